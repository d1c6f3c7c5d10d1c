"""Facts about Forge's models, for models that lack the usual attributes too."""

from types import SimpleNamespace

import pytest
import torch

from lib_lora_guard.hosts.forge import facts
from lib_lora_guard.hosts.forge.access import ForgeAccess


class Network(torch.nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)


class Wrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.diffusion_model = Network()


@pytest.mark.parametrize(
    ("attributes", "dtype"),
    [
        ({"computation_dtype": torch.bfloat16}, torch.bfloat16),
        ({"computation_dtype": torch.float32}, torch.float32),
        ({"computation_dtype": None}, torch.float16),
        ({"computation_dtype": "bf16"}, torch.float16),
        ({}, torch.float16),
    ],
)
def test_a_model_computes_in_fp16_unless_it_says_otherwise(attributes, dtype):
    model = Network(**attributes)
    assert facts.compute_dtype(model) == dtype
    api = SimpleNamespace(operations=SimpleNamespace())
    assert ForgeAccess(api, model).compute_dtype() == dtype


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ({"storage_dtype": torch.bfloat16}, "bf16"),
        ({"storage_dtype": torch.float8_e4m3fn}, "fp8_e4m3fn"),
        ({"storage_dtype": "nf4"}, "nf4"),
        ({"storage_dtype": None}, ""),
        ({}, ""),
    ],
)
def test_the_storage_has_its_common_name(attributes, name):
    assert facts.storage_name(Network(**attributes)) == name


def test_a_denoiser_is_forges_wrapper_of_one():
    assert facts.is_denoiser(Wrapper())
    assert facts.network_name(Wrapper()) == "Network"
    assert not facts.is_denoiser(Network())
    assert facts.network_name(Network()) == "Network"


def test_another_extensions_objects_may_lack_what_forges_have():
    assert facts.loader_of(SimpleNamespace()) is None
    assert facts.patches_of(SimpleNamespace()) == {}
    assert facts.loaded_module(SimpleNamespace()) is None
    assert facts.about_patcher(SimpleNamespace()).loras == ()
