"""Unpacks the archives of `pack.py` that are new: unpack.py FROM TO. One process each; needs nothing but Python."""

import lzma
import shutil
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def unpack(archive, target):
    """Unpacks one archive and leaves a note of which it was.

    Returns:
        A line for the console.
    """
    began, note = time.monotonic(), target / f".{archive.name}"
    fact = f"{archive.stat().st_size} {archive.stat().st_mtime_ns}"
    if note.exists() and note.read_text() == fact:
        return f"{archive.name}: is unpacked"
    if archive.name.startswith("builds"):
        shutil.rmtree(target / "builds", ignore_errors=True)
    with lzma.open(archive) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        tar.extractall(target, filter="fully_trusted")
    note.write_text(fact)
    return f"{archive.name}: unpacked in {time.monotonic() - began:.0f} s"


def main():
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    archives = sorted(source.glob("*.tar.xz"))
    with ProcessPoolExecutor(max(1, len(archives))) as pool:
        for text in pool.map(unpack, archives, [target] * len(archives)):
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
