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
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TypeVar

from ...checkpoints.lora_header import LoraFacts, damaged_where_torch_refuses, read_facts
from ...checkpoints.model_header import read_checkpoint
from ...errors import LoraGuardError
from ...files import shown
from ...models.architecture import Architecture
from ...models.fit import Target, fit_file
from ...private_files import make_private_folder, open_private
from ...runtime.data_folder import CARDS_NAME as FILE_NAME

log = logging.getLogger(__name__)

T = TypeVar("T")

VERSION = 1
IMAGE_PARTS = {"U-Net", "transformer"}
"""The parts of `LoraFacts` that lie in every checkpoint."""
MOST_CARDS, MOST_PAIRS = 5000, 20_000
"""Files, and pairs of a file and a checkpoint, whose facts are kept: those read last."""
LONGEST_BYTES = 64 << 20
"""More than so many facts take, with names of the most characters and of any letters."""
BUSY_SECONDS = 1.0
"""Between two looks whether an image is still being made: its steps need the processor."""
REST_SHARE = 1.0
"""The thread rests as long as it reads, so that the page stays quick."""


@dataclass(frozen=True)
class CardFacts:
    """What the header of one LoRA file says.

    Attributes:
        made_for: The architecture's name; "" if it does not show.
        kinds: The kinds of its adapters, the most frequent first.
        rank: The most frequent rank; 0 for kinds without one.
        is_dora: Some adapters are DoRAs.
        is_readable: False for a file that is damaged or no LoRA.
    """

    made_for: str = ""
    kinds: tuple[str, ...] = ()
    rank: int = 0
    is_dora: bool = False
    is_readable: bool = True


def read_lora(path: Path) -> LoraFacts | None:
    """Reads the header of a LoRA file. Never raises: None for a file that is damaged or no LoRA."""
    try:
        return read_facts(path)
    except (LoraGuardError, OSError):
        return None


def card_of(facts: LoraFacts | None) -> CardFacts:
    """Returns what the card of a LoRA file shows."""
    if facts is None:
        return CardFacts(is_readable=False)
    return CardFacts(
        made_for=facts.made_for.value if facts.made_for else "",
        kinds=tuple(kind for kind, _ in facts.kinds.most_common(2)),
        rank=facts.ranks.most_common(1)[0][0] if facts.ranks else 0,
        is_dora=facts.dora_modules > 0,
    )


def read_target(path: Path) -> Target | None:
    """Reads the header of a checkpoint as LoRA files are matched to it. Never raises: None for a file that cannot be read."""
    try:
        return read_checkpoint(path).target()
    except (LoraGuardError, OSError):
        return None


def fits(facts: LoraFacts | None, target: Target | None) -> bool | None:
    """Returns whether a model can use a LoRA file, by the rule that applies it; None where the headers do not show it.

    Never raises.
    """
    if facts is None or target is None or target.architecture is None:
        return None
    try:
        with damaged_where_torch_refuses(facts.file.path):
            fit = fit_file(facts.file, target)
    except LoraGuardError:
        return None
    if fit.refused is None and not fit.terms and not IMAGE_PARTS & set(facts.parts):
        return None  # the text encoders lie in a file of their own
    return fit.refused is None and bool(fit.terms)


class CardReader:
    """Reads headers in the background. For any thread; never raises."""

    def __init__(
        self,
        folder: Callable[[], Path | None] = lambda: None,
        is_busy: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], None] = time.sleep,
        quiet_seconds: float = 0.5,
    ) -> None:
        """
        Args:
            folder: Returns where the facts are kept between two starts; None keeps nothing.
            is_busy: True while an image is made.
            quiet_seconds: Nothing is read until the page has asked for nothing for so long.
            sleep: For tests.
        """
        self._folder, self._is_busy, self._sleep = folder, is_busy, sleep
        self._quiet_seconds, self._asked = quiet_seconds, 0.0
        self._lock = threading.Lock()
        self._kept: Kept | None = None
        self._wanted: OrderedDict[str, tuple[Path, ...]] = OrderedDict()
        self._target: tuple[str, Target | None] = ("", None)
        self._thread: threading.Thread | None = None

    def card(self, path: Path) -> CardFacts | None:
        """Returns the facts of a LoRA file; None until its header is read."""
        self._asked = time.monotonic()
        key = _key(path)
        if key is None:
            return None
        with self._lock:
            found = self._known().cards.get(key)
            if found is None:
                self._want(key, (path,))
        return found

    def fits(self, path: Path, checkpoint: Path) -> bool | None:
        """Returns whether a LoRA fits a checkpoint; None until both are read, and where it does not show."""
        keys = _key(path), _key(checkpoint)
        if keys[0] is None or keys[1] is None:
            return None
        pair = f"{keys[0]} on {keys[1]}"
        with self._lock:
            known = self._known().fits
            if pair not in known:
                self._want(pair, (path, checkpoint))
            return known.get(pair)

    def wait(self, seconds: float = 10.0) -> None:
        """Waits until everything asked for is read. For tests."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _want(self, key: str, paths: tuple[Path, ...]) -> None:
        self._wanted[key] = paths
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_all, name="lora-guard-cards", daemon=True)
            self._thread.start()

    def _read_all(self) -> None:
        try:
            while (wanted := self._next()) is not None:
                while self._is_busy():
                    self._sleep(BUSY_SECONDS)
                while (left := self._asked + self._quiet_seconds - time.monotonic()) > 0:
                    self._sleep(left)
                begun = time.perf_counter()
                self._read(*wanted)
                self._sleep(REST_SHARE * (time.perf_counter() - begun))
        except Exception:
            log.debug("the headers of LoRA files are not read for their cards", exc_info=True)
            with self._lock:
                self._thread = None

    def _read(self, key: str, paths: tuple[Path, ...]) -> None:
        path, *checkpoints = paths
        name = _key(path) or ""
        with self._lock:
            if not checkpoints and name in self._known().cards:
                return  # read together with a checkpoint
        facts = read_lora(path)
        with self._lock:
            _remember(self._known().cards, name, card_of(facts), MOST_CARDS)
        for checkpoint in checkpoints:
            model = _key(checkpoint) or ""
            if self._target[0] != model:
                self._target = model, read_target(checkpoint)
            verdict = fits(facts, self._target[1])
            with self._lock:
                _remember(self._known().fits, key, verdict, MOST_PAIRS)

    def _next(self) -> tuple[str, tuple[Path, ...]] | None:
        """Returns what is to be read next. Where nothing is, the facts are kept and the thread ends."""
        while True:
            with self._lock:
                if self._wanted:
                    return self._wanted.popitem(last=False)
            self._keep()
            with self._lock:
                if not self._wanted:
                    self._thread, self._target = None, ("", None)
                    return None

    def _known(self) -> Kept:
        if self._kept is None:
            folder = self._folder()
            self._kept = Kept() if folder is None else _read_kept(folder / FILE_NAME)
        return self._kept

    def _keep(self) -> None:
        folder = self._folder()
        if folder is None:
            return
        with self._lock:
            known = self._known()
            cards = {key: astuple(card) for key, card in known.cards.items()}
            document = {"version": VERSION, "cards": cards, "fits": dict(known.fits)}
        temporary = folder / (FILE_NAME + ".tmp")
        try:
            make_private_folder(folder)
            temporary.unlink(missing_ok=True)
            with open_private(temporary, "xb") as file:
                file.write(json.dumps(document, ensure_ascii=False).encode())
            os.replace(temporary, folder / FILE_NAME)
        except OSError as error:
            log.debug("what LoRA cards show is not kept: %s", error)


@dataclass
class Kept:
    """What is known of files, the one read last at the end, and of pairs of a file and a checkpoint."""

    cards: OrderedDict[str, CardFacts] = field(default_factory=OrderedDict)
    fits: OrderedDict[str, bool | None] = field(default_factory=OrderedDict)


def _remember(known: OrderedDict[str, T], key: str, value: T, most: int) -> None:
    known[key] = value
    while len(known) > most:
        known.popitem(last=False)


def _key(path: Path) -> str | None:
    """Returns what a file is known by: its name without folders, its size and its time; None if there is no file."""
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return None
    return f"{shown(path.name, 200)}|{facts.st_size}|{facts.st_mtime_ns}"


def _read_kept(path: Path) -> Kept:
    """Reads the kept facts; entries that are none are left out."""
    kept = Kept()
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, LookupError):
        with open_private(path, "rb") as file:
            document = json.loads(file.read(LONGEST_BYTES))
        if document["version"] == VERSION:
            for key, entry in document["cards"].items():
                if (card := _card(entry)) is not None:
                    kept.cards[key] = card
            kept.fits.update(
                (key, verdict) for key, verdict in document["fits"].items() if verdict in (True, False, None)
            )
    return kept


def _card(entry: object) -> CardFacts | None:
    if not isinstance(entry, list) or len(entry) != 5:
        return None
    made_for, kinds, rank, is_dora, is_readable = entry
    is_sound = (
        made_for in {"", *(architecture.value for architecture in Architecture)}
        and isinstance(kinds, list)
        and all(isinstance(kind, str) and kind.isidentifier() for kind in kinds[:3])
        and type(rank) is int
        and type(is_dora) is bool
        and type(is_readable) is bool
    )
    return CardFacts(made_for, tuple(kinds[:3]), rank, is_dora, is_readable) if is_sound else None
