"""RAM is looked at before something large is read or moved into it: over what is fast another way is taken, over what the
process survives it is refused, in words, before the system ends it without any.

Sources: Forge's `backend/loader.py` (`forge_loader`, which gets file names), `backend/args.py` (`dynamic_args`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MemoryShortError
from ..files import shown
from ..hosts.forge.access import RAM_FLOOR_BYTES
from ..memory import rules
from ..memory.readings import MemorySnapshot
from ..memory.rules import Finding
from ..messages import Joined, Message, say
from ..recorder.crash_report import Precaution
from .precautions import Cautions

log = logging.getLogger(__name__)

_FP8_NAMES = ("float8",)


class Preflight:
    def __init__(
        self,
        snapshot: Callable[[], MemorySnapshot],
        drop_caches: Callable[[], int],
        tell: Callable[[Finding | None], None],
        cautions: Cautions | None = None,
    ) -> None:
        """`drop_caches` gives back what the guard keeps for speed, and returns the bytes."""
        self._snapshot, self._drop_caches, self._tell = snapshot, drop_caches, tell
        self._cautions = cautions or Cautions(lambda model: ())
        self.advise: Callable[[Sequence[Path], int], Sequence[Message]] = lambda files, room_bytes: ()
        """What would help where files do not fit into so many bytes."""

    def before_reading(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of `forge_loader(sd, additional_state_dicts)`. Raises MemoryShortError instead of reading files that RAM
        and page file together cannot take."""
        files = [path for path in _files(args, kwargs) if path.is_file()]
        what = Message("preflight.reading", {"files": Joined(shown(path.name) for path in files)})
        with self.careful("reading"):
            try:
                self.check(sum(_bytes_in_ram(path) for path in files), what)
            except MemoryShortError as error:
                advice = self.advise(files, self._snapshot().alive_ram_bytes or 0)
                if not advice:
                    raise
                refused = {"why": error, "advice": Joined(advice, "list.semicolon")}
                raise MemoryShortError(Message("preflight.refused", refused)) from None
            return original(*args, **kwargs)

    @contextlib.contextmanager
    def careful(self, doing: str) -> Iterator[None]:
        """Around something large: after a crash the caches are given back first."""
        with self._cautions.against(Precaution.DROP_CACHES, doing) as cautious:
            if cautious:
                self._drop()
            yield

    @contextlib.contextmanager
    def leaving(self, model: Any, wanted_bytes: int) -> Iterator[int]:
        """Around a model's way off the card into RAM: how much of `wanted_bytes` may go. After a crash in it, what is fast."""
        with self._cautions.against(Precaution.PARTIAL_UNLOAD, "leaving", model) as cautious:
            fast = self.fast_bytes() if cautious else None
            yield wanted_bytes if fast is None else min(wanted_bytes, fast)

    def check(self, needed_bytes: int, what: Message) -> None:
        """Drops caches where that makes the difference. Raises MemoryShortError where nothing does."""
        self.choose([needed_bytes], what)

    def choose(self, needs: Sequence[int], what: Message) -> int:
        """Which of several ways, by the RAM that each needs: the first that stays fast, else the smallest; 0 where the
        system does not say. Drops caches where that makes the difference. Raises MemoryShortError where the process would
        not survive any."""
        chosen = self._fast(needs)
        # Caches cost time to fill again; another way may cost more than time.
        if chosen != 0 and self._drop():
            chosen = self._fast(needs)
        if chosen is not None:
            return chosen
        chosen = min(range(len(needs)), key=needs.__getitem__)
        finding = self._judge(needs[chosen], what)
        if finding is not None and finding.says.key == "rule.ram_refused":
            raise MemoryShortError(Message("rule.line", {"rule": finding.rule, "says": finding.says}))
        self._tell(finding)
        return chosen

    def room_bytes(self) -> int | None:
        """How much may still be moved into RAM before the process is in danger; None where the system does not say."""
        alive = self._snapshot().alive_ram_bytes
        return None if alive is None else max(0, alive - RAM_FLOOR_BYTES // 4)

    def fast_bytes(self) -> int | None:
        """RAM that can be filled without paging; None where the system does not say."""
        return self._snapshot().fast_ram_bytes(RAM_FLOOR_BYTES)

    def _drop(self) -> int:
        dropped = self._drop_caches()
        if dropped:
            say(log, logging.INFO, "preflight.dropped", size_mb=dropped / rules.MB)
        return dropped

    def _fast(self, needs: Sequence[int]) -> int | None:
        fast = self.fast_bytes()
        if fast is None:
            return 0
        return next((place for place, need in enumerate(needs) if need <= fast), None)

    def _judge(self, needed_bytes: int, what: Message) -> Finding | None:
        snapshot = self._snapshot()
        fast, alive = snapshot.fast_ram_bytes(RAM_FLOOR_BYTES), snapshot.alive_ram_bytes
        if fast is None or alive is None:
            return None
        return rules.ram_for(needed_bytes, fast, alive, what)


def _files(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Path]:
    state = args[0] if args else kwargs.get("sd")
    others = args[1] if len(args) > 1 else kwargs.get("additional_state_dicts")
    for one in (state, *(others or ())):
        if isinstance(one, (str, Path)):
            yield Path(one)


def _bytes_in_ram(path: Path) -> int:
    """What the tensors of a file take once they are in a model. A model that Forge shall hold in fp8 is cast as it is read,
    so it takes half of a 16-bit file; how it is stored is in its header, and to refuse wrongly is worse than late."""
    size = path.stat().st_size
    dtype = _wished_dtype()
    return size // 2 if any(name in str(dtype) for name in _FP8_NAMES) else size


def _wished_dtype() -> Any:
    """What "Diffusion in Low Bits" says; None where it says nothing."""
    import sys

    arguments = sys.modules.get("backend.args")
    return getattr(arguments, "dynamic_args", {}).get("forge_unet_storage_dtype")
