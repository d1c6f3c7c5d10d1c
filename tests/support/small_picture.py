"""Screenshots as small files."""

import io
from pathlib import Path

from PIL import Image


def save(shot: bytes, path: Path) -> None:
    """Saves a screenshot. Text on flat colours: 256 of them are enough, and a third of the bytes."""
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
