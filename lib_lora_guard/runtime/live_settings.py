"""The user's settings, read at each use: a request over the API may bring options of its own for one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..messages.languages import language_of, system_locale
from ..settings import PREFIX, LoraMode, read
from ..units import MB

LOW_BITS_OPTION = "forge_unet_storage_dtype"
"""The host's dropdown "Diffusion in Low Bits"; several of its choices end in "(fp16 LoRA)"."""
HOST_FILE_LIMIT_OPTION = "lora_in_memory_limit"


def mode_of(options: Mapping[str, object]) -> LoraMode:
    """Returns the mode that the host's options ask for.

    If the guard's own mode is "Automatic", a choice with "(fp16 LoRA)" in Forge's "Diffusion in Low Bits" gives FP16. This holds
    for 16-bit models too, where Forge ignores it.
    """
    mode = read({PREFIX + "mode": options.get(PREFIX + "mode")})[0].mode
    if mode is LoraMode.AUTOMATIC and "(fp16 LoRA)" in str(options.get(LOW_BITS_OPTION)):
        return LoraMode.FP16
    return mode


@dataclass
class LiveSettings:
    """One object that all read.

    Attributes:
        options: the host's live mapping; empty until its options are loaded.
        as_trained: DoRA as its trainer means it, where the host differs.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    as_trained: bool = False

    def mode(self) -> LoraMode:
        """Returns the mode for the present image."""
        return mode_of(self.options)

    def language(self) -> str:
        """Returns the language of the reader of the WebUI: by the guard's own setting, else the WebUI's, else the system's."""
        localization = self.options.get("localization")
        wanted = read(self.options)[0].language.value
        return language_of(wanted, None if localization is None else str(localization), system_locale())

    def is_host_reading(self) -> bool:
        """True in the mode "Forge's own": the host reads LoRA files itself."""
        return self.mode() is LoraMode.OWN

    def kept_files_bytes(self) -> int:
        """Returns how many bytes of LoRA files stay in RAM beyond the present stack."""
        return read(self.options)[0].kept_files_mb * MB

    def kept_files(self) -> int:
        """Returns how many LoRA files stay in RAM by the host's own option; 0 for any number."""
        limit = self.options.get(HOST_FILE_LIMIT_OPTION)
        return limit if isinstance(limit, int) else 0
