"""What the LoRA cards say of files and of the checkpoint, read from headers in a thread of its own and kept by name, size and time.

Reading a header takes some 30 ms, a page with hundreds of cards must take none: a card shows what is known by then.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.lora_header import read_facts
from ...checkpoints.model_header import read_checkpoint
from ...errors import LoraGuardError
from ...files import shown
from ...models.architecture import Architecture, may_be_for
from ...models.evidence import Evidence
from ...private_files import make_private_folder, open_private
from ...runtime.data_folder import CARDS_NAME as FILE_NAME

log = logging.getLogger(__name__)

VERSION = 1
MOST_CARDS = 5000
"""Files whose facts are kept, those looked at last."""
LONGEST_BYTES = 8 << 20
BUSY_SECONDS = 1.0
"""Between two looks whether an image is still being made: its steps need the processor."""
REST_SHARE = 1.0
"""The thread rests as long as it reads, so that the page stays quick."""


@dataclass(frozen=True)
class CardFacts:
    """What the header of one LoRA file says.

    Attributes:
        made_for: The architecture's name; "" if it does not show.
        may_be_for: All architectures that it may be for.
        kinds: The kinds of its adapters, the most frequent first.
        rank: The most frequent rank; 0 for kinds without one.
        is_dora: Some adapters are DoRAs.
        inputs: Input widths of the modules that it changes.
        is_readable: False for a file that is damaged or no LoRA.
    """

    made_for: str = ""
    may_be_for: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    rank: int = 0
    is_dora: bool = False
    inputs: tuple[int, ...] = ()
    is_readable: bool = True


@dataclass(frozen=True)
class CheckpointFacts:
    """What the header of a checkpoint says: its architecture, "" if unknown, and the input widths of its modules."""

    architecture: str = ""
    inputs: frozenset[int] = frozenset()


def read_card(path: Path) -> CardFacts:
    """Reads the header of a LoRA file. Never raises."""
    try:
        facts = read_facts(path)
        shapes = facts.file.shapes
        return CardFacts(
            made_for=facts.made_for.value if facts.made_for else "",
            may_be_for=tuple(sorted(one.value for one in may_be_for(shapes, facts.file.metadata))),
            kinds=tuple(kind for kind, _ in facts.kinds.most_common(2)),
            rank=facts.ranks.most_common(1)[0][0] if facts.ranks else 0,
            is_dora=facts.dora_modules > 0,
            inputs=tuple(sorted(Evidence.of_lora(shapes).inputs(""))),
        )
    except (LoraGuardError, OSError):
        return CardFacts(is_readable=False)


def read_model(path: Path) -> CheckpointFacts:
    """Reads the header of a checkpoint. Never raises: nothing is known of a file that cannot be read."""
    try:
        found = read_checkpoint(path)
        architecture = found.architecture.value if found.architecture else ""
        return CheckpointFacts(architecture, frozenset(Evidence.of_model(found.shapes).inputs("")))
    except (LoraGuardError, OSError, ValueError, IndexError):
        return CheckpointFacts()


def fits(card: CardFacts, model: CheckpointFacts) -> bool | None:
    """Returns whether a LoRA is for this checkpoint, by architecture and sizes; None where the headers do not show it."""
    if not card.may_be_for or not model.architecture:
        return None
    if model.architecture not in card.may_be_for:
        return False
    if not card.inputs or not model.inputs:
        return None
    # Variants of one architecture differ in their widths; a module or two may differ in a variant that fits.
    return 2 * len(set(card.inputs) & model.inputs) >= len(card.inputs)


class CardReader:
    """Reads headers in the background. For any thread; never raises."""

    def __init__(
        self,
        folder: Callable[[], Path | None] = lambda: None,
        is_busy: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            folder: Returns where the facts are kept between two starts; None keeps nothing.
            is_busy: True while an image is made.
            sleep: For tests.
        """
        self._folder, self._is_busy, self._sleep = folder, is_busy, sleep
        self._lock = threading.Lock()
        self._cards: OrderedDict[str, CardFacts] | None = None
        self._models: dict[str, CheckpointFacts] = {}
        self._wanted: OrderedDict[str, Path | None] = OrderedDict()
        self._thread: threading.Thread | None = None

    def card(self, path: Path) -> CardFacts | None:
        """Returns the facts of a LoRA file; None until its header is read."""
        key = _key(path)
        if key is None:
            return None
        with self._lock:
            found = self._known().get(key)
            if found is not None:
                self._known().move_to_end(key)
                return found
        self._want(key, path)
        return None

    def model(self, path: Path) -> CheckpointFacts | None:
        """Returns the facts of a checkpoint; None until its header is read."""
        key = _key(path)
        if key is None:
            return None
        with self._lock:
            found = self._models.get(key)
        if found is None:
            self._want(_MODEL + key, path)
        return found

    def wait(self, seconds: float = 10.0) -> None:
        """Waits until everything asked for is read. For tests."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _want(self, key: str, path: Path) -> None:
        with self._lock:
            self._wanted[key] = path
            if key.startswith(_MODEL):
                # One header for all cards.
                self._wanted.move_to_end(key, last=False)
            if self._thread is None:
                self._thread = threading.Thread(target=self._read_all, name="lora-guard-cards", daemon=True)
                self._thread.start()

    def _read_all(self) -> None:
        try:
            while (wanted := self._next()) is not None:
                key, path = wanted
                while self._is_busy():
                    self._sleep(BUSY_SECONDS)
                begun = time.perf_counter()
                facts = read_model(path) if key.startswith(_MODEL) else read_card(path)
                with self._lock:
                    if isinstance(facts, CheckpointFacts):
                        self._models[key.removeprefix(_MODEL)] = facts
                    else:
                        self._known()[key] = facts
                self._sleep(REST_SHARE * (time.perf_counter() - begun))
        except Exception:
            log.debug("the headers of LoRA files are not read for their cards", exc_info=True)
            with self._lock:
                self._thread = None

    def _next(self) -> tuple[str, Path] | None:
        """Returns what is to be read next. Where nothing is, the facts are kept and the thread ends."""
        with self._lock:
            if self._wanted:
                key, path = self._wanted.popitem(last=False)
                return key, path or Path()
        self._keep()
        with self._lock:
            if not self._wanted:
                self._thread = None
                return None
        return self._next()

    def _known(self) -> OrderedDict[str, CardFacts]:
        if self._cards is None:
            folder = self._folder()
            self._cards = OrderedDict() if folder is None else _kept(folder / FILE_NAME)
        return self._cards

    def _keep(self) -> None:
        folder = self._folder()
        if folder is None:
            return
        with self._lock:
            cards = list(self._known().items())[-MOST_CARDS:]
        document = {"version": VERSION, "cards": {key: astuple(card) for key, card in cards}}
        temporary = folder / (FILE_NAME + ".tmp")
        try:
            make_private_folder(folder)
            temporary.unlink(missing_ok=True)
            with open_private(temporary, "xb") as file:
                file.write(json.dumps(document).encode())
            os.replace(temporary, folder / FILE_NAME)
        except OSError as error:
            log.debug("what LoRA cards show is not kept: %s", error)


_MODEL = "checkpoint:"


def _key(path: Path) -> str | None:
    """Returns what a file is known by: its name without folders, its size and its time; None if there is no file."""
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return None
    return f"{shown(path.name, 200)}|{facts.st_size}|{facts.st_mtime_ns}"


def _kept(path: Path) -> OrderedDict[str, CardFacts]:
    """Reads the kept facts; entries that are none are left out."""
    found: OrderedDict[str, CardFacts] = OrderedDict()
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, LookupError):
        with open_private(path, "rb") as file:
            document = json.loads(file.read(LONGEST_BYTES))
        if document["version"] == VERSION:
            for key, entry in document["cards"].items():
                if (card := _card(entry)) is not None:
                    found[key] = card
    return found


def _card(entry: Any) -> CardFacts | None:
    names = {architecture.value for architecture in Architecture}
    if not isinstance(entry, list) or len(entry) != 7:
        return None
    made_for, may_be, kinds, rank, is_dora, inputs, is_readable = entry
    lists = [may_be, kinds, inputs]
    if not all(isinstance(one, list) and len(one) <= 200 for one in lists) or not isinstance(made_for, str):
        return None
    is_sound = (
        made_for in {"", *names}
        and names.issuperset(may_be)
        and all(isinstance(kind, str) and kind.isidentifier() for kind in kinds)
        and all(type(number) is int for number in [rank, *inputs])
        and type(is_dora) is bool
        and type(is_readable) is bool
    )
    if not is_sound:
        return None
    return CardFacts(made_for, tuple(may_be), tuple(kinds), rank, is_dora, tuple(inputs), is_readable)
