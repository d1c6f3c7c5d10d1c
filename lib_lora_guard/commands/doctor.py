"""`lora-guard doctor`: reports the facts of this machine that the guard works with, and what it has measured there."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import shown
from ..lazy_torch import is_loaded, torch
from ..memory import MemorySnapshot, Nvml, links_file, take_snapshot
from ..memory.allocator_machine import availability, look
from ..memory.allocator_text import CUDA_VARIABLE, variable_in_force
from ..memory.calibration import FILE_NAME
from ..memory.calibration_file import CalibrationFile
from ..memory.calibration_report import Kept, kept_in
from ..memory.torch_build import torch_build
from ..messages import Joined, Message
from ..private_files import open_private
from ..recorder.crash import LONGEST_BYTES, Crash, last_crash
from ..recorder.crash_report import crash_report
from ..units import GB
from ..version import __version__
from .page import say

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "lora-guard/doctor/1"
DATA = Path(__file__).resolve().parents[2] / "data"
"""The folder of the guard's files in Forge: in the extension's folder, beside the package."""

LARGEST = 5
"""The number of corrections shown."""

_FLIGHTS = ("flight-*.ring", "flight-*.told")


@dataclass(frozen=True)
class Examination:
    """The facts of this machine.

    Attributes:
        data: The folder of the guard's files.
        card: The card's name; "" if torch can use none.
        card_line: A sentence about the card.
        snapshot: The memory.
        backend: torch's CUDA allocator.
        variable: The environment variable that configures it.
        variable_text: The variable's value; None if it is not set.
        allocator: By option, why it cannot be set; None if it can.
        corrections: Corrected memory estimates, the largest first.
        crash: The last process that died while it was at work.
    """

    data: Path
    card: str
    card_line: Message
    snapshot: MemorySnapshot
    backend: str
    variable: str
    variable_text: str | None
    allocator: dict[str, Message | None]
    corrections: list[Kept]
    crash: Crash | None


def examine(data: Path) -> Examination:
    """Reads the facts. Starts CUDA if there is a card, so that the numbers are those that the guard sees in Forge.

    Args:
        data: The folder of the guard's files.
    """
    device, card, card_line = _card()
    nvml = Nvml() if device is not None and device.type == "cuda" else None
    try:
        snapshot = take_snapshot(device, nvml)
    finally:
        if nvml is not None:
            nvml.close()
    machine = look(device)
    variable = variable_in_force(os.environ, machine.torch_version, machine.rocm)
    return Examination(
        data=data,
        card=card,
        card_line=card_line,
        snapshot=snapshot,
        backend=machine.backend or machine.device,
        variable=variable or CUDA_VARIABLE,
        variable_text=None if variable is None else os.environ[variable],
        allocator=availability(machine),
        corrections=kept_in(data / FILE_NAME),
        crash=known_crash(data),
    )


@dataclass(frozen=True)
class Forgotten:
    """What was measured on this machine and is forgotten now.

    Attributes:
        corrections: The number of corrected memory estimates.
        links: The number of cards whose links to RAM were measured.
    """

    corrections: int
    links: int


def forget(data: Path) -> Forgotten:
    """Forgets every correction, and how fast the links between RAM and the cards are.

    Raises:
        OSError: A file cannot be deleted.
    """
    return Forgotten(CalibrationFile(data / FILE_NAME).delete(), links_file.delete(data))


def known_crash(data: Path) -> Crash | None:
    """Returns the newest crash in the flight recorder's files, reported or not.

    `last_crash` marks a crash as reported, and Forge's next start must still find it. So it reads copies.
    """
    with tempfile.TemporaryDirectory(prefix="lora-guard-") as place:
        for file in (found for pattern in _FLIGHTS for found in data.glob(pattern)):
            with contextlib.suppress(OSError), open_private(file, "rb") as ring:
                (Path(place) / f"{file.stem}.ring").write_bytes(ring.read(LONGEST_BYTES))
        return last_crash(Path(place))


def print_examination(console: Console, found: Examination, language: str) -> None:
    """Prints the facts as a page of text."""

    def tell(key: str, facts: dict[str, Any] | None = None, style: str = "", indent: str = "") -> None:
        say(console, indent + Message(key, facts).text(language), style)

    tell("doctor.versions", _versions(), "bold")
    say(console, found.card_line.text(language))
    tell("doctor.memory", style="bold")
    for line in (*_known(found.snapshot), *_missing(found.snapshot)):
        say(console, "  " + line.text(language))
    for key, number in _sums(found.snapshot).items():
        if number is not None:
            tell(f"doctor.{key}", {"gb": number / GB}, indent="  ")
    text = Message("doctor.unset") if found.variable_text is None else shown(found.variable_text)
    tell("doctor.allocator", {"backend": found.backend, "variable": found.variable, "text": text}, "bold")
    for why, names in _by_reason(found.allocator.items()):
        if why is None:
            tell("doctor.option", {"names": names}, indent="  ")
        else:
            tell("doctor.option_missing", {"names": names, "why": why}, indent="  ")
    tell("doctor.data" if found.data.is_dir() else "doctor.no_data", {"folder": shown(str(found.data), 300)}, "bold")
    _print_corrections(console, found, language)
    if found.crash is None:
        tell("doctor.no_crash")
    else:
        tell("doctor.crash", style="bold")
        for line in crash_report(found.crash):
            say(console, "  " + line.text(language))


def _print_corrections(console: Console, found: Examination, language: str) -> None:
    wrong = [one for one in found.corrections if one.correction_bytes]
    if not found.corrections:
        say(console, Message("doctor.no_corrections").text(language))
        return
    key = "doctor.corrections" if wrong else "doctor.all_right"
    say(console, Message(key, {"count": len(found.corrections)}).text(language))
    for one in wrong[:LARGEST]:
        say(console, "  " + one.line.text(language))


def print_forgotten(console: Console, data: Path, forgotten: Forgotten, language: str) -> None:
    """Prints how much was forgotten."""
    facts = {"count": forgotten.corrections, "file": shown(str(data / FILE_NAME), 300)}
    say(console, Message("doctor.forgotten", facts).text(language))
    if forgotten.links:
        facts = {"count": forgotten.links, "file": shown(str(data / links_file.FILE_NAME), 300)}
        say(console, Message("doctor.links_forgotten", facts).text(language))


def examination_document(found: Examination) -> dict[str, Any]:
    """Returns the facts as one JSON document, in English."""
    memory = {
        name: {
            "bytes": reading.bytes,
            "source": str(reading.source),
            "missing": None if reading.missing is None else str(reading.missing),
        }
        for name, reading in found.snapshot.readings()
    }
    return {
        "schema": SCHEMA,
        "version": __version__,
        **{name: text for name, text in _versions().items() if name != "guard"},
        "card": found.card or None,
        "memory": memory,
        "usable_vram_bytes": found.snapshot.usable_vram_bytes,
        "alive_ram_bytes": found.snapshot.alive_ram_bytes,
        "allocator": {
            "backend": found.backend,
            "variable": found.variable,
            "text": found.variable_text,
            "missing": {name: None if why is None else str(why) for name, why in found.allocator.items()},
        },
        "data": str(found.data),
        "corrections": len(found.corrections),
        "largest_corrections": [_correction(one) for one in found.corrections[:LARGEST]],
        "crash": None if found.crash is None else _crash(found.crash),
    }


def forgotten_document(data: Path, forgotten: Forgotten) -> dict[str, Any]:
    """Returns how much was forgotten as one JSON document."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "data": str(data),
        "corrections_forgotten": forgotten.corrections,
        "links_forgotten": forgotten.links,
    }


def _card() -> tuple[torch.device | None, str, Message]:
    """Returns the device, its name and a line about it. The device is None if torch was not asked: it could find no card."""
    if not (is_loaded() or torch_build().may_have_card()):
        return None, "", Message("doctor.no_card")
    if not torch.cuda.is_available():
        return torch.device("cpu"), "", Message("doctor.no_card")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's own
        device = torch.device("cuda", torch.cuda.current_device())
        name = shown(torch.cuda.get_device_name(device))
        return device, name, Message("doctor.card", {"name": name})
    except (RuntimeError, AssertionError) as error:
        why = shown(str(error).strip().split("\n")[0])
        return torch.device("cpu"), "", Message("doctor.not_started", {"error": why})


def _versions() -> dict[str, str]:
    return {
        "guard": __version__,
        "python": platform.python_version(),
        "torch": torch_build().version,
        "system": platform.platform(),
    }


def _known(snapshot: MemorySnapshot) -> list[Message]:
    known = [(name, reading) for name, reading in snapshot.readings() if reading.bytes is not None]
    return [
        Message("doctor.reading", {"name": _title(name), "gb": (reading.bytes or 0) / GB, "source": reading.source})
        for name, reading in known
    ]


def _missing(snapshot: MemorySnapshot) -> list[Message]:
    """Returns a line for each reason: without a card, one line for all of the card's numbers."""
    missing = [(_title(name), reading.missing) for name, reading in snapshot.readings() if reading.bytes is None]
    return [Message("doctor.missing", {"names": names, "why": why}) for why, names in _by_reason(missing)]


def _by_reason(reasons: Iterable[tuple[str, Message | None]]) -> list[tuple[Message | None, Joined]]:
    """Groups names by reason, in the order of the reasons."""
    names: dict[Message | None, list[str]] = {}
    for name, why in reasons:
        names.setdefault(why, []).append(name)
    return [(why, Joined(found, "list.names")) for why, found in names.items()]


def _title(name: str) -> Message:
    return Message(f"doctor.reading_{name}")


def _sums(snapshot: MemorySnapshot) -> dict[str, int | None]:
    return {"usable_vram": snapshot.usable_vram_bytes, "alive_ram": snapshot.alive_ram_bytes}


def _correction(one: Kept) -> dict[str, Any]:
    key = None if one.key is None else {**asdict(one.key), "kind": one.key.kind.value}
    return {
        "key": key,
        "card": shown(one.card),
        "torch": shown(one.torch_version),
        "measurements": one.measurements,
        "predicted_bytes": one.predicted_bytes,
        "measured_bytes": one.measured_bytes,
        "correction_bytes": one.correction_bytes,
    }


def _crash(crash: Crash) -> dict[str, Any]:
    return {
        "phase": crash.phase.value,
        "time": crash.time,
        "model": crash.model,
        "storage": crash.storage,
        "loras": crash.lora_count,
        "lines": [str(line) for line in crash_report(crash)],
    }
