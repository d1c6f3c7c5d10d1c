"""Deferred tensors: everything torch does with them works on the values, and nothing reaches the memory they come from."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from support.make import rand
from support.measure import same_bits

from lib_lora_guard.patching.deferred import DeferredTensor

VALUES = rand(4, 6, seed=1).to(torch.bfloat16)


class Source:
    def __init__(self, values=VALUES):
        self.values, self.reads = values.clone(), 0
        self.deferred = DeferredTensor(self.read, values.dtype, tuple(values.shape), values.device)

    def read(self):
        self.reads += 1
        return self.values


def joined(tensors):
    """As a converter does it that may not use `cat`."""
    out = torch.empty(sum(t.shape[0] for t in tensors), *tensors[0].shape[1:], dtype=tensors[0].dtype)
    at = 0
    for tensor in tensors:
        out[at : at + tensor.shape[0]] = tensor
        at += tensor.shape[0]
    return out


OPERATIONS = {
    "transpose": lambda t: t.transpose(0, 1).contiguous(),
    "t": lambda t: t.t(),
    "to": lambda t: t.to(torch.float32),
    "half": lambda t: t.half(),
    "cat": lambda t: torch.cat([t, t], 1),
    "stack": lambda t: torch.stack((t, VALUES)),
    "slices of another": lambda t: joined([t, t, t]),
    "part": lambda t: t[1:3, ::2],
    "view": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(2, 12).clone(),
    "bytes": lambda t: t.view(torch.uint8),
    "matmul": lambda t: t @ t.t(),
    "detach": lambda t: t.detach(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_give_plain_tensors_with_the_right_values(operation, inference):
    source = Source()
    with torch.inference_mode(inference):
        result, wanted = (OPERATIONS[operation](t) for t in (source.deferred, VALUES.clone()))
        assert type(result) is torch.Tensor
        assert same_bits(result, wanted)
        result.zero_()
    assert same_bits(source.values, VALUES), "an operation's result reached the memory that is read"


@pytest.mark.parametrize("inference", [False, True])
def test_attributes_and_clones_do_not_compute_the_values(inference):
    source = Source()
    with torch.inference_mode(inference):
        copied = source.deferred.clone().clone()
        assert isinstance(copied, DeferredTensor)
        assert (copied.dtype, copied.shape, copied.device.type) == (torch.bfloat16, (4, 6), "cpu")
        assert (copied.numel(), copied.element_size(), copied.is_contiguous()) == (24, 2, True)
        assert copied.contiguous() is copied
        assert None not in [copied, source.deferred]
        assert "4, 6" in repr(copied)
    assert source.reads == 0
    assert same_bits(copied.read(), VALUES)
    assert source.reads == 1


@pytest.mark.parametrize("write", [lambda t: t.mul_(2), lambda t: t.copy_(VALUES), lambda t: t.zero_()])
def test_writing_into_a_deferred_tensor_raises(write):
    source = Source()
    with pytest.raises(RuntimeError, match="cannot be written into"):
        write(source.deferred)
    assert same_bits(source.values, VALUES)


@pytest.mark.filterwarnings("ignore:TypedStorage")  # safetensors with older torch
def test_access_to_its_memory_raises_instead_of_reading_rubbish(tmp_path):
    deferred = Source().deferred
    with pytest.raises((RuntimeError, TypeError)):
        deferred.numpy()
    with pytest.raises(RuntimeError):
        deferred.untyped_storage().data_ptr()
    with pytest.raises(RuntimeError):
        safetensors.torch.save({"a": deferred})
    kept = io.BytesIO()
    torch.save({"a": deferred}, kept)
    kept.seek(0)
    assert same_bits(torch.load(kept)["a"], VALUES)


def test_a_deferred_tensor_has_the_values_at_the_time_of_reading():
    values = VALUES.clone()
    deferred = DeferredTensor.of(values).clone()
    values.add_(1)
    assert deferred.read() is values
    assert same_bits(deferred.transpose(0, 1), (VALUES + 1).transpose(0, 1))
