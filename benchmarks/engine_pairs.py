"""Times apply, change, remove and a forward pass of two versions of this project by turns, on the CPU.

    python benchmarks/engine_pairs.py --before ../main --after . --pairs 30

Each version runs in a process of its own, which gives the least of three times for each step and mode. The processes are made anew
every few pairs: where memory happens to lie would else count as a difference. Printed are the median of the CPU times of both and
of the ratios of the pairs, with the interval that the median of the ratios lies in (95 %, by order of rank).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LAYERS, WIDTH, RANK = 120, 64, 16
TIMES, PAIRS_OF_A_PROCESS = 3, 2
MODES = {"auto": "AUTO", "on the fly": "ON_THE_FLY", "merge": "MERGE"}


def child():
    import torch

    from lib_lora_guard.adapters import LoraAdapter, Term
    from lib_lora_guard.hosts.plain.access import PlainAccess
    from lib_lora_guard.patching.engine import Engine, LoraRequest  # here in every version
    from lib_lora_guard.patching.strengths import set_strengths
    from lib_lora_guard.planning.mode import Wish

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    layers = {f"block_{n}": torch.nn.Linear(WIDTH, WIDTH) for n in range(LAYERS)}
    model = torch.nn.Sequential(*layers.values()).requires_grad_(False)
    access, x = PlainAccess(model), torch.randn(8, WIDTH, generator=generator)
    keys = [f"{n}.weight" for n in range(LAYERS)]

    def lora():
        pairs = [
            (torch.randn(WIDTH, RANK, generator=generator), torch.randn(RANK, WIDTH, generator=generator)) for _ in keys
        ]
        return {key: LoraAdapter(up, down, alpha=0.1) for key, (up, down) in zip(keys, pairs, strict=True)}

    adapters = lora(), lora()

    def requests(*strengths):
        return [
            LoraRequest(f"lora{n}", s, {key: [Term(a, s, origin=n)] for key, a in adapters[n].items()})
            for n, s in enumerate(strengths)
        ]

    def timed(work):
        started = time.process_time()
        work()
        return (time.process_time() - started) * 1000

    def forward():
        with torch.no_grad():
            for _ in range(2):
                model(x)

    def run():
        found = {}
        for name, wish in MODES.items():
            engine, wish = Engine(), Wish[wish]
            stacks = {"apply": (0.7,), "change a strength": (0.3,), "apply the same": (0.3,), "add a LoRA": (0.3, 0.5)}
            for step, strengths in stacks.items():
                stack = requests(*strengths)
                found[f"{name}: {step}"] = timed(lambda: engine.change(access, stack, wish))  # noqa: B023  # called at once
            found[f"{name}: forward"] = timed(forward)
            found[f"{name}: between steps"] = timed(lambda: set_strengths(engine, {0: 0.6, 1: 0.2}))  # noqa: B023  # the same
            one = requests(0.6)
            found[f"{name}: take one off"] = timed(lambda: engine.change(access, one, wish))  # noqa: B023  # the same
            found[f"{name}: remove"] = timed(lambda: engine.change(access, []))  # noqa: B023  # the same
        return found

    run()
    for _ in sys.stdin:
        turns = [run() for _ in range(TIMES)]
        print(json.dumps({step: min(turn[step] for turn in turns) for step in turns[0]}), flush=True)


def interval(ratios):
    """The ranks between which the median lies, 95 of 100 times."""
    ordered, count = sorted(ratios), len(ratios)
    reach = 0.98 * math.sqrt(count)
    return ordered[max(0, math.floor(count / 2 - reach))], ordered[min(count - 1, math.ceil(count / 2 + reach) - 1)]


def start(tree):
    """Starts a process that runs the version in `tree`."""
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *safe_path, str(Path(__file__).resolve()), "child"]
    return subprocess.Popen(
        command, env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def end(children):
    for process in children.values():
        process.stdin.close()
        process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--pairs", type=int, default=30)
    chosen = parser.parse_args()
    trees = {name: getattr(chosen, name).resolve() for name in ("before", "after")}
    found = {name: [] for name in trees}
    children = {}
    for pair in range(chosen.pairs):
        if pair % PAIRS_OF_A_PROCESS == 0:
            end(children)
            children = {name: start(tree) for name, tree in trees.items()}
        for name in (list(children), list(children)[::-1])[pair % 2]:
            children[name].stdin.write("go\n")
            children[name].stdin.flush()
            found[name].append(json.loads(children[name].stdout.readline()))
    end(children)
    print(f"{'CPU ms':34} {'before':>8} {'after':>8} {'ratio':>6}  interval")
    for step in found["before"][0]:
        before, after = ([one[step] for one in found[name]] for name in ("before", "after"))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, high = interval(ratios)
        medians = statistics.median(before), statistics.median(after), statistics.median(ratios)
        print("{:34} {:8.2f} {:8.2f} {:6.3f}  {:.3f} to {:.3f}".format(step, *medians, low, high))


if __name__ == "__main__":
    child() if sys.argv[1:] == ["child"] else main()
