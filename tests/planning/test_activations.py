"""The formulas against what Forge's own modules took on a GPU (`benchmarks/activations_gpu.py`, activations.jsonl)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.forge_arithmetic import vae_encode_bytes

from lib_lora_guard.planning import activations
from lib_lora_guard.planning.host_memory import Latent, unet_estimate_bytes
from lib_lora_guard.planning.tokens import Picture, tokens_for
from lib_lora_guard.replay.forge_memory import vae_decode_bytes
from lib_lora_guard.units import MB

FILE = Path(__file__).parent / "activations.jsonl"
HEADER, *MEASURED = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
WIDTHS = {"Flux": 3072, "Chroma": 3072, "SD 3 medium": 1536, "SD 3.5 large": 2432}


def predicted(row):
    width, height, rows = row["width"], row["height"], row["rows"]
    latent = Latent.of(width, height, rows)
    if row["part"] != "denoiser":
        call = activations.decode if row["part"] == "decode" else activations.encode
        return call(latent, 2 if "bfloat16" in row["name"] else 4)
    name = row["name"]
    # As measured: these rows, and 154 text tokens for SD 3.
    tokens = replace(tokens_for(name[:4] if "SD 3" in name else name, Picture(width, height)), rows=rows)
    shapes = {}
    if name in WIDTHS:
        shapes = {f"{n}.weight": (WIDTHS[name], WIDTHS[name]) for n in range(3)}
    if "SD 3" in name:
        tokens = replace(tokens, text=154)
    if name == "SD 3.5 large":
        shapes["joint_blocks.0.x_block.attn.ln_q.weight"] = (64,)
    return activations.step(tokens, Picture(width, height, rows), shapes, 2)


@pytest.mark.parametrize(
    "row", MEASURED, ids=lambda r: f"{r['part']}-{r['name']}-{r['rows']}x{r['width']}x{r['height']}"
)
def test_predicted_use_of_a_step_is_within_five_percent_of_the_measured(row):
    """The goal of the whole estimator is 5 %; of small pictures 32 MB, less than a layer, where a formula has no say."""
    found = predicted(row).used_bytes / MB
    assert found >= row["peak_mb"] - 16
    assert found <= max(row["peak_mb"] * 1.05, row["peak_mb"] + 32)


def test_predicted_held_memory_of_a_step_is_the_measured_or_a_little_more():
    """In a fresh process. The rows whose memory came out of what earlier ones had left are not counted."""
    fresh = [row for row in MEASURED if row["reserved_mb"] >= row["peak_mb"] and row["width"] >= 768]
    assert len(fresh) > 90
    assert HEADER["gpu"] == "NVIDIA H200"
    for row in fresh:
        held = predicted(row).held_bytes / MB
        assert held >= row["reserved_mb"] * 0.9 - 70, row
    ratios = [predicted(row).held_bytes / MB / row["reserved_mb"] for row in fresh if row["peak_mb"] > 400]
    assert sum(ratios) / len(ratios) < 1.15


def test_forges_own_estimates_are_larger_by_these_factors():
    square = Latent.of(1024, 1024)
    flux = activations.step(tokens_for("Flux", Picture(1024, 1024)), Picture(1024, 1024), {}, 2)
    assert unet_estimate_bytes(square, 2) > flux.held_bytes
    for theirs, share, ours in (
        (vae_decode_bytes(square, 2), activations.DECODE_WHERE_FORGE_HAS, activations.decode(square, 2)),
        (vae_encode_bytes(1024, 1024, 2), activations.ENCODE_WHERE_FORGE_HAS, activations.encode(square, 2)),
    ):
        assert theirs * share == pytest.approx(ours.used_bytes - activations.FIXED_BYTES, rel=1e-6)


def test_an_architecture_that_was_not_measured():
    picture = Picture(1024, 1024)
    other = activations.step(tokens_for(None, picture), picture, {"a.weight": (1024, 2048)}, 2)
    flux = activations.step(tokens_for("Flux", picture), picture, {"a.weight": (3072, 3072)}, 2)
    assert other.used_bytes == pytest.approx(flux.used_bytes * 2 / 3, rel=0.01)
