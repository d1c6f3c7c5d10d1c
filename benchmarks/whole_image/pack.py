"""Packs Forge, Forge Neo and the project for a GPU machine that has torch but no network.

    python pack.py packages --python312 PYTHON --forge ROOT PYTHON --neo ROOT PYTHON --out FOLDER
    python pack.py hosts --forge ROOT --neo ROOT --out FOLDER
    python pack.py builds --build LABEL=COMMIT ... --out FOLDER

`packages` takes minutes, `hosts` one, `builds` seconds: only what has changed has to be packed again. Each makes one archive;
`bring.sh` and this folder are copied beside them, so that `bash FOLDER/bring.sh ARGUMENTS` on that machine unpacks what is
not unpacked yet and runs `run.py ARGUMENTS`. Both hosts fit into about 50 MB, because that machine's own packages are used
where a host does not need another version (`ON_THE_MACHINE`), and what only web pages and videos need stays here.

`--forge` and `--neo` name an installed host and, for its versions, the Python that runs it. Packages come from the registry
that pip is set up for.
"""

import argparse
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
MOST_BYTES = 54_000_000
"""Of all archives together: what such a machine takes in one upload, less the working tree."""


def lines_of(name):
    """Returns the lines of a file beside this one, without comments."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


ON_THE_MACHINE = lines_of("on_the_machine.txt")
"""Taken as that machine has them."""

NOT_NEEDED = lines_of("not_needed.txt")
"""Test tools, and picture and video formats that no image here is written in."""

STUBS = {
    "forge": {"pillow_avif.py": "", "wcwidth.py": "def wcwidth(c): return 1\ndef wcswidth(s): return len(s)\n"},
    "neo": {"av.py": "", "pillow_jxl.py": "", "pillow_heif.py": "def register_heif_opener(*a, **k): pass\n"},
}
"""Stand-ins for what a host imports and does not use here: modules of `NOT_NEEDED`."""

REPLACED = {"pillow": "10.4.0"}
"""Versions that both hosts take, where one of theirs has no wheel for Python 3.12."""

SHARED_LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
"""Of bitsandbytes' many: the one for that machine's CUDA, and the one for a trial here."""

LEFT_OUT = (
    *(".git", "models", "outputs", "output", "cache", "config.json", "ui-config.json", "params.txt", "extensions/*"),
    *("backend/huggingface/tiny", "extensions-builtin/forge_space_*"),
)
"""Paths in a host that its user fills, or that no image needs."""

REPAIRS = {
    "forge/packages_3rdparty/gguf/gguf_reader.py": (
        """            .view(dtype = dtype)[:count]
            .newbyteorder(override_order or self.byte_order)
""",
        """            .view(np.dtype(dtype).newbyteorder(override_order or self.byte_order))[:count]
""",
    ),
}
"""Text of a host to replace: Forge's GGUF reader uses what numpy 2, which that machine has, no longer has."""

TOKENIZERS_KEPT = ("FLUX.1-dev", "FLUX.1-schnell", "stable-diffusion-v1-5")
"""Of the models whose tokenizers a host brings. The others' become empty files: Neo unpacks them only where none is."""


def names(freeze):
    """Returns `{name: version}` of the lines of `pip freeze`."""
    pairs = (line.strip().split("==") for line in freeze.splitlines() if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def to_install(freezes):
    """Splits the hosts' packages into what both have in one version and what each has.

    Args:
        freezes: The output of `pip freeze` for each host.

    Returns:
        Requirements by site: "common" and each host.
    """
    left_out = {*ON_THE_MACHINE, *NOT_NEEDED, "bitsandbytes"}
    found = {host: {**names(text), **REPLACED} for host, text in freezes.items()}

    def is_kept(name):
        # What a torch for cards brings along lies on that machine beside its torch.
        return name not in left_out and not name.startswith(("nvidia-", "cuda-"))

    kept = {host: {n: v for n, v in pairs.items() if is_kept(n)} for host, pairs in found.items()}
    shared = set.intersection(*(set(pairs.items()) for pairs in kept.values()))
    sites = {"common": sorted(shared), **{h: sorted(set(pairs.items()) - shared) for h, pairs in kept.items()}}
    return {site: [f"{name}=={version}" for name, version in pairs] for site, pairs in sites.items()}


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, text=True, **options)


def site_packages(python):
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(run(python, "-c", code, capture_output=True).stdout.strip())


def slim(site):
    """Removes what no running host reads: tests, caches, gradio's pages, type stubs."""
    for folder in [*site.rglob("tests"), *site.rglob("__pycache__"), *site.rglob("_frontend_code"), site / "bin"]:
        shutil.rmtree(folder, ignore_errors=True)
    for file in site.glob("gradio*/templates/**/*"):
        if file.is_file() and file.suffix != ".html":
            file.unlink()
    for file in site.rglob("*.pyi"):
        file.unlink()


def pack_packages(options):
    hosts = {"forge": options.forge, "neo": options.neo}
    freezes = {
        host: run(python, "-m", "pip", "freeze", capture_output=True).stdout for host, (_, python) in hosts.items()
    }
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        made = Path(folder)
        for site, requirements in to_install(freezes).items():
            install = [options.python312, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target"]
            run(*install, made / f"site_{site}", *requirements)
            slim(made / f"site_{site}")
            for name, text in STUBS.get(site, {}).items():
                (made / f"site_{site}" / name).write_text(text)
        source = site_packages(options.forge[1]) / "bitsandbytes"
        target = made / "site_common" / "bitsandbytes"
        shutil.copytree(source, target, ignore=lambda _, files: [f for f in files if not wanted_of_bitsandbytes(f)])
        archive(options.out / "packages.tar.xz", [(path, path.name) for path in sorted(made.iterdir())])


def wanted_of_bitsandbytes(name):
    return name != "__pycache__" and (not name.endswith(".so") or name in SHARED_LIBRARIES)


def pack_hosts(options):
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        made = Path(folder)
        for host, (root, *_) in (("forge", options.forge), ("neo", options.neo)):
            target = made / host
            unwanted = {path for pattern in LEFT_OUT for path in Path(root).glob(pattern)}
            shutil.copytree(root, target, ignore=ignoring(unwanted), symlinks=True)
            for file in (target / "backend" / "huggingface").rglob("*"):
                if file.is_file() and not set(TOKENIZERS_KEPT) & set(file.parts) and is_of_tokenizer(file):
                    file.write_text("")
        for name, (old, new) in REPAIRS.items():
            text = (made / name).read_text(encoding="utf-8")
            if old not in text:
                sys.exit(f"{name}: the text to replace is not in it")
            (made / name).write_text(text.replace(old, new), encoding="utf-8")
        archive(options.out / "hosts.tar.xz", [(path, path.name) for path in sorted(made.iterdir())])


def ignoring(unwanted):
    """Returns what `copytree` leaves out: these paths, and Python's caches."""
    return lambda folder, files: [f for f in files if Path(folder, f) in unwanted or f in ("__pycache__", ".git")]


def is_of_tokenizer(file):
    return file.suffix == ".xz" or (file.stat().st_size > 100_000 and file.suffix in (".json", ".txt", ".model"))


def pack_builds(options):
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        made = Path(folder) / "builds"
        for label, _, commit in (build.partition("=") for build in options.build):
            (made / label).mkdir(parents=True)
            data = subprocess.run(["git", "-C", PROJECT, "archive", commit], check=True, capture_output=True).stdout
            with tarfile.open(fileobj=io.BytesIO(data)) as tree:
                tree.extractall(made / label, filter="data")
            for unused in ("tests", "docs", "findings"):
                shutil.rmtree(made / label / unused, ignore_errors=True)
            short = run("git", "-C", PROJECT, "rev-parse", "--short", commit, capture_output=True).stdout.strip()
            (made / label / "COMMIT").write_text(short + "\n")
        archive(options.out / "builds.tar.xz", [(made, "builds")])


def archive(target, members):
    """Writes an archive; its dictionary is large enough to see what two hosts have in common."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27}]
    with lzma.open(target, "wb", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path, name in members:
            tar.add(path, name)
    print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB", flush=True)


def copy_scripts(out):
    """Puts this folder, and what it uses of the folder above, beside the archives."""
    shutil.rmtree(out / "benchmarks", ignore_errors=True)
    shutil.copytree(HERE, out / "benchmarks" / HERE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for used in ("ballast.py", "reading.py"):
        shutil.copy(HERE.parent / used, out / "benchmarks")
    shutil.copy(HERE / "bring.sh", out)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("packages", "hosts", "builds"))
    parser.add_argument("--python312", help="a Python 3.12 with pip")
    parser.add_argument("--forge", nargs="+", metavar=("ROOT", "PYTHON"), help="Forge's folder, and its Python")
    parser.add_argument("--neo", nargs="+", metavar=("ROOT", "PYTHON"), help="Neo's folder, and its Python")
    parser.add_argument("--build", nargs="+", default=["guard=HEAD"], metavar="LABEL=COMMIT")
    parser.add_argument("--out", type=Path, required=True, help="ignored by git, e.g. .gpu in the project's root")
    return parser.parse_args(arguments)


def main():
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    {"packages": pack_packages, "hosts": pack_hosts, "builds": pack_builds}[options.what](options)
    copy_scripts(options.out)
    packed = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"all together: {packed / 1e6:.1f} MB")
    if packed > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES / 1e6:.0f} MB: too much for one upload")


if __name__ == "__main__":
    main()
