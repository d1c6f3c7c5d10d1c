"""Merges LoRAs into a new checkpoint file, one tensor at a time. Pure: files in, a file and a report out."""

from .bake import BakeReport, bake
from .dtypes import DTYPES
from .output import check_output
from .stack import BakedLora, Stack, match_stack

__all__ = ["DTYPES", "BakeReport", "BakedLora", "Stack", "bake", "check_output", "match_stack"]
