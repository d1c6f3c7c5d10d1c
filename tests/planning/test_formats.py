"""The ways to make room: formats that fit, a smaller picture, LoRAs left out."""

import pytest

from lib_lora_guard.planning.formats import (
    MATRIX_BYTES,
    Fit,
    Smaller,
    model_bytes,
    smaller_picture,
    that_fit,
    to_leave_out,
)
from lib_lora_guard.replay.known_models import flux_bytes, flux_matrices

GB = 1 << 30
FLUX = {f"{n}.weight": shape for n, (shape, _) in enumerate(flux_matrices())} | {
    f"{n}.bias": shape[:1] for n, (shape, _) in enumerate(flux_matrices())
}


def test_flux_dev_in_the_sizes_that_users_know():
    sizes = {form: round(model_bytes(FLUX, form) / GB, 1) for form in MATRIX_BYTES}
    assert sizes == {
        "GGUF Q8_0": 11.8,
        "fp8": 11.1,
        "GGUF Q6_K": 9.1,
        "GGUF Q5_K": 7.6,
        # In the file 6.2; Forge bakes it.
        "GGUF Q4_K": 6.9,
        "NF4": 6.2,
    }
    # As Forge's own count has it.
    assert model_bytes(FLUX, "fp8") == pytest.approx(flux_bytes("fp8"), rel=1e-3)


def test_convolutions_norms_and_biases_stay_wide():
    shapes = {"conv": (320, 4, 3, 3), "norm": (320,), "matrix": (320, 640)}
    beside = 2 * (320 * 36 + 320)
    assert model_bytes(shapes, "NF4") == beside + 320 * 640 * 9 // 16
    assert model_bytes(shapes, "GGUF Q8_0") == beside + 320 * 640 * 34 // 32
    assert model_bytes(shapes, "fp8") == 320 * 36 + 320 + 320 * 640
    with pytest.raises(KeyError):
        model_bytes(shapes, "Q9")


def test_formats_that_fit_beside_a_step_on_the_card():
    now, step = int(flux_bytes("bf16")), GB
    fits = that_fit(FLUX, now, step, 12 * GB)
    assert [one.format for one in fits] == ["GGUF Q6_K", "GGUF Q5_K", "GGUF Q4_K", "NF4"]
    assert fits[-1] == Fit("NF4", model_bytes(FLUX, "NF4") + step)
    # To the byte.
    need = model_bytes(FLUX, "NF4") + step
    assert that_fit(FLUX, now, step, need) == [Fit("NF4", need)]
    assert that_fit(FLUX, now, step, need - 1) == []


def test_a_format_that_is_no_smaller_is_no_advice():
    now = model_bytes(FLUX, "GGUF Q4_K")
    assert [one.format for one in that_fit(FLUX, now, 0, 48 * GB)] == ["NF4"]
    assert that_fit(FLUX, model_bytes(FLUX, "NF4"), 0, 48 * GB) == []


def area(width, height):
    return width * height


@pytest.mark.parametrize(
    ("size", "missing", "expected"),
    [
        ((1024, 1024), 1, Smaller(896, 896, 1024 * 1024 - 896 * 896)),
        ((1024, 1024), 1024 * 1024 - 896 * 896, Smaller(896, 896, 1024 * 1024 - 896 * 896)),
        ((1024, 1024), 1024 * 1024 - 896 * 896 + 1, Smaller(768, 768, 1024 * 1024 - 768 * 768)),
        ((1536, 1024), 900_000, Smaller(960, 640, 1536 * 1024 - 960 * 640)),
        ((1024, 1024), 1024 * 1024, None),
        ((512, 512), 1, None),
        ((832, 1216), 1, Smaller(704, 1024, 832 * 1216 - 704 * 1024)),
    ],
)
def test_the_largest_picture_that_saves_enough(size, missing, expected):
    assert smaller_picture(*size, area, missing) == expected


def test_the_fewest_loras():
    sizes = {"small": 10, "large": 100, "middle": 50, "empty": 0}
    assert to_leave_out(sizes, 1) == (["large"], 100)
    assert to_leave_out(sizes, 100) == (["large"], 100)
    assert to_leave_out(sizes, 101) == (["large", "middle"], 150)
    assert to_leave_out(sizes, 1000) == (["large", "middle", "small"], 160)
    assert to_leave_out(sizes, 0) == ([], 0)
    assert to_leave_out({}, 5) == ([], 0)
