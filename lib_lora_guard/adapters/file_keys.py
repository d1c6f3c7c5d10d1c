"""What the end of a tensor's name in a LoRA file means: which field of which kind of adapter.

Names, from files the trainers write: kohya sd-scripts (`lora_down.weight`), PEFT and diffusers (`lora_A.weight`,
`lora.down.weight`), LyCORIS 4 (`hada_*`, `lokr_*`, `oft_blocks`), ComfyUI and BFL (`diff_b`, `set_weight`, `lora_B.bias`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_UP, _DOWN = ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up"), ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down")  # fmt: skip

_FIELDS: dict[str, tuple[str, str]] = {
    **{f"{up}.weight": ("lora", "up") for up in _UP},
    **{f"{down}.weight": ("lora", "down") for down in _DOWN},
    "lora_mid.weight": ("lora", "mid"),
    "lora_B.bias": ("lora_bias", "diff"),
    **{f"hada_w{side}_{ab}": ("loha", f"w{side}{ab}") for side in (1, 2) for ab in "ab"},
    **{f"hada_t{side}": ("loha", f"t{side}") for side in (1, 2)},
    **{f"lokr_w{side}": ("lokr", f"w{side}") for side in (1, 2)},
    **{f"lokr_w{side}_{ab}": ("lokr", f"w{side}{ab}") for side in (1, 2) for ab in "ab"},
    "lokr_t2": ("lokr", "t2"),
    **{f"{ab}{side}.weight": ("glora", f"{ab}{side}") for side in (1, 2) for ab in "ab"},
    "bm.weight": ("glora", "core"),
    "oft_blocks": ("oft", "blocks"),
    "rescale": ("oft", "rescale"),
    "oft_R.weight": ("peft_oft", "packed"),
    "boft_R": ("peft_boft", "blocks"),
    "boft_s": ("peft_boft", "factor"),
    "ia3_l": ("peft_ia3", "weight"),
    "on_input": ("ia3", "on_input"),
    "diff": ("diff", "diff"),
    "w_norm": ("diff", "diff"),
    "set_weight": ("set", "value"),
    "diff_b": ("bias", "diff"),
    "b_norm": ("bias", "diff"),
    "base_layer.bias": ("set_bias", "value"),
    "alpha": ("scale", "alpha"),
    "scalar": ("scale", "scalar"),
    "dora_scale": ("scale", "magnitude"),
    # PEFT's magnitudes are always those of the rows, whatever their shape looks like.
    "lora_magnitude_vector": ("scale", "row_magnitude"),
    "lora_magnitude_vector.weight": ("scale", "row_magnitude"),
}
_ATTACHED = re.compile(r"^(?P<module>.+_lora[12]?)\.(?P<field>up|down)\.weight$")
"""Attention processors of old diffusers and XLabs: `...processor.to_q_lora.up.weight`, `...processor.qkv_lora1.down.weight`."""
_ADAPTER_NAME = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+|oft_R|boft_R|boft_s|ia3_l)\.(?!weight$|bias$)[^.]+(?=\.(?:weight|bias)$|$)"
)
"""PEFT may put the adapter's own name between: `lora_A.default.weight`, `lora_A.style.weight`."""


@dataclass(frozen=True)
class KeyMeaning:
    """`module` as written; `kind` "scale" is for fields that belong to whichever kind the module has."""

    module: str
    kind: str
    field: str


def meaning_of(key: str) -> KeyMeaning | None:
    """What a key says, or None where it is not a LoRA key."""
    key = _ADAPTER_NAME.sub(r".\1", key)
    # The longest suffix has the say: "lora.up.weight" before "up.weight".
    end = len(key)
    dots = [place for place in range(end) if key[place] == "."][-3:]
    for dot in dots:
        if (known := _FIELDS.get(key[dot + 1 :])) is not None:
            return KeyMeaning(key[:dot], *known)
    if (attached := _ATTACHED.match(key)) is not None:
        return KeyMeaning(attached["module"], "lora", attached["field"])
    return None
