"""The guard from a file on disk to a model's output, held against the output of a model that its trainer patched."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib_lora_guard import LoraGuard

from .make import gen
from .measure import assert_same, contribution_error, fp32_limit, same_bits

MODES = ("auto", "bypass", "on_the_fly", "merge")


@pytest.fixture(autouse=True)
def one_thread(_same_threads_and_seed):
    """Layers as small as these wait longer for the threads of a busy machine than they compute; the next test sets its own."""
    torch.set_num_threads(1)


def fill(model, seed=0, scale=0.3):
    """Random values in every parameter, those of norms around one. Returns the model, frozen and in eval mode."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=gen(seed * 1000 + number))
            around_one = "norm" in name and name.endswith("weight") and parameter.dim() == 1
            if parameter.dim() > 1:
                # Signals keep their size from layer to layer, whatever the layers' widths.
                noise = noise * parameter[0].numel() ** -0.5
                parameter.copy_(noise)
            else:
                parameter.copy_(1 + scale * noise if around_one else scale * noise)
    return model.requires_grad_(False).eval()


def lycoris_preset(*kinds, algo_map=None):
    """A preset of LyCORIS for every layer of these classes. All keys are given: LyCORIS keeps those of its last network."""
    return {
        "enable_conv": True,
        "target_module": list(kinds),
        "target_name": [],
        "module_algo_map": algo_map or {},
        "name_algo_map": {},
        "lora_prefix": "lycoris",
        "use_fnmatch": False,
        "exclude_name": [],
    }


def check_in_modes(
    model, file, reference, forward, *, strength=1.0, used, modes=MODES, as_trained=False, skipped=0, base=None
):
    """`forward(model)` equals `reference` with the guard's LoRA in every mode, and the model is itself again after each.

    `used`: how many parameters the file changes; `base`: what the model gives without a LoRA, where that is known. Returns
    `{mode: {how many weights in which mode}}`.
    """
    base, bits = (
        forward(model) if base is None else base,
        {name: p.detach().clone() for name, p in model.named_parameters()},
    )
    found = {}
    with LoraGuard(model) as guard:
        for mode in modes:
            report = guard.apply([(file, strength)], mode=mode, as_trained=as_trained)
            (lora,) = report.loras
            assert not report.is_worrying, report.line()
            assert (lora.used, len(lora.skipped)) == (used, skipped), report.line()
            found[mode] = dict(lora.modes)
            assert_same(forward(model), reference, base)
            guard.remove()
            assert same_bits(forward(model), base)
            assert all(same_bits(p, bits[name]) for name, p in model.named_parameters())
    return found


def assert_seen(model, stack, reference, forward, as_trained=False, base=None):
    """What is wrong with this stack is larger than twice what the equality tests allow."""
    base = forward(model) if base is None else base
    with LoraGuard(model) as guard:
        guard.apply(stack, as_trained=as_trained)
        error, limit = contribution_error(forward(model), reference, base), fp32_limit(reference, base)
    assert error > 2 * limit, f"would not be seen: error {error:.2e}, limit {limit:.2e}"


def tampered(file, folder, change):
    """A copy of `file` with `change(tensors, metadata)` made to it, PEFT's configuration beside it."""
    folder.mkdir()
    with safe_open(str(file), "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # it is no dict
        metadata = dict(opened.metadata() or {})
    change(tensors, metadata)
    save_file(tensors, str(folder / file.name), metadata)
    config = file.with_name("adapter_config.json")
    if config.is_file():
        shutil.copy(config, folder / config.name)
    return folder / file.name


def without_alpha(file, folder):
    """The file as if nothing in it or beside it said a scale."""

    def change(tensors, metadata):
        for key in [key for key in tensors if key.endswith(".alpha")]:
            del tensors[key]
        metadata.pop("lora_adapter_metadata", None)

    path = tampered(file, folder, change)
    config = path.with_name("adapter_config.json")
    if config.is_file():
        entries = json.loads(config.read_text(encoding="utf-8"))
        entries.pop("lora_alpha", entries.pop("alpha", None))
        config.write_text(json.dumps(entries), encoding="utf-8")
    return path


def without_module(file, folder, part):
    """The file without the tensors of the modules whose names hold `part`."""

    def change(tensors, metadata):
        gone = [key for key in tensors if part in key]
        assert gone, f"no key holds {part}"
        for key in gone:
            del tensors[key]

    return tampered(file, folder, change)
