"""Machines without CUDA: every mode in plain torch, with `torch.cuda` that answers "no" and nothing else.

Apple's MPS, DirectML and Intel's smaller GPUs have no 64-bit floats: a mode that refuses to make one on the model's device
stands for them. No such device was there to run on; what runs here is the same code on the CPU.
"""

import types

import pytest
import torch
from support.make import Net, host_value, rand, write_kohya
from support.measure import assert_same, same_bits
from support.reference import merge_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.hosts.plain.guard import LoraGuard
from lib_lora_guard.memory.out_of_memory import give_back_cached_memory, is_out_of_memory
from lib_lora_guard.memory.probe import measure_budget
from lib_lora_guard.patching import merging, norms
from lib_lora_guard.patching.device_cache import DeviceCache
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning.mode import Mode, Wish
from lib_lora_guard.weights import Nf4Codec, PlainCodec, Q8_0Codec, ScaledFp8Codec, StoredLinear
from lib_lora_guard.weights.storage import widest_float

WIDTH = 64
X = rand(2, 16, WIDTH, seed=5)
CODECS = {
    "fp32": None,
    "bf16": PlainCodec(torch.bfloat16, "bf16"),
    "fp8": ScaledFp8Codec(),
    "nf4": Nf4Codec(),
    "Q8_0": Q8_0Codec(),
}
WISHES = (Wish.BYPASS, Wish.ON_THE_FLY, Wish.MERGE)
KINDS = ("lora", "loha", "lokr", "glora", "dora", "dora in")


ANSWERS = {"is_available": False, "_is_in_bad_fork": True}
"""What may be asked: the second is torch's own question before it seeds, and True says that there is nothing to seed."""


class NoCuda(types.ModuleType):
    def __getattr__(self, name):
        if name in ANSWERS:
            return lambda: ANSWERS[name]
        raise AssertionError(f"torch.cuda.{name} was used")


class NoDoubles(TorchDispatchMode):
    """Refuses every 64-bit float, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{function}: the device has no float64")
        return result


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch, "cuda", NoCuda("torch.cuda"))
    with pytest.raises(AssertionError, match="mem_get_info"):
        torch.cuda.mem_get_info()


def build(codec):
    model = Net(WIDTH, depth=2)
    for name, layer in list(model.named_modules()):
        if codec is not None and isinstance(layer, torch.nn.Linear):
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, StoredLinear(codec, layer.weight.data, layer.bias.data))
    return model


def patches_of(kinds=KINDS):
    """One patch per weight matrix, of these kinds in turn; DoRA over the outputs and ("dora in") over the inputs."""
    found = {}
    for n, (key, shape) in enumerate((k, tuple(v.shape)) for k, v in Net(WIDTH, depth=2).state_dict().items()):
        if len(shape) == 2:
            kind = kinds[n % len(kinds)]
            dora = {"dora": "output", "dora in": "input"}.get(kind)
            found[key] = host_value("lora" if dora else kind, shape, n, dora=dora)
    return found


def request(patches, strength):
    terms = {key: [parse_term([strength, value, 1.0, None, None], {}, 0)] for key, value in patches.items()}
    return LoraRequest("one", strength, terms)


def output(model):
    with torch.no_grad():
        return model(X).clone()


def reference(weights, patches, strength):
    state = dict(weights)
    for key, value in patches.items():
        state[key] = merge_reference([[strength, value, 1.0, None, None]], state[key].double())
    model = Net(WIDTH, depth=2)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return output(model)


def dense(model):
    access = PlainAccess(model)
    return {key: access.dense(access.site(key)) for key in Net(WIDTH, depth=2).state_dict()}


MODES = [(codec, wish) for codec in CODECS for wish in WISHES if wish is not Wish.MERGE or codec == "fp32"]
"""Merging into few bits loses the LoRA and is refused on every machine; what bf16 keeps of one is another test's."""


@pytest.mark.parametrize(("codec", "wish"), MODES)
def test_every_mode_works_and_is_taken_off_without_cuda(no_cuda, codec, wish):
    model = build(CODECS[codec])
    weights, base, engine = dense(model), output(model), Engine()
    before = [parameter.data.clone() for parameter in model.parameters()]
    patches = patches_of()
    with torch.device("cpu"):
        report = engine.change(PlainAccess(model), [request(patches, 0.7)], wish)
    assert report.loras[0].used == len(patches)
    assert Mode(wish.value) in {attachment.mode for attachment in engine.attached.values()}
    assert_same(output(model), reference(weights, patches, 0.7), base)
    engine.drop_device_copies()
    engine.change(PlainAccess(model), [])
    assert torch.equal(output(model), base)
    assert all(same_bits(p.data, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_mode_needs_64_bit_floats_on_the_device(monkeypatch, kind, wish):
    for module in (merging, norms):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    model = build(None)
    weights, base, engine = dense(model), output(model), Engine()
    patches = patches_of([kind])
    stack = [request(patches, 0.7)]
    with NoDoubles():
        report = engine.change(PlainAccess(model), stack, wish)
        patched = output(model)
    assert report.loras[0].used == len(patches)
    assert_same(patched, reference(weights, patches, 0.7), base)
    with NoDoubles():
        engine.change(PlainAccess(model), [])
    assert torch.equal(output(model), base)


def test_64_bit_floats_are_used_on_devices_that_have_them():
    for device, dtype in {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}.items():
        assert widest_float(torch.device(device)) is dtype
    assert widest_float(torch.device("privateuseone")) is widest_float(torch.device("xpu")) is torch.float32


def test_out_of_memory_errors_of_other_devices_are_recognised():
    for text in ("MPS backend out of memory (MPS allocated: 9 GB)", "There is not enough GPU video memory available!"):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_lora_file_is_applied_without_cuda(no_cuda, tmp_path):
    model = Net(WIDTH, depth=2)
    path = tmp_path / "one.safetensors"
    write_kohya(path, {"blocks_0_qkv": (3 * WIDTH, WIDTH)})
    base = output(model)
    guard = LoraGuard(model)
    report = guard.apply([(path, 1.0)])
    assert report.loras[0].used == 1
    assert not torch.equal(output(model), base)
    guard.remove()
    assert torch.equal(output(model), base)


def test_free_memory_can_be_measured_without_cuda(no_cuda):
    budget = measure_budget(torch.device("cpu"), 0)
    assert budget.vram_spare_bytes == 0
    assert budget.ram_spare_bytes > 0
    for device in ("mps", "xpu", "privateuseone"):
        assert measure_budget(torch.device(device), 0).vram_spare_bytes == 0
    give_back_cached_memory()


@pytest.mark.parametrize("device", ["mps", "privateuseone", "cpu"])
def test_device_copies_need_no_cuda_on_other_devices(no_cuda, device):
    cache, made = DeviceCache(), []
    for _ in range(2):
        cache.get(torch.device(device), torch.float16, lambda: made.append(device) or device)
    assert len(made) == (2 if device == "cpu" else 1)
    assert len(cache) == (0 if device == "cpu" else 1)
