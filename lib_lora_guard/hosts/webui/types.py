"""The objects of a WebUI that the guard works with, as far as it uses them.

Sources: `modules/processing.py` and `modules/sd_models.py` of the A1111 family; the `forge_objects` of Forge and its successors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from ...runtime.image_words import Comment
from ...runtime.live_settings import Options
from ...settings import MODE_OPTION


class DenoiserPatcher(Protocol):
    """The image model with the stack of LoRAs that it shall have."""

    model: torch.nn.Module
    load_device: torch.device

    def memory_required(self, input_shape: Sequence[int]) -> float: ...


class ForgeObjects(Protocol):
    """The parts of the loaded checkpoint."""

    unet: DenoiserPatcher
    clip: TextEncoder


class SdModel(Protocol):
    """The loaded checkpoint."""

    forge_objects: ForgeObjects
    sd_checkpoint_info: Hashable
    """Which one it is."""


class Processing(Protocol):
    """One request for images. Sizes in pixels."""

    sd_model: SdModel
    steps: int
    width: int
    height: int
    batch_size: int
    hr_upscale_to_x: int
    hr_upscale_to_y: int
    is_hr_pass: bool


@runtime_checkable
class Refined(Protocol):
    """A request that another checkpoint may take over."""

    refiner_checkpoint_info: Hashable | None
    refiner_switch_at: float | None
    """Share of the steps before it does; None takes it from the first one."""


@runtime_checkable
class TwoPasses(Protocol):
    """A request that may draw its images again, larger."""

    enable_hr: bool
    is_hr_pass: bool
    hr_checkpoint_info: Hashable | None
    """The second pass's own checkpoint."""


class ForgeObjectsWithLoras(Protocol):
    """The parts of the loaded checkpoint, with the patchers that have the prompt's LoRAs."""

    unet: DenoiserPatcher
    clip: TextEncoder


class SdModelWithLoras(Protocol):
    """The loaded checkpoint, once the prompt's LoRAs are chosen."""

    forge_objects_after_applying_lora: ForgeObjectsWithLoras


class MadeRequest(Protocol):
    """A request whose present batch is decoded."""

    sd_model: SdModelWithLoras
    extra_generation_params: dict[str, str]
    """The fields of the infotext."""

    def comment(self, text: str) -> None: ...


class Commented(Protocol):
    """A request that can show lines of text under its images. Each host escapes them for its page."""

    def comment(self, text: str) -> None: ...


def comments_of(request: Processing | Commented) -> tuple[Comment | None, Comment | None]:
    """Returns what shows a line of text under the images of a request, and what takes one back.

    Each is None where the host has no place for it.

    Args:
        request: `Commented` in the A1111 family since 1.5 and in Forge, whose pages show the lines and whose infotexts and
            API leave them out. The host keeps the lines as the keys of `comments` until the images are done.
    """
    comment: Comment | None = getattr(request, "comment", None)
    if not callable(comment):
        return None, None

    def lines() -> object:
        return getattr(request, "comments", None)

    def take_back(line: str) -> None:
        if isinstance(shown := lines(), dict):
            shown.pop(line, None)

    return comment, take_back if isinstance(lines(), dict) else None


def own_options(request: object) -> Options:
    """Returns the WebUI's options that a request sets for its own images, and the LoRA mode that it was given.

    The WebUI has set the options before it makes the images; another client may have set others since.
    """
    options = getattr(request, "override_settings", None)
    mode = getattr(request, MODE_OPTION, None)
    return {**(options if isinstance(options, Mapping) else {}), **({} if mode is None else {MODE_OPTION: mode})}


def give_mode(request: object, mode: str) -> None:
    """Gives a request a LoRA mode of its own, for `own_options`.

    It is none of the request's options: those the WebUI keeps for all images to come where a request over the API says
    `"override_settings_restore_afterwards": false`.
    """
    setattr(request, MODE_OPTION, mode)


class TextEncoder(Protocol):
    """The text encoders of the loaded checkpoint."""

    cond_stage_model: torch.nn.Module
    patcher: Patched


class Patched(Protocol):
    """A patcher: a model with the stack of LoRAs that it shall have, by LoRA and by parameter."""

    lora_patches: Mapping[Hashable, Mapping[Hashable, Sequence[Sequence[Any]]]]


class LoraTag(Protocol):
    """A tag such as `<lora:name:0.8>`, as `modules.extra_networks` reads it."""

    items: list[str]
    positional: list[str]
    named: dict[str, str]


Tags: TypeAlias = Mapping[str, Sequence[LoraTag]]
"""The tags of a prompt by the name of their network."""

CondCache: TypeAlias = list[Any]
"""The WebUI's `[key, conditioning, infotext entries]`; the key is None where nothing is kept."""


class PromptProcessing(Protocol):
    """The part of a request that encodes prompts."""

    def cached_params(
        self,
        required_prompts: Sequence[str],
        steps: int,
        extra_network_data: Tags,
        hires_steps: int | None,
        use_old_scheduling: bool,
    ) -> tuple[Any, ...]: ...


@runtime_checkable
class FromPicture(Protocol):
    """A request of img2img."""

    init_latent: torch.Tensor | None
    """The picture that the image begins with, as the VAE encodes it; None until it is."""
