"""Holds a LoRA file against a trainer's formula in float64: through the public API, in every mode."""

import copy

import torch
from safetensors.torch import save_file

from lib_lora_guard import LoraGuard

from .make import rand
from .measure import contribution_error, fp32_limit

MODES = ("bypass", "on_the_fly", "merge")


def layers(**made):
    """A model of these layers, each with random numbers that do not depend on the others."""
    model = torch.nn.ModuleDict(made).requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(rand(*parameter.shape, seed=number + 1, scale=0.3))
    return model


def assert_as_trained(
    folder, model, tensors, wanted, *, metadata=None, skipped=0, lost=0, modes=MODES, strengths=(1.0, 0.6), **options
):
    """The file changes the layers as the trainer does, at strength 1 the whole way, at 0.6 that part.

    Args:
        folder: for the file.
        model: of `layers`.
        tensors: of the file, by name.
        wanted: the trainer's weight in float64, by layer; the others stay as they are.
        metadata: of the file.
        skipped: keys of the file that have no place.
        lost: keys of the file that have a place and are left out.
        modes: to apply in.
        strengths: to apply at.
        options: of `LoraGuard.apply`.
    """
    path = folder / "trained.safetensors"
    save_file(tensors, path, metadata=metadata)
    clean = copy.deepcopy(model)
    guard = LoraGuard(model)
    for mode in modes:
        for strength in strengths:
            report = guard.apply([(path, strength)], mode=mode, **options)
            lora = report.loras[0]
            assert (len(lora.skipped) - lost, len(lora.lost)) == (skipped, lost), lora
            for name, layer in model.items():
                weight, x = clean[name].weight, rand(3, *input_of(layer), seed=5)
                with torch.no_grad():
                    result = layer(x)
                if name not in wanted:
                    assert torch.allclose(result, clean[name](x), atol=1e-6), name
                    continue
                base = output_of(clean[name], weight.double(), x.double())
                changed = weight.double() + strength * (wanted[name] - weight.double())
                reference = output_of(clean[name], changed, x.double())
                error, limit = contribution_error(result, reference, base), fp32_limit(reference, base)
                assert error <= limit, f"{mode}, strength {strength}, {name}: off by {error:.2e}, allowed {limit:.2e}"
        guard.remove()
    for (name, parameter), before in zip(model.named_parameters(), clean.parameters(), strict=True):
        assert torch.equal(parameter, before), name


def output_of(layer, weight, x):
    """What `layer` gives for `x` with this weight, in float64."""
    changed = copy.deepcopy(layer).double()
    changed.weight = torch.nn.Parameter(weight, requires_grad=False)
    return changed(x)


def input_of(layer):
    """The shape of one input for `layer`."""
    return (layer.in_features,) if isinstance(layer, torch.nn.Linear) else (layer.in_channels, 5, 5)
