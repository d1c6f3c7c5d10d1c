"""The guard's column of the replay: rows worked out by hand from published sizes, and what must hold for any machine."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib_lora_guard.planning import activations, eviction, host_memory
from lib_lora_guard.planning.limits import RAM_FLOOR_BYTES
from lib_lora_guard.planning.tokens import Picture
from lib_lora_guard.replay import guard_case
from lib_lora_guard.replay.field_cases import CASES, Outcome
from lib_lora_guard.replay.guard_case import BADNESS, SLOW_COPY_BYTES, explained, guard_outcome, host, judge, missing
from lib_lora_guard.replay.guard_readings import ELSEWHERE, MISSING, SDXL, readings
from lib_lora_guard.units import MB

OK, SLOW, REFUSED, OOM = Outcome.OK, Outcome.SLOW, Outcome.REFUSED, Outcome.OOM

# MB, as Forge's logs print them (field-reports): the denoisers, the text encoders after a prompt, the VAEs.
NF4, FP8, Q8_0, BF16, UNET = 6246.84, 11350.07, 12119.55, 22700.13, 4897.05
# T5 in fp8 or in fp16 (9641.98 without CLIP-L's projection, which is 1.125).
T5_FP8, T5_FP16, CLIPS = 5227.11, 9643.11, 1752.98
VAE, SDXL_VAE = 159.87, 319.11
# 504 pairs of rank 64 in fp32 are 1323.59: half of the rank and half of the bytes.
LORA = 1323.59 / 4


def case(number):
    return CASES[number - 1]


def flux_holds(tokens, value_bytes=2):
    """22.5 values a token and width of 3072, 10 MB of workspace; torch holds 1.99 times as much."""
    return (22.5 * 3072 * tokens * value_bytes / MB + 10) * 1.99


PRESET = flux_holds(56 * 72 + 512)
CAST = 21504 * 3072 * 2 / MB
"""The 16-bit copy of the largest layer, made of what is stored in fewer bits."""


def swapped(model, free, need, left=256 + 256):
    """The guard's rule: 1 / 1.3 of the rest, or the rest less what is left for swapping, goes to the card (Forge: less 1280).

    Left are 256 for two copies of Flux's largest layer of 126 each, and 256 that Windows' desktop may take.
    """
    return model - max(0, (free - need) / 1.3, free - need - left)


def loading(model, text, vae=VAE):
    return 1024 + model + text + vae


# row: outcome, VRAM free, copied in a step, RAM needed. 1600 MB of a card are others' where no log has the free ones.
BY_HAND = {
    1: (OK, 12287 - 1600, swapped(FP8, 10687, PRESET + CAST + LORA), loading(FP8, T5_FP8)),
    3: (OK, 9773.37, 0, loading(NF4, T5_FP8)),
    4: (OK, 24576 - 1600, 0, loading(Q8_0, T5_FP16)),
    5: (OK, 24566 - 1600, swapped(BF16, 22966, PRESET + LORA), loading(BF16, T5_FP16)),
    6: (OK, 12288 - 1600, 0, loading(NF4, T5_FP8)),
    7: (OK, 16384 - 1600, 0, loading(NF4, T5_FP8)),
    8: (OK, 12288 - 1600, 0, loading(NF4, T5_FP8)),
    9: (OK, 12288 - 1600, 0, loading(NF4, T5_FP8)),
    11: (SLOW, 16384 - 1600, swapped(BF16, 14784, PRESET + LORA), loading(BF16, T5_FP16)),
    # The slider leaves 4379 MB, more than a step holds; two LoRAs: 6246.84 + 4379 + 661.8 of 14779.
    12: (OK, 16379 - 1600, 0, loading(NF4, T5_FP8)),
    15: (REFUSED, 16384 - 1600, swapped(BF16, 14784, PRESET + 3 * LORA), loading(BF16, T5_FP16)),
    16: (OK, 12288 - 1600, 0, loading(UNET, CLIPS, SDXL_VAE)),
    22: (OK, 24575 - 1600, swapped(BF16, 22975, PRESET + LORA), loading(BF16, T5_FP8)),
    # The file's own slider, 3075 MB; the log says 17496.00 swapped, to a layer.
    25: (SLOW, 9589.18, swapped(BF16, 9589.18, 3075), loading(BF16, T5_FP16)),
    27: (REFUSED, 24576 - 1600, swapped(BF16, 22976, PRESET), loading(BF16, T5_FP16)),
    24: (OK, 15018.08, 0, loading(Q8_0, T5_FP16)),
}  # fmt: skip


@pytest.mark.parametrize("number", BY_HAND)
def test_rows_worked_out_by_hand(number):
    outcome, free, copied, ram = BY_HAND[number]
    found = guard_outcome(case(number))
    assert found.outcome is outcome
    # Sizes of logs have two places; the sums here have up to four of them.
    assert found.numbers["VRAM free"] == pytest.approx(free, abs=0.01)
    assert found.numbers["copied a step"] == pytest.approx(copied, abs=0.05)
    assert found.numbers["RAM needed"] == pytest.approx(ram, abs=0.05)


def test_the_four_gigabyte_card_by_hand():
    """Row 34: GTX 1650, which computes in fp32; no LoRA. Forge leaves too little for a step, the guard swaps more."""
    free, held = 3232.70, flux_holds(56 * 72 + 512, value_bytes=4)
    numbers = guard_outcome(case(34)).numbers
    cast = 2 * CAST
    assert numbers["copied a step"] == pytest.approx(swapped(FP8, free, held + cast, 2 * cast + 256), abs=0.05)
    assert numbers["Forge: copied a step"] == pytest.approx(swapped(FP8, free, 189, 1280), abs=0.05)
    assert numbers["VRAM peak"] == pytest.approx((free - held - cast) / 1.3 + held / 1.99 + cast, abs=0.05)
    # All that is not on the card while it draws, and the process: more than the 16 GB less 2.
    assert numbers["RAM needed"] > numbers["RAM there"] == 16384 - 2048
    words = guard_outcome(case(34)).why
    left, used = free - (free - 189) / 1.3, held / 1.99 + cast
    assert f"Forge leaves {left:.0f} MB beside the weights for a step that uses {used:.0f}" in words
    assert "from the page file" in words


@pytest.mark.parametrize("number", [12, 24])
def test_the_multiplications_that_replace_a_merge_are_counted(number):
    """Two LoRAs of rank 32 or one of rank 64: 347 M values in 16 bit beside 11.9 G."""
    share = 1323.59 / 2 / 2 / FP8  # fp8 is a byte a value
    assert f"with {share:.1%} more multiplications a step" in guard_outcome(case(number)).why
    assert "multiplications" not in guard_outcome(case(3)).why


def test_sdxl_on_eight_gigabytes_by_hand():
    """Row 17: the model, two LoRAs and 1024 MB fit beside each other; the prompt pushes a part of the model out."""
    numbers = guard_outcome(case(17)).numbers
    free = 8192 - 1600
    assert numbers["copied a step"] == 0
    assert numbers["VRAM peak"] == pytest.approx(UNET + 400 + 4920 * 320 * 2 * 128 * 128 * 2 / 320 / MB + 10, abs=0.05)
    # The decoder in fp32 holds 1.46 times 69640 values a pixel of the latent: more than is free, so all it finds.
    assert free - UNET - 400 < 1.46 * (69640 * 128 * 128 * 4 / MB + 10)
    # Of Forge: two copies of the U-Net, the text encoder, VAE, LoRAs and 2.4 GB of process.
    assert numbers["Forge: RAM needed"] == pytest.approx(
        2 * UNET + CLIPS + SDXL_VAE + 400 + int(2.4 * 1024**3) / MB, abs=0.05
    )
    assert numbers["Forge: RAM needed"] > numbers["RAM there"] > numbers["RAM needed"]


def test_a_picture_too_large_runs_its_two_prompts_one_after_the_other():
    """Row 38: 4032x4096 in fp32 uses 9.7 GB with both, 4.8 with one."""
    found = guard_outcome(case(38))
    assert found.outcome is SLOW
    both = 4920 * 2 * 258048 * 4 / MB + 10
    assert found.numbers["a step uses"] == pytest.approx(both, abs=0.05)
    assert found.numbers["on the card"] == 0
    assert found.numbers["copied a step"] == pytest.approx(2 * UNET, abs=0.05)
    cast = 10240 * 1280 * 4 / MB
    assert found.numbers["VRAM peak"] == pytest.approx(200 + cast + both / 2, abs=0.05)


def test_every_row_has_an_outcome_or_a_reason():
    for one in CASES:
        found = guard_outcome(one)
        assert (found is None) is (missing(one) is not None)
        assert found is None or found.why
    computed = [one.number for one in CASES if (found := guard_outcome(one)) and found.numbers]
    assert computed == [1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15, 16, 17, 19, 22, 23, 24, 25, 27, 34, 38]
    kept = [one.number for one in CASES if guard_outcome(one) and one.number not in computed]
    assert kept == sorted(ELSEWHERE)
    assert all(guard_outcome(case(number)).outcome is case(number).outcome for number in kept)
    assert not set(MISSING) & set(ELSEWHERE)


@pytest.mark.parametrize(
    ("number", "left"),
    [(1, 256 + 256), (34, 2 * 252 + 256), (19, 256 + 192 + 256), (38, 256 + 192 + 256)],
)
def test_what_is_left_for_swapping_is_what_the_guard_leaves(number, left):
    """Flux in 16 bit and in fp32; SDXL, whose weights leave gaps."""
    assert guard_case._swapping_bytes(readings(case(number))[0]) == left * MB


def test_a_failure_that_the_arithmetic_does_not_explain_has_no_outcome():
    # Flux in NF4 on 32 GB without a LoRA: 13 GB are needed; what killed it was something else.
    assert guard_outcome(case(29)) is None
    assert missing(case(29)) == "by this arithmetic Forge has enough memory too: what went wrong is not known"
    assert missing(case(35)) == "no VRAM known"
    # With half of the RAM the backup explains row 1, with twice as much nothing does.
    assert guard_outcome(replace(case(1), ram_mb=2 * 32692)) is None
    assert missing(replace(case(1), ram_mb=None)) == "the RAM that ran out is not known"
    assert missing(replace(case(3), vram_free_mb=None, vram_total_mb=None)) == "no VRAM known"


def test_a_refusal_is_in_the_products_words():
    why = guard_outcome(case(27)).why
    needed, there = BF16 + T5_FP16 + VAE, 32768 - 2048 - 1024
    assert (
        f"LG-R08: reading the model's files needs {needed:.0f} MB of RAM; with the page file there are {there} MB, and the system "
        "would end Forge. Make the page file at least 3 GB larger" in why
    )


def test_a_storage_that_is_not_named_counts_at_its_worst():
    why = guard_outcome(case(11)).why
    assert why.endswith("the worst counts (nf4 ok, fp8 ok, Q8_0 ok, bf16 slow)")
    # In NF4 Forge has enough RAM: it is not that storage that died.
    assert guard_outcome(case(15)).why.endswith("the worst counts (fp8 ok, Q8_0 ok, bf16 refused with a message)")


def reading(**changes):
    (found,) = readings(case(1))
    return replace(found, **changes)


def test_edges_of_the_outcomes():
    # RAM: exactly enough, and a byte less.
    placed = judge(reading())[1]
    enough = placed.ram_bytes + RAM_FLOOR_BYTES
    assert judge(reading(ram_bytes=enough))[0] is OK
    assert judge(reading(ram_bytes=enough - 1))[0] is SLOW
    assert judge(reading(ram_bytes=enough - 1), died_of_ram=True)[0] is REFUSED
    assert judge(reading(ram_bytes=None), died_of_ram=True)[0] is OK
    # A second of copying.
    wide = reading(denoiser_bytes=placed.on_card_bytes + SLOW_COPY_BYTES, ram_bytes=None)
    assert judge(wide)[1].copied_bytes == SLOW_COPY_BYTES
    assert judge(wide)[0] is OK
    assert judge(replace(wide, denoiser_bytes=wide.denoiser_bytes + 1))[0] is SLOW
    # Not even a step without weights fits; Flux runs once a step, so nothing can be split.
    assert judge(reading(free_bytes=600 * MB, ram_bytes=None))[0] is OOM
    assert "draw a smaller picture" in guard_outcome(replace(case(8), vram_total_mb=2100.0)).why


def test_forges_side_by_hand():
    stock = host(reading())
    assert stock.copied_bytes / MB == pytest.approx(swapped(FP8, 10687, 1024, 1280), abs=0.05)
    assert stock.ram_bytes / MB == pytest.approx(2 * FP8 + T5_FP8 + VAE + LORA + int(2.4 * 1024**3) / MB, abs=0.05)
    # On a card with room for all nothing leaves, and the backup is one copy.
    roomy = host(reading(free_bytes=48 * 1024 * MB))
    assert roomy.ram_bytes / MB == pytest.approx(FP8 + T5_FP8 + VAE + LORA + int(2.4 * 1024**3) / MB, abs=0.05)
    assert explained(SLOW, reading(online=True, ram_bytes=None, picture=Picture(512, 512))).startswith(
        "Forge merges into every"
    )


def wrong_activations(monkeypatch):
    monkeypatch.setattr(activations, "step", lambda *_: activations.Activations(100 * MB, 100 * MB))


def wrong_budget(monkeypatch):
    monkeypatch.setattr(guard_case, "weights_on_card_bytes", lambda free, need, swapping: int((free - need) / 1.3))


def room_of_before(monkeypatch):
    monkeypatch.setattr(guard_case, "swapping_bytes", lambda *_, **__: 768 * MB)


def no_factors(monkeypatch):
    monkeypatch.setattr(guard_case, "guard", lambda one, real=guard_case.guard: real(replace(one, lora_bytes=0)))


def nobody_leaves(monkeypatch):
    def stay(coming, need, free, residents):
        return eviction.Eviction((0,) * len(residents), 0, 0)

    monkeypatch.setattr(guard_case, "plan_eviction", stay)


@pytest.mark.parametrize("plant", [wrong_activations, wrong_budget, room_of_before, no_factors, nobody_leaves])
def test_a_wrong_formula_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    numbers = guard_outcome(case(1)).numbers
    assert numbers["copied a step"] != pytest.approx(BY_HAND[1][2], abs=0.05)


ALL = [one for row in CASES for one in readings(row)]
sizes = st.integers(256, 49152).map(lambda mb: mb * MB)
machines = st.builds(
    lambda one, free, ram, lora, width, height: replace(
        one,
        free_bytes=free,
        ram_bytes=ram,
        lora_bytes=lora,
        inference_bytes=1024 * MB,
        picture=Picture(width * 64, height * 64),
    ),
    st.sampled_from(ALL),
    sizes,
    st.one_of(st.none(), sizes),
    st.integers(0, 4096).map(lambda mb: mb * MB),
    st.integers(4, 32),
    st.integers(4, 32),
)


@settings(max_examples=200)
@given(machines, st.integers(1, 24576), st.booleans())
def test_more_vram_never_ends_worse(one, more_mb, died):
    before, after = judge(one, died), judge(replace(one, free_bytes=one.free_bytes + more_mb * MB), died)
    assert BADNESS[after[0]] <= BADNESS[before[0]]


@settings(max_examples=200)
@given(machines, st.integers(1, 4096), st.booleans())
@example(
    # Neither the card nor RAM have enough: that RAM pages does not hide that a step does not fit.
    replace(
        next(one for one in ALL if one.storage == "Q8_0"),
        free_bytes=256 * MB,
        ram_bytes=26429 * MB,
        lora_bytes=0,
        inference_bytes=1024 * MB,
        picture=Picture(256, 448),
    ),
    1,
    False,
)
def test_more_lora_never_ends_better(one, more_mb, died):
    before, after = judge(one, died), judge(replace(one, lora_bytes=one.lora_bytes + more_mb * MB), died)
    assert BADNESS[after[0]] >= BADNESS[before[0]]


@settings(max_examples=200)
@given(machines)
def test_numbers_hold_together(one):
    outcome, placed = judge(one)
    assert 0 <= placed.on_card_bytes <= one.denoiser_bytes
    assert placed.copied_bytes == placed.calls * (one.denoiser_bytes - placed.on_card_bytes)
    assert placed.ram_bytes >= host_memory.PROCESS_LOADING_BYTES + one.file_bytes
    assert placed.moved_bytes >= 0
    if outcome in (OK, SLOW) and (one.ram_bytes is None or outcome is OK):
        assert placed.peak_bytes <= one.free_bytes
    assert one.is_wide is (one.storage in ("bf16", SDXL))
