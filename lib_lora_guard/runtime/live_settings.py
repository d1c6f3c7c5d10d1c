"""The user's settings, read at each use; what shapes a picture stays for an image as it was at its begin.

A request over the API may bring options of its own for one image, and another client may change them at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from ..memory.shares import usual_kept_files_mb
from ..messages.languages import language_of, system_locale
from ..settings import MODE_OPTION, PREFIX, LoraMode, read
from ..units import MB

Options: TypeAlias = Mapping[str, object]
"""The host's options by name."""

LOW_BITS_OPTION = "forge_unet_storage_dtype"
"""The host's dropdown "Diffusion in Low Bits"; several of its choices end in "(fp16 LoRA)"."""
HOST_FILE_LIMIT_OPTION = "lora_in_memory_limit"
SHAPING = (MODE_OPTION, LOW_BITS_OPTION, PREFIX + "merge_from_file")
"""The options that the guard reads while an image is made, and that show in the picture."""


def mode_of(options: Options) -> LoraMode:
    """Returns the mode that the host's options ask for.

    If the guard's own mode is "Automatic", a choice with "(fp16 LoRA)" in Forge's "Diffusion in Low Bits" gives FP16. This holds
    for 16-bit models too, where Forge ignores it.
    """
    mode = read({MODE_OPTION: options.get(MODE_OPTION)})[0].mode
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

    options: Options = field(default_factory=dict)
    as_trained: bool = False
    _images: list[Options] = field(default_factory=list)
    """The shaping options of each image that is being made, the innermost last."""

    @contextmanager
    def image(self, own: Options = MappingProxyType({})) -> Iterator[None]:
        """Wraps the making of an image: `mode` answers the same until it ends, whatever is set meanwhile.

        The text encoder is patched minutes before the U-Net's second pass. In two modes they make a picture of none.

        Args:
            own: The options that the image's own request sets. An image inside another one, a detailer's, takes the
                others from that.
        """
        outer = self._images[-1] if self._images else self.options
        latched = {name: (own if name in own else outer).get(name) for name in SHAPING}
        self._images.append(latched)
        try:
            yield
        finally:
            # By identity: another extension may run two images at once, and the first may end first.
            self._images[:] = [image for image in self._images if image is not latched]

    def mode(self) -> LoraMode:
        """Returns the mode for the present image; between images the one that the next would have."""
        return mode_of(self._shaping())

    def merges_from_file(self) -> bool:
        """True if the mode "Automatic" merges where the checkpoint file has the originals; for the same image as `mode`."""
        return self.uses_file_backups() and read(self._shaping())[0].merge_from_file

    def _shaping(self) -> Options:
        return self._images[-1] if self._images else self.options

    def language(self) -> str:
        """Returns the language of the reader of the WebUI: by the guard's own setting, else the WebUI's, else the system's."""
        localization = self.options.get("localization")
        wanted = read(self.options)[0].language.value
        return language_of(wanted, None if localization is None else str(localization), system_locale())

    def is_host_reading(self) -> bool:
        """True in the mode "Forge's own": the host reads LoRA files itself."""
        return self.mode() is LoraMode.OWN

    def plans_residency(self) -> bool:
        """True if what lies on the card while a model runs is chosen by the seconds that the whole image takes."""
        return read(self.options)[0].plan_residency

    def pins_swapped(self) -> bool:
        """True if weights that are copied to the card in each step may lie in pinned RAM."""
        return read(self.options)[0].pin_swapped

    def uses_kernels(self) -> bool:
        """True if the fast kernels may be used."""
        return read(self.options)[0].fast_kernels

    def uses_kernels_without_loras(self) -> bool:
        """True if the fast kernels are for layers without LoRAs too, on models that have some."""
        return read(self.options)[0].fast_host_cast

    def uses_file_backups(self) -> bool:
        """True if a merge may leave the original weights to the checkpoint file."""
        return read(self.options)[0].file_backups

    def shows_lora_cards(self) -> bool:
        """True if the host's LoRA cards get a line with base model, rank and fit."""
        return read(self.options)[0].lora_cards

    def kept_files_bytes(self) -> int:
        """Returns how many bytes of LoRA files stay in RAM beyond the present stack."""
        wanted = read(self.options)[0].kept_files_mb
        return (usual_kept_files_mb() if wanted is None else wanted) * MB

    def kept_files(self) -> int:
        """Returns how many LoRA files stay in RAM by the host's own option; 0 for any number."""
        limit = self.options.get(HOST_FILE_LIMIT_OPTION)
        return limit if isinstance(limit, int) else 0
