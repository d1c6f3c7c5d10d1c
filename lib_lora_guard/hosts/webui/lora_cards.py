"""A line on every LoRA card of the WebUI: base model, kind, rank, and whether it fits the chosen checkpoint.

The host makes a card of an item, a dict, in `create_item_html`. A copy of the item gets the line in its description, and in
what the search looks at: nothing else of the page is touched, and what users write about a LoRA stays theirs. Read in Forge
dfdcbab6 and Forge Neo 2.26: `modules/ui_extra_networks.py`, `extensions-builtin/sd_forge_lora/ui_extra_networks_lora.py`.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypedDict

from ...files import shown
from ...messages import Joined, Message
from ...runtime.hooks import P, R, Row
from ...runtime.live_settings import LiveSettings
from .card_facts import CardFacts, CardReader

log = logging.getLogger(__name__)


class Item(TypedDict, total=False):
    """What the host knows of a card; other entries are passed on."""

    filename: str
    description: str | None
    search_terms: list[str]


class Page(Protocol):
    """The host's page with the cards."""


_KIND_NAMES = {
    "lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT", "ia3": "IA3", "diff": "diff",
}  # fmt: skip
_NAME_CHARACTERS = 40
"""Characters shown of the checkpoint's name."""


class LoraCards:
    """Adds the line. `modules` are the host's, by name."""

    def __init__(
        self,
        settings: LiveSettings,
        modules: Mapping[str, ModuleType],
        folder: Callable[[], Path | None] = lambda: None,
    ) -> None:
        self._settings, self._modules = settings, modules
        self.reader = CardReader(folder, self._is_busy)

    def create_item_html(
        self, original: Callable[P, R], page: Page, tabname: str, item: Item, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Stands in place of `ExtraNetworksPageLora.create_item_html`."""
        try:
            item = self._with_line(item)
        except Exception:
            # A card of another shape is shown as it is.
            log.debug("a LoRA card is left as it is", exc_info=True)
        make: Callable[..., R] = original
        return make(page, tabname, item, *args, **kwargs)

    def look_ahead(self, files: Iterable[str]) -> None:
        """Begins to read the headers of LoRA files, before a page asks for them."""
        if self._settings.shows_lora_cards():
            checkpoint = self._checkpoint()
            for path in map(Path, files):
                if checkpoint is None:
                    self.reader.card(path)
                else:
                    self.reader.fits(path, checkpoint)

    def _with_line(self, item: Item) -> Item:
        if not self._settings.shows_lora_cards():
            return item
        path, checkpoint = Path(item["filename"]), self._checkpoint()
        verdict = None if checkpoint is None else self.reader.fits(path, checkpoint)
        card = self.reader.card(path)
        if card is None:
            return item
        line = card_line(card, verdict, checkpoint.stem if checkpoint else "").text(self._settings.language())
        between = " | "
        if self._takes_html():
            line, between = html.escape(line), "<br>"
        description = item.get("description")
        words = [html.escape(word) for word in (card.made_for, *map(_kind_name, card.kinds)) if word]
        return {
            **item,
            "description": f"{line}{between}{description}" if description else line,
            "search_terms": [*item.get("search_terms", ()), *words],
        }

    def _takes_html(self) -> bool:
        """Returns True if the host shows descriptions as HTML."""
        shared = self._modules.get("modules.shared")
        return shared is not None and bool(shared.opts.extra_networks_card_description_is_html)

    def _checkpoint(self) -> Path | None:
        """Returns the checkpoint that the next image is made with."""
        models = self._modules.get("modules.sd_models")
        try:
            return (
                None if models is None else Path(models.model_data.forge_loading_parameters["checkpoint_info"].filename)
            )
        except (AttributeError, LookupError, TypeError):
            return None  # none is chosen yet

    def _is_busy(self) -> bool:
        shared = self._modules.get("modules.shared")
        return shared is not None and bool(shared.state.job)


ROWS: tuple[Row[LoraCards], ...] = (
    Row(
        "ui_extra_networks_lora",
        "ExtraNetworksPageLora.create_item_html",
        lambda cards: (cards.create_item_html,),
        is_needed=False,
    ),
)


def card_line(card: CardFacts, verdict: bool | None, name: str) -> Message | Joined:
    """Returns the line of a card.

    Args:
        card: The LoRA's facts.
        verdict: It fits the checkpoint; None where that is not known.
        name: The checkpoint's name: the line stays true when another one is chosen.
    """
    if not card.is_readable:
        return Message("card.unreadable")
    parts: list[str] = [card.made_for or Message("card.unknown_model")]
    kinds = " + ".join(map(_kind_name, card.kinds)) + (" (DoRA)" if card.is_dora else "")
    parts.append(Message("card.kind_and_rank", {"kind": kinds, "rank": card.rank}) if card.rank else kinds)
    if verdict is not None:
        checkpoint = shown(name, _NAME_CHARACTERS)
        if verdict:
            parts.append(Message("card.fits", {"model": checkpoint}))
        else:
            parts.append(Message("card.misfit", {"model": checkpoint}))
    return Joined(part for part in parts if part)


def _kind_name(kind: str) -> str:
    return _KIND_NAMES.get(kind, kind)
