"""The faults of a way that was walked on two sides (sides.py): its pictures, the last one, the console."""

import re

import numpy as np

from real_forge.run import LARGEST_GAP, difference

SMALLEST_EFFECT = 8
"""Grey levels that a LoRA must change, or a lost one would not be seen."""

ERROR = re.compile(
    r"Traceback|\w*(?:Error|Exception|exception)\b|\bERROR\b|\berror\b|WITHOUT|NOT applied|still without|\*\*\*"
)
NOT_OURS = re.compile(r"Failed reading extension data|MoviePy|memory monitor disabled")


def judge(way, model, low_bit, truth, guard):
    """One row: way, model, smallest effect, guard's largest difference, seconds, and what is wrong."""
    wrong = list(guard.wrong) + [f"on stock: {sentence}" for sentence in truth.wrong]
    gaps, effects = [], []
    for label, shot in guard.shots.items():
        wanted = truth.shots.get(shot.truth or label)
        gap = None if wanted is None else difference(shot.image, wanted.image)
        gaps.append(gap)
        if gap is None:
            why = shot.image if isinstance(shot.image, str) else wanted.image if wanted else "no such shot of stock"
            wrong.append(f"{label}: {str(why)[:150]}")
            continue
        if gap[0] > (0 if shot.strict else LARGEST_GAP):
            wrong.append(f"{label}: {gap[0]} grey levels off (mean {gap[1]:.3f})")
        if wanted.bare is not None:
            effect = difference(wanted.image, wanted.bare)
            effects.append(effect)
            if effect is None or effect[0] <= SMALLEST_EFFECT:
                wrong.append(f"{label}: the LoRA changes the picture by {effect} only, nothing is tested")
    if not isinstance(guard.last, np.ndarray) or difference(guard.last, guard.first) != (0, 0.0):
        is_picture = isinstance(guard.last, np.ndarray)
        seen = difference(guard.last, guard.first) if is_picture else guard.last
        wrong.append(f"removed: not the first picture ({seen})")
    if guard.shots and difference(guard.first, truth.first) != (0, 0.0):
        wrong.append("without LoRA the picture is not stock's")
    wrong += console_faults(way, truth, guard)
    largest = max((g[0] for g in gaps if g), default=None)
    smallest = min((e[0] for e in effects if e), default=None)
    seconds = f"{truth.seconds:.1f} / {guard.seconds:.1f}"
    verdict = way.verdict or ("as the reference" if low_bit else "as stock")
    return [way.name, model, smallest, largest, seconds, verdict, wrong]


def console_faults(way, truth, guard):
    lines = lines_of(guard.console)
    usual = {without_numbers(line) for line in lines_of(truth.console)}
    faults = [f"the console lacks /{w}/" for w in way.wants if not any(re.search(w, line) for line in lines)]
    known = [*way.wants, NOT_OURS]
    for line in lines:
        if ERROR.search(line) and without_numbers(line) not in usual and not any(re.search(k, line) for k in known):
            faults.append(f"console: {line[:200]}")
    if guard.shots and not any("[LoRA Guard]" in line for line in lines):
        faults.append("no line of the guard in the console")
    return list(dict.fromkeys(faults))[:6]


def lines_of(console):
    """Console lines; progress bars write over themselves."""
    return [line.strip() for line in re.split(r"[\r\n]+", console) if line.strip()]


def without_numbers(line):
    """A console line without what differs from server to server."""
    return re.sub(r"\d+", "", re.sub(r"\S*[/\\]Lora[/\\]", "", line))
