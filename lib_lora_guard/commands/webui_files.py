"""Finds files by the names that the WebUI's lists show: a command run in the extension's folder need not be given paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

MODELS = ("Stable-diffusion", "diffusion_models", "unet")
LORAS = ("Lora", "LyCORIS")
PARTS = ("text_encoder", "VAE")
"""Folders in the WebUI's `models`, as Forge and Forge Neo have them."""
ENDS = ("", ".safetensors", ".gguf")
"""A prompt names a LoRA without its ending."""
MOST_FOLDERS = 2000
"""Folders that are looked into."""

_HASH = re.compile(r" \[[0-9a-f]{8,64}\]$")
"""A list of checkpoints shows the beginning of each file's hash."""
PACKAGE = Path(__file__).resolve().parents[1]


def webui_models(package: Path | None = None) -> Path | None:
    """Returns the folder `models` of the WebUI that the package lies in as an extension; None if it lies elsewhere.

    `package`: The package's folder; None for this one.
    """
    extensions = (package or PACKAGE).parent.parent
    models = extensions.parent / "models"
    return models if extensions.name == "extensions" and models.is_dir() else None


def find(name: Path, folders: tuple[str, ...], models: Path | None) -> Path | None:
    """Returns the file of a name, which may be in a folder of the list and without its ending; None if there is none.

    Args:
        name: What the user wrote. No list has an absolute path.
        folders: Folders of `models`, the likeliest first.
        models: The WebUI's folder of models; None without one.
    """
    if models is None or name.is_absolute() or ".." in name.parts or not name.name:
        return None
    bare = _HASH.sub("", str(name)).lower()
    wanted = [bare + end for end in ENDS]
    for folder in folders:
        for number, (inside, _, files) in enumerate(os.walk(models / folder, followlinks=True)):
            if number >= MOST_FOLDERS:
                break
            for file in sorted(files):
                path = Path(inside, file)
                if file.lower() in wanted or str(path.relative_to(models / folder)).lower() in wanted:
                    return path
    return None
