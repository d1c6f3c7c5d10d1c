"""Decides what lies on the card while a model runs, by the seconds that it costs until the next image. Pure.

    seconds = bytes that leave / link to RAM + bytes that come / link to the card + calls x swapped bytes / link while swapping

Swapped are the weights that lie in RAM and are copied in each call of the model. What follows counts too: the decode after
the calls, for which others leave before the model does, and the neighbours' return for the next prompt. Models that run in
the same calls (ControlNets) count as parts of the model: each byte of theirs comes or is swapped, too. Where another
checkpoint follows (a refiner, a detailer's own), all that is on the card leaves after the calls, and nothing of it returns:
what comes then serves these calls alone. The other one's own bytes are the same in every way. Leaving is slow
where RAM has to be allocated for it (measured: 1.6 GB/s, against 7 GB/s to the card), and free where a copy is still there.
What comes from pinned RAM keeps its copy: for a decode it leaves for nothing, so that even a few calls are worth its coming.
Without copies it can be right with few calls to leave a text encoder where it is, and with many it never is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .rates import PAGEABLE_TO_GPU, PAGEABLE_TO_RAM

NEW_PROMPTS = 0.5
"""Share of images with a new prompt, which needs the text encoder again, as long as it is not known."""
PASSES = 2
"""Of a text encoder: for the prompt and the negative prompt."""
USUAL_IMAGES = 3
"""What comes for one image is there for the next one, too."""
USUAL_CALLS = 20
"""Of a job that does not say how many steps it has."""


@dataclass(frozen=True)
class Links:
    """Bytes per second between RAM and the card."""

    to_card: float = PAGEABLE_TO_GPU
    to_ram: float = PAGEABLE_TO_RAM
    """Into RAM that is allocated for it."""
    swapping: float = PAGEABLE_TO_GPU
    """Weights that are copied for one call."""
    keeps_copies: bool = False
    """True if what has left for a decode keeps its copy in RAM when it is back, so that it leaves again for nothing."""


@dataclass(frozen=True)
class Job:
    """What is known of the work that is about to begin."""

    calls: int = USUAL_CALLS
    """Calls of the model until others need its room."""
    decode_bytes: int = 0
    """VRAM that the decode after them takes, its weights included; 0 if none follows."""
    new_prompts: float = NEW_PROMPTS
    """Share of images with a new prompt."""
    images: float = USUAL_IMAGES
    """Images like this one, this one included."""
    is_last: bool = False
    """True if another checkpoint follows: the host then unloads all models."""


@dataclass(frozen=True)
class Neighbour:
    """Another model on the card."""

    on_card_bytes: int
    swappable_bytes: int
    """The part that can leave while the rest stays."""
    copied_bytes: int = 0
    """The part that has a copy in RAM, so that it leaves for nothing."""


@dataclass(frozen=True)
class State:
    """The card before the calls."""

    outside_bytes: int
    """Of the model: what lies in RAM and can come."""
    on_card_bytes: int
    copied_bytes: int
    """Of the model on the card: the part that has a copy in RAM."""
    free_bytes: int
    need_bytes: int
    """To keep free beside the weights while the model runs."""
    swapping_bytes: int
    """To keep free beyond that if a part of the model is swapped."""
    neighbours: Sequence[Neighbour]
    """In eviction order."""
    placed_by_host_bytes: int = 0
    """Of what lies in RAM: models that the host is about to place, which come as far as there is room, whatever is chosen."""
    fixed_bytes: int = 0
    """The part of those that cannot be swapped: it comes, room or not."""
    stays_bytes: int = 0
    """Of the model, beside `outside_bytes`: what lies in RAM and is swapped in every way. Its copies need their room."""
    pinned_bytes: int = 0
    """Of `outside_bytes`: what lies in pinned RAM, and keeps that copy if it comes."""

    @property
    def need_in_part_bytes(self) -> int:
        """To keep free if a part of the model is swapped."""
        return self.need_bytes + self.swapping_bytes

    @property
    def need_at_most_bytes(self) -> int:
        """To keep free if all has come that can."""
        return self.need_in_part_bytes if self.stays_bytes else self.need_bytes


@dataclass(frozen=True)
class Choice:
    """One way, and what it costs."""

    leaving_bytes: tuple[int, ...]
    """Of each neighbour."""
    comes_bytes: int
    """Of the model; negative for bytes that have to leave."""
    swapped_bytes: int
    """Of the model, in each call."""
    seconds: float
    grows: bool
    """True if the model takes room beyond what the host is about to fill."""


def runs_from_ram(passes: int, links: Links) -> bool:
    """True if a model of few passes had better stay in RAM than come to the card and leave it again."""
    return passes / links.swapping < _there_and_back(links)


def choose(state: State, job: Job, links: Links) -> Choice:
    """Returns the fastest way; of equal ones the one that moves least."""
    return min(ways(state, job, links), key=lambda way: (way.seconds, sum(way.leaving_bytes) + abs(way.comes_bytes)))


def ways(state: State, job: Job, links: Links) -> Iterator[Choice]:
    """Yields every way that can be the fastest. The cost is linear between them: a neighbour stays, leaves as far as the model
    gains by it, or leaves whole; the model takes the room, or stays as it is.
    """
    for wanted in _amounts(state):
        leaving = _leaving(wanted, state.neighbours)
        for comes in sorted({_comes(state, sum(leaving), grows) for grows in (True, False)}):
            swapped, grows = state.outside_bytes - comes, comes > state.placed_by_host_bytes
            yield Choice(leaving, comes, swapped, _seconds(state, job, links, leaving, comes), grows)


def _amounts(state: State) -> Iterator[int]:
    """Yields how much the neighbours may be asked for: what the calls need, what makes the model whole, each as a whole."""
    total = sum(one.on_card_bytes for one in state.neighbours)
    whole = state.outside_bytes + state.need_at_most_bytes - state.free_bytes
    some = state.fixed_bytes + state.need_in_part_bytes - state.free_bytes
    least = min(max(0, min(some, whole)), total)
    # More may be short than all of them have: then what is swapped needs its own room.
    in_part = state.outside_bytes + state.need_in_part_bytes - state.free_bytes
    most = min(max(0, whole if whole <= total else in_part), total)
    yield least
    before = 0
    for one in state.neighbours:
        before += one.on_card_bytes
        if least < before < most:
            yield before
    yield most


def _leaving(wanted: int, neighbours: Sequence[Neighbour]) -> tuple[int, ...]:
    leaving = []
    for one in neighbours:
        part = max(0, min(wanted, one.on_card_bytes))
        if part > one.swappable_bytes:
            # The rest could not run without it.
            part = one.on_card_bytes
        leaving.append(part)
        wanted -= part
    return tuple(leaving)


def _comes(state: State, left: int, grows: bool) -> int:
    """Returns the bytes of the model that come; negative if some have to leave."""
    free = state.free_bytes + left
    wanted = state.outside_bytes if grows else state.placed_by_host_bytes
    if free - state.need_at_most_bytes >= state.outside_bytes:
        return wanted
    room = free - state.need_in_part_bytes
    if room < state.fixed_bytes:
        return state.fixed_bytes - min(state.on_card_bytes, state.fixed_bytes - room)
    return min(room, wanted)


def _seconds(state: State, job: Job, links: Links, leaving: Sequence[int], comes: int) -> float:
    left, away, come = sum(leaving), max(0, -comes), max(0, comes)
    copied = sum(min(part, one.copied_bytes) for part, one in zip(leaving, state.neighbours, strict=True))
    out = left - copied + max(0, away - state.copied_bytes)
    now = out / links.to_ram + come / links.to_card
    calls = job.calls * (state.outside_bytes - comes) / links.swapping
    # What has a copy leaves for nothing, now or after the calls. What the host places comes first, and keeps none.
    kept = min(max(0, come - state.placed_by_host_bytes), state.pinned_bytes)
    copies = max(0, state.copied_bytes - away) + kept
    copies_of_others = sum(one.copied_bytes for one in state.neighbours) - copied
    others = sum(one.on_card_bytes for one in state.neighbours) - left
    if job.is_last:
        there = state.on_card_bytes + comes + others
        return now + calls + max(0, there - copies - copies_of_others) / links.to_ram
    back_again = _there_and_back(links)
    short = max(0, job.decode_bytes - (state.free_bytes + left - comes))
    from_others = min(short, others)
    from_model = min(short - from_others, state.on_card_bytes + comes)
    now += (max(0, from_others - copies_of_others) + max(0, from_model - copies)) / links.to_ram
    # For later images what left for the decode comes back, or stays away if that is faster.
    later = max(0, job.images - 1) * from_model * min(back_again, job.calls / links.swapping)
    prompts = job.images * job.new_prompts * (left + from_others) * min(back_again, PASSES / links.swapping)
    return now + job.images * calls + later + prompts


def _there_and_back(links: Links) -> float:
    """Returns the seconds of a byte that came and leaves, and comes again."""
    return 1 / links.to_card + (0 if links.keeps_copies else 1 / links.to_ram)
