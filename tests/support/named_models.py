"""Small models made from names and shapes alone, LoRA files for them, and what these change."""

import torch
from safetensors.torch import save_file

from lib_lora_guard import LoraGuard
from support.make import rand


class _Norm(torch.nn.Module):
    """Holds parameters and computes nothing."""


def module_of(shapes):
    """A module that has these parameters: Linear layers and convolutions for weights, plain parameters for the rest."""
    root = torch.nn.Module()
    for number, (name, shape) in enumerate(shapes.items()):
        *path, last = name.split(".")
        owner = root
        for depth, part in enumerate(path):
            if not hasattr(owner, part):
                is_layer = depth == len(path) - 1 and last == "weight" and len(shape) in (2, 4)
                owner.add_module(part, _layer(shape, name, shapes) if is_layer else _Norm())
            owner = getattr(owner, part)
        value = torch.nn.Parameter(rand(*shape, seed=1000 + number), requires_grad=False)
        owner.register_parameter(last, value)
    return root


def _layer(shape, name, shapes):
    bias = name.removesuffix("weight") + "bias" in shapes
    if len(shape) == 4:
        return torch.nn.Conv2d(shape[1], shape[0], shape[2:], bias=bias)
    return torch.nn.Linear(shape[1], shape[0], bias=bias)


def kohya(module, rows, columns, seed, rank=2, alpha=4.0):
    """The tensors of one module as kohya writes them, and their delta in float64."""
    up, down = rand(rows, rank, seed=seed), rand(rank, columns, seed=seed + 500)
    tensors = {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.alpha": torch.tensor(alpha),
    }
    return tensors, alpha / rank * up.double() @ down.double()


def peft(module, rows, columns, seed, rank=2):
    """The same as PEFT writes it; alpha is the rank."""
    up, down = rand(rows, rank, seed=seed), rand(rank, columns, seed=seed + 500)
    return {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}, up.double() @ down.double()


def change_of(model, tensors, tmp_path, *, metadata=None, strength=1.0, mode="merge", inner=None):
    """Applies one file and takes it off again.

    Args:
        model: what LoraGuard is given.
        inner: the module whose parameters are compared, where `model` is a wrapper around it.

    Returns:
        What the file adds to each parameter that it changes, in float64, and its entry in the report.
    """
    path = tmp_path / "one.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    inner = model if inner is None else inner
    before = {name: p.detach().double() for name, p in inner.named_parameters()}
    guard = LoraGuard(model)
    try:
        report = guard.apply([(path, strength)], mode=mode)
        after = {name: p.detach().double() for name, p in inner.named_parameters()}
    finally:
        guard.remove()
    changes = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    return changes, report.loras[0]


def assert_changes(changes, expected):
    """Exactly these parameters change, each to 1e-4 of what the file adds."""
    assert sorted(changes) == sorted(expected)
    for name, delta in expected.items():
        error = (changes[name].reshape(delta.shape) - delta).norm() / delta.norm()
        assert error <= 1e-4, (name, float(error))
