"""Makes docs/spellings.md: how many modules of a LoRA file are used, and how exactly, by architecture and spelling.

    python benchmarks/spellings.py [--write docs/spellings.md]

Needs diffusers, peft and LyCORIS; takes some minutes on one core. Nothing is downloaded: the models are small and random.
The section that `trainers_own.py` makes stays as it is in the page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from support.spelled import MAKERS, OF_TRANSFORMERS, SPELLINGS, UNETS, Found, parts_of, read_back  # noqa: E402

from benchmarks.pages import replaced, section_of  # noqa: E402

OWN = "## The trainers' own code"
"""The section of `trainers_own.py`."""
_HEAD = """# Spellings of LoRA files

Every trainer writes the names of a model's layers in its own way, and a model has them in its authors' layout (Forge,
Forge Neo and ComfyUI load that one) or in diffusers'. The tables show what is read of each. A cell says how many modules
of the file are used, of how many, and the error over all parameters of the model, as a share of what the LoRA adds.

Made by `python benchmarks/spellings.py --write docs/spellings.md` with {versions}.
`tests/references/test_spellings.py` holds the models of 2025 and 2026 to it.

- The models are diffusers' own classes in small, with random weights and every kind of layer; there are fewer blocks than
  in the real ones.
- The LoRA is PEFT's, on every linear layer and 2-D convolution, rank 4, alpha 6. The truth is the model after diffusers'
  `fuse_lora`. LoKr is LyCORIS'; the truth is its own difference.
- Which rows of the authors' checkpoint a layer of diffusers is, diffusers' converters of checkpoints say (not the guard's
  tables). Qwen-Image and ERNIE-Image have one layout.
- A name alone stands for its trainer's names: `lora_unet_` before the authors' names, `transformer.` before diffusers'.
- The files carry the trainer's names with the trainer's keys (`lora_A`, `lora_down`, `alpha`); the trainers themselves
  were not run for this table, but for [those below](#the-trainers-own-code). A layer that the authors have fused (query, key and value) is one module in files with the authors' names.
- Flux.2 stands for dev and Klein, which differ in sizes alone; Anima is diffusers' Cosmos-Predict2, whose layers it has.

## On the authors' layout
"""
_SECOND = """
## On diffusers' layout
"""
_LAST = """
## Wider inputs

An inpainting, FLUX-tools or image-to-video model has more input channels in its first projection (`conv_in`, `x_embedder`,
`img_in`, `patch_embedding`: 4 to 9, 64 to 384, 16 to 36) than the model a LoRA was trained with. The first channels are those
of the image in all of them. `tests/adapters/test_layers_of_another_size.py` holds every kind to its formula, in every mode.

| kind | further channels |
| --- | --- |
| LoRA, LoCon, LoHa, LoKr, with a Tucker core too; differences | get nothing |
| IA3 on the input | factor 1 |
| GLoRA | get nothing; `W A` sees the first columns of W alone |
| OFT and BOFT of PEFT, OFT of OneTrainer (input side) | are not turned: identity. A factor per row scales the whole row |
| OFT and BOFT of LyCORIS and sd-scripts, IA3 on the output | the rows are changed whole: the width does not matter |
| OFT with a single block, where no `adapter_config.json` says `block_share` | turned with all others, where every layer of the file has one block of about that size (OneTrainer's `oft_block_share`); else left out and named: the block may be for all inputs or for the first |
| DoRA of any kind; OFT with `dora_scale` and no `initial_norm` | left out and named: the norms that it was trained with are those of fewer columns |
| whole weights (`set_weight`, `modules_to_save`) | left out and named: the file has no values for the further channels |

`block_share: true` on a wider input turns all of it: such a file does not say how many columns it was trained with.

## Not in the tables

- **Text encoders**: `tests/references/test_language_models.py` holds Qwen3, Gemma 2, Mistral, Qwen2.5-VL and UMT5 of
  transformers against PEFT's merge, as transformers and as Forge Neo name them, in ten spellings (`lora_te_`, `lora_te1_`,
  `lycoris_`, `text_encoder.`, `base_model.model.`, `text_encoders.NAME.`, each with the names before `layers` or without);
  `test_diffusers_names.py` and `test_architectures.py` CLIP and T5.
- **Anima's adapter** (`llm_adapter`): names only, against Forge Neo's key map (its `lora_te_llm_adapter_` and
  `text_encoders.qwen3_06b.llm_adapter.`) and diffusers' `text_conditioner`, in `tests/models/test_models_of_2025.py`.
- **Parameters outside layers** (Wan's `modulation`, Krea 2's `mod.lin`, pad tokens): names against diffusers' converters in
  `tests/references/test_names_of_2025.py`, differences for them in `tests/models/test_models_of_2025.py`.
- **HunyuanImage and HunyuanVideo** are recognised, so that a LoRA for another model is refused by name. They have no table
  of their own: a name works where it is the model's own.
"""


def _cell(found: Found) -> str:
    if found.refused:
        return "refused"
    return f"{found.used}/{found.modules}, {found.error:.0e}"


def _table(folder: Path, families: list[str], *, in_diffusers: bool) -> Iterator[str]:
    yield "| | " + " | ".join(SPELLINGS) + " |"
    yield "| --- |" + " --- |" * len(SPELLINGS)
    for family in families:
        cells = []
        for spelling in SPELLINGS:
            if family in UNETS and spelling in OF_TRANSFORMERS:
                cells.append("-")
                continue
            cells.append(_cell(read_back(family, spelling, folder, in_diffusers=in_diffusers)))
            print(f"{family}, {spelling}: {cells[-1]}", file=sys.stderr)
        yield f"| {family} | " + " | ".join(cells) + " |"


def _page() -> Iterator[str]:
    names = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "peft", "lycoris-lora", "torch"))
    yield _HEAD.format(versions=names)
    with tempfile.TemporaryDirectory() as folder:
        yield from _table(Path(folder), list(MAKERS), in_diffusers=False)
        yield _SECOND
        yield from _table(Path(folder), [f for f in MAKERS if parts_of(f)], in_diffusers=True)
    yield _LAST


def main() -> int:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser(description="Modules used and errors, by architecture and spelling.")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    page = "\n".join(_page()).rstrip() + "\n"
    if arguments.write and arguments.write.exists():
        page = replaced(page, OWN, section_of(arguments.write.read_text(encoding="utf-8"), OWN))
    if arguments.write:
        arguments.write.write_text(page, encoding="utf-8")
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
