"""alpha and strength beyond fp16, with factors so small that the change is within it: torch refuses such a number beside fp16."""

import pytest
import torch
from safetensors.torch import save_file

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraMismatchError

ALPHA = 2e6
MODES = ("auto", "bypass", "on_the_fly", "merge")


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
        for n, parameter in enumerate(self.parameters()):
            parameter.data = 0.1 * some(*parameter.shape, seed=n)

    def forward(self, dtype):
        x, image = some(3, 8, seed=10).to(dtype), some(1, 8, 4, 4, seed=11).to(dtype)
        return [self.linear(x), self.conv(image), self.conv(image.to(memory_format=torch.channels_last))]


def tensors(module, kind):
    """A change within fp16, made of small factors and a large alpha."""
    kernel = () if module == "linear" else (3, 3)
    columns = 8 if module == "linear" else 72
    if kind == "lora":
        up, down = some(8, 2, *(1 for _ in kernel)), some(2, 8, *kernel, seed=1)
        return {"lora_up.weight": up * 1e-2, "lora_down.weight": down * 1e-2, "alpha": torch.tensor(ALPHA)}
    if kind == "loha":
        sides = {
            f"hada_w{n}_{x}": some(8, 2, seed=n) if x == "a" else some(2, columns, seed=n) for n in (1, 2) for x in "ab"
        }
        return {**{name: 0.1 * side for name, side in sides.items()}, "alpha": torch.tensor(ALPHA)}
    if kind == "lokr":
        return {
            "lokr_w1": some(2, 2) * 1e-2,
            "lokr_w2_a": some(4, 2) * 0.1,
            "lokr_w2_b": some(2, columns // 2, seed=1) * 0.1,
            "alpha": torch.tensor(ALPHA),
        }
    return {"diff": some(8, 8, *kernel) * 1e-4}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
@pytest.mark.parametrize("module", ["linear", "conv"])
def test_the_change_is_that_of_fp32_in_every_mode(tmp_path, module, kind, mode):
    save_file({f"{module}.{name}": t for name, t in tensors(module, kind).items()}, tmp_path / "a.safetensors")
    stack = [(tmp_path / "a.safetensors", 1e6 if kind == "diff" else 1.0)]
    models = {dtype: Model().to(dtype) for dtype in (torch.float32, torch.float16)}
    with torch.no_grad():
        base = models[torch.float32](torch.float32)
        guards = {dtype: LoraGuard(model) for dtype, model in models.items()}
        for dtype, guard in guards.items():
            guard.apply(stack, "merge" if dtype == torch.float32 else mode)
        wanted, found = (models[dtype](dtype) for dtype in models)
    assert any((one - other).norm() > 0.05 * other.norm() for one, other in zip(wanted, base, strict=True)), "an effect"
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_that_no_dtype_has_is_refused_as_the_strength(tmp_path, dtype, mode):
    made = {**tensors("conv", "lora"), "alpha": torch.tensor(1e29)}
    save_file({f"conv.{name}": t for name, t in made.items()}, tmp_path / "a.safetensors")
    model = Model().to(dtype)
    before = [t.clone() for t in model(dtype)]
    with pytest.raises(LoraMismatchError, match=r"its strength is 1000000\.0, not a usable number"):
        LoraGuard(model).apply([(tmp_path / "a.safetensors", 1e6)], mode)
    assert all(torch.equal(a, b) for a, b in zip(model(dtype), before, strict=True))
