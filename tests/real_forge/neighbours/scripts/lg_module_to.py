"""As forge_space apps and `automatic_memory_management`: `torch.nn.Module.to` is replaced for good, and a program of its
own moves modules that it has collected."""

import lg_neighbours
import torch

if lg_neighbours.wanted("module_to"):
    _to, _init = torch.nn.Module.to, torch.nn.Module.__init__

    def to(self, *args, **kwargs):
        lg_neighbours.work("Module.to")
        return _to(self, *args, **kwargs)

    torch.nn.Module.to = to

    class ModuleTo(lg_neighbours.script_class()):
        called = "module to"

        def process(self, p, setting="", **kwargs):
            if not setting:
                return
            seen = []

            def init(module, *args, **kw):
                seen.append(module)
                return _init(module, *args, **kw)

            torch.nn.Module.__init__ = init
            try:
                torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)).to("cpu")
            finally:
                torch.nn.Module.__init__ = _init
            for module in seen:
                module.to(device=torch.device("cpu"))
