"""The VAE decodes and encodes in tiles where a whole picture does not fit, before it is tried.

Forge tries the whole picture and goes on in tiles after an out-of-memory error. Windows' driver raises none: it goes on in
system RAM, 5 to 30 times slower, and on the CPU the system ends the process. So what a whole picture takes is compared with
what is free once Forge has made room, and Forge's own tiles are asked for where it does not fit. Where it fits nothing is
different, to the bit; a real out-of-memory error goes to Forge's own fallback as before.

Source: Forge's `backend/patcher/vae.py` and `backend/memory_management.py` (`VAE_ALWAYS_TILED`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import MemoryShortError
from ...memory.out_of_memory import is_out_of_memory
from ...memory.step_times import driver_spills
from ...messages import Joined, Message, say
from ...planning import activations
from ...planning.formats import smaller_picture
from ...planning.host_memory import GB, Latent
from ...recorder.crash_report import Precaution
from ...runtime.precautions import Cautions
from ...runtime.preflight import Preflight
from ...weights.storage import MB
from ..hooks import HookSet

log = logging.getLogger(__name__)

FORGES = ("backend.nn.vae", "IntegratedAutoencoderKL")
USUAL_CHANNELS, USUAL_RATIO = 128, 8
"""Of the VAEs that `planning.activations` was measured with: channels of the finest level, pixels per latent pixel."""
TILES = {"decoding": 64, "encoding": 512}
"""Sides of Forge's tiles, in pixels of the latent and of the picture. It goes over the picture three times, with squares and
with tiles of half and twice the side, and takes the mean."""
WHOLE_COPIES, TILED_COPIES = 3, 6
"""Pictures in fp32 that lie in RAM at once: the result and what it is computed from; in tiles the three passes' too."""
FP32_BYTES, COLOURS = 4, 3
LARGE_BYTES = 256 * MB
"""Less is no reason to give remembered prompts and LoRA files up."""
PRECAUTIONS = {"decoding": Precaution.TILED_VAE, "encoding": Precaution.TILED_ENCODE}


@dataclass(frozen=True)
class Work:
    """One call of the VAE. `whole_bytes`: for one picture; `tile_bytes`: for the largest tile, None where tiles are no way
    out; `asked_bytes`: what Forge asks for, by which it decides how many pictures run at once."""

    phrase: str
    pictures: int
    width: int
    height: int
    whole_bytes: int
    tile_bytes: int | None
    asked_bytes: float

    @property
    def what(self) -> Message:
        size = {"count": self.pictures, "width": self.width, "height": self.height}
        return Message(f"preflight.{self.phrase}", size)

    def pictures_bytes(self, copies: int) -> int:
        return self.pictures * self.width * self.height * COLOURS * FP32_BYTES * copies


class VaeRoom:
    """What was measured corrects how much room Forge makes for a decode, and never the choice of tiles: what is decoded in
    tiles is not measured, so one odd peak would keep every later picture in them."""

    def __init__(self, memory: Any, preflight: Preflight, cautions: Cautions) -> None:
        """`memory`: Forge's `backend.memory_management`."""
        self._memory, self._preflight, self._cautions = memory, preflight, cautions
        self._spills = driver_spills()
        self._said: str = ""
        self._lock, self._in_tiles = threading.Lock(), 0

    def stand_in(self, hooks: HookSet, vae_class: Any) -> None:
        """`vae_class`: Forge's `VAE`."""
        hooks.add(vae_class, "decode_inner", self.decode_inner)
        hooks.add(vae_class, "encode_inner", self.encode_inner)

    def decode_inner(self, original: Callable[..., Any], vae: Any, samples_in: torch.Tensor) -> Any:
        """In place of `VAE.decode_inner`. `samples_in`: (pictures, channels, height, width) of the latent. Raises MemoryShortError where RAM would not
        survive it, not even in tiles."""
        if not self._knows(vae, samples_in):
            return original(vae, samples_in)
        pictures, _, height, width = samples_in.shape
        asked = vae.memory_used_decode(samples_in.shape, vae.vae_dtype)
        return self._run(original, vae, samples_in, self._work("decoding", vae, pictures, height, width, asked))

    def encode_inner(self, original: Callable[..., Any], vae: Any, pixel_samples: torch.Tensor) -> Any:
        """In place of `VAE.encode_inner`. `pixel_samples`: (pictures, height, width, 3). Raises MemoryShortError as `decode_inner` does."""
        if not self._knows(vae, pixel_samples):
            return original(vae, pixel_samples)
        pictures, height, width, _ = pixel_samples.shape
        asked = vae.memory_used_encode((pictures, COLOURS, height, width), vae.vae_dtype)
        height, width = height // vae.downscale_ratio, width // vae.downscale_ratio
        return self._run(original, vae, pixel_samples, self._work("encoding", vae, pictures, height, width, asked))

    def _knows(self, vae: Any, given: torch.Tensor) -> bool:
        """False for another extension's VAE, and where tiles were asked for already (Never OOM Integrated)."""
        is_forges = any((kind.__module__, kind.__name__) == FORGES for kind in type(vae.first_stage_model).__mro__)
        # While another thread works in tiles this one's picture gets them too, and needs no second look.
        in_tiles = getattr(self._memory, "VAE_ALWAYS_TILED", True)
        return is_forges and given.ndim == 4 and given.shape[0] > 0 and not in_tiles

    def _work(self, phrase: str, vae: Any, pictures: int, height: int, width: int, asked: float) -> Work:
        whole = self._bytes(phrase, vae, height, width)
        side = TILES[phrase] if phrase == "decoding" else TILES[phrase] // vae.downscale_ratio
        tiles = ((side, side), (side // 2, side * 2), (side * 2, side // 2))
        tile = max(self._bytes(phrase, vae, min(height, high), min(width, wide)) for high, wide in tiles)
        # Forge's tiles leave this out.
        is_regulated = phrase == "encoding" and vae.patcher.model_options.get("model_vae_regulation") is not None
        pixels = vae.downscale_ratio
        can_tile = tile < whole and not is_regulated
        return Work(phrase, pictures, width * pixels, height * pixels, whole, tile if can_tile else None, asked)

    def _bytes(self, phrase: str, vae: Any, height: int, width: int) -> int:
        """VRAM (on the CPU: RAM) of one picture or tile, `height` and `width` in latent pixels."""
        estimate = activations.decode if phrase == "decoding" else activations.encode
        found = estimate(Latent(1, height, width), self._memory.dtype_size(vae.vae_dtype))
        # Where memory that is short raises an error, the allocator collects what lies free in it and tries again.
        count = found.held_bytes if self._spills and vae.device.type != "cpu" else found.used_bytes
        channels = getattr(getattr(vae.first_stage_model, "config", None), "block_out_channels", (USUAL_CHANNELS,))[0]
        return int(count * (vae.downscale_ratio / USUAL_RATIO) ** 2 * channels / USUAL_CHANNELS)

    def _run(self, original: Callable[..., Any], vae: Any, given: torch.Tensor, work: Work) -> Any:
        # A picture that tiles are no way out for says nothing of one that they are.
        careful = self._cautions.against(PRECAUTIONS[work.phrase], work.phrase, vae.first_stage_model)
        with careful if work.tile_bytes is not None else contextlib.nullcontext(False) as cautious:
            if vae.device.type == "cpu":
                ways = self._ways_on_the_cpu(vae, work, cautious)
                way = ways[self._chosen([need for _, need in ways], work)][0]
                if way != ways[0][0]:
                    self._say(f"preflight.{way}_in_ram", work, need=ways[0][1], free=self._preflight.fast_bytes() or 0)
            else:
                way = "tiles" if cautious else self._way_on_the_card(vae, work)
                need = work.pictures_bytes(TILED_COPIES if way == "tiles" else WHOLE_COPIES)
                if need > LARGE_BYTES:
                    self._chosen([need], work)
            if way == "singly":
                return torch.cat([original(vae, given[place : place + 1]) for place in range(work.pictures)])
            with self._tiled() if way == "tiles" else contextlib.nullcontext():
                return original(vae, given)

    def _chosen(self, needs: Sequence[int], work: Work) -> int:
        """Which of the ways. Raises MemoryShortError, with what would help, where RAM would survive none."""
        try:
            return self._preflight.choose(needs, work.what)
        except MemoryShortError as error:
            advice = _what_helps(work, min(needs), self._preflight.room_bytes() or 0)
            if not advice:
                raise
            refused = {"why": error, "advice": Joined(advice, "list.semicolon")}
            raise MemoryShortError(Message("preflight.refused", refused)) from None

    def _ways_on_the_cpu(self, vae: Any, work: Work, cautious: bool) -> Sequence[tuple[str, int]]:
        """Each way with the RAM that it needs, the best first."""
        at_once = max(1, int(self._memory.get_free_memory(vae.device) / work.asked_bytes))
        ways = [("whole", min(at_once, work.pictures) * work.whole_bytes + work.pictures_bytes(WHOLE_COPIES))]
        if min(at_once, work.pictures) > 1:
            ways.append(("singly", work.whole_bytes + work.pictures_bytes(WHOLE_COPIES)))
        if work.tile_bytes is not None:
            tiles = ("tiles", work.tile_bytes + work.pictures_bytes(TILED_COPIES))
            ways = [tiles] if cautious else [*ways, tiles]
        return ways

    def _way_on_the_card(self, vae: Any, work: Work) -> str:
        if work.tile_bytes is None or vae.device.type != "cuda":
            return "whole"
        memory, device, model = self._memory, vae.device, vae.first_stage_model
        whole = work.whole_bytes
        free = int(memory.get_free_memory(device)) - int(memory.module_size(model, exclude_device=device))
        if whole <= free:
            return "whole"
        total = int(memory.get_total_memory(device))
        if whole + int(memory.module_size(model)) <= total:
            # What Forge would do next: only then is it known what can be had. Of what is asked for a VAE that share is freed.
            asked = max(work.asked_bytes, (whole + MB) / activations.VAE_HOLDS_WHERE_FORGE_HAS)
            try:
                memory.load_models_gpu([vae.patcher], memory_required=asked)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Forge loads it once more, and has a fallback of its own.
                return "whole"
            free = int(memory.get_free_memory(device))
            if whole <= free:
                return "whole"
        self._say("preflight.tiles_in_vram", work, need=whole, free=max(0, free))
        return "tiles"

    @contextlib.contextmanager
    def _tiled(self) -> Iterator[None]:
        """Forge's own switch, for one call."""
        with self._lock:
            self._in_tiles += 1
            self._memory.VAE_ALWAYS_TILED = True
        try:
            yield
        finally:
            with self._lock:
                self._in_tiles -= 1
                # It was off when the first one came, or that one would not be here.
                self._memory.VAE_ALWAYS_TILED = self._in_tiles > 0

    def _say(self, key: str, work: Work, need: int, free: int) -> None:
        """Once while the same is done: each image of a row would say it again."""
        if self._said == f"{key} {work.what}":
            return
        self._said = f"{key} {work.what}"
        facts: dict[str, Any] = {"what": work.what, "need_mb": need / MB, "tile_mb": (work.tile_bytes or 0) / MB}
        say(log, logging.WARNING, key, **facts, free_mb=free / MB)


def _what_helps(work: Work, need_bytes: int, room_bytes: int) -> list[Message]:
    """`need_bytes`: RAM of the way that takes least, of which all but a tile is of the pictures' size."""
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
