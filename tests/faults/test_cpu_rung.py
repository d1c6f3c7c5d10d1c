"""The last rung of a layer that finds no VRAM: its low-rank product comes from the CPU, and the picture is right."""

import pytest
import torch
from support.make import host_value, rand
from support.measure import contribution_error, fp32_limit
from support.reference import merge_reference

from faults.models import DEVICE
from faults.planting import Faults, every
from faults.scene import listening
from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import LayerError
from lib_lora_guard.messages import Message
from lib_lora_guard.patching import forward_steps, in_ram, layer_call, low_rank
from lib_lora_guard.patching.bypass import Bypass

IN_RAM = ("in_ram.py", "parts_in_ram")
"""Where RAM is used and nothing of the device."""


def entry(kind, shape, seed, strength=0.8, offset=None, **more):
    return [strength, host_value(kind, shape, seed, **more), 1.0, offset, None]


def slices(out, *rest):
    """As of a fused qkv, with one LoRA on the whole and one on a part of the input: two blocks, four outputs."""
    part = out // 3
    entries = [entry("lora", (part, *rest), n, 0.5 + n / 10, (0, n * part, part), rank=2 + n) for n in range(3)]
    half = rest[0] // 2
    return [*entries, entry("lora", (out, *rest), 9), entry("lora", (out, half, *rest[1:]), 4, -0.3, (1, half, half))]


LAYERS = {
    "linear": (lambda: torch.nn.Linear(16, 24), slices(24, 16), (2, 700, 16)),
    "linear, few tokens": (lambda: torch.nn.Linear(16, 24), slices(24, 16), (3, 16)),
    "linear, loha": (lambda: torch.nn.Linear(16, 24), [entry("loha", (24, 16), 1, rank=3)], (1200, 16)),
    "convolution": (lambda: torch.nn.Conv2d(8, 12, 3, stride=2, padding=1, padding_mode="circular"), slices(12, 8, 3, 3), (2, 8, 9, 9)),
    "convolution, tucker": (lambda: torch.nn.Conv2d(8, 12, 3), [entry("lora_mid", (12, 8, 3, 3), 1)], (2, 8, 9, 9)),
    "convolution, loha": (lambda: torch.nn.Conv2d(8, 12, 3), [entry("loha", (12, 8, 3, 3), 1, rank=2)], (1, 8, 9, 9)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=LAYERS)
def layer_of(request, monkeypatch):
    """`(layer, input, hook, reference)`. Where there is no GPU the CPU plays one: its memory is not RAM, and terms are joined."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(layer_call, "lies_in_ram", lambda tensor: False)
        monkeypatch.setattr(low_rank, "joins_on", lambda device: True)
        monkeypatch.setattr(forward_steps, "joins_on", lambda device: True)
    make, entries, tokens = LAYERS[request.param]
    layer, x = make(), rand(*tokens, seed=3)
    shape = tuple(layer.weight.shape)
    weight = merge_reference(entries, layer.weight.double())
    values = {"weight": weight, "bias": layer.bias.double()}
    reference = torch.func.functional_call(layer.double(), values, (x.double(),)).float()
    layer = layer.float().to(DEVICE)
    hook = Bypass("block.weight", tuple(parse_term(e, {}) for e in entries), shape)
    return layer, x.to(DEVICE), hook, reference.to(DEVICE)


def on_the_device(made):
    return any(tensor.device.type == DEVICE.type for tensor in made)


def run(layer, x, hook, **plan):
    output = layer(x)
    with Faults(**plan, only=on_the_device) as faults:
        return hook(layer, (x,), {}, output), faults


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_the_values_are_right_wherever_the_device_is_full(layer_of, for_good):
    layer, x, hook, wanted = layer_of
    base = layer(x)
    hook(layer, (x,), {}, layer(x))
    hook.drop_device_copies()
    _, counted = run(layer, x, hook, spared=IN_RAM)
    assert counted.count
    for k in every(counted.count):
        hook.drop_device_copies()
        result, faults = run(layer, x, hook, first=k, for_good=for_good, spared=IN_RAM)
        assert faults.planted
        assert contribution_error(result, wanted, base) <= fp32_limit(wanted, base), f"k={k}"


RAM = "[enforce fail] planned: DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize("what", ["the blocks", "a piece"])
def test_ram_that_ends_in_the_middle_adds_nothing_twice(layer_of, monkeypatch, what):
    """Output 0 has its share, output 1 finds no VRAM, and the CPU that was to help finds no RAM, once: then the image stops."""
    layer, x, hook, _ = layer_of
    if not isinstance(layer, torch.nn.Linear) or len(hook.program.steps[0].parts(call_of(layer, x))[0][0].outputs) < 2:
        pytest.skip("one output alone")
    addmm, products, failed = torch.Tensor.addmm_, [], []

    def full(self, *args, **kwargs):
        products.append(1)
        if len(products) == 2:
            raise torch.cuda.OutOfMemoryError("planned: CUDA out of memory")
        return addmm(self, *args, **kwargs)

    def once(function):
        def failing(*args, **kwargs):
            if not failed:
                failed.append(1)
                raise RuntimeError(RAM)
            return function(*args, **kwargs)

        return failing

    monkeypatch.setattr(torch.Tensor, "addmm_", full)
    if what == "the blocks":
        monkeypatch.setattr(low_rank.JoinedLowRank, "parts_in_ram", once(low_rank.JoinedLowRank.parts_in_ram))
    else:
        monkeypatch.setattr(torch.Tensor, "copy_", once(torch.Tensor.copy_))
    output = layer(x)
    with pytest.raises(LayerError, match=r"block\.weight: no memory left for the LoRA of this layer"):
        hook(layer, (x,), {}, output)
    assert failed


def call_of(layer, x):
    return layer_call.LayerCall("block.weight", layer, x, layer(x), tuple(layer.weight.shape))


def parts_of_pictures(pictures, tokens, width):
    """As Flux passes the picture's part of all tokens on: no view of all rows at once."""
    return rand(pictures, tokens + 7, width, seed=8)[:, 7:]


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("full", [False, True], ids=["room", "no room"])
def test_an_input_that_is_no_view_is_not_copied(kind, full, monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(layer_call, "lies_in_ram", lambda tensor: False)
    layer, x = torch.nn.Linear(16, 24).to(DEVICE), parts_of_pictures(3, 40, 16).to(DEVICE)
    e = entry(kind, (24, 16), 2)
    hook = Bypass("block.weight", (parse_term(e, {}),), (24, 16))
    base = layer(x)
    values = {"weight": merge_reference([e], layer.weight.double().cpu()), "bias": layer.bias.double().cpu()}
    wanted = (
        torch.func.functional_call(torch.nn.Linear(16, 24).double(), values, (x.double().cpu(),)).float().to(DEVICE)
    )
    clones = []
    monkeypatch.setattr(torch.Tensor, "reshape", copying(torch.Tensor.reshape, x, clones))
    if full and kind != "lokr":
        result, _ = run(layer, x, hook, first=1, for_good=True, spared=IN_RAM)
    else:
        result = hook(layer, (x,), {}, layer(x))
    assert contribution_error(result, wanted, base) <= fp32_limit(wanted, base)
    assert not clones


def copying(reshape, whole, clones):
    def watched(self, *shape):
        result = reshape(self, *shape)
        if self.numel() == whole.numel() and result.untyped_storage().data_ptr() != self.untyped_storage().data_ptr():
            clones.append(shape)
        return result

    return watched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_are_as_near_as_on_the_device(layer_of, dtype):
    layer, x, hook, _ = layer_of
    layer, x = layer.to(dtype), x.to(dtype)
    base, wanted = layer(x), hook(layer, (x,), {}, layer(x))
    result, _ = run(layer, x, hook, first=1, for_good=True, spared=IN_RAM)
    assert result.dtype == dtype
    # Outputs and shares are rounded each; the contribution of these LoRAs is as large as the output.
    assert contribution_error(result, wanted, base) <= 6 * torch.finfo(dtype).eps


def test_a_layer_computed_on_the_cpu_is_logged_once(layer_of):
    layer, x, hook, _ = layer_of
    with listening() as lines:
        for _ in range(3):
            run(layer, x, hook, first=1, for_good=True, spared=IN_RAM)
    assert lines == [f"INFO {Message('memory.on_the_cpu', {'key': 'block.weight'})}"]
    assert "block.weight" in Message("memory.on_the_cpu", {"key": "block.weight"}).text("zh")


@pytest.mark.parametrize("error", ["gpu", "ram"])
def test_where_ram_ends_too_the_image_stops_with_the_layers_name(layer_of, error):
    layer, x, hook, _ = layer_of
    output = layer(x)
    with (
        Faults(1, error, for_good=True),
        pytest.raises(LayerError, match=r"block\.weight: no memory left for the LoRA"),
    ):
        hook(layer, (x,), {}, output)


def test_an_error_of_another_kind_is_not_taken_to_the_cpu(layer_of):
    layer, x, hook, _ = layer_of
    with listening() as lines, pytest.raises(ValueError, match="a wrong value"):
        run(layer, x, hook, first=1, error="other")
    assert not lines


def test_the_cpu_computes_a_large_output_in_pieces(layer_of, monkeypatch):
    """Of whatever size the output is: here some tokens at a time, or a few channels."""
    monkeypatch.setattr(in_ram, "PIECE_BYTES", 1500)
    layer, x, hook, wanted = layer_of
    base = layer(x)
    result, _ = run(layer, x, hook, first=1, for_good=True, spared=IN_RAM)
    assert contribution_error(result, wanted, base) <= fp32_limit(wanted, base)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("offset", [None, (0, 1024, 2048)], ids=["whole", "slice"])
def test_on_a_gpu_nothing_is_taken(offset):
    layer, x = torch.nn.Linear(512, 4096).to(DEVICE, torch.bfloat16), rand(8192, 512, seed=1).to(DEVICE, torch.bfloat16)
    shape = (4096 if offset is None else offset[2], 512)
    hook = Bypass("block.weight", (parse_term(entry("lora", shape, 1, offset=offset), {}),), (4096, 512))
    wanted = hook(layer, (x,), {}, layer(x))
    call = layer_call.LayerCall("block.weight", layer, x, layer(x), (4096, 512))
    (step,) = hook.program.steps
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for block, scale in step.parts_in_ram(call):
        in_ram.add_to_linear(call, block, scale)
    assert torch.cuda.max_memory_allocated() == before
    assert contribution_error(call.output, wanted, layer(x)) <= 6 * torch.finfo(torch.bfloat16).eps
