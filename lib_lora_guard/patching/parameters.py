"""The modules and parameters of a model, as torch's own methods give them, in a third of their time: each change asks for them."""

from __future__ import annotations

import torch


def named_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters by name, in the order of `torch.nn.Module.named_parameters`. A shared one has its first name.

    A module with a method of its own for it is asked.
    """
    if "named_parameters" in vars(module) or type(module).named_parameters is not torch.nn.Module.named_parameters:
        return dict(module.named_parameters())
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    _collect(module, "", found, seen)
    return found


def modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns a model and all modules in it, in the order of `torch.nn.Module.modules`. A shared one has its first place.

    A model with a method of its own for it is asked.
    """
    if "named_modules" in vars(model) or type(model).named_modules is not torch.nn.Module.named_modules:
        return list(model.modules())
    found: dict[int, torch.nn.Module] = {}
    _add_modules(model, found)
    return list(found.values())


def own_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns the parameters of a module itself, each once, as `parameters(recurse=False)` does."""
    return list({id(one): one for one in module._parameters.values() if one is not None}.values())


def _add_modules(module: torch.nn.Module, found: dict[int, torch.nn.Module]) -> None:
    if id(module) in found:
        return
    found[id(module)] = module
    children = module.__dict__.get("_modules")
    if children is None:
        # As below.
        found.update((id(one), one) for one in module.modules() if id(one) not in found)
        return
    for child in children.values():
        if child is not None:
            _add_modules(child, found)


def _collect(module: torch.nn.Module, prefix: str, found: dict[str, torch.nn.Parameter], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    # Through the dictionary: attributes of a module that are no plain ones take a call of Python's each.
    kept = module.__dict__
    if "_parameters" not in kept or "_modules" not in kept:
        # A module that torch.jit has traced keeps them elsewhere.
        for name, parameter in module.named_parameters():
            found.setdefault(prefix + name, parameter)
        return
    for name, parameter in kept["_parameters"].items():
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            found[prefix + name] = parameter
    for name, child in kept["_modules"].items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", found, seen)
