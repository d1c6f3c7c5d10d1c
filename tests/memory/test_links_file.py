"""The file with the speeds of the links between RAM and the cards."""

import json

import pytest

from lib_lora_guard.memory.file_lock import locked
from lib_lora_guard.memory.links_file import FILE_NAME, KEPT_SECONDS, LEAST, Measured, delete, keep, read

NOW = 1_790_000_000.0
SLOW, FAST = Measured(7e9, 2e9, 12e9, NOW), Measured(25e9, 8e9, 26e9, NOW)


def test_rates_are_kept_by_card(tmp_path):
    keep(tmp_path, "one", SLOW)
    keep(tmp_path, "two", FAST)
    assert read(tmp_path) == {"one": SLOW, "two": FAST}


def test_rates_that_do_not_hold_any_more_make_room(tmp_path):
    keep(tmp_path, "one", SLOW)
    later = FAST._replace(when=NOW + KEPT_SECONDS + 1)
    keep(tmp_path, "two", later)
    assert read(tmp_path) == {"two": later}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 0, "cards": {}}',
        '{"version": 3, "cards": []}',
        '{"version": 2, "cards": {"one": [1e9, 1e9, 1e9]}}',
        "[" * 100_000,
    ]
    + [
        json.dumps({"version": 3, "cards": {"one": numbers}})
        for numbers in (
            None,
            [1e9],
            [1e9, 1e9, "7", NOW],
            [1e9, LEAST / 2, 1e9, NOW],
            [1e9, 1e9, 1e9],
            [1e9, 1e9, 1e9, None],
            [1e9, 1e9, 1e9, float("nan")],
            [1e9, 1e9, 1e9, 10**400],
        )
    ],
)
def test_a_file_that_was_edited_counts_for_nothing(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    assert read(tmp_path) == {}
    keep(tmp_path, "one", SLOW)
    assert read(tmp_path) == {"one": SLOW}


def test_deleted_rates_are_counted(tmp_path):
    assert delete(tmp_path / "none") == 0
    assert not (tmp_path / "none").exists()
    keep(tmp_path, "one", SLOW)
    keep(tmp_path, "two", FAST)
    assert delete(tmp_path) == 2
    assert not (tmp_path / FILE_NAME).exists()
    assert delete(tmp_path) == 0


def test_a_file_that_is_in_use_is_not_deleted(tmp_path, monkeypatch):
    keep(tmp_path, "one", SLOW)
    monkeypatch.setattr("lib_lora_guard.memory.links_file.WAIT_SECONDS", 0.05)
    with locked(tmp_path / f"{FILE_NAME}.lock", 1), pytest.raises(OSError, match="in use"):
        delete(tmp_path)
    assert read(tmp_path) == {"one": SLOW}
