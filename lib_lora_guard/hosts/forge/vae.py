"""The VAE decodes and encodes in tiles where a whole picture does not fit, before it is tried.

Forge tries the whole picture and goes on in tiles after an out-of-memory error. Windows' driver raises none: it goes on in
system RAM, 5 to 30 times slower, and on the CPU the system ends the process. So what a whole picture takes is compared with
what is free once Forge has made room, and Forge's own tiles are asked for where it does not fit. Where it fits nothing is
different, to the bit; a real out-of-memory error goes to Forge's own fallback as before.

Source: Forge's `backend/patcher/vae.py` and `backend/memory_management.py` (`VAE_ALWAYS_TILED`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from ...memory.out_of_memory import is_out_of_memory
from ...memory.step_times import driver_spills
from ...planning import activations
from ...planning.host_memory import Latent
from ...recorder.crash_report import Precaution
from ...runtime.precautions import Precautions
from ...runtime.vae_room import COLOURS, TILED_COPIES, WHOLE_COPIES, VaeRoom, Work
from ...weights.storage import MB
from .facts import is_forges_vae
from .types import MemoryManagement, Vae

USUAL_CHANNELS, USUAL_RATIO = 128, 8
"""The measures of the VAEs behind `planning.activations`: channels of the finest level, pixels per latent pixel."""
TILES = {"decoding": 64, "encoding": 512}
"""Sides of Forge's tiles, in pixels of the latent and of the picture. It goes over the picture three times, with squares and
with tiles of half and twice the side, and takes the mean."""
LARGE_BYTES = 256 * MB
"""Less is no reason to give remembered prompts and LoRA files up."""
_Inner: TypeAlias = Callable[..., torch.Tensor]
PRECAUTIONS = {"decoding": Precaution.TILED_VAE, "encoding": Precaution.TILED_ENCODE}


class ForgeVae:
    """Stands in place of the two methods of Forge's `VAE` that work on whole pictures.

    Measured peaks correct how much room Forge makes for a decode, never the choice of tiles: what is decoded in tiles is not
    measured, so one odd peak would keep every later picture in them.
    """

    def __init__(self, memory: MemoryManagement, room: VaeRoom, precautions: Precautions) -> None:
        """
        Args:
            memory: Forge's.
            room: chooses between the ways.
            precautions: of this run.
        """
        self._memory, self._room, self._precautions = memory, room, precautions
        self._spills = driver_spills()
        self._lock, self._in_tiles = threading.Lock(), 0

    def decode_inner(
        self, original: _Inner, vae: Vae, samples_in: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Stands in place of `VAE.decode_inner`.

        Args:
            original: the host's.
            vae: Forge's.
            samples_in: latent `(pictures, channels, height, width)`.
            args: what a newer Forge passes.
            kwargs: the same.

        Raises:
            MemoryShortError: RAM would not survive it, not even in tiles.
        """
        if args or kwargs or not self._knows(vae, samples_in):
            return original(vae, samples_in, *args, **kwargs)
        pictures, _, height, width = samples_in.shape
        asked = vae.memory_used_decode(samples_in.shape, vae.vae_dtype)
        return self._run(original, vae, samples_in, self._work("decoding", vae, pictures, height, width, asked))

    def encode_inner(
        self, original: _Inner, vae: Vae, pixel_samples: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Stands in place of `VAE.encode_inner`.

        Args:
            original: the host's.
            vae: Forge's.
            pixel_samples: `(pictures, height, width, 3)`.
            args: what a newer Forge passes.
            kwargs: the same.

        Raises:
            MemoryShortError: as `decode_inner` does.
        """
        if args or kwargs or not self._knows(vae, pixel_samples):
            return original(vae, pixel_samples, *args, **kwargs)
        pictures, height, width, _ = pixel_samples.shape
        asked = vae.memory_used_encode((pictures, COLOURS, height, width), vae.vae_dtype)
        height, width = height // vae.downscale_ratio, width // vae.downscale_ratio
        return self._run(original, vae, pixel_samples, self._work("encoding", vae, pictures, height, width, asked))

    def _knows(self, vae: Vae, given: torch.Tensor) -> bool:
        """True for Forge's own VAE, unless tiles were asked for already (Never OOM Integrated)."""
        # While another thread works in tiles, this one's picture gets them too and needs no second look.
        in_tiles = getattr(self._memory, "VAE_ALWAYS_TILED", True)
        return is_forges_vae(vae.first_stage_model) and given.ndim == 4 and given.shape[0] > 0 and not in_tiles

    def _work(self, phrase: str, vae: Vae, pictures: int, height: int, width: int, asked: float) -> Work:
        whole = self._bytes(phrase, vae, height, width)
        side = TILES[phrase] if phrase == "decoding" else TILES[phrase] // vae.downscale_ratio
        tiles = ((side, side), (side // 2, side * 2), (side * 2, side // 2))
        tile = max(self._bytes(phrase, vae, min(height, high), min(width, wide)) for high, wide in tiles)
        # Forge's tiles leave this out.
        is_regulated = phrase == "encoding" and vae.patcher.model_options.get("model_vae_regulation") is not None
        pixels = vae.downscale_ratio
        can_tile = tile < whole and not is_regulated
        return Work(phrase, pictures, width * pixels, height * pixels, whole, tile if can_tile else None, asked)

    def _bytes(self, phrase: str, vae: Vae, height: int, width: int) -> int:
        """VRAM (on the CPU: RAM) of one picture or tile, `height` and `width` in latent pixels."""
        estimate = activations.decode if phrase == "decoding" else activations.encode
        found = estimate(Latent(1, height, width), self._memory.dtype_size(vae.vae_dtype))
        # Where memory that is short raises an error, the allocator collects what lies free in it and tries again.
        count = found.held_bytes if self._spills and vae.device.type != "cpu" else found.used_bytes
        channels = getattr(getattr(vae.first_stage_model, "config", None), "block_out_channels", (USUAL_CHANNELS,))[0]
        return int(count * (vae.downscale_ratio / USUAL_RATIO) ** 2 * channels / USUAL_CHANNELS)

    def _run(self, original: _Inner, vae: Vae, given: torch.Tensor, work: Work) -> torch.Tensor:
        # A call that cannot be tiled is no success of the precaution.
        careful = self._precautions.against(PRECAUTIONS[work.phrase], work.phrase, vae.first_stage_model)
        with careful if work.tile_bytes is not None else contextlib.nullcontext(False) as cautious:
            if vae.device.type == "cpu":
                way = self._room.way_in_ram(work, int(self._memory.get_free_memory(vae.device)), cautious)
            else:
                way = "tiles" if cautious else self._way_on_the_card(vae, work)
                need = work.pictures_bytes(TILED_COPIES if way == "tiles" else WHOLE_COPIES)
                if need > LARGE_BYTES:
                    self._room.choose([need], work)
            if way == "singly":
                return torch.cat([original(vae, given[place : place + 1]) for place in range(work.pictures)])
            with self._tiled() if way == "tiles" else contextlib.nullcontext():
                return original(vae, given)

    def _way_on_the_card(self, vae: Vae, work: Work) -> str:
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
        self._room.say("preflight.tiles_in_vram", work, need=whole, free=max(0, free))
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
                # `_knows` returned True only while the flag was off, so False is its value outside.
                self._memory.VAE_ALWAYS_TILED = self._in_tiles > 0
