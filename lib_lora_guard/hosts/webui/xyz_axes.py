"""The axes "LoRA mode" and "LoRA strength" of the WebUI's X/Y/Z plot.

The strength multiplies all strengths of the prompt's LoRA tags, so that several LoRAs keep their balance; to change one of
them alone there is the WebUI's own axis "Prompt S/R". The prompts are rewritten: an image's infotext tells its own strengths.

Source: `scripts/xyz_grid.py` of the A1111 family, whose scripts add their axes to its list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Protocol

from ...files import shown
from ...messages import Joined, Message
from ...planning.prompt_strengths import times
from ...runtime import installed
from ...runtime.live_settings import LiveSettings
from ...settings import LoraMode
from .types import give_mode

MODE, STRENGTH = "[LoRA Guard] LoRA mode", "[LoRA Guard] LoRA strength (times the prompt's)"
MODE_COST, STRENGTH_COST = 0.5, 0.2
"""The dearer axis is the outer loop. A checkpoint costs 1, a VAE 0.7, and a seed 0."""
LARGEST_FACTOR = 100
FACTOR = "lora_guard_strength"
"""The attribute of a request with the number that its strengths are multiplied with."""
_ORIGINALS = "lora_guard_prompts"
_LISTS = ("all_prompts", "all_hr_prompts")


class Request(Protocol):
    """A request for images, as a cell of the plot has it. One with a second pass has `all_hr_prompts` too."""

    all_prompts: list[str]
    prompts: list[str]
    main_prompt: str
    batch_size: int


def add(modules: Mapping[str, ModuleType]) -> None:
    """Adds the axes where a WebUI with the plot is loaded, once. The plot's page shows them from its next building on."""
    for module in _plots(modules):
        known = {option.label for option in module.axis_options}
        module.axis_options.extend(axis for axis in _axes(module.AxisOption) if axis.label not in known)


def remove(modules: Mapping[str, ModuleType]) -> None:
    """Takes the axes out. A page that has them keeps them until it is built again, and is told that the guard is off."""
    for module in _plots(modules):
        module.axis_options[:] = [option for option in module.axis_options if option.label not in (MODE, STRENGTH)]


def _plots(modules: Mapping[str, ModuleType]) -> list[ModuleType]:
    scripts = modules.get("modules.scripts")
    if scripts is None:
        return []
    # Scripts are in no list of modules: the WebUI loads each by its path, under its file's name.
    loaded = {id(data.module): data.module for data in scripts.scripts_data}
    names = ("axis_options", "AxisOption")
    return [
        one for one in loaded.values() if one.__name__ == "xyz_grid.py" and all(name in vars(one) for name in names)
    ]


class Axis(Protocol):
    """`AxisOption` of the WebUI."""

    label: str


def _axes(option: Callable[..., Axis]) -> Sequence[Axis]:
    modes = [mode.value for mode in LoraMode]
    return (
        option(MODE, str, _set_mode, confirm=_confirm_modes, cost=MODE_COST, choices=lambda: modes),
        option(STRENGTH, float, _set_strength, _label_of_strength, confirm=_confirm_strengths, cost=STRENGTH_COST),
    )


def _set_mode(request: Request, mode: str, modes: Sequence[str]) -> None:
    give_mode(request, mode)


def _set_strength(request: Request, factor: float, factors: Sequence[float]) -> None:
    setattr(request, FACTOR, factor)


def _label_of_strength(request: Request, option: Axis, factor: float) -> str:
    return f"LoRA strength × {round(factor, 8):g}"


def _confirm_modes(request: Request, modes: Sequence[str]) -> None:
    _confirm_guard()
    known = [mode.value for mode in LoraMode]
    for mode in modes:
        if mode not in known:
            raise _refusal(Message("xyz.unknown_mode", {"mode": shown(mode), "known": Joined(known, "list.names")}))


def _confirm_strengths(request: Request, factors: Sequence[float]) -> None:
    _confirm_guard()
    for factor in factors:
        if not abs(factor) <= LARGEST_FACTOR:
            raise _refusal(Message("xyz.strength", {"factor": factor, "largest": LARGEST_FACTOR}))


def _confirm_guard() -> None:
    if installed.installed() is None:
        raise _refusal(Message("xyz.off"))


def _refusal(said: Message) -> RuntimeError:
    """Returns the error in the reader's language: the page shows its text."""
    try:
        from modules import shared

        options = shared.opts.data
    except (ImportError, AttributeError):
        options = {}
    return RuntimeError(said.text(LiveSettings(options).language()))


# The prompts of a request.


def scale_batch(request: Request, number: int) -> None:
    """Multiplies the strengths in the prompts of the batch that is about to be made.

    Args:
        request: Nothing happens to one without a factor.
        number: The batch's, from 0.
    """
    factor = vars(request).get(FACTOR)
    if factor is None:
        return
    if _ORIGINALS not in vars(request):
        originals = {name: vars(request).get(name) for name in (*_LISTS, "main_prompt")}
        setattr(request, _ORIGINALS, {name: value for name, value in originals.items() if value is not None})
    place = slice(number * request.batch_size, (number + 1) * request.batch_size)
    for name in _LISTS:
        if vars(request).get(name) is not None:
            # The list may be the one that the request was made with.
            prompts = list(vars(request)[name])
            prompts[place] = [times(prompt, factor) for prompt in prompts[place]]
            setattr(request, name, prompts)
    request.prompts[:] = [times(prompt, factor) for prompt in request.prompts]
    if number == 0:
        request.main_prompt = times(request.main_prompt, factor)


def restore_prompts(request: Request) -> None:
    """Gives a request that is done its prompts back: the infotext of the whole plot has those that were written."""
    originals = vars(request).pop(_ORIGINALS, {})
    for name, value in originals.items():
        setattr(request, name, value)
