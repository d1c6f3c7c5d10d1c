"""Every function of Neo that the guard replaces: where it is, and which layers stand around it, the outermost first.

docs/hosts.md lists the same functions; a test compares the two.
"""

from __future__ import annotations

from ...recorder.flight_recorder import Phase
from ...runtime.hooks import Row
from ..webui import saving
from ..webui.checkpoint_reading import reading_plan, text_encoder_plan
from ..webui.takeover import HOOKS as WEB
from .parts import NeoParts

_PATCHER = "backend.patcher.base"

START: tuple[Row[NeoParts], ...] = (
    Row(_PATCHER, "ModelPatcher.clone", lambda g: (g.patchers.clone,)),
    Row(_PATCHER, "ModelPatcher.partially_load", lambda g: (g.control.partially_load,)),
    Row(_PATCHER, "ModelPatcher.partially_unload", lambda g: (g.control.partially_unload,)),
    Row(_PATCHER, "ModelPatcher.load", lambda g: (g.control.load,)),
    Row(_PATCHER, "ModelPatcher.unpatch_model", lambda g: (g.control.unpatch_model,)),
    Row("backend.memory_management", "load_models_gpu", lambda g: (g.memory.load_models_gpu,)),
    Row("backend.memory_management", "get_free_memory", lambda g: (g.free.get_free_memory,)),
)
"""The functions that exist when preload.py runs: all of them are replaced, or none."""

LATER: tuple[Row[NeoParts], ...] = (
    Row("backend.state_dict", "load_state_dict", lambda g: (g.control.load_state_dict,), is_needed=False),
    Row("backend.modules.k_model", "KModel.apply_model", lambda g: (g.steps.apply_model,), is_needed=False),
    Row(
        "backend.patcher.vae",
        "VAE.decode",
        lambda g: (g.journal.around(Phase.VAE_DECODE, g.memory.decoding_plan),),
        is_needed=False,
    ),
    Row("backend.patcher.vae", "VAE.encode", lambda g: (g.journal.around(Phase.VAE_ENCODE),), is_needed=False),
    Row(
        "modules.sd_models",
        "forge_loader",
        lambda g: (
            g.journal.around(Phase.LOAD_CHECKPOINT, reading_plan),
            g.reading.before_reading,
            g.first_lora.after_reading,
        ),
        is_needed=False,
    ),
    Row(
        "backend.loader",
        "load_huggingface_component",
        lambda g: (g.journal.around(Phase.LOAD_TEXT_ENCODER, text_encoder_plan),),
        is_needed=False,
    ),
    Row("backend.operations_bnb", "copy_quant_state", lambda g: (g.quant_states.copy_quant_state,), is_needed=False),
)
"""The functions that exist when Neo runs the extension's scripts."""

SAVING = (*saving.NEOS_SAVE_ROWS, *saving.CONTROL_ROWS)

HOOKS = (*START, *LATER, *WEB, *SAVING)
