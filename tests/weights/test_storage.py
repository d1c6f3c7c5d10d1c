import pytest
import torch

from lib_lora_guard.weights import dtype_name, shares_storage, storage_of


@pytest.mark.parametrize(
    ("dtype", "name", "wide"),
    [
        (torch.float32, "fp32", True),
        (torch.bfloat16, "bf16", True),
        (torch.float16, "fp16", True),
        (torch.float8_e4m3fn, "fp8_e4m3fn", False),
        (torch.float8_e5m2, "fp8_e5m2", False),
        (torch.uint8, "uint8", False),
    ],
)
def test_dense_storage(dtype, name, wide):
    storage = storage_of(torch.nn.Parameter(torch.zeros(4, 3).to(dtype), requires_grad=False))
    assert (storage.format, storage.shape, storage.wide) == (name, (4, 3), wide)
    assert storage.bytes == 12 * torch.zeros(1).to(dtype).element_size()
    assert dtype_name(dtype) == name


def test_a_bnb_parameter_shows_the_shape_of_its_weight():
    parameter = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    parameter.bnb_quantized, parameter.quant_type = True, "nf4"
    parameter.quant_state = type("State", (), {"shape": torch.Size([16, 8])})()
    assert (storage_of(parameter).format, storage_of(parameter).shape, storage_of(parameter).wide) == (
        "nf4",
        (16, 8),
        False,
    )


def test_shared_storage_is_seen_through_views_and_casts_that_return_the_same_tensor():
    parameter = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    assert shares_storage(parameter.to(torch.float32), parameter)
    assert shares_storage(parameter.data[1:], parameter)
    assert not shares_storage(parameter.clone(), parameter)
    assert not shares_storage(parameter.to(torch.float16), parameter)
    assert not shares_storage(parameter, None)
