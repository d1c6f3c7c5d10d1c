"""Any `torch.nn.Module`, without a WebUI."""

from .guard import LoraGuard as LoraGuard
from .stored_weights import load_stored as load_stored
