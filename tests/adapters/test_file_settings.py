"""PEFT's settings: where they lie, and what becomes of those that cannot be read."""

import json

import pytest
from safetensors.torch import save_file
from support.make import rand

from lib_lora_guard.adapters.files import read_lora_file


def test_alpha_comes_from_pefts_settings_in_the_metadata_or_beside_the_file(tmp_path):
    up, down = rand(8, 4, seed=1), rand(4, 6, seed=2)
    tensors = {
        f"transformer.blocks.{n}.proj.{k}.weight": v.clone()
        for n in range(2)
        for k, v in (("lora_A", down), ("lora_B", up))
    }
    tensors |= {f"text_encoder.proj.{k}.weight": v.clone() for k, v in (("lora_A", down), ("lora_B", up))}
    settings = {
        "transformer.r": 4, "transformer.lora_alpha": 16, "transformer.use_rslora": True,
        "transformer.alpha_pattern": {"blocks.1.proj": 2},
        "text_encoder.lora_alpha": 3,
    }  # fmt: skip
    save_file(tensors, str(tmp_path / "d.safetensors"), metadata={"lora_adapter_metadata": json.dumps(settings)})
    file = read_lora_file(tmp_path / "d.safetensors")
    scales = {module: adapter.scale for (module, _), adapter in file.adapters.items()}
    assert scales == {"transformer.blocks.0.proj": 8.0, "transformer.blocks.1.proj": 1.0, "text_encoder.proj": 0.75}
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {"base_model.model.p.lora_A.weight": down, "base_model.model.p.lora_B.weight": up},
        str(folder / "adapter_model.safetensors"),
    )
    assert read_lora_file(folder / "adapter_model.safetensors").adapters["base_model.model.p", "weight"].alpha is None
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 6}', encoding="utf-8")
    assert read_lora_file(folder / "adapter_model.safetensors").adapters["base_model.model.p", "weight"].alpha == 6.0


def test_a_configuration_that_is_too_large_is_named(tmp_path, caplog):
    tensors = {"p.lora_A.weight": rand(4, 6, seed=1), "p.lora_B.weight": rand(8, 4, seed=2)}
    save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    padding = " " * (3 << 19)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6}' + padding, encoding="utf-8")
    (adapter,) = read_lora_file(tmp_path / "adapter_model.safetensors").adapters.values()
    assert adapter.alpha is None
    assert "adapter_config.json beside it has 1.5 MB and is not read, for at most 1 MB are" in caplog.text


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"lora_alpha": "many", "alpha_pattern": {"(a+)+$": 2}}'])
def test_settings_that_cannot_be_read_are_left_out_with_a_warning(tmp_path, text, caplog):
    tensors = {
        f"{'a' * 60}!.{k}": v for k, v in (("lora_A.weight", rand(4, 6, seed=1)), ("lora_B.weight", rand(8, 4, seed=2)))
    }
    save_file(tensors, str(tmp_path / "d.safetensors"), metadata={"lora_adapter_metadata": text})
    (adapter,) = read_lora_file(tmp_path / "d.safetensors").adapters.values()
    assert adapter.alpha is None
    assert ("not readable JSON" in caplog.text) == (not text.startswith('{"'))
