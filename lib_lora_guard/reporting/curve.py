"""Converts the timeline to the curve's JSON: bounded, numbers in MB. Pure."""

from __future__ import annotations

from typing import Any

from ..units import MB
from .headline import kind_of
from .timeline import Image, Sample, Timeline

COLUMNS = ("number", "time", "image", "kind", "vram_mb", "ram_mb", "promised_mb")


def curve_json(timeline: Timeline, since: int) -> dict[str, Any]:
    """Returns the samples after sample `since` as rows of COLUMNS, and what is known of the images."""
    samples = timeline.since(since)
    last = samples[-1].levels if samples else None
    return {
        "samples": [_sample(sample) for sample in samples],
        "images": [_image(image) for image in timeline.images()],
        "vram_total_mb": _mb(None if last is None else last.vram_total_bytes),
        "ram_total_mb": _mb(None if last is None else last.ram_total_bytes),
    }


def _sample(sample: Sample) -> list[Any]:
    levels = sample.levels
    numbers = (levels.vram_bytes, levels.ram_bytes, sample.promised_bytes)
    return [sample.number, round(sample.time, 2), sample.image, kind_of(sample.phase), *map(_mb, numbers)]


def _image(image: Image) -> dict[str, Any]:
    return {
        "number": image.number,
        "begun": round(image.begun, 2),
        "ended": None if image.ended is None else round(image.ended, 2),
        "peak_mb": _mb(image.peak_bytes),
        "promised_mb": _mb(image.promised_bytes),
    }


def _mb(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / MB, 1)
