"""Reading LoRA files: what a refusal costs, and what reading costs beside another version of LoRA Guard.

    python benchmarks/reading.py refuse
    python benchmarks/reading.py read --other PATH [--python PYTHON]

`refuse` makes sparse files of 22 GB, which take no room on the disk: a checkpoint with the header of Flux.1, and a LoRA. In a
child process it measures what the refusal takes: seconds, CPU seconds, and the peak of the resident memory over what it was.

`read` makes a LoRA of 494 modules and 150 MB, which lies in the system's cache after the first time. It reads it in two child
processes by turns, by this version and by the one in PATH, and prints the median of the pairs.
"""

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 3072
MOST_SECONDS, MOST_MB = 0.1, 32
"""The promise for a checkpoint that is chosen as LoRA."""


def flux_shapes():
    """Names and shapes of Flux.1's transformer as its authors publish it."""
    shapes = {}

    def linear(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("img_in", WIDTH, 64)
    linear("txt_in", WIDTH, 4096)
    for name, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        linear(f"{name}.in_layer", WIDTH, columns)
        linear(f"{name}.out_layer", WIDTH, WIDTH)
    for n in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{n}.{side}"
            linear(f"{block}_mod.lin", 6 * WIDTH, WIDTH)
            linear(f"{block}_attn.qkv", 3 * WIDTH, WIDTH)
            linear(f"{block}_attn.proj", WIDTH, WIDTH)
            linear(f"{block}_mlp.0", 4 * WIDTH, WIDTH)
            linear(f"{block}_mlp.2", WIDTH, 4 * WIDTH)
            for norm in ("query_norm", "key_norm"):
                shapes[f"{block}_attn.norm.{norm}.scale"] = (128,)
    for n in range(38):
        block = f"single_blocks.{n}"
        linear(f"{block}.linear1", 7 * WIDTH, WIDTH)
        linear(f"{block}.linear2", WIDTH, 5 * WIDTH)
        linear(f"{block}.modulation.lin", 3 * WIDTH, WIDTH)
        for norm in ("query_norm", "key_norm"):
            shapes[f"{block}.norm.{norm}.scale"] = (128,)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    linear("final_layer.linear", 64, WIDTH)
    return shapes


def lora_shapes(rank, modules=None):
    """A LoRA in diffusers' names: 494 modules of Flux.1, as trainers that train all of it write them."""
    shapes, made = {}, 0

    def add(name, rows, columns):
        nonlocal made
        if modules is None or made < modules:
            shapes[f"transformer.{name}.lora_A.weight"] = (rank, columns)
            shapes[f"transformer.{name}.lora_B.weight"] = (rows, rank)
            made += 1

    for n in range(19):
        block = f"transformer_blocks.{n}"
        for side in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            add(f"{block}.attn.{side}", WIDTH, WIDTH)
        for side in ("ff", "ff_context"):
            add(f"{block}.{side}.net.0.proj", 4 * WIDTH, WIDTH)
            add(f"{block}.{side}.net.2", WIDTH, 4 * WIDTH)
        for side in ("norm1.linear", "norm1_context.linear"):
            add(f"{block}.{side}", 6 * WIDTH, WIDTH)
    for n in range(38):
        block = f"single_transformer_blocks.{n}"
        for side in ("to_q", "to_k", "to_v"):
            add(f"{block}.attn.{side}", WIDTH, WIDTH)
        add(f"{block}.norm.linear", 3 * WIDTH, WIDTH)
        add(f"{block}.proj_mlp", 4 * WIDTH, WIDTH)
        add(f"{block}.proj_out", WIDTH, 5 * WIDTH)
    return shapes


def write_sparse(path, shapes, dtype="BF16", value_bytes=2):
    """Writes a safetensors file whose values are a hole: zeros that take no room on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = value_bytes
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


REFUSE = """
import ctypes, gc, sys, time
sys.path.insert(0, sys.argv[2])
import torch
from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.adapters import files  # every kind is registered, as in a program that has used a LoRA

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

guard = LoraGuard(torch.nn.Sequential(torch.nn.Linear(4, 4)))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, cpu, began = status("VmRSS"), time.process_time(), time.perf_counter()
try:
    guard.apply([(sys.argv[1], 1.0)])
    said = "not refused"
except LoraFileError as error:
    said = str(error)
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
import json
print(json.dumps({"said": said, "seconds": seconds, "cpu_seconds": cpu, "mb": status("VmHWM") - before}))
"""

READ = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from lib_lora_guard.adapters.files import read_lora_file
read_lora_file(sys.argv[1])
for line in sys.stdin:
    cpu, began = time.process_time(), time.perf_counter()
    file = read_lora_file(sys.argv[1])
    print(time.perf_counter() - began, time.process_time() - cpu, len(file.adapters), flush=True)
    del file
"""


def in_a_process(code, *arguments):
    """Runs `code` in a Python of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)


def refusal(path, run=in_a_process):
    """Measures the refusal of a file in a child process; returns what was said, and the cost. Linux only.

    `run`: starts the process; a test has one that has torch already.
    """
    return json.loads(run(REFUSE, str(path), str(ROOT)).stdout)


def refuse(options):
    """Prints what each refusal cost, and returns 1 if one cost too much."""
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "checkpoint of Flux.1": write_sparse(Path(folder) / "flux.safetensors", flux_shapes()),
            "LoRA of rank 4096": write_sparse(Path(folder) / "lora.safetensors", lora_shapes(4096), "F32", 4),
        }
        for name, path in files.items():
            found = [refusal(path) for _ in range(options.times)]
            seconds = statistics.median(one["seconds"] for one in found)
            cpu = statistics.median(one["cpu_seconds"] for one in found)
            mb = max(one["mb"] for one in found)
            print(f"{name}, {path.stat().st_size / 1e9:.1f} GB: {seconds:.3f} s, {cpu:.3f} s of CPU, {mb:.1f} MB more")
            print(f"  {found[0]['said']}")
            status |= found[0]["said"] == "not refused" or min(seconds, cpu) > MOST_SECONDS or mb > MOST_MB
    return int(status)


def read(options):
    """Prints the medians of reading by this version and by the other."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_sparse(Path(folder) / "lora.safetensors", lora_shapes(14))
        path.write_bytes(path.read_bytes())  # no hole: the pages lie in the system's cache
        print(f"{path.stat().st_size / 1e6:.0f} MB")
        sides = {"this": (sys.executable, ROOT), "other": (options.python or sys.executable, options.other)}
        children = {
            side: subprocess.Popen(
                [python, "-c", READ, str(path), str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for side, (python, root) in sides.items()
        }
        times = {side: [] for side in children}
        for turn in range(options.pairs):
            for side in sorted(children, reverse=bool(turn % 2)):
                child = children[side]
                child.stdin.write("\n")
                child.stdin.flush()
                wall, cpu, modules = child.stdout.readline().split()
                assert modules == "494", f"{side}: {modules} modules"
                times[side].append((float(wall), float(cpu)))
        for child in children.values():
            child.stdin.close()
            child.wait()
    for place, what in ((0, "wall"), (1, "CPU")):
        this, other = (statistics.median(one[place] for one in times[side]) for side in ("this", "other"))
        ratio = statistics.median(
            mine[place] / theirs[place] for mine, theirs in zip(times["this"], times["other"], strict=True)
        )
        print(f"{what}: this {1e3 * this:.1f} ms, other {1e3 * other:.1f} ms, median of the ratios {ratio:.3f}")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("refuse")
    one.add_argument("--times", type=int, default=3)
    one.set_defaults(run=refuse)
    two = commands.add_parser("read")
    two.add_argument("--other", type=Path, required=True, help="folder of the other version")
    two.add_argument("--python", help="its Python, if it needs another one")
    two.add_argument("--pairs", type=int, default=30)
    two.set_defaults(run=read)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
