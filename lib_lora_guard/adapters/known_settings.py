"""Knows the entries of PEFT's configurations (0.21): those that change nothing here, and those that no host can follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Message
from ..files import shown

_SUPPORTED = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` after which the layer keeps what is left of its weight, not the checkpoint's."""
_VARIANTS = {
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer_replication",
}
"""Entries of a LoRA's configuration that make something else of its factors, with the names users know."""
_READ = (
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "bias", "modules_to_save", "feedforward_modules", "use_cayley_neumann", "num_cayley_neumann_terms", "block_share",
    "coft", "eps", "oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor",
    "target_parameters", "use_bdlora", "use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale",
    "init_lora_weights", "init_weights", "init_ia3_weights",
)  # fmt: skip
"""Entries that the guard reads, or that the tensors tell themselves."""
_TRAINING = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "module_dropout",
    "rank_dropout", "oft_dropout", "boft_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "monteclora_config", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
)  # fmt: skip
"""Entries on how it was trained, and with which program."""
_KNOWN = frozenset((*_READ, *_TRAINING, *_VARIANTS))
_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


def refusal_of(entries: Mapping[str, Any]) -> Message | None:
    """Why a configuration's tensors cannot be applied to the checkpoint; None if they can."""
    kind = entries.get("peft_type")
    if isinstance(kind, str) and kind.upper() not in _SUPPORTED:
        return Message("lora.other_kind", {"kind": shown(kind.upper()), "library": "PEFT"})
    for entry, variant in _VARIANTS.items():
        if entries.get(entry) not in _NOTHING:
            return Message("lora.variant", {"variant": variant, "entry": entry})
    start = entries.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        return Message("lora.other_base", {"start": shown(start)})
    return None


def not_understood(entries: Mapping[str, Any]) -> list[str]:
    """The names of entries that may change the result and are not known."""
    return [name for name, value in entries.items() if name not in _KNOWN and value not in _NOTHING]
