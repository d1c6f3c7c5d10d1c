"""What baking makes of GGUF weights: sizes by `planning.gguf_baked`, and that everything counts them as baked."""

import pytest
import torch
from support.live_memory import LiveMemory

from contract.host import REAL, STORAGES, _real_gguf

only_real = pytest.mark.skipif(not REAL, reason="the double bakes Q8_0 alone, which does not grow")
FORMS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16"]


@only_real
@pytest.mark.parametrize("form", FORMS)
def test_x(host, form):
    p = _real_gguf(host.gguf, torch.randn(512, 1024), form)
    before = p.data.numel() * p.data.element_size()
    q = _real_gguf(host.gguf, torch.randn(512, 1024), form)
    q.gguf_cls.bake(q)
    with LiveMemory(p.data) as live:
        p.gguf_cls.bake(p)
    after = p.data.numel() * p.data.element_size()
    print(form, before / 512 / 1024, after / 512 / 1024, "peak new / stored", live.peak_bytes / before, [round(s/before,3) for s in live.sizes][:20])
