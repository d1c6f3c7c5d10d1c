"""Which model this is, and which part of it each name in a LoRA file means. Pure: names and shapes in, routes out."""

from .architecture import Architecture, accepts, detect_lora, detect_model
from .names import NameMap
from .routes import Route

__all__ = ["Architecture", "NameMap", "Route", "accepts", "detect_lora", "detect_model"]
