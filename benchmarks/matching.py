"""Matching a LoRA of 494 modules with Flux.1: this checkout against another one, in CPU time.

    python benchmarks/matching.py --against PATH_OF_ANOTHER_CHECKOUT [--python ITS_PYTHON]

The file is one of diffusers (`transformer.`), the model one in the original layout, so that query, key and value are rows
of fused weights. Both have true names and shapes and no data. Two processes take turns, 30 times each; the medians are
compared. "first" matches with a model that was not seen before: its names are read, its architecture and that of the
file are told, every module gets its weight. "again" matches the same file with the same model once more, as after a
change of the LoRA's strength. The other checkout may be as old as 6090d05, which kept nothing from one to the next.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, DOUBLE, SINGLE, RANK = 3072, 19, 38, 16


def model_shapes():
    """The parameters of Flux.1 in the original layout."""
    shapes = {}

    def layer(name, rows, columns):
        shapes[f"diffusion_model.{name}.weight"] = (rows, columns)
        shapes[f"diffusion_model.{name}.bias"] = (rows,)

    def norms(name):
        for x in ("query", "key"):
            shapes[f"diffusion_model.{name}.{x}_norm.scale"] = (128,)

    layer("img_in", WIDTH, 64)
    layer("txt_in", WIDTH, 4096)
    for name, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        layer(f"{name}.in_layer", WIDTH, columns)
        layer(f"{name}.out_layer", WIDTH, WIDTH)
    for n in range(DOUBLE):
        for x in ("img", "txt"):
            block = f"double_blocks.{n}.{x}_"
            for inner, rows, columns in (("mod.lin", 6, 1), ("attn.qkv", 3, 1), ("attn.proj", 1, 1)):
                layer(block + inner, rows * WIDTH, columns * WIDTH)
            layer(block + "mlp.0", 4 * WIDTH, WIDTH)
            layer(block + "mlp.2", WIDTH, 4 * WIDTH)
            norms(block + "attn.norm")
    for n in range(SINGLE):
        block = f"single_blocks.{n}."
        layer(block + "linear1", 7 * WIDTH, WIDTH)
        layer(block + "linear2", WIDTH, 5 * WIDTH)
        layer(block + "modulation.lin", 3 * WIDTH, WIDTH)
        norms(block + "norm")
    layer("final_layer.linear", 64, WIDTH)
    layer("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return shapes


def lora_modules():
    """The 494 modules of the blocks in the names of diffusers, with their sizes."""
    modules = {}
    for n in range(DOUBLE):
        block = f"transformer_blocks.{n}."
        for x in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            modules[f"{block}attn.{x}"] = (WIDTH, WIDTH)
        for x in ("ff", "ff_context"):
            modules[f"{block}{x}.net.0.proj"] = (4 * WIDTH, WIDTH)
            modules[f"{block}{x}.net.2"] = (WIDTH, 4 * WIDTH)
        for x in ("norm1", "norm1_context"):
            modules[f"{block}{x}.linear"] = (6 * WIDTH, WIDTH)
    for n in range(SINGLE):
        block = f"single_transformer_blocks.{n}."
        for x in "qkv":
            modules[f"{block}attn.to_{x}"] = (WIDTH, WIDTH)
        modules[f"{block}proj_mlp"] = (4 * WIDTH, WIDTH)
        modules[f"{block}proj_out"] = (WIDTH, 5 * WIDTH)
        modules[f"{block}norm.linear"] = (3 * WIDTH, WIDTH)
    assert len(modules) == 494
    return modules


def write_lora(path):
    """Writes the file's header; the rest is a hole in the file."""
    header, at = {}, 0
    for module, (rows, columns) in lora_modules().items():
        for name, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
            size = 2 * shape[0] * shape[1]
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            header[f"transformer.{module}.{name}.weight"] = entry
            at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


def worker(root, path):
    """Answers each line on stdin with the seconds of CPU time that one match took."""
    sys.path.insert(0, str(root))
    first, again = _new(path) if (Path(root) / "lib_lora_guard/models/fit.py").exists() else _old(path)
    for line in sys.stdin:
        run = first if line.strip() == "first" else again
        gc.collect()
        start = time.process_time()
        run()
        print(time.process_time() - start, flush=True)


def _new(path):
    from lib_lora_guard.adapters.files import lora_of_header, open_lora
    from lib_lora_guard.models.fit import Target, fit_file

    file, shapes = lora_of_header(open_lora(path)), model_shapes()
    kept = Target(shapes)

    def first():
        _check(fit_file(file, Target(shapes)).terms)

    def again():
        _check(fit_file(file, kept).terms)

    again()
    return first, again


def _old(path):
    from lib_lora_guard.adapters.files import read_lora_header
    from lib_lora_guard.adapters.fitting import misfit
    from lib_lora_guard.models.architecture import detect_model
    from lib_lora_guard.models.matching import foreign_to, match_file
    from lib_lora_guard.models.names import NameMap

    file, shapes = read_lora_header(path), model_shapes()

    def match():
        names = NameMap(shapes)
        assert foreign_to(file, detect_model(shapes)) is None
        terms = match_file(file, names, shapes, 1.0).terms
        # Its engine looked afterwards whether each term fits its weight, which is part of the match today.
        assert not any(misfit(on_key, shapes[key], may_expand=False) for key, on_key in terms.items())
        _check(terms)

    return match, match


def _check(terms):
    assert sum(len(on_key) for on_key in terms.values()) == 494


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="the other checkout")
    parser.add_argument("--python", default=sys.executable, help="the other checkout's Python")
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        path = Path(folder) / "flux.safetensors"
        write_lora(path)
        pythons = {"this": (sys.executable, ROOT), "other": (options.python, options.against.resolve())}
        workers = {
            name: running.enter_context(
                subprocess.Popen(
                    [python, __file__, "--worker", str(root), str(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                )
            )
            for name, (python, root) in pythons.items()
        }
        for kind in ("first", "again"):
            seconds = {name: [] for name in workers}
            for pair in range(options.pairs + 2):
                for name in sorted(workers, reverse=pair % 2 == 1):
                    process = workers[name]
                    process.stdin.write(kind + "\n")
                    taken = float(process.stdout.readline())
                    if pair >= 2:
                        seconds[name].append(taken)
            this, other = (1e3 * statistics.median(seconds[name]) for name in ("this", "other"))
            print(f"{kind}: {this:.1f} ms, the other checkout {other:.1f} ms, {this / other:.2f} times its time")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:4])
    else:
        main()
