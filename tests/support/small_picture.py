"""Screenshots as small files."""

import io
from pathlib import Path

from PIL import Image


def save(shot: bytes, path: Path) -> None:
    """Saves a screenshot. Text on flat colours: 256 of them are enough, and a third of the bytes.

    The median cut keeps the flat colours as they are; the others tint them.
    """
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
