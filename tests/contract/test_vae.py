"""Forge's own VAE under the guard: untouched where there is room, Forge's own tiles where there is none."""

import importlib
import logging

import pytest
import torch

from contract.host import REAL
from lib_lora_guard.errors import MemoryShortError
from lib_lora_guard.planning import activations
from lib_lora_guard.planning.host_memory import Latent
from lib_lora_guard.recorder.crash_report import Precaution

pytestmark = pytest.mark.skipif(not REAL, reason="the double has no VAE")
GB = 1 << 30
SIDE = 80
"""Of the latent: larger than one tile."""


class Ram:
    def __init__(self, fast, alive):
        self.fast, self.alive_ram_bytes = fast, alive

    def fast_ram_bytes(self, floor_bytes):
        return self.fast


def build(levels):
    """Forge's class with a small model: a quarter of the usual channels, one block a level."""
    nn, patcher = importlib.import_module("backend.nn.vae"), importlib.import_module("backend.patcher.vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.IntegratedAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(32,) * levels,
            latent_channels=4,
        )
    model.requires_grad_(False)
    return patcher.VAE(model=model, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def vae(host):
    """Of two pixels a latent pixel: the larger levels take most of the time."""
    return build(levels=2)


@pytest.fixture
def takeover(guarded):
    found = guarded.guard
    found.install_loaded({"backend.patcher.vae": importlib.import_module("backend.patcher.vae")})
    return found


def latent(pictures=1, side=SIDE):
    return torch.randn(pictures, 4, side, side, generator=torch.Generator().manual_seed(9))


def encoded(vae, side, how="encode"):
    pixels = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(9))
    # Forge draws from the encoder's distribution.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return getattr(vae, how)(pixels)


def ram(takeover, fast=64 * GB, alive=64 * GB):
    takeover.preflight._snapshot = lambda: Ram(fast, alive)


def need(side, how=activations.decode, ratio=2):
    """Of the small model: a quarter of what it takes with the usual channels."""
    return int(how(Latent(1, side, side), 4).used_bytes * (ratio / 8) ** 2 / 4)


def pictures(copies, count=1, side=SIDE * 2):
    return count * side * side * 3 * 4 * copies


def in_tiles():
    return need(64) + pictures(6)


def test_with_room_a_picture_is_the_same_to_the_bit(host, vae):
    from lib_lora_guard.hosts.forge import takeover as forge

    with torch.inference_mode():
        stock = vae.decode(latent(2)), encoded(vae, 64)
        takeover = forge.install()
        try:
            takeover.install_loaded({"backend.patcher.vae": importlib.import_module("backend.patcher.vae")})
            ram(takeover)
            guarded = vae.decode(latent(2)), encoded(vae, 64)
        finally:
            forge.uninstall()
    for one, other in zip(stock, guarded, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_without_room_forges_own_tiles_are_the_result(takeover, host, vae, caplog):
    caplog.set_level(logging.WARNING, logger="lib_lora_guard.hosts.forge.vae")
    with torch.inference_mode():
        ram(takeover)
        whole = vae.decode(latent())
        expected = vae.decode_tiled(latent())
        ram(takeover, fast=in_tiles())
        found = vae.decode(latent())
    assert host.memory.VAE_ALWAYS_TILED is False
    assert torch.equal(found, expected)
    assert not torch.equal(found, whole)
    assert [r.getMessage().split(" at once")[0] for r in caplog.records] == ["decoding 1 picture(s) of 160x160"]


def test_the_same_for_encoding(takeover, host):
    vae, side = build(levels=4), 544
    with torch.inference_mode():
        expected = encoded(vae, side, "encode_tiled")
        ram(takeover, fast=need(side // 8, activations.encode, ratio=8))
        found = encoded(vae, side)
    assert host.memory.VAE_ALWAYS_TILED is False
    assert torch.equal(found, expected)


def test_several_pictures_one_by_one(takeover, vae):
    with torch.inference_mode():
        ram(takeover)
        expected = vae.decode(latent(2))
        ram(takeover, fast=need(SIDE) + pictures(3, count=2))
        found = vae.decode(latent(2))
    assert found.shape == expected.shape == (2, 160, 160, 3)
    # Another batch size sums in another order; in tiles the gap is a thousand times this.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_the_process_would_not_survive_is_refused(takeover, vae):
    with torch.inference_mode():
        ram(takeover, fast=0, alive=in_tiles() - 1)
        with pytest.raises(MemoryShortError, match=r"decoding 1 picture\(s\) of 160x160 needs \d+ MB of RAM"):
            vae.decode(latent())
        ram(takeover, fast=0, alive=in_tiles())
        assert torch.equal(vae.decode(latent()), vae.decode_tiled(latent()))


def test_after_a_crash_the_first_picture_is_decoded_in_tiles(takeover, vae):
    takeover.precautions.planned = lambda model: {Precaution.TILED_VAE}
    ram(takeover)
    with torch.inference_mode():
        first, second = vae.decode(latent()), vae.decode(latent())
        takeover.precautions.planned = lambda model: ()
        assert torch.equal(first, vae.decode_tiled(latent()))
        assert torch.equal(second, vae.decode(latent()))


def test_a_small_picture_is_left_whole_however_little_there_is(takeover, vae):
    with torch.inference_mode():
        ram(takeover)
        expected = vae.decode(latent(side=32))
        ram(takeover, fast=0)
        assert torch.equal(vae.decode(latent(side=32)), expected)
