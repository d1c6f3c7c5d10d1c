"""Detects a model's architecture and maps names in LoRA files to its weights. Pure: names and shapes in, routes out."""

from .architecture import Architecture, accepts, detect_lora, detect_model
from .names import NameMap
from .routes import Route

__all__ = ["Architecture", "NameMap", "Route", "accepts", "detect_lora", "detect_model"]
