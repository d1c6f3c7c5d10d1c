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
OTHERS = {
    "none": (0, 0),
    "ControlNet of 1.4 GB": (1.4, 0),
    "ControlNet of 3.3 GB": (3.3, 0),
    "refiner of 6.5 GB": (0, 6.5),
}
"""GB of other models of a job, by name: one that runs in the same calls, and one that takes over at 0.8 of the steps."""
STACKS = {"none": 0, "twenty of 30 MB": 600 * MB, "three of 1 GB": 3 * GB}
"""Factors of LoRAs, which lie on the card in each step."""
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
    control: int = 0
    factors: int = 0
    is_last: bool = False
    ram: dict = field(default_factory=lambda: {"denoiser": [0, 0], "text": [0, 0], "control": [0, 0]})
    """Of each model where copies are kept: bytes in RAM that stay there as a copy when they come, and such copies of what is on the card."""
    on: dict = field(default_factory=lambda: {"denoiser": 0, "text": 0, "control": 0})
    placed: set = field(default_factory=set)
    """Models that the host has placed, if only in part: it brings no more of them until they have left whole."""
    seconds: float = 0.0
    new: float = 0.5
    images: int = 1

    @property
    def step(self):
        """To keep free in each step."""
        return STEP + self.factors

    def room(self):
        return self.free - sum(self.on.values())

    def move(self, name, size):
        """To the card; negative: off it."""
        self.on[name] += size
        assert self.on[name] >= 0
        if size < 0 and not self.on[name]:
            self.placed.discard(name)
        if size > 0:
            self.seconds += size / self.links.to_card
            self.stay(name, min(size, self.ram[name][0]))
        else:
            without = min(0, size + self.ram[name][1])
            self.stay(name, size - without)
            self.seconds += -without / self.links.to_ram
        self.pin()

    def stay(self, name, size):
        """Bytes come, and their place in RAM is a copy now; negative: they leave for their copy."""
        self.ram[name][0] -= size
        self.ram[name][1] += size

    def pin(self):
        """What is swapped of the denoiser is pinned; a text encoder keeps any copy, for it leaves again and again."""
        if self.links.keeps_copies:
            self.ram["text"][0] = self.text - self.on["text"]
            self.ram["denoiser"][0] = self.denoiser - self.on["denoiser"] if self.on["denoiser"] else 0

    def leave(self, short, order):
        """Lets models leave until `short` bytes have left: whole ones by the host's policy, else no more than is missing."""
        for name in order:
            if short > 0:
                leaves = self.on[name] if self.policy == "stock" else min(short, self.on[name])
                self.move(name, -leaves)
                short -= leaves

    def prompt(self):
        outside = self.text - self.on["text"]
        if self.policy == "stock":
            self.leave(1.3 * outside + SLIDER - self.room(), ("denoiser", "control"))
            self.move("text", min(outside, max(0, self.room() - SLIDER)))
        else:
            residents = [Resident(self.on[name], self.on[name], name == "denoiser") for name in ("denoiser", "control")]
            plan = plan_eviction(Coming(outside, outside, PASSES), SLIDER, self.room(), residents)
            for name, leaves in zip(("denoiser", "control"), plan.leaving_bytes, strict=True):
                self.move(name, -leaves)
            lacking = self.denoiser - self.on["denoiser"] if self.on["denoiser"] else 0
            has_room = lacking <= max(0, self.room() - max(self.step, SLIDER) - outside)
            if self.policy != "guard" or has_room or not runs_from_ram(PASSES, self.links):
                self.move("text", max(0, min(outside, self.room() - SLIDER)))
        self.seconds += PASSES * (self.text - self.on["text"]) / self.links.swapping

    def sample(self):
        {"stock": self._stock, "keep": self._keep, "give back": self._give_back, "guard": self._guard}[self.policy]()
        assert self.room() >= self.step or not self.on["denoiser"]
        if self.policy == "keep":
            self._place_control()
        self.placed |= {"denoiser", "control"}
        swapped = self.denoiser - self.on["denoiser"] + self.control - self.on["control"]
        self.seconds += self.steps * swapped / self.links.swapping

    def decode(self):
        self.leave(DECODE + VAE - self.room(), ("text", "denoiser", "control"))

    def switch(self, denoiser, control, steps):
        """Another checkpoint: the host unloads all models, and forgets them."""
        for name, size in self.on.items():
            self.move(name, -size)
        self.placed.clear()
        self.ram = {name: [0, 0] for name in self.ram}
        self.denoiser, self.control, self.steps, self.is_last = denoiser, control, steps, True

    def _place_control(self, grows=False):
        """The host brings it as far as there is room, if it is not there; what has left of it returns only if it `grows`."""
        outside = self.control - self.on["control"]
        rest = self.room() - self.step
        if grows or "control" not in self.placed:
            self.move("control", outside if outside <= rest else max(0, rest - SWAPPING))

    def _stock(self):
        # The same patcher is not placed again.
        outside, control = self.unplaced()
        self.leave(1.3 * (outside + control) + self.step - self.room(), ("text",))
        self._host_places(max(self.step, SLIDER))

    def _host_places(self, need):
        """One after the other by the host's rule, each in what the one before has left.

        No policy may have the room that swapping takes: with Forge's rule alone the second model would get most of that.
        """
        for name, size in zip(("denoiser", "control"), self.unplaced(), strict=True):
            rest = self.room() - need
            by_rule = min(int(max(rest / 1.3, rest - 1.25 * GB)), rest - SWAPPING)
            self.move(name, size if size <= rest else max(0, by_rule))

    def _keep(self):
        """What lies on the card stays as far as the step allows."""
        if "denoiser" in self.placed:
            need = self.step + (SWAPPING if self.on["control"] < self.control else 0)
            self.move("text", -min(self.on["text"], max(0, need - self.room())))
            self.move("denoiser", -min(self.on["denoiser"], max(0, need - self.room())))
        else:
            self._give_back()

    def _give_back(self):
        self.move("text", -self.on["text"])
        if all(self.unplaced()):
            return self._host_places(self.step)
        self._take(self.room() - self.step - (self.control - self.on["control"]))
        return self._place_control(grows=True)

    def _take(self, room):
        outside = self.denoiser - self.on["denoiser"]
        if outside <= room:
            self.move("denoiser", outside)
        else:
            self.move("denoiser", max(-self.on["denoiser"], min(outside, room - SWAPPING)))

    def _guard(self):
        job = Job(self.steps, DECODE + VAE, self.new, self.images, self.is_last)
        state = self.state()
        choice = choose(state, job, self.links)
        self.move("text", -choice.leaving_bytes[0])
        comes = choice.comes_bytes
        if all(self.unplaced()):
            return self._host_places(self.step)
        # The host places the other one where the denoiser has left room for it.
        left = self.unplaced()[1]
        self.move("denoiser", comes if comes < 0 else min(self.denoiser - self.on["denoiser"], max(0, comes - left)))
        return self._place_control(choice.grows)

    def state(self):
        text, on = self.on["text"], self.on["denoiser"]
        control = self.control - self.on["control"]
        outside = self.denoiser - on + control
        (pinned, copied), (_, text_copied) = self.ram["denoiser"], self.ram["text"]
        others = [Neighbour(text, text, text_copied)]
        host = sum(self.unplaced())
        return State(outside, on, copied, self.room(), self.step, SWAPPING, others, host, pinned_bytes=pinned)

    def unplaced(self):
        """The bytes of the denoiser and of the one in the same calls that the host is about to place."""
        sizes = {"denoiser": self.denoiser, "control": self.control}
        return tuple(0 if name in self.placed else size for name, size in sizes.items())


def seconds(policy, prompts, refiner=0, **facts):
    """Returns the seconds of copying of images of which the first has a new prompt, then as `prompts` says."""
    day = Day(policy=policy, is_last=refiner > 0, **facts)
    denoiser, control, steps = day.denoiser, day.control, day.steps
    before = -(-steps * 4 // 5) if refiner else steps
    for number, is_new in enumerate(prompts):
        later = prompts[number + 1 :]
        day.images, day.new = len(later) + 1, sum(later) / (len(later) + 1)
        if refiner and number:
            day.switch(denoiser, control, before)
        day.steps = before
        if is_new or refiner:
            day.prompt()
        day.sample()
        if refiner and steps > before:
            day.switch(refiner, 0, steps - before)
            day.prompt()
            day.sample()
        day.decode()
    if refiner:
        # What an image leaves behind counts for the last one as for those before.
        day.switch(denoiser, control, before)
    return day.seconds


def compared(prompts, **facts):
    """Returns the seconds of the guard's choice, and of each other policy."""
    return seconds("guard", prompts, **facts), {policy: seconds(policy, prompts, **facts) for policy in POLICIES}


def main():
    rows = []
    grid = (
        (False, True),
        STORAGES,
        (3, 7, 12, 25, 50),
        (0.23, 1.0),
        (6, 8, 10, 12, 16, 24),
        (1, 2, 4, 8, 20, 50),
        TEXT_ENCODERS,
        PROMPTS,
        OTHERS,
        STACKS,
    )
    for keeps, storage, link, out, free, steps, text, prompts, others, stack in itertools.product(*grid):
        control, refiner = (int(size * GB) for size in OTHERS[others])
        facts = {
            "denoiser": int(STORAGES[storage] * GB),
            "text": int(text * GB),
            "free": free * GB,
            "links": Links(link * 1e9, link * out * 1e9, link * 1e9, keeps),
            "steps": steps,
            "control": control,
            "refiner": refiner,
            "factors": STACKS[stack],
        }
        guard, found = compared(PROMPTS[prompts], **facts)
        best = min(found.values())
        row = (
            storage,
            f"{link} GB/s, {out} of it to RAM{', copies kept' * keeps}",
            f"{free} GB",
            f"{steps} steps",
            f"T5 {text} GB",
            prompts,
            others,
        )
        rows.append((guard / best, guard / found["stock"], *row))
    rows.sort(reverse=True)
    lines = [f"{row[0]:.3f} of the best, {row[1]:.3f} of stock's: {', '.join(row[2:])}" for row in rows[:10]]
    worse = sum(row[0] > 1.03 for row in rows)
    lines.append(f"{worse} of {len(rows)} more than 3 % worse than the best of {', '.join(POLICIES)}")
    of_best, of_stock = (statistics.median(row[place] for row in rows) for place in (0, 1))
    lines.append(f"median {of_best:.3f} of the best, {of_stock:.3f} of stock's")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
