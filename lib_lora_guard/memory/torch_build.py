"""Finds out which torch is installed, and whether it could find a card, without importing it.

Source: torch/version.py, which every build of torch writes for itself.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType

from ..lazy_torch import is_loaded, torch


@dataclass(frozen=True)
class TorchBuild:
    """How the installed torch was built. `cuda` and `rocm`: it can use cards of that kind."""

    version: str
    cuda: bool
    rocm: bool

    def may_have_card(self) -> bool:
        """Returns False if torch cannot find a card: its build can use none, or there is no CUDA driver to load."""
        return self.rocm or (self.cuda and cuda_driver() is not None)


def torch_build() -> TorchBuild:
    """Reads the facts from torch's own file, or from torch if it is loaded or keeps them elsewhere."""
    facts = torch.version if is_loaded() else _version_file() or torch.version
    return TorchBuild(str(facts.__version__), facts.cuda is not None, facts.hip is not None)


def cuda_driver() -> ctypes.CDLL | None:
    """Loads the library of the CUDA driver; None if there is none. CUDA is not started."""
    try:
        return ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return None


def _version_file() -> ModuleType | None:
    torch_package = util.find_spec("torch")
    for folder in (torch_package and torch_package.submodule_search_locations) or ():
        spec = util.spec_from_file_location("torch_version", Path(folder) / "version.py")
        if spec is not None and spec.loader is not None:
            module = util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except (OSError, ImportError):
                continue
            if all(hasattr(module, name) for name in ("__version__", "cuda", "hip")):
                return module
    return None
