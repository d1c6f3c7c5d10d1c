#!/usr/bin/env bash
# Guess:    loralib merges its LoRA at eval() and takes it out at train(). A LoRA loaded into the model before or after
#           eval() is the LoRA that acts.
# Versions: torch==2.13.0 numpy==2.4.6 loralib==0.1.2, any build of torch, on a CPU
# Seen:     Only before. Loaded after eval() it leaves 0.0 of itself in the outputs: Linear, MergedLinear, Embedding and
#           Conv2d are merged by the change of mode alone, and the outputs stay those of the LoRA before. eval() again
#           changes nothing. train() then takes out the new LoRA in place of the old one, so that base + old - new is
#           what stays: with the new one running the model still does what the old one did, in both modes, until the
#           base itself is loaded again.
# Matters:  Whoever goes through a folder of LoRAs with one model in eval(), as one does to compare them, sees the first
#           one each time. What was merged has to be kept, as factors or as the old weight: taking out what the
#           parameters hold now is right only while nobody has loaded anything.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 loralib==0.1.2
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import loralib
import torch
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
vectors = torch.randn(32, 8)
KINDS = {
    "Linear": (vectors, lambda: loralib.Linear(8, 12, r=2)),
    "MergedLinear": (vectors, lambda: loralib.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])),
    "Embedding": (torch.randint(0, 10, (32,)), lambda: loralib.Embedding(10, 12, r=2)),
    "Conv2d": (torch.randn(4, 8, 6, 6), lambda: loralib.Conv2d(8, 12, 3, r=2)),
}
for kind, (given, build) in KINDS.items():
    layer = nn.Sequential(build())
    base = {name: value.clone() for name, value in layer.state_dict().items() if "lora_" not in name}
    shapes = {name: value.shape for name, value in layer.state_dict().items() if "lora_" in name}
    none, old, new = ({name: size * torch.randn(shape) for name, shape in shapes.items()} for size in (0, 1, 1))

    @torch.no_grad()
    def run(model):
        return model(given)

    def loaded(lora):
        """Returns a layer as loralib's README makes it: the base, then the LoRA, then eval()."""
        model = nn.Sequential(build())
        model.load_state_dict(base, strict=False)
        model.load_state_dict(lora, strict=False)
        return model.eval()

    plain, of_old, of_new = run(loaded(none)), run(loaded(old)), run(loaded(new))
    effect = (of_new - plain).norm()
    off = ((run(loaded(new).train()) - of_new).norm() / effect).item()
    check(f"{kind}: the new LoRA running and merged, apart", off, 0, 1e-9)
    check(f"{kind}: effect of the new LoRA", (effect / plain.norm()).item(), 0.1, 100)
    check(f"{kind}: the two LoRAs, apart", ((of_old - of_new).norm() / effect).item(), 0.3, 10)

    for before, outputs, lora in (("none", plain, none), ("the old LoRA", of_old, old)):
        model, what = loaded(lora), f"{kind}, {before} before"
        result = model.load_state_dict(new, strict=False)
        check(f"{what}: keys refused by the load", len(result.unexpected_keys), 0, 0)
        holds = all(model.state_dict()[name].equal(new[name]) for name in new)
        check(f"{what}: the layer holds the new LoRA", holds, 1, 1)
        check(f"{what}: outputs, off those before", (run(model) - outputs).norm().item(), 0, 0)
        check(f"{what}: eval() again, off those before", (run(model.eval()) - outputs).norm().item(), 0, 0)
        for mode in (True, False, True):
            off = ((run(model.train(mode)) - outputs).norm() / effect).item()
            check(f"{what}: then train({mode}), off those before", off, 0, 1e-9)
        # by hand: what train() took out of the weight is not what eval() had put in
        name = "0.conv.weight" if kind == "Conv2d" else "0.weight"
        weight, true = model.state_dict()[name], base[name]
        check(f"{what}: weight of the base in train(), off", ((weight - true).norm() / true.norm()).item(), 0.1, 100)
        # the remedy: the base anew, in train()
        model.load_state_dict(base, strict=False)
        off = ((run(model.eval()) - of_new).norm() / effect).item()
        check(f"{what}: base loaded again in train(), off the new LoRA", off, 0, 1e-9)
PY
