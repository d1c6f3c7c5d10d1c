"""Says where alpha was taken from text in the metadata, and where such text was left aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import Message
from .base import Adapter
from .file_settings import FileSettings
from .ranked import RankedAdapter


def notes_on_alpha(settings: FileSettings, adapters: Mapping[tuple[str, str], Adapter]) -> Iterator[Message]:
    """Yields sentences for users.

    Args:
        settings: those that the adapters were made with.
        adapters: by module name and parameter.
    """
    if not settings.has_stated:
        return
    used: Counter[float] = Counter()
    other: Counter[int] = Counter()
    stated: set[int] = set()
    for (module, _), adapter in adapters.items():
        by_rank = settings.of(module).stated
        if not by_rank or not isinstance(adapter, RankedAdapter) or not adapter.rank:
            continue
        if adapter.alpha is None:
            other[adapter.rank] += 1
            stated.update(by_rank)
        else:
            used[adapter.alpha] += 1
    for alpha, count in used.items():
        yield Message("lora.alpha_stated", {"alpha": alpha, "count": count})
    if other:
        ranks, found = (", ".join(str(rank) for rank in sorted(some)[:5]) for some in (stated, other))
        yield Message("lora.alpha_not_stated", {"count": other.total(), "rank": ranks, "found": found})
