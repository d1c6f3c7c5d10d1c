"""The ways that are compared: a host without the guard, with its two settings for LoRAs, and builds of the guard."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
STOCK = {"stock": "Automatic", "fp16": "Automatic (fp16 LoRA)"}
"""Ways without the guard, and what they choose as "Diffusion in Low Bits"."""
NOT_COPIED = shutil.ignore_patterns(".*", "tests", "docs", "findings", "benchmarks", "__pycache__")


class Way(NamedTuple):
    """One way.

    Attributes:
        name: What tables call it.
        setting: The host's setting for LoRAs.
        build: The folder of the guard; None for the host alone.
        environment: Variables that its host gets.
    """

    name: str
    setting: str = "Automatic"
    build: Path | None = None
    environment: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def parse(cls, text, builds=None):
        """Reads "stock", "fp16", "guard" (this checkout), the name of a folder in `builds`, or NAME=FOLDER. What
        follows as "+VARIABLE=VALUE" is for its host's environment: "guard+LORA_GUARD_KERNELS=0".

        Raises:
            ValueError: There is no such build.
        """
        text, *variables = text.split("+")
        if variables:
            environment = dict(one.split("=", 1) for one in variables)
            way = cls.parse(text, builds)
            return way._replace(name="+".join([way.name, *variables]), environment=environment)
        name, _, folder = text.partition("=")
        if not folder and name in STOCK:
            return cls(name, STOCK[name])
        if folder:
            build = Path(folder)
        elif builds is not None and (builds / name).is_dir():
            build = builds / name
        else:
            build = PROJECT if name == "guard" else Path(name)
        if not (build / "preload.py").is_file():
            raise ValueError(f"{text}: expected {', '.join(STOCK)} or a build of the guard; none is in {build}")
        return cls(name, build=build)

    @property
    def file_name(self):
        """The name, of letters that every system takes in a file's."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.name)

    @property
    def commit(self):
        """The commit of the build, as `pack.py` wrote it or as git says; empty where neither does."""
        if self.build is None:
            return ""
        noted = self.build / "COMMIT"
        return noted.read_text().strip() if noted.is_file() else head_of(self.build)


def head_of(folder):
    import subprocess

    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def data_folder(path, way, config, extensions=()):
    """Makes the folder that a host keeps a user's files in: settings, and the extensions of a way.

    Extensions are copied: what they write stays out of the checkout, and a way begins without what another one learned.
    """
    shutil.rmtree(path, ignore_errors=True)
    (path / "extensions").mkdir(parents=True)
    settings = {**config, "forge_unet_storage_dtype": way.setting}
    (path / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for extension in extensions:
        shutil.copytree(extension, path / "extensions" / extension.name, ignore=NOT_COPIED)
    if way.build is not None:
        shutil.copytree(way.build, path / "extensions" / "lora-guard", ignore=NOT_COPIED)
