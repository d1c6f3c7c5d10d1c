"""Every function of Neo that the guard replaces: where it is, and which layers stand around it, the outermost first.

docs/hosts.md lists the same functions; a test compares the two.
"""

from __future__ import annotations

from ...runtime.hooks import Row
from ..webui.takeover import HOOKS as WEB
from .parts import NeoParts

_PATCHER = "backend.patcher.base"

START: tuple[Row[NeoParts], ...] = (
    Row(_PATCHER, "ModelPatcher.clone", lambda g: (g.patchers.clone,)),
    Row(_PATCHER, "ModelPatcher.partially_load", lambda g: (g.control.partially_load,)),
    Row(_PATCHER, "ModelPatcher.partially_unload", lambda g: (g.control.partially_unload,)),
    Row(_PATCHER, "ModelPatcher.load", lambda g: (g.control.load,)),
    Row(_PATCHER, "ModelPatcher.unpatch_model", lambda g: (g.control.unpatch_model,)),
)
"""The functions that exist when preload.py runs: all of them are replaced, or none."""

LATER: tuple[Row[NeoParts], ...] = (
    Row("backend.state_dict", "load_state_dict", lambda g: (g.control.load_state_dict,), is_needed=False),
)
"""The functions that exist when Neo runs the extension's scripts."""

HOOKS = (*START, *LATER, *WEB)
