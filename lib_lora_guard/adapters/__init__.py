"""What a LoRA file says: one module per kind of adapter. Pure torch; knows neither models nor hosts."""

from .base import Adapter, LowRank, Slice, Term, apply_terms
from .glora import GloraAdapter
from .loha import LohaAdapter
from .lokr import LokrAdapter
from .lora import LoraAdapter
from .patch_tuples import parse_term, parse_value
from .whole import DiffAdapter, ForeignAdapter, NestedAdapter, SetAdapter

__all__ = [
    "Adapter",
    "DiffAdapter",
    "ForeignAdapter",
    "GloraAdapter",
    "LohaAdapter",
    "LokrAdapter",
    "LoraAdapter",
    "LowRank",
    "NestedAdapter",
    "SetAdapter",
    "Slice",
    "Term",
    "apply_terms",
    "parse_term",
    "parse_value",
]
