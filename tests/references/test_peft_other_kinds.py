"""Every kind that PEFT can train and the guard cannot apply is refused by its name, from PEFT's own files."""

import inspect
import shutil

import pytest
import torch

from lib_lora_guard.adapters.files import read_lora_file
from lib_lora_guard.errors import LoraFileError

peft = pytest.importorskip("peft", reason="peft writes the files")

SUPPORTED = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
OPTIONS = {
    "ADALORA": {"init_r": 4, "total_step": 10},
    "C3A": {"block_size": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "FOURIERFT": {"n_frequency": 8},
    "WAVEFT": {"n_frequency": 8},
    "ROAD": {"group_size": 4},
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.second(self.first(x))


def kinds():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value not in SUPPORTED}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(kinds()))
def test_a_file_of_another_kind_is_named(kind, tmp_path):
    config, options = kinds()[kind], dict(OPTIONS.get(kind, {}))
    known = inspect.signature(config).parameters
    if "target_modules" in known:
        options["target_modules"] = ["first", "second"]
    if "r" in known and kind != "ADALORA":
        options["r"] = 4
    try:
        peft.get_peft_model(Net(), config(**options)).save_pretrained(tmp_path)
    except (ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        pytest.skip(f"peft makes none of this for two linear layers: {error}")
    with pytest.raises(LoraFileError, match=f"a {kind} adapter of PEFT, a kind that cannot be applied here"):
        read_lora_file(tmp_path / "adapter_model.safetensors")
    # Without the configuration beside it the names of the tensors tell.
    shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(LoraFileError, match=f"(?i)a {kind} adapter of PEFT, a kind that cannot be applied here"):
        read_lora_file(tmp_path / "alone.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ["velora_config", "monteclora_config"])
def test_what_a_variant_keeps_beside_its_factors_for_training_is_no_fault(entry, tmp_path):
    config = getattr(peft, {"velora_config": "VeloraConfig", "monteclora_config": "MontecloraConfig"}[entry], None)
    if config is None:
        pytest.skip("this peft does not have it")
    options = peft.LoraConfig(r=4, target_modules=["first", "second"], **{entry: config()})
    try:
        peft.get_peft_model(Net(), options).save_pretrained(tmp_path)
    except (ValueError, TypeError) as error:
        pytest.skip(str(error))
    file = read_lora_file(tmp_path / "adapter_model.safetensors")
    assert {module for module, _ in file.adapters} == {"base_model.model.first", "base_model.model.second"}
