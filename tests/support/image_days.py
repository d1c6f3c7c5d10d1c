"""A day of images on one card, counted byte by byte and independently of `planning.job_cost`: seconds of copying by policy.

python tests/support/image_days.py     # every link x card x steps x storage, and where the choice is worst
"""

import itertools
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib_lora_guard.planning.eviction import Coming, Resident, plan_eviction
from lib_lora_guard.planning.job_cost import Job, Links, Neighbour, State, choose, runs_from_ram
from lib_lora_guard.units import GB, MB

STORAGES = {"nf4": 6.7, "Q4_K": 7.4, "fp8": 11.9, "Q8_0": 12.6, "bf16": 23.8}
"""GB of a Flux."""
TEXT_ENCODERS = (4.9, 9.8)
STEP, DECODE, VAE, SWAPPING, SLIDER = int(1.34 * GB), int(3.1 * GB), int(0.16 * GB), 256 * MB, GB
PASSES = 2
"""Of the text encoder: prompt and negative prompt."""
POLICIES = ("stock", "keep", "give back")
"""Forge's; what lies on the card stays as far as the step allows; everything goes back to the denoiser before each image."""
PROMPTS = {"seeds": (1, 0, 0, 0), "every other": (1, 0, 1, 0, 1, 0), "each": (1, 1, 1, 1)}
"""By name: whether each image has a new prompt."""


@dataclass
class Day:
    """Images in a row on one card by one policy. Counts seconds of copying."""

    denoiser: int
    text: int
    free: int
    links: Links
    steps: int
    policy: str
    on: dict = field(default_factory=lambda: {"denoiser": 0, "text": 0})
    seconds: float = 0.0
    new: float = 0.5
    images: int = 1

    def room(self):
        return self.free - sum(self.on.values())

    def move(self, name, size):
        """To the card; negative: off it."""
        self.on[name] += size
        assert self.on[name] >= 0
        self.seconds += size / self.links.to_card if size > 0 else -size / self.links.to_ram

    def prompt(self):
        outside = self.text - self.on["text"]
        if self.policy == "stock":
            if self.room() < 1.3 * outside + SLIDER:
                self.move("denoiser", -self.on["denoiser"])
            self.move("text", min(outside, max(0, self.room() - SLIDER)))
        else:
            on = self.on["denoiser"]
            plan = plan_eviction(Coming(outside, outside, PASSES), SLIDER, self.room(), [Resident(on, on, True)])
            self.move("denoiser", -plan.leaving_bytes[0])
            is_whole = self.on["denoiser"] in (0, self.denoiser)
            if self.policy != "guard" or is_whole or not runs_from_ram(PASSES, self.links):
                self.move("text", max(0, min(outside, self.room() - SLIDER)))
        self.seconds += PASSES * (self.text - self.on["text"]) / self.links.swapping

    def sample(self):
        {"stock": self._stock, "keep": self._keep, "give back": self._give_back, "guard": self._guard}[self.policy]()
        assert self.room() >= STEP or not self.on["denoiser"]
        self.seconds += self.steps * (self.denoiser - self.on["denoiser"]) / self.links.swapping

    def decode(self):
        short = DECODE + VAE - self.room()
        for name in ("text", "denoiser"):
            if short > 0:
                leaves = self.on[name] if self.policy == "stock" else min(short, self.on[name])
                self.move(name, -leaves)
                short -= leaves

    def _stock(self):
        outside = self.denoiser - self.on["denoiser"]
        if self.on["denoiser"]:
            # The same patcher is not placed again.
            if self.room() < STEP:
                self.move("text", -self.on["text"])
            return
        if self.room() < 1.3 * outside + STEP:
            self.move("text", -self.on["text"])
        rest = self.room() - max(STEP, SLIDER)
        self.move("denoiser", outside if outside <= rest else int(max(0, rest / 1.3, rest - 1.25 * GB)))

    def _keep(self):
        """What lies on the card stays as far as the step allows."""
        if self.on["denoiser"]:
            self.move("text", -min(self.on["text"], max(0, STEP - self.room())))
            self.move("denoiser", -max(0, STEP - self.room()))
        else:
            self._give_back()

    def _give_back(self):
        self.move("text", -self.on["text"])
        self._take(self.room() - STEP)

    def _take(self, room):
        outside = self.denoiser - self.on["denoiser"]
        if outside <= room:
            self.move("denoiser", outside)
        else:
            self.move("denoiser", max(-self.on["denoiser"], min(outside, room - SWAPPING)))

    def _guard(self):
        choice = self.chosen = choose(self.state(), Job(self.steps, DECODE + VAE, self.new, self.images), self.links)
        self.move("text", -choice.leaving_bytes[0])
        self.move("denoiser", choice.comes_bytes)

    def state(self):
        text, on = self.on["text"], self.on["denoiser"]
        return State(self.denoiser - on, on, 0, self.room(), STEP, SWAPPING, [Neighbour(text, text)])


def seconds(policy, prompts, **facts):
    """Returns the seconds of copying of images of which the first has a new prompt, then as `prompts` says."""
    day = Day(policy=policy, **facts)
    for number, is_new in enumerate(prompts):
        later = prompts[number + 1 :]
        day.images, day.new = len(later) + 1, sum(later) / (len(later) + 1)
        if is_new:
            day.prompt()
        day.sample()
        day.decode()
    return day.seconds


def compared(prompts, **facts):
    """Returns the seconds of the guard's choice, and of each other policy."""
    return seconds("guard", prompts, **facts), {policy: seconds(policy, prompts, **facts) for policy in POLICIES}


def main():
    rows = []
    grid = (
        STORAGES,
        (3, 7, 12, 25, 50),
        (0.23, 1.0),
        (6, 8, 10, 12, 16, 24),
        (1, 2, 4, 8, 20, 50),
        TEXT_ENCODERS,
        PROMPTS,
    )
    for storage, link, out, free, steps, text, prompts in itertools.product(*grid):
        facts = {
            "denoiser": int(STORAGES[storage] * GB),
            "text": int(text * GB),
            "free": free * GB,
            "links": Links(link * 1e9, link * out * 1e9, link * 1e9),
            "steps": steps,
        }
        guard, others = compared(PROMPTS[prompts], **facts)
        best = min(others.values())
        row = storage, f"{link} GB/s, {out} of it to RAM", f"{free} GB", f"{steps} steps", f"T5 {text} GB", prompts
        rows.append((guard / best, guard / others["stock"], *row))
    rows.sort(reverse=True)
    lines = [f"{row[0]:.3f} of the best, {row[1]:.3f} of stock's: {', '.join(row[2:])}" for row in rows[:10]]
    worse = sum(row[0] > 1.03 for row in rows)
    lines.append(f"{worse} of {len(rows)} more than 3 % worse than the best of {', '.join(POLICIES)}")
    of_best, of_stock = (statistics.median(row[place] for row in rows) for place in (0, 1))
    lines.append(f"median {of_best:.3f} of the best, {of_stock:.3f} of stock's")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
