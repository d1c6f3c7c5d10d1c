"""Neo's torch.compile extension: a LoRA that changes shows in a model that is compiled."""

import pytest
import torch
from contract.stacks import lora_on_everything, other_kinds, reference, tokens
from support.measure import assert_same, same_bits

from contract_neo.host import REAL
from lib_lora_guard.patching.operators import is_compilable

pytestmark = pytest.mark.skipif(not is_compilable(), reason="Neo's torch is newer: this one fails on layers with LoRAs")


@pytest.fixture(autouse=True)
def _compiler():
    torch._dynamo.reset()
    # As the extension has it: GGUF's own classes are not compiled.
    with torch._dynamo.config.patch(suppress_errors=REAL):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("storage", ["bf16", "Q8_0", "kitchen fp8"] if REAL else ["bf16"])
def test_each_stack_counts_in_a_compiled_model(guarded, storage):
    patcher, dense = guarded.build(storage)
    compiled = torch.compile(patcher.model, backend="eager", dynamic=False)
    x = tokens(patcher)

    def run():
        with torch.inference_mode():
            return compiled(x).clone()

    base = run()
    stacks = [
        [("a", lora_on_everything(dense), 0.8)],
        [("a", lora_on_everything(dense), 0.3)],
        [("k", other_kinds(dense), 0.5), ("a", lora_on_everything(dense), 0.3)],
        [("k", other_kinds(dense), 0.25)],
        [("b", lora_on_everything(dense, 9), 0.5)],
    ]
    for loras in stacks if REAL else stacks[:3]:
        guarded.load(guarded.with_loras(patcher, *loras))
        assert_same(run(), reference(patcher, dense, loras), base, 0.02)
    guarded.load(patcher)
    assert same_bits(run(), base)
