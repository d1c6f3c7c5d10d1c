"""Updates an installation in place, as the Extensions tab does, while it runs; then starts it anew. Run by hand:

    python tests/update_in_place.py [--old COMMIT]

The host is the double of Forge (tests/forge_double). The old version is started in it, its files are replaced by those of this
working tree, and its scripts are run again ("Apply and restart UI"): that has to say "restart" and to break nothing. Then a new
process starts over the same `data/`, in which the old one has left what it had measured and how it died.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("lib_lora_guard", "scripts", "preload.py", "install.py", "javascript", "style.css")

HOST = """
import argparse, os, runpy, signal, sys
from pathlib import Path
extension, new = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(extension))
preload = runpy.run_path(str(extension / "preload.py"))["preload"]
sys.argv = sys.argv[:1]
preload(argparse.ArgumentParser())
import torch
import backend.patcher.lora as lora
from contract.host import Host

def scripts():
    return runpy.run_path(str(extension / "scripts" / "lora_guard.py"))

def picture(host, patcher, patches):
    stack = patcher.clone()
    for strength in patches:
        up, down = torch.full((96, 2), 0.1), torch.full((2, 32), 0.1)
        stack.add_patches(filename="style.safetensors", patches={"blocks.0.qkv.weight": ("lora", (up, down, None, None, None))}, strength_patch=strength)
    stack.refresh_loras()
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(5))
    return patcher.model(x).clone()

def pictures(where):
    host = Host()
    patcher, _ = host.build("fp32")
    plain, styled, again = picture(host, patcher, []), picture(host, patcher, [1.0]), picture(host, patcher, [])
    print(where, "LORA", bool((styled - plain).abs().max() > 0), "REMOVED", torch.equal(plain, again), flush=True)

scripts()
pictures("before")
if new:
    for name in os.environ["PARTS"].split():
        target, source = extension / name, Path(new) / name
        if target.is_dir():
            import shutil
            shutil.rmtree(target)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.write_bytes(source.read_bytes())
    for _ in range(2):
        scripts()
    pictures("after")
    journal = sys.modules["lib_lora_guard.hosts.forge"].installed().journal
    from lib_lora_guard.reporting.flight_recorder import Phase
    with journal.phase(Phase.SAMPLING_STEP):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run(extension, new=""):
    paths = [str(ROOT / "tests" / "forge_double"), str(ROOT / "tests")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PARTS": " ".join(PARTS), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", HOST, str(extension), str(new)]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, cwd=extension.parent)
    print(shown.stdout, shown.stderr, sep="")
    return shown.stdout, shown.stderr


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--old", default="6090d05", help="the commit that is installed")
    old = parser.parse_args().old
    archive = subprocess.run(["git", "archive", old], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        extension = Path(folder) / "lora guard"
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(extension)
        out, _ = run(extension, ROOT)
        assert "restart Forge to use the new version" in out, "an update without a restart says so"
        assert "Traceback" not in out
        for where in ("before", "after"):
            assert f"{where} LORA True REMOVED True" in out, f"pictures {where} the update"
        kept = sorted(path.name for path in (extension / "data").iterdir())
        assert kept, "the journal of the killed process is there"
        out, _ = run(extension)
        assert "in place of Forge's LoRA patcher" in out
        assert "before LORA True REMOVED True" in out
        assert "while the image was being sampled" in out, "the new version says what the old process died in"
    print("all as it should be")


if __name__ == "__main__":
    sys.exit(main())
