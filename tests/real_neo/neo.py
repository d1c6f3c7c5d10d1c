"""A Forge Neo process and its API, started on the CPU: stock, with the guard, or as the reference.

FORGE_ROOT is Neo's folder, FORGE_PYTHON a Python with its requirements; both as for the scripts of tests/real_forge. The test-only
extension (`extension/`) merges in fp64 where it is the reference, and can make the CPU play a card with little room.
"""

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("LORA_GUARD_TEST_PORT", "7917")
os.environ.setdefault("PYTHONUNBUFFERED", "1")
from real_forge.server import FORGE, ROOT, ApiError, Server

GGUF_PARTS = ["nf_vae", "nf_clip_l", "nf_t5"]
HOST = "Forge Neo 5692d2d2"
NEO_SETTINGS = {"VERSION_UID": "PY313", "sd_checkpoint_hash": ""}
"""What Neo's config needs to start."""
SIDES = ("stock", "guard", "reference")
EXTENSIONS = {
    "lora-guard": ROOT,
    "zz_lora_guard_neo": ROOT / "tests" / "real_neo" / "extension",
    "zz_lora_guard_neighbours": ROOT / "tests" / "real_neo" / "neighbours",
    "zz_lora_guard_everyday": ROOT / "tests" / "real_forge" / "everyday_extension",
}


class Neo(Server):
    """`with Neo(log, flags, env) as neo: neo.image(prompt="...")`."""

    on_the_cpu = "--cpu"

    def room(self, megabytes, taken_megabytes=None):
        """The room that the next loads of a denoiser find on the device, None for all there is; and what of a loaded one has to
        leave when a text encoder comes."""
        self.call("/lora-guard-test/room", {"megabytes": megabytes, "taken_megabytes": taken_megabytes})


def link_extensions():
    for name, target in EXTENSIONS.items():
        link = FORGE / "extensions" / name
        if not link.exists():
            link.symlink_to(target, target_is_directory=True)


def unlink_extensions():
    for name in EXTENSIONS:
        (FORGE / "extensions" / name).unlink(missing_ok=True)


def parts(names):
    """Full paths of the separate VAE and text encoder files that GGUF checkpoints need."""
    folders = [FORGE / "models" / "VAE", FORGE / "models" / "text_encoder"]
    return [str(next(f for folder in folders for f in folder.glob(f"{name}.*"))) for name in names]


def write_docs(name, table):
    """Puts a table between its two marks in docs/neo.md."""
    path, begin, end = ROOT / "docs" / "neo.md", f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text(encoding="utf-8")
    assert all(mark in text for mark in (begin, end)), f"docs/neo.md has no place for {name}"
    path.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.S), encoding="utf-8")


def attempt(make):
    try:
        return make()
    except (ApiError, OSError) as error:
        return str(error)


@contextlib.contextmanager
def linked():
    """The extensions are Neo's for so long."""
    link_extensions()
    try:
        yield
    finally:
        unlink_extensions()


@contextlib.contextmanager
def running(side, low_bits="Automatic", folder=None, flags=(), web=False, env=None):
    """A Neo of one side. `low_bits`: the setting "Diffusion in Low Bits" at the start."""
    with contextlib.ExitStack() as stack:
        folder = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / f"{side}.json"
        settings = {**NEO_SETTINGS, "forge_unet_storage_dtype": low_bits}
        config.write_text(json.dumps(settings))
        every = ["--ui-settings-file", str(config), *flags] + ([] if side == "guard" else ["--lora-guard-off"])
        env = {"LORA_GUARD_TESTS": str(ROOT / "tests"), "LORA_GUARD_EVERYDAY": "1", **(env or {})}
        env["LORA_GUARD_REFERENCE"] = "1" if side == "reference" else ""
        neo = stack.enter_context(Neo(folder / f"{side}.log", every, env, web))
        wanted = {
            "guard": "in place of Forge Neo's LoRA patcher",
            "stock": "switched off by --lora-guard-off",
            "reference": "merged in fp64",
        }[side]
        assert wanted in neo.console(), f"{side}: '{wanted}' is not in the console"
        yield neo
