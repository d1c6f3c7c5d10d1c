"""Header tensors answer as torch does for a tensor on its meta device: the same shapes, dtypes and errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.files import Entry, open_header, read_tensors, write_safetensors
from lib_lora_guard.files.header_tensor import HeaderTensor, header_tensors, is_tensor
from lib_lora_guard.files.safetensors_file import FORMATS, read_numbers

DTYPES = [name for _, name in FORMATS.values() if name is not None and hasattr(torch, name)]
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def on_meta(tensor):
    return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype_name), device="meta")


def said(call):
    """What a call gives: shape and dtype of a tensor, another value as it is, an error by its type and text."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    return (tuple(result.shape), result.dtype) if is_tensor(result) else result


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_described_as_torch_does(name):
    ours = HeaderTensor((3, 2), name)
    meta = on_meta(ours)
    for ask in ("dim", "numel", "element_size", "is_floating_point", "is_complex"):
        assert getattr(ours, ask)() == getattr(meta, ask)(), ask
    assert (ours.dtype, ours.is_meta, tuple(meta.shape)) == (meta.dtype, True, ours.shape)
    assert said(ours.float) == said(meta.float)


def test_a_dtype_that_this_torch_lacks_counts_as_bytes():
    assert HeaderTensor((2,), "float5_of_the_future").dtype is torch.uint8


CALLS = {
    "flatten": lambda t, a, b, c: t.flatten(a),
    "narrow": lambda t, a, b, c: t.narrow(a, b, c),
    "item": lambda t, a, b, c: t[b],
    "slice": lambda t, a, b, c: t[b:c],
    "strided slice": lambda t, a, b, c: t[b:c:2],
    "mask": lambda t, a, b, c: t[None],
    "times": lambda t, a, b, c: t * 0.5,
    "minus": lambda t, a, b, c: t - 1,
    "over": lambda t, a, b, c: t.div(2),
    "transposed": lambda t, a, b, c: t.transpose(a, b),
    "reshaped": lambda t, a, b, c: t.reshape(b, -1),
    "permuted": lambda t, a, b, c: t.permute(0, 1),
    "viewed": lambda t, a, b, c: t.view(-1, 2),
    "to meta": lambda t, a, b, c: t.to("meta"),
    "to dtype": lambda t, a, b, c: t.to(torch.float64),
    "to like": lambda t, a, b, c: t.to(torch.empty(1, dtype=torch.bfloat16, device="meta")),
    "number": lambda t, a, b, c: float(t),
    "a function": lambda t, a, b, c: torch.linalg.vector_norm(t.float(), dim=0),
    "a function of several": lambda t, a, b, c: torch.cat([t, t]),
    "a missing name": lambda t, a, b, c: t.nonsense,
}


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES,
    name=st.sampled_from(["float16", "bfloat16", "float32", "int64", "uint8"]),
    numbers=st.tuples(st.integers(-2, 5), st.integers(-2, 5), st.integers(-2, 5)),
)
def test_calls_give_what_the_meta_device_gives(call, shape, name, numbers):
    ours = HeaderTensor(shape, name)
    assert said(lambda: CALLS[call](ours, *numbers)) == said(lambda: CALLS[call](on_meta(ours), *numbers))


@settings(max_examples=150, deadline=None)
@given(left=SHAPES, right=SHAPES, names=st.tuples(*[st.sampled_from(["float16", "float32", "int8"])] * 2))
def test_products_give_what_the_meta_device_gives(left, right, names):
    a, b = HeaderTensor(left, names[0]), HeaderTensor(right, names[1])
    meta = said(lambda: on_meta(a) @ on_meta(b))
    assert said(lambda: a @ b) == said(lambda: a @ on_meta(b)) == said(lambda: on_meta(a) @ b) == meta
    einsum = "rs...,si,ro->oi..."
    core = HeaderTensor((*left[:1], *right[:1], 3), names[0])
    metas = [on_meta(t) for t in (core, b, a)]
    assert said(lambda: torch.einsum(einsum, core, b, a)) == said(lambda: torch.einsum(einsum, *metas))


def test_a_product_beyond_every_memory_is_left_to_torch():
    tall, wide = HeaderTensor((1 << 40, 0), "float32"), HeaderTensor((0, 1 << 40), "float32")
    assert said(lambda: tall @ wide) == said(lambda: on_meta(tall) @ on_meta(wide))
    assert said(lambda: tall @ wide)[0] is RuntimeError


def test_nothing_but_numbers_has_a_value():
    number = HeaderTensor((), "float16", 0.5)
    assert (float(number), bool(number), number.is_meta) == (0.5, True, False)
    assert not HeaderTensor((1,), "bool", 0.0)
    with pytest.raises(RuntimeError, match=r"[Mm]eta"):
        bool(HeaderTensor((), "bool"))


def test_what_is_a_tensor():
    assert is_tensor(HeaderTensor((2,), "float16"))
    assert is_tensor(torch.empty(2))
    assert is_tensor(torch.nn.Parameter(torch.empty(2)))
    assert not any(map(is_tensor, (None, 1.0, "a", (torch.empty(2),))))


NUMBERS = {
    "BOOL": torch.tensor(True), "U8": torch.tensor(200, dtype=torch.uint8), "I8": torch.tensor(-3, dtype=torch.int8),
    "U16": torch.tensor(60000, dtype=torch.uint16), "I16": torch.tensor(-300, dtype=torch.int16),
    "U32": torch.tensor(4_000_000_000, dtype=torch.uint32), "I32": torch.tensor(-5, dtype=torch.int32),
    "U64": torch.tensor(2**53 + 3, dtype=torch.uint64), "I64": torch.tensor(-(2**53) - 3),
    "F16": torch.tensor(0.1, dtype=torch.float16), "BF16": torch.tensor(0.1, dtype=torch.bfloat16),
    "F32": torch.tensor(0.1), "F64": torch.tensor(0.1, dtype=torch.float64),
    "F8_E4M3": torch.tensor(0.3).to(torch.float8_e4m3fn), "F8_E5M2": torch.tensor(-0.3).to(torch.float8_e5m2),
}  # fmt: skip


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "a.safetensors"
    tensors = {**NUMBERS, "F32": NUMBERS["F32"].reshape(1), "C64": torch.tensor(1j)}
    write_safetensors(path, [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()])
    return open_header(path)


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_are_those_that_torch_reads(numbers, form):
    (number,) = read_numbers(numbers, [form]).values()
    assert number == float(read_tensors(numbers, [form])[form]) == float(NUMBERS[form])
    assert type(number) is float


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
def test_numbers_that_are_not_finite_stay_so(tmp_path, bits):
    tensor = torch.tensor(bits, dtype=torch.uint16).view(torch.float16)
    write_safetensors(tmp_path / "a", [Entry("x", tensor.dtype, (), lambda: tensor)])
    (number,) = read_numbers(open_header(tmp_path / "a"), ["x"]).values()
    assert not math.isfinite(number)


def test_a_header_gives_every_tensor_and_the_numbers_asked_for(numbers):
    found = header_tensors(numbers, ["F16", "C64"])
    assert list(found) == list(numbers.tensors)
    assert (found["F16"].number, found["C64"].number, found["F64"].number) == (float(NUMBERS["F16"]), None, None)
    assert (found["F32"].shape, found["BF16"].dtype_name) == ((1,), "bfloat16")
