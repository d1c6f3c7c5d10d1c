"""The pictures and tables of docs/benchmarks.md are those of the results, and a new file needs no change of the script."""

import json
import shutil
from xml.etree import ElementTree

import plots

PAGE = plots.PAGE.read_text(encoding="utf-8")


def test_the_page_and_its_pictures_are_those_of_the_results():
    pictures, page = plots.made_of(plots.RESULTS, PAGE)
    assert page == PAGE
    for name, text in pictures.items():
        assert (plots.PAGE.parent / name).read_text(encoding="utf-8") == text
        ElementTree.fromstring(text)


def test_a_newer_file_is_taken_in_place_of_older_ones(tmp_path):
    for file in plots.RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    rows = [
        {
            "what": "step",
            "storage": "fp8",
            "kind": kind,
            "ranks": ranks,
            "tokens": tokens,
            "ms": {"host": 100.0, "guard": 90.0 + n},
        }
        for n, (kind, ranks, tokens) in enumerate(
            [
                ("lora", [16], 4096),
                ("lora", [64], 4096),
                ("lora", [16, 16], 4096),
                ("lora", [16], 1024),
                ("dora", [16], 4096),
            ]
        )
    ]
    head = {
        "script": "step_gpu.py",
        "commit": "abcdef0",
        "date": "2030-01-01T10:00",
        "device": "A card",
        "torch": "3.0",
        "triton": None,
    }
    (tmp_path / "new.json").write_text(json.dumps({**head, "rows": rows}), encoding="utf-8")
    pictures, page = plots.made_of(tmp_path, PAGE)
    for name in ("rank", "count", "tokens"):
        assert "A card, commit abcdef0" in pictures[f"cost-{name}.svg"], name
    assert "| one LoRA of rank 16 | fp8 x0.90, nf4 x" in page
    assert "| fp8: LoRA, rank 64 | with kernels | <= x1.00 | x0.910, met | step | abcdef0 |" in page
    assert "| fp8: DoRA, rank 16 | with kernels | <= x1.05 | x0.940, met | step | abcdef0 |" in page
    assert "| step | fp8 | 2 LoRAs, ranks 16, 16 | 4096 | 100 | 92 (x0.920) | not measured |" in page
    _, found = plots.load(tmp_path)
    lines = plots.panels(found, plots.AXES["rank"])["step"]
    (line,) = [line for line in lines if line.storage == "fp8" and line.way == "guard"]
    assert line.points == [(16, 0.9), (32, 0.92), (64, 0.91)]
