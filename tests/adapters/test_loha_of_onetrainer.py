"""LoHa as OneTrainer stores it for convolutions: the factors are convolutions themselves (`make_weight`)."""

import pytest
import torch
from support.make import rand
from support.trainer_formulas import assert_as_trained, layers


@pytest.mark.parametrize("kernel", [1, 3])
def test_factors_with_a_kernel(kernel, tmp_path):
    model = layers(conv=torch.nn.Conv2d(6, 8, kernel), lin=torch.nn.Linear(6, 8))
    shapes = {"hada_w1_a": (8, 4, 1, 1), "hada_w1_b": (4, 6, kernel, kernel)}
    shapes |= {"hada_w2_a": (8, 4, 1, 1), "hada_w2_b": (4, 6, kernel, kernel)}
    file, wanted = {}, {}
    for name, layer in model.items():
        factors = [
            rand(*(s if name == "conv" else s[:2]), seed=n, scale=0.5) for n, s in enumerate(shapes.values(), start=3)
        ]
        file |= {f"lora_unet_{name}.{key}": factor for key, factor in zip(shapes, factors, strict=True)}
        file[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
        a1, b1, a2, b2 = (factor.double().flatten(1) for factor in factors)
        wanted[name] = layer.weight.double() + 0.5 * ((a1 @ b1) * (a2 @ b2)).reshape(layer.weight.shape)
    assert_as_trained(tmp_path, model, file, wanted)
