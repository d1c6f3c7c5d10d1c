"""Says where alpha was taken from text in the metadata, and where such text was left aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import Message
from ..files import shown
from .base import Adapter
from .file_settings import FileSettings, PeftSettings
from .ranked import RankedAdapter

Adapters = Mapping[tuple[str, str], Adapter]
"""By module name and parameter."""


def with_ranks(settings: FileSettings, adapters: Adapters) -> FileSettings:
    """The settings with the alphas that stand without a rank, where all factors they are for have the same.

    Args:
        settings: those that the adapters were made with; returned as they are if there is no such alpha.
        adapters: of the file.
    """
    if not settings.has_stated:
        return settings
    return settings.with_ranks(lambda own: _without_alpha(settings, adapters, own))


def _without_alpha(settings: FileSettings, adapters: Adapters, own: PeftSettings) -> Counter[int]:
    """Modules that a component's settings are for and that have no alpha, by their rank."""
    return Counter(
        adapter.rank
        for (module, _), adapter in adapters.items()
        if isinstance(adapter, RankedAdapter) and adapter.rank and adapter.alpha is None and settings.of(module) is own
    )


def notes_on_alpha(settings: FileSettings, adapters: Adapters) -> Iterator[Message]:
    """Yields sentences for users.

    Args:
        settings: those that the adapters were made with.
        adapters: of the file.
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
    for own in settings.alone():
        if by_rank := _without_alpha(settings, adapters, own):
            entry, value = own.alone or ("", "")
            ranks = ", ".join(map(str, sorted(by_rank)[:5]))
            facts = {"entry": shown(entry), "value": shown(value), "count": by_rank.total(), "found": ranks}
            yield Message("lora.alpha_alone", facts)
    if other:
        ranks, found = (", ".join(str(rank) for rank in sorted(some)[:5]) for some in (stated, other))
        yield Message("lora.alpha_not_stated", {"count": other.total(), "rank": ranks, "found": found})
