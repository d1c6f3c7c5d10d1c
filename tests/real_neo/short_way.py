"""Pictures of a running Forge Neo with the fused pass (plain torch in the kernels' place) and without: at most one grey level apart.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/short_way.py

After make_storages.py. The console of the one side must name a fused pass for each checkpoint, that of the other none.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_forge.run import difference, show

from real_neo.neo import GGUF_PARTS, linked, parts, running
from real_neo.tables import image_with

MODELS = {
    "nf_fp8.safetensors": "fp8 e4m3",
    "nf_e5m2.safetensors": "fp8 e5m2",
    "nf_scaledfp8.safetensors": "fp8 e4m3 scaled",
    "nf_q8_0.gguf": "Q8_0",
    "nf_q4_0.gguf": "Q4_0",
    "nf_q4_k.gguf": "Q4_K",
    "nf_q6_k.gguf": "Q6_K",
}


def pictures(switch):
    found, kinds = {}, {}
    with running("guard", flags=("--lora-guard-log-level", "debug"), env={"LORA_GUARD_KERNELS": switch}) as neo:
        for model, kind in MODELS.items():
            modules = parts(GGUF_PARTS) if model.endswith(".gguf") else []
            begin = len(neo.console())
            for strength in (0, 4, 2):
                prompt = f"a cat <lora:nf_lora:{strength}>" if strength else "a cat"
                found[model, strength] = image_with(neo, model, prompt=prompt, modules=modules, cfg_scale=1)()
            lines = neo.console()[begin:].splitlines()
            kinds[model] = sum(kind in line and line.rstrip().endswith(": fused") for line in lines)
    return found, kinds


def main():
    with linked():
        without, none = pictures("0")
        with_it, fused = pictures("twin")
    wrong = [model for model in MODELS if none[model] or not fused[model]]
    for key, picture in with_it.items():
        off = difference(picture, without[key])
        effect = difference(picture, with_it[key[0], 0])
        print(key, "effect", show(effect), "apart", show(off), "kernels", fused[key[0]])
        if off is None or off[0] > (1 if key[1] else 0):
            wrong.append(key)
    print("WRONG" if wrong else "all as it should be", wrong or "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
