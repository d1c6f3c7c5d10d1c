"""Chooses how a VAE's pictures are decoded or encoded, by the RAM and VRAM that each way takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import MemoryShortError
from ..messages import Joined, Message
from ..planning.formats import smaller_picture
from ..planning.host_memory import GB
from ..weights.storage import MB
from .image_words import ImageWords
from .preflight import Preflight

log = logging.getLogger(__name__)

WHOLE_COPIES, TILED_COPIES = 3, 6
"""Pictures in fp32 that lie in RAM at once: the result and what it is computed from; in tiles those of all three passes."""
FP32_BYTES, COLOURS = 4, 3


@dataclass(frozen=True)
class Work:
    """One call of the VAE.

    Attributes:
        phrase: "decoding" or "encoding".
        pictures: how many.
        width: of one, in pixels.
        height: of one, in pixels.
        whole_bytes: for one picture as a whole.
        tile_bytes: for the largest tile; None where tiles are no way out.
        asked_bytes: what the host asks for, by which it decides how many pictures run at once.
    """

    phrase: str
    pictures: int
    width: int
    height: int
    whole_bytes: int
    tile_bytes: int | None
    asked_bytes: float

    @property
    def what(self) -> Message:
        """Names the work in a sentence."""
        size = {"count": self.pictures, "width": self.width, "height": self.height}
        return Message(f"preflight.{self.phrase}", size)

    def pictures_bytes(self, copies: int) -> int:
        """Returns the RAM of all pictures in fp32, `copies` times."""
        return self.pictures * self.width * self.height * COLOURS * FP32_BYTES * copies


class VaeRoom:
    """Compares what each way takes with what there is, and says so where it is not the usual one."""

    def __init__(self, preflight: Preflight, words: ImageWords | None = None) -> None:
        """
        Args:
            preflight: compares with the RAM there is.
            words: says under the image what was done another way than usual.
        """
        self._preflight, self._words = preflight, words or ImageWords()
        self._said = ""

    def choose(self, needs: Sequence[int], work: Work) -> int:
        """Returns the place of the way to take.

        Args:
            needs: the RAM in bytes that each way takes.
            work: the call.

        Raises:
            MemoryShortError: RAM would survive none of them; says what would help.
        """
        try:
            return self._preflight.choose(needs, work.what)
        except MemoryShortError as error:
            advice = _what_helps(work, min(needs), self._preflight.room_bytes() or 0)
            if not advice:
                raise
            refused = {"why": error, "advice": Joined(advice, "list.semicolon")}
            raise MemoryShortError(Message("preflight.refused", refused)) from None

    def way_in_ram(self, work: Work, free_bytes: int, cautious: bool) -> str:
        """Chooses between "whole", "singly" and "tiles" for a VAE on the CPU.

        Args:
            work: the call.
            free_bytes: what the host calls free, by which it decides how many pictures run at once.
            cautious: take the tiles if they are a way out.
        """
        ways = _ways_in_ram(work, free_bytes, cautious)
        way = ways[self.choose([need for _, need in ways], work)][0]
        if way != ways[0][0]:
            self.say(f"preflight.{way}_in_ram", work, need=ways[0][1], free=self._preflight.fast_bytes() or 0)
        return way

    def say(self, key: str, work: Work, need: int, free: int) -> None:
        """Says a choice under each image, and in the log once while it stays the same."""
        choice = f"{key} {work.what}"
        is_logged, self._said = self._said == choice, choice
        sizes = {"need_mb": need / MB, "tile_mb": (work.tile_bytes or 0) / MB, "free_mb": free / MB}
        message = Message(key, {"what": work.what, **sizes})
        if not is_logged:
            log.warning("%s", message)
        self._words.tell(message, is_logged=True, once=choice)


def _ways_in_ram(work: Work, free_bytes: int, cautious: bool) -> Sequence[tuple[str, int]]:
    """Returns each way with the RAM that it needs, the best first."""
    at_once = max(1, int(free_bytes / work.asked_bytes))
    ways = [("whole", min(at_once, work.pictures) * work.whole_bytes + work.pictures_bytes(WHOLE_COPIES))]
    if min(at_once, work.pictures) > 1:
        ways.append(("singly", work.whole_bytes + work.pictures_bytes(WHOLE_COPIES)))
    if work.tile_bytes is not None:
        tiles = ("tiles", work.tile_bytes + work.pictures_bytes(TILED_COPIES))
        ways = [tiles] if cautious else [*ways, tiles]
    return ways


def _what_helps(work: Work, need_bytes: int, room_bytes: int) -> list[Message]:
    """Advises on work that RAM cannot take. `need_bytes` is what the smallest way takes; all of it but a tile grows with the
    pictures' size."""
    said = []
    tile = min(need_bytes, work.tile_bytes or 0) if need_bytes > work.pictures_bytes(TILED_COPIES) else 0
    one = tile + (need_bytes - tile) // work.pictures
    if one <= room_bytes:
        said.append(Message("preflight.one_picture", {"need_gb": one / GB}))

    def need(width: int, height: int) -> int:
        return tile + int((need_bytes - tile) * width * height / (work.width * work.height))

    smaller = smaller_picture(work.width, work.height, need, need_bytes - room_bytes)
    if smaller is not None:
        facts = {"width": smaller.width, "height": smaller.height, "saved_gb": smaller.saved_bytes / GB}
        said.append(Message("preflight.smaller_picture", facts))
    return said
