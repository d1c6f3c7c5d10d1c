"""The meaning of a LoRA file: one module per kind of adapter, which registers itself when it is imported here.

Pure torch; knows neither models nor hosts.
"""

from .base import Adapter, Slice, Term, apply_terms
from .boft import BoftAdapter, PeftBoftAdapter
from .forms import LowRank
from .glora import GloraAdapter
from .ia3 import Ia3Adapter
from .loha import LohaAdapter
from .lokr import LokrAdapter
from .lora import LoraAdapter
from .oft import OftAdapter, PeftOftAdapter
from .patch_tuples import parse_term, parse_value
from .whole import DiffAdapter, ForeignAdapter, NestedAdapter, SetAdapter

__all__ = [
    "Adapter",
    "BoftAdapter",
    "DiffAdapter",
    "ForeignAdapter",
    "GloraAdapter",
    "Ia3Adapter",
    "LohaAdapter",
    "LokrAdapter",
    "LoraAdapter",
    "LowRank",
    "NestedAdapter",
    "OftAdapter",
    "PeftBoftAdapter",
    "PeftOftAdapter",
    "SetAdapter",
    "Slice",
    "Term",
    "apply_terms",
    "parse_term",
    "parse_value",
]
