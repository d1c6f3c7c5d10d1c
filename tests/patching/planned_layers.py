"""Ten layers whose engine counts how often it derives cheap forms."""

import torch
from support.make import host_value, rand

from lib_lora_guard.adapters import LoraAdapter, parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching import plan
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning import cheap
from lib_lora_guard.planning.mode import Wish

LAYERS, WIDTH = 10, 16
KEYS = [f"{n}.weight" for n in range(LAYERS)]


X = rand(3, WIDTH, seed=5)


def lora(seed, keys=KEYS, **more):
    return {key: host_value("lora", (WIDTH, WIDTH), seed + n, **more) for n, key in enumerate(keys)}


FIRST, SECOND, DORA = lora(1), lora(50), lora(90, dora="output")


def stack(*loras):
    """Adapter objects are parsed anew for each stack, as Forge's are; their tensors are the same."""
    return [
        LoraRequest(
            f"lora{origin}",
            strength,
            {key: [parse_term([strength, value, 1.0, None, None], {}, origin)] for key, value in patches.items()},
        )
        for origin, (patches, strength) in enumerate(loras)
    ]


class Counted:
    """An engine on ten layers, and how often cheap forms were derived."""

    def __init__(self, monkeypatch):
        self.model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).requires_grad_(False)
        self.engine, self.access = Engine(), PlainAccess(self.model)
        self.forms = self.forwards = 0
        form_of, cheap_forward = cheap.form_of, LoraAdapter.cheap_forward

        def counting_form(*args, **kwargs):
            self.forms += 1
            return form_of(*args, **kwargs)

        def counting_forward(adapter):
            self.forwards += 1
            return cheap_forward(adapter)

        for module in (cheap, plan):
            monkeypatch.setattr(module, "form_of", counting_form)
        monkeypatch.setattr(LoraAdapter, "cheap_forward", counting_forward)

    def change(self, *loras, wish=Wish.AUTO):
        """The calls of `form_of` and of `cheap_forward` in this change."""
        self.forms = self.forwards = 0
        report = self.engine.change(self.access, stack(*loras), wish)
        assert not report.refused
        return self.forms, self.forwards

    def modes(self):
        return {attachment.mode for attachment in self.engine.attached.values()}

    def picture(self):
        with torch.no_grad():
            return self.model(X)
