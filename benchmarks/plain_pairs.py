"""CPU time of apply, a change of strength, a forward and remove on a plain model: this checkout against another one.

    git worktree add ../before <commit>
    python benchmarks/plain_pairs.py --other ../before [--pairs 30]

Two processes take turns, so that both meet the same noise. Prints the median of the ratios of each pair, with the interval that
95 of 100 resamplings of the pairs fall into.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ACTS = ("apply", "change", "forward", "remove")
MODES = ("auto", "bypass", "on_the_fly", "merge")

WORKER = """
import sys, time, tempfile, torch
from pathlib import Path
from safetensors.torch import save_file
from lib_lora_guard.hosts.plain.guard import LoraGuard
torch.manual_seed(0)
torch.set_num_threads(1)
WIDTH, LAYERS = 256, 60
model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]).requires_grad_(False)
path = Path(tempfile.mkdtemp()) / "a.safetensors"
save_file({f"{n}.lora_{side}.weight": 0.01 * torch.randn(shape) for n in range(LAYERS) for side, shape in (("up", (WIDTH, 8)), ("down", (8, WIDTH)))}, str(path))
x = torch.randn(32, WIDTH)
guard = LoraGuard(model)
def timed(act, times=1):
    start = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - start) / times
for line in sys.stdin:
    mode = line.strip()
    with torch.no_grad():
        found = [timed(lambda: guard.apply([(path, 1.0)], mode=mode)), timed(lambda: guard.apply([(path, 0.5)], mode=mode))]
        model(x)
        found += [timed(lambda: model(x), 20), timed(guard.remove)]
    print(*found, flush=True)
"""  # fmt: skip


class Worker:
    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""},
        )  # fmt: skip

    def times(self, mode: str) -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{mode}\n")
        self.process.stdin.flush()
        return [float(one) for one in self.process.stdout.readline().split()]


def interval(ratios: list[float]) -> tuple[float, float]:
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=30)
    arguments = parser.parse_args()
    mine, other = Worker(ROOT), Worker(arguments.other.resolve())
    for mode in MODES:
        for one in (mine, other):
            for _ in range(3):
                one.times(mode)
        pairs = []
        for number in range(arguments.pairs):
            order = (mine, other) if number % 2 else (other, mine)
            found = {one: one.times(mode) for one in order}
            pairs.append((found[mine], found[other]))
        for place, act in enumerate(ACTS):
            ratios = [a[place] / b[place] for a, b in pairs]
            low, high = interval(ratios)
            milliseconds = 1000 * statistics.median(b[place] for _, b in pairs)
            print(
                f"{mode:11} {act:8} {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}] of {milliseconds:.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
