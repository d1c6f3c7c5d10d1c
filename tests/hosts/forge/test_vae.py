"""The VAE works in tiles where whole pictures do not fit, and is left alone where they do."""

import logging
import re
import threading
import types

import pytest
import torch

from lib_lora_guard.errors import MemoryShortError
from lib_lora_guard.hosts.forge.vae import ForgeVae
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.planning import activations
from lib_lora_guard.planning.host_memory import Latent
from lib_lora_guard.planning.limits import RAM_FLOOR_BYTES
from lib_lora_guard.recorder.crash_report import Precaution, avoid
from lib_lora_guard.recorder.flight_recorder import Phase
from lib_lora_guard.runtime.hooks import HookSet
from lib_lora_guard.runtime.image_words import ImageWords
from lib_lora_guard.runtime.precautions import Precautions
from lib_lora_guard.runtime.preflight import Preflight
from lib_lora_guard.runtime.vae_room import VaeRoom

MB, GB = 1 << 20, 1 << 30
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


class Ram:
    """A snapshot as the pre-flight asks it."""

    def __init__(self, fast, alive):
        self.fast, self.alive_ram_bytes = fast, alive

    def fast_ram_bytes(self, floor_bytes):
        assert floor_bytes == RAM_FLOOR_BYTES
        return self.fast


class Config:
    block_out_channels = (128, 256, 512, 512)


class IntegratedAutoencoderKL:
    __module__ = "backend.nn.vae"
    config = Config()


class OtherVae:
    config = Config()


class Patcher:
    def __init__(self):
        self.model_options = {}


class Memory:
    """`backend.memory_management`: `free` now, `after` once everything else has left the card."""

    def __init__(self, free=0, after=None, total=24 * GB, resident=160 * MB):
        self.VAE_ALWAYS_TILED = False
        self.free, self.after, self.total, self.resident = free, free if after is None else after, total, resident
        self.asked = []

    def dtype_size(self, dtype):
        return torch.empty(0, dtype=dtype).element_size()

    def get_free_memory(self, device):
        return self.free

    def get_total_memory(self, device):
        return self.total

    def module_size(self, model, exclude_device=None):
        return 160 * MB - (self.resident if exclude_device is not None else 0)

    def load_models_gpu(self, models, memory_required):
        self.asked.append((models, memory_required))
        self.free = self.after


class Scene:
    def __init__(
        self, memory=None, fast=64 * GB, alive=64 * GB, device=CARD, model=IntegratedAutoencoderKL, planned=()
    ):
        self.memory = memory = memory or Memory(free=64 * GB)
        self.dropped, self.told = 0, []
        self.ram = Ram(fast, alive)
        self.calls = calls = []
        cautions = Precautions(lambda model: planned)

        class VAE:
            """Of Forge: in tiles where its switch says so, else the whole picture; `fails` is raised by what runs whole."""

            fails = None
            downscale_ratio, vae_dtype = 8, torch.float16
            first_stage_model, patcher = model(), Patcher()

            def memory_used_decode(self, shape, dtype):
                return 2178 * shape[2] * shape[3] * 64 * memory.dtype_size(dtype)

            def memory_used_encode(self, shape, dtype):
                return 1767 * shape[2] * shape[3] * memory.dtype_size(dtype)

            def decode_inner(self, samples_in):
                calls.append(("tiles" if memory.VAE_ALWAYS_TILED else "whole", samples_in.shape[0]))
                if VAE.fails is not None:
                    raise VAE.fails
                return samples_in.movedim(1, -1)

            def encode_inner(self, pixel_samples):
                calls.append(("tiles" if memory.VAE_ALWAYS_TILED else "whole", pixel_samples.shape[0]))
                return pixel_samples.movedim(-1, 1)

        self.VAE, self.vae = VAE, VAE()
        self.vae.device = device
        preflight = Preflight(lambda: self.ram, self.drop, self.told.append, cautions)
        self.words = ImageWords()
        self.room = ForgeVae(memory, VaeRoom(preflight, self.words), cautions)
        self.room._spills = True
        hooks = HookSet()
        hooks.add(VAE, "decode_inner", self.room.decode_inner)
        hooks.add(VAE, "encode_inner", self.room.encode_inner)

    def drop(self):
        self.ram.fast += self.dropped
        return self.dropped

    def decode(self, width=1024, height=1024, pictures=1):
        latent = torch.arange(pictures * 4.0).reshape(pictures, 4, 1, 1).expand(-1, -1, height // 8, width // 8)
        given = self.vae.decode_inner(samples_in=latent)
        assert torch.equal(given, latent.movedim(1, -1))
        return self.calls

    def encode(self, width=1024, height=1024, pictures=1):
        pixels = torch.arange(pictures * 1.0).reshape(pictures, 1, 1, 1).expand(-1, height, width, 3)
        given = self.vae.encode_inner(pixels)
        assert torch.equal(given, pixels.movedim(-1, 1))
        return self.calls


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]


def held(width, height, value_bytes=2, how=activations.decode):
    return how(Latent.of(width, height), value_bytes).held_bytes


def used(width, height, value_bytes=4, how=activations.decode):
    return how(Latent.of(width, height), value_bytes).used_bytes


# -- on a card


def test_where_it_fits_nothing_is_asked_and_nothing_is_different(lines):
    scene = Scene(Memory(free=held(1024, 1024)))
    assert scene.decode() == [("whole", 1)]
    assert scene.memory.asked == []
    assert lines() == []
    assert scene.told == []
    assert scene.memory.VAE_ALWAYS_TILED is False


def test_room_is_made_as_forge_would_before_the_picture_is_judged():
    scene = Scene(Memory(free=held(1024, 1024) - 1, after=held(1024, 1024)))
    assert scene.decode() == [("whole", 1)]
    ((patchers, asked),) = scene.memory.asked
    assert patchers == [scene.vae.patcher]
    # The guard frees this share of it, what the picture takes and a MB, which is a little more than Forge asks for.
    assert round(asked * activations.VAE_HOLDS_WHERE_FORGE_HAS) == held(1024, 1024) + MB
    assert 0 < asked - 2178 * 128 * 128 * 64 * 2 < 32 * MB


def test_weights_that_are_not_on_the_card_yet_count():
    scene = Scene(Memory(free=held(1024, 1024) + 160 * MB - 1, after=0, resident=0))
    assert scene.decode() == [("tiles", 1)]
    scene = Scene(Memory(free=held(1024, 1024) + 160 * MB, after=0, resident=0))
    assert scene.decode() == [("whole", 1)]


def test_a_decode_on_the_card_drops_no_prompts():
    """With little free RAM every picture would cost its successor an encoded prompt, for 36 MB."""
    scene, drops = Scene(fast=0, alive=20 << 30), []
    scene.room._room._preflight._drop_caches = lambda: drops.append(1) or (8 << 20)
    for _ in range(3):
        scene.decode()
    assert not drops
    # 16 pictures of 4 MP are no trifle.
    scene.decode(2048, 2048, pictures=16)
    assert drops


def test_memory_that_ends_while_room_is_made_is_forges_to_handle():
    scene = Scene(Memory(free=held(1024, 1024) - 1))
    scene.memory.load_models_gpu = lambda *a, **k: (_ for _ in ()).throw(OutOfMemory[0]("CUDA out of memory."))
    assert scene.decode() == [("whole", 1)]
    scene.memory.load_models_gpu = lambda *a, **k: (_ for _ in ()).throw(ValueError("planted"))
    with pytest.raises(ValueError, match="planted"):
        scene.decode()


def test_a_small_picture_ends_no_precaution():
    scene = Scene(Memory(free=64 * GB), planned=(Precaution.TILED_VAE,))
    assert scene.decode(256, 256) == [("whole", 1)]
    assert scene.decode(2048, 2048)[-1] == ("tiles", 1)
    assert scene.decode(2048, 2048)[-1] == ("whole", 1)


def test_a_crash_in_encoding_says_nothing_of_decoding():
    crash = types.SimpleNamespace(phases=[Phase.VAE_ENCODE], model="", storage="")
    planned = avoid(crash, "IntegratedAutoencoderKL", "")
    assert planned == {Precaution.TILED_ENCODE}
    scene = Scene(Memory(free=64 * GB), planned=planned)
    assert scene.decode(2048, 2048) == [("whole", 1)]
    assert scene.encode(2048, 2048)[-1] == ("tiles", 1)
    assert scene.encode(2048, 2048)[-1] == ("whole", 1)


def test_two_threads_in_tiles_leave_the_switch_off():
    room, memory = (scene := Scene(Memory(free=0, after=0))).room, scene.memory
    one, two, done = threading.Event(), threading.Event(), threading.Event()

    def first():
        with room._tiled():
            one.set()
            two.wait(5)
        done.set()

    def second():
        one.wait(5)
        with room._tiled():
            two.set()
            done.wait(5)
            assert memory.VAE_ALWAYS_TILED is True

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.VAE_ALWAYS_TILED is False


def test_tiles_before_the_driver_spills_and_said_once_with_numbers(lines):
    scene = Scene(Memory(free=GB, after=2 * GB))
    assert scene.decode() == [("tiles", 1)]
    assert scene.memory.VAE_ALWAYS_TILED is False
    scene.decode()
    need, tile = held(1024, 1024), held(512, 512)
    assert lines() == [
        f"decoding 1 picture(s) of 1024x1024 takes about {need / MB:.0f} MB of VRAM for each and 2048 MB are free: the VAE works "
        f"in tiles, which take about {tile / MB:.0f} MB. A smaller picture, or 'VAE in 16 bit' where it is 32, avoids this"
    ]
    assert 3.0 * GB < need < 3.3 * GB
    scene.decode(1280, 1024)
    assert len(lines()) == 2
    shown = []
    with scene.words.image(1, shown.append):
        scene.decode(1280, 1024), scene.decode(1280, 1024)
    assert (shown, len(lines())) == ([f"LoRA Guard: {lines()[1]}"], 2), "each image shows it, once"


def test_nobody_is_sent_away_for_what_the_whole_card_could_not_hold():
    scene = Scene(Memory(free=GB, after=8 * GB, total=8 * GB))
    assert scene.decode(2048, 2048) == [("tiles", 1)]
    assert scene.memory.asked == []


def test_where_the_driver_raises_an_error_the_allocator_may_collect_first():
    between = used(1024, 1024, 2)
    assert between < held(1024, 1024)
    scene = Scene(Memory(free=between))
    scene.room._spills = False
    assert scene.decode() == [("whole", 1)]
    scene = Scene(Memory(free=between - 1))
    scene.room._spills = False
    assert scene.decode() == [("tiles", 1)]


def test_what_is_no_larger_than_a_tile_is_left_to_forge():
    scene = Scene(Memory(free=0))
    assert scene.decode(512, 512) == [("whole", 1)]
    assert scene.decode(256, 512)[1:] == [("whole", 1)]
    # A long picture is larger than any of Forge's tiles.
    assert scene.decode(512, 1536)[2:] == [("tiles", 1)]


def test_encoding_has_its_own_estimate_and_its_regulation_keeps_it_whole():
    need = held(1024, 1024, how=activations.encode)
    assert Scene(Memory(free=need)).encode() == [("whole", 1)]
    assert Scene(Memory(free=need - 1)).encode() == [("tiles", 1)]
    scene = Scene(Memory(free=need - 1))
    scene.vae.patcher.model_options = {"model_vae_regulation": object()}
    try:
        assert scene.encode() == [("whole", 1)]
    finally:
        scene.vae.patcher.model_options = {}


def test_other_vaes_and_the_users_own_tiles_are_left_alone():
    scene = Scene(Memory(free=0), model=OtherVae)
    assert scene.decode() == [("whole", 1)]
    scene = Scene(Memory(free=0))
    scene.memory.VAE_ALWAYS_TILED = True
    assert scene.decode() == [("tiles", 1)]
    assert scene.memory.VAE_ALWAYS_TILED is True
    assert scene.memory.asked == []


def test_forges_switch_comes_back_after_an_error_and_the_error_goes_on():
    scene = Scene(Memory(free=0))
    scene.VAE.fails = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        scene.decode()
    assert scene.calls == [("tiles", 1)]
    assert scene.memory.VAE_ALWAYS_TILED is False


def test_a_smaller_vae_takes_less():
    scene = Scene(Memory(free=held(1024, 1024) // 4))
    scene.vae.first_stage_model.config = type("Small", (), {"block_out_channels": (32, 64, 128, 128)})()
    try:
        assert scene.decode() == [("whole", 1)]
    finally:
        del scene.vae.first_stage_model.config
    assert Scene(Memory(free=held(1024, 1024) // 4)).decode() == [("tiles", 1)]


def test_pictures_that_ram_cannot_take_are_refused_on_a_card_too():
    pixels = 64 * 4096 * 4096 * 3 * 4
    scene = Scene(fast=3 * pixels - 1, alive=3 * pixels - 1)
    with pytest.raises(MemoryShortError, match=r"^LG-R08: decoding 64 picture\(s\) of 4096x4096 needs 36864 MB of RAM"):
        scene.decode(4096, 4096, pictures=64)
    assert scene.calls == []


@pytest.mark.parametrize(
    ("alive_gb", "advice"),
    [
        # 36 GB for all of them, 0.6 for one; a quarter of the floor, 0.5 GB, is left alone.
        (30, "one picture at a time needs 0.6 GB; a picture of 3584x3584 needs 8.4 GB less"),
        (10, "one picture at a time needs 0.6 GB; a picture of 2048x2048 needs 27.0 GB less"),
        (1.5, "one picture at a time needs 0.6 GB"),
    ],
)
def test_a_refusal_says_what_would_help(alive_gb, advice):
    alive = int(alive_gb * GB)
    with pytest.raises(MemoryShortError) as refused:
        Scene(fast=alive, alive=alive).decode(4096, 4096, pictures=64)
    assert str(refused.value).endswith(f". What would help: {advice}")
    assert "可行的办法：" in refused.value.message.text("zh")


def test_what_no_smaller_picture_helps_is_refused_as_it_is():
    with pytest.raises(MemoryShortError) as refused:
        on_the_cpu(0, alive=GB // 2).decode(512, 512)
    assert "What would help" not in str(refused.value)


def test_on_the_cpu_a_tile_stays_as_large_as_it_is():
    """Tiles take 1098 MB there whatever the picture is; only the copies of the picture shrink."""
    four = used(512, 512) + pictures(4096, 4096, 6)
    alive = used(512, 512) + pictures(2048, 2048, 6) + GB // 2
    with pytest.raises(MemoryShortError) as refused:
        on_the_cpu(0, alive=alive).decode(4096, 4096)
    saved = (four - (alive - GB // 2)) / GB
    assert str(refused.value).endswith(f"What would help: a picture of 2048x2048 needs {saved:.1f} GB less")


# -- on the CPU, where what the VAE computes lies in RAM


def on_the_cpu(fast, alive=64 * GB, free=64 * GB, **settings):
    scene = Scene(Memory(free=free), fast=fast, alive=alive, device=CPU, **settings)
    scene.vae.vae_dtype = torch.float32
    return scene


def pictures(width, height, copies, count=1):
    return count * width * height * 3 * 4 * copies


WHOLE = used(1024, 1024) + pictures(1024, 1024, 3)
IN_TILES = used(512, 512) + pictures(1024, 1024, 6)


def test_sdxl_on_the_cpu_takes_more_than_four_gigabytes_and_a_quarter_in_tiles():
    assert 4 * GB < WHOLE < 4.5 * GB
    assert 1.1 * GB < IN_TILES < 1.2 * GB


def test_whole_while_it_is_fast_then_tiles_then_refused(lines):
    assert on_the_cpu(WHOLE).decode() == [("whole", 1)]
    assert lines() == []
    assert on_the_cpu(WHOLE - 1).decode() == [("tiles", 1)]
    assert re.fullmatch(
        rf"decoding 1 picture\(s\) of 1024x1024 at once takes about {WHOLE / MB:.0f} MB of RAM and {(WHOLE - 1) / MB:.0f} MB are free: "
        rf"the VAE works in tiles, which take about {used(512, 512) / MB:.0f} MB",
        lines()[0],
    )
    slow = on_the_cpu(IN_TILES - 1, alive=IN_TILES)
    assert slow.decode() == [("tiles", 1)]
    assert [finding.rule for finding in slow.told] == ["LG-R08"]
    refused = on_the_cpu(IN_TILES - 1, alive=IN_TILES - 1)
    with pytest.raises(
        MemoryShortError, match=r"decoding 1 picture\(s\) of 1024x1024 needs 1170 MB of RAM; with the page file there"
    ):
        refused.decode()
    assert refused.calls == []
    assert refused.memory.VAE_ALWAYS_TILED is False


def test_caches_go_before_the_picture_is_cut_up(lines):
    scene = on_the_cpu(WHOLE - 100 * MB)
    scene.dropped = 100 * MB
    assert scene.decode() == [("whole", 1)]
    assert lines() == ["RAM is short: 100 MB of LoRA files and remembered prompts are given back"]


def test_several_pictures_go_one_by_one_before_they_go_in_tiles(lines):
    # Forge takes all four at once: by its own estimate they fit into what is free.
    one = used(512, 512) + pictures(512, 512, 3, count=4)
    assert on_the_cpu(one).decode(512, 512, pictures=4) == [("whole", 1)] * 4
    assert "the VAE takes one picture after the other" in lines()[0]
    both = 4 * used(512, 512) + pictures(512, 512, 3, count=4)
    assert on_the_cpu(both).decode(512, 512, pictures=4) == [("whole", 4)]
    # Forge itself takes as many at once as it believes to fit.
    asked = 2178 * 64 * 64 * 64 * 4
    scene = on_the_cpu(one, free=asked)
    assert scene.decode(512, 512, pictures=4) == [("whole", 4)]
    assert scene.told == []


def test_encoding_on_the_cpu():
    need = used(1024, 1024, how=activations.encode) + pictures(1024, 1024, 3)
    assert on_the_cpu(need).encode() == [("whole", 1)]
    assert on_the_cpu(need - 1).encode() == [("tiles", 1)]


def test_nothing_known_of_ram_changes_nothing():
    assert on_the_cpu(None, alive=None).decode() == [("whole", 1)]


# -- after a crash


@pytest.mark.parametrize("device", [CPU, CARD], ids=str)
def test_after_a_crash_in_the_vae_tiles_until_one_picture_is_done(device, lines):
    scene = Scene(device=device, planned={Precaution.TILED_VAE, Precaution.TILED_ENCODE})
    scene.VAE.fails = RuntimeError("stopped")
    with pytest.raises(RuntimeError, match="stopped"):
        scene.decode()
    scene.VAE.fails = None
    scene.decode()
    scene.decode()
    # Encoding did not go well yet.
    scene.encode()
    scene.encode()
    assert [way for way, _ in scene.calls] == ["tiles", "tiles", "whole", "tiles", "whole"]
    assert lines() == [f"after the last crash: the VAE {what} in tiles this time" for what in ("decodes", "encodes")]


def test_another_precaution_leaves_the_vae_alone():
    assert Scene(planned={Precaution.DROP_CACHES, Precaution.NO_MERGE}).decode() == [("whole", 1)]
