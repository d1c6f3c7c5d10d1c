"""Stacks of LoRAs on the small models of the contract suite, and what they should give."""

import torch
from support.make import Net, host_value, rand
from support.reference import merge_reference

FILE = "C:\\loras\\style.safetensors"


def tokens(patcher):
    width = patcher.model.blocks[0].norm.normalized_shape[0]
    return torch.randn(2, 16, width, generator=torch.Generator().manual_seed(5))


def with_loras(host, patcher, *loras, online=False):
    """A clone of `patcher` with `loras`, `(filename, patches, strength)`, loaded the way Forge loads it."""
    clone = patcher.clone()
    for filename, patches, strength in loras:
        clone.add_patches(filename=filename, patches=patches, strength_patch=strength, online_mode=online)
    return host.load(clone)


def run(patcher):
    with torch.inference_mode():
        return patcher.model(tokens(patcher)).clone()


def reference(patcher, dense, loras):
    """The fp32 model with the merge written out in float64; what is merged is rounded once to its storage: small
    parameters, and on wide storage the weights with patches as large as themselves."""
    model = Net(patcher.model.blocks[0].norm.normalized_shape[0], depth=len(patcher.model.blocks))
    state, merged = dict(dense), {key for key, value in dense.items() if value.dim() == 1}
    for _, patches, strength in loras:
        for address, value in patches.items():
            key, offset, function = (address, None, None) if isinstance(address, str) else (*address, None)[:3]
            if isinstance(value, list) or len(value) == 1:
                merged.add(key)
            state[key] = merge_reference([[strength, value, 1.0, offset, function]], state[key].double())
    for key, dtype in patcher.model.rounded_to.items():
        if key in state and state[key].dtype == torch.float64:
            state[key] = state[key].to(dtype).float() if key in merged else state[key].float()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(tokens(patcher)).clone()


def shapes(dense):
    return {name: tuple(value.shape) for name, value in dense.items()}


def lora_on_everything(dense, seed=1):
    patches = {k: host_value("lora", s, seed + n) for n, (k, s) in enumerate(shapes(dense).items()) if len(s) > 1}
    patches |= {k: (rand(*s, seed=seed + 50, scale=0.05),) for k, s in shapes(dense).items() if len(s) == 1}
    return patches


def slices_of_qkv(dense, seed=1):
    patches = {}
    for key, shape in shapes(dense).items():
        if key.endswith("qkv.weight"):
            third = shape[0] // 3
            for n in range(3):
                patches[key, (0, n * third, third)] = host_value("lora", (third, shape[1]), seed + n)
            patches[key, (1, 8, 16)] = host_value("lora", (shape[0], 16), seed + 9)
    return patches


def other_kinds(dense, seed=1):
    kinds = ["loha", "lokr", "glora", "diff", "nested"]
    linear = [k for k, s in shapes(dense).items() if len(s) == 2]
    patches = {key: host_value(kinds[n % len(kinds)], shapes(dense)[key], seed + n) for n, key in enumerate(linear)}
    conv = [k for k, s in shapes(dense).items() if len(s) == 4]
    return patches | {key: host_value("loha_mid", shapes(dense)[key], seed + n) for n, key in enumerate(conv)}


def lokr_on_everything(dense, seed=1):
    kinds = ["lokr", "lokr_factors", "lokr_left"]
    linear = [k for k, s in shapes(dense).items() if len(s) == 2]
    return {key: host_value(kinds[n % 3], shapes(dense)[key], seed + n) for n, key in enumerate(linear)}


def dora(dense, seed=1):
    return {
        k: host_value("lora", s, seed + n, dora=("output", "input")[n % 2])
        for n, (k, s) in enumerate(shapes(dense).items())
        if len(s) == 2
    }


CASES = {"lora": lora_on_everything, "slices": slices_of_qkv, "other kinds": other_kinds, "dora": dora}


def faults(loras):
    (name, patches, strength), *rest = loras
    # Forge knows a LoRA by file name and strength, so a changed content needs another name.
    yield "layer skipped", [("skipped", dict(list(patches.items())[1:]), strength), *rest]
    yield "strength 5 % off", [(name, patches, strength * 1.05), *rest]
    ignored = {
        k: (v[0], (*v[1][:2], None, *v[1][3:])) if v[0] in ("lora", "loha") and not isinstance(v, list) else v
        for k, v in patches.items()
    }
    if any(ignored[k] is not v for k, v in patches.items()):
        yield "alpha ignored", [("ignored", ignored, strength), *rest]
    yield "one of two LoRAs dropped", rest
