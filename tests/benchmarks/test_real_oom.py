"""How real_oom.py judges an attempt, faults_gpu.py what pytest said, and one_setting.py pictures; and the ballast."""

import os
import subprocess
import sys

import ballast
import faults_gpu
import gpu_rig
import memory_table
import one_setting
import pytest
import real_oom
import torch

from lib_lora_guard.errors import LayerError
from lib_lora_guard.memory.out_of_memory import OutOfMemory

HEADER = {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0", "commit": "abc1234"}
NONE, FIRST, OTHER = torch.zeros(4), torch.tensor([3.0, 0, 0, 0]), torch.tensor([0.0, 3, 0, 0])


class Said:
    def __init__(self, *keys):
        self.keys = list(keys)


@pytest.fixture
def scene():
    """A scene without a model: what the operation answers or raises is the test's."""
    made = object.__new__(real_oom.Scene)
    made.references = {"none": [NONE], "first": [FIRST, FIRST * 1.05], "other": [OTHER]}
    return made


def judge(scene, answer, *said, operation="apply"):
    def act(operation, level_mb):
        if isinstance(answer, BaseException):
            raise answer
        return answer

    scene.act = act
    return scene.judged(operation, 0, Said(*said))


def raised_in(folder, error, tmp_path):
    """An error whose last frame is in a file of that folder."""
    (tmp_path / folder).mkdir()
    file = tmp_path / folder / "layer.py"
    code = compile("def fail(error):\n    raise error\n", str(file), "exec")
    space = {}
    exec(code, space)
    return lambda *_: space["fail"](error)


def test_an_image_counts_only_where_it_is_right(scene):
    assert judge(scene, FIRST) == {"end": "image", "distance": 0.0}
    assert judge(scene, FIRST * 1.05)["end"] == "image"  # the other mode's reference
    assert judge(scene, FIRST * (1 + 0.9e-3))["end"] == "image"
    weak = judge(scene, FIRST * 0.95)
    assert weak["end"] == "wrong"
    assert weak["distance"] == pytest.approx(0.05, rel=1e-3)
    assert len(weak["wrong_values"]) == 1
    assert judge(scene, OTHER, operation="change")["end"] == "image"
    assert judge(scene, NONE, operation="restore")["end"] == "image"
    assert judge(scene, FIRST, operation="restore")["end"] == "wrong"
    assert judge(scene, FIRST * float("nan"))["end"] == "wrong"


def test_an_image_without_the_lora_must_have_been_said(scene):
    assert judge(scene, NONE)["end"] == "wrong"
    assert judge(scene, NONE, "host.without")["end"] == "words"
    assert judge(scene, FIRST / 2, "host.without")["end"] == "wrong"


def test_errors_of_ours_are_words_and_others_are_told_apart(scene, tmp_path):
    assert judge(scene, LayerError("no memory left"))["end"] == "words"
    other = judge(scene, ValueError("shapes"))
    assert other["end"] == "wrong"
    assert other["wrong_states"] == ["an error of another kind: ValueError: shapes"]
    scene.act = raised_in("backend", OutOfMemory[0]("CUDA out of memory"), tmp_path)
    hosts = scene.judged("apply", 0, Said())
    assert (hosts["end"], hosts["where"]) == ("host", "layer.py: fail")
    scene.act = raised_in("patching", OutOfMemory[0]("CUDA out of memory"), tmp_path)
    assert scene.judged("apply", 0, Said())["wrong_states"] == ["out of memory in a LoRA, without words"]


class Denoiser:
    """Two layers and what the scene asks of it; `spoil` is called when a stack is loaded."""

    def __init__(self):
        self.kmodel = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).requires_grad_(False)
        self.device = torch.device("cpu")


def recovering(scene, outputs):
    scene.denoiser = Denoiser()
    scene.originals = {k: p.data.clone() for k, p in scene.denoiser.kmodel.named_parameters()}
    scene.ballast = ballast.Ballast(torch)
    scene.load = lambda name: setattr(scene, "loaded", name)
    scene.output = lambda: outputs[scene.loaded]
    return scene


def test_afterwards_outputs_weights_and_hooks_are_looked_at(scene):
    right = {"first": FIRST, "none": NONE}
    assert recovering(scene, right).recover("first") == ([], [])
    states, values = recovering(scene, {"first": FIRST, "none": FIRST / 50}).recover("first")
    assert (states, values) == ([], ["output of 'none' afterwards: 0.02"])
    _, values = recovering(scene, {"first": FIRST * float("nan"), "none": NONE}).recover("first")
    assert values == ["output of 'first' afterwards: nan"]
    recovering(scene, right)
    scene.denoiser.kmodel[1].weight.data[0, 0] += 1e-6
    assert scene.recover("first") == ([], ["1.weight did not come back"])
    recovering(scene, right)
    scene.denoiser.kmodel[0].register_forward_hook(lambda *_: None)
    assert scene.recover("first") == (["something is left on 0"], [])
    recovering(scene, right).load = lambda name: 1 / 0
    states, values = scene.recover("first")
    assert values == []
    assert states == ["no image even with memory: ZeroDivisionError: division by zero"]


def test_a_scene_that_cannot_be_set_up_is_a_wrong_state(scene):
    scene.storage, scene.mode = "fp8", "Automatic"

    def fail(place, before):
        raise RuntimeError("two devices")

    scene.place = fail
    row = scene.attempt("apply", "whole", 64)
    assert row["end"] == "wrong"
    assert row["wrong_states"] == ["not set up: RuntimeError: two devices"]


def test_memory_goes_between_a_layers_product_and_what_is_added_to_it(monkeypatch):
    layer, seen, held = torch.nn.Linear(2, 2), [], []
    empty = torch.empty

    def counted(size, **_):
        held.append(size)
        if len(held) > 3:
            raise torch.cuda.OutOfMemoryError("none")
        return empty(1)

    guards = layer.register_forward_hook(lambda *_: seen.append(list(held)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", counted)
    with real_oom.emptied_before_the_lora(layer, 7):
        layer(torch.ones(2))
    assert held[:4] == [7, *[256 << 20] * 3]  # what is spared first, then all there is
    assert held[4:] == [32 << 20, 2 << 20, 1 << 19, 1 << 15, 512]
    assert seen == [held]
    guards.remove()
    assert not layer._forward_hooks


def test_every_operation_is_tried_on_both_placements_at_three_levels():
    plan = real_oom.plan_of("Automatic")
    assert len(plan) == len(set(plan)) == 7 * 2 * 3
    assert plan.index(("apply", "swapped", 256)) < plan.index(("apply", "whole", 64))
    assert not [one for one in real_oom.plan_of("Merge") if one[0] == "layer"]
    assert {v[0] for v in real_oom.VARIANTS} >= {"fp8", "nf4", "Q8_0", "bf16"}


@pytest.mark.parametrize(
    ("text", "passed", "failed"),
    [
        ("....  [100%]\n4 passed in 1.2s\n", 4, 0),
        (
            "..F.\nFAILED tests/faults/test_host.py::test_x - AssertionError\n1 failed, 3 passed, 2 skipped in 3s\n",
            3,
            1,
        ),
        ("......... [ 20%]\n..F..", 13, 1),  # out of time
        ("", 0, 0),
    ],
)
def test_outcomes_are_read_from_pytests_output(text, passed, failed):
    found = faults_gpu.outcomes(text)
    assert (found["passed"], found["failed"]) == (passed, failed)
    assert len(found["failures"]) == text.count("FAILED")
    assert found["errors"] == {}


SAID = """.F.F
=================================== FAILURES ===================================
______________ test_in_a_forward_pass[nf4-two] ______________
tests/faults/scene.py:43: in picture
    return self.patcher.model(TOKENS).clone()
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
.../torch/nn/modules/module.py:1778: in _wrapped_call_impl
    return self._call_impl(*args, **kwargs)
E   RuntimeError: Expected all tensors to be on the same device, but found at least two devices
___ test_in_a_change[other stack-prefer_merge] ___
tests/faults/test_engine.py:148: in test_in_a_change
    assert not wrong, "\\n".join(wrong)
E   AssertionError: once, k=5 gpu: the next change gives another picture
E     once, k=6 ram: the next change gives another picture
E     once, k=7 gpu: the next change gives another picture
E     once, k=8 ram: the next change gives another picture
E   assert not ['once, k=5 gpu: the next change gives another picture']
=========================== short test summary info ============================
FAILED tests/faults/test_forward.py::test_in_a_forward_pass[nf4-two]
FAILED tests/faults/test_engine.py::test_in_a_change[other stack-prefer_merge]
2 failed, 2 passed in 3.10s
"""


def test_the_first_lines_of_an_error_are_in_the_row():
    found = faults_gpu.outcomes(SAID)
    assert (found["passed"], found["failed"], len(found["failures"])) == (2, 2, 2)
    assert found["errors"] == {
        "test_in_a_forward_pass[nf4-two]": [
            ".../torch/nn/modules/module.py:1778: in _wrapped_call_impl",
            "RuntimeError: Expected all tensors to be on the same device, but found at least two devices",
        ],
        "test_in_a_change[other stack-prefer_merge]": [
            "tests/faults/test_engine.py:148: in test_in_a_change",
            "AssertionError: once, k=5 gpu: the next change gives another picture",
            "once, k=6 ram: the next change gives another picture",
            "once, k=7 gpu: the next change gives another picture",
        ],
    }


def test_pytests_own_words_are_read_so(tmp_path):
    failing = tmp_path / "test_it.py"
    failing.write_text("def test_it():\n    assert not ['a'], 'one' + chr(10) + 'two'\n", encoding="utf-8")
    done = subprocess.run(
        [*faults_gpu.bare_pytest(tmp_path), str(failing)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    where, *said = faults_gpu.outcomes(done.stdout)["errors"]["test_it"]
    assert where.endswith("test_it.py:2: in test_it")
    assert said == ["AssertionError: one", "two", "assert not ['a']"]


def row(end, **more):
    found = {"storage": "fp8", "mode": "Automatic", "operation": "apply", "end": end, "on_the_cpu": 0}
    return HEADER | found | {"wrong_states": [], "wrong_values": []} | more


def test_the_sums_say_how_attempts_ended(tmp_path):
    rows = [
        row("image"),
        row("image", on_the_cpu=3),
        row("words", storage="nf4"),
        row("host"),
        row("wrong", wrong_values=["x"]),
    ]
    assert real_oom.summary(rows) == {
        "attempts": 5, "images": 2, "on_the_cpu": 1, "words": 1, "host": 1, "wrong_states": 0, "wrong_values": 1,
    }  # fmt: skip
    faults = HEADER | {"faults": "all", "device": "cuda", "passed": 90, "failed": 2, "failures": [], "ended": 1}
    page, file = tmp_path / "gpu.md", tmp_path / "o.jsonl"
    page.write_text("## To repeat it\n", encoding="utf-8")
    for one in [*rows, HEADER | {"summary": "all"}, faults]:
        gpu_rig.write_line(file, one)
    memory_table.main(["--oom", str(file), "--write"], page)
    text = page.read_text(encoding="utf-8")
    assert "| fp8, Automatic | 4 | 2 | 1 | 0 | 1 | 0 | 1 |\n| nf4, Automatic | 1 | 0 | 0 | 1 | 0 | 0 | 0 |" in text
    assert "5 attempts, 2 images made, 1 clear messages, 0 wrong states, 1 wrong values." in text
    assert "on the card (cuda): 90 tests passed, 2 failed." in text


def test_pictures_may_be_one_level_apart_and_the_lora_must_show(tmp_path):
    first = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    one_off, plain = first.clone(), first.clone()
    one_off[0, 0, 0] = 99
    plain[0] = 140
    assert one_setting.difference(one_off, first) == {"largest": 1, "share_that_differs": round(1 / 48, 6)}
    assert one_setting.difference(first, plain)["largest"] == 40  # no wrapping round 255
    without = one_setting.difference(plain, first)
    assert one_setting.verdict({"12": one_setting.difference(one_off, first)}, without)["ok"]
    assert not one_setting.verdict({"12": {"largest": 2}}, without)["ok"]
    assert not one_setting.verdict({"12": {"largest": 0}}, {"largest": 1})["ok"]  # the LoRA is not seen
    assert not one_setting.verdict({}, without)["ok"]
    runs = [
        {"cap_gb": 24.0, "with_loras": True, "swapped_mb": 0.0},
        {"cap_gb": 8.0, "with_loras": True, "swapped_mb": 5000.0},
    ]
    against = {"8": {"largest": 1, "share_that_differs": 0.01}}
    result = {
        "storage": "fp8",
        "size_px": 1024,
        "steps": 4,
        "runs": runs,
        "against_first": against,
        "without_lora": without,
    }
    text = memory_table.pictures([HEADER | result | {"ok": True}])
    assert "| fp8 | 8 | 5,000 | 1 | 1.0000% |" in text
    assert "while the LoRA is seen: met. Measured: NVIDIA H200" in text


class Card:
    """Stands for torch and for the other process: a card of `total` megabytes of which this process has some."""

    MB = 1 << 20

    def __init__(self, total, ours):
        self.total, self.ours, self.asked = total * self.MB, ours * self.MB, []
        self.cuda = self

    def is_available(self):
        return False  # so that no process is started

    def mem_get_info(self):
        return self.total - self.ours - self.made.held_bytes, self.total


def test_the_ballast_leaves_what_it_is_told(monkeypatch):
    card = Card(total=1000, ours=100)
    made = card.made = ballast.Ballast(card)
    made.process = object()

    def hold(size):
        card.asked.append(size)
        # The driver hands out pieces of 2 MB.
        made.held_bytes = -(-size // (2 * card.MB)) * 2 * card.MB

    monkeypatch.setattr(made, "_hold", hold)
    monkeypatch.setattr(made, "release_cache", lambda: None)
    assert made.leave(300 * card.MB) == 300 * card.MB
    assert card.asked == [600 * card.MB]
    card.ours = 250 * card.MB  # this process has taken some
    assert made.leave(51 * card.MB) == 50 * card.MB
    assert made.leave(52 * card.MB) == 50 * card.MB  # near enough: nothing is given back
    assert len(card.asked) == 2
    assert made.leave(5000 * card.MB) == 750 * card.MB  # all there is
    assert made.held_bytes == 0


def test_the_ballast_process_takes_a_little_less_where_it_must(tmp_path):
    """The program itself, with a torch of its own that has 100 GB and says what is asked of it."""
    (tmp_path / "torch.py").write_text(
        "import sys\n"
        "held = 0\n"
        "class OutOfMemoryError(Exception): pass\n"
        "class cuda:\n"
        "    OutOfMemoryError = OutOfMemoryError\n"
        "    mem_get_info = empty_cache = staticmethod(lambda: None)\n"
        "class Held:\n"
        "    def __init__(self, size):\n"
        "        global held\n"
        "        held += size\n"
        "        self.size, self.numel = size, lambda: size\n"
        "    def __del__(self):\n"
        "        global held\n"
        "        held -= self.size\n"
        "uint8 = None\n"
        "def empty(size, dtype, device):\n"
        "    if held + size > 100 << 30: raise OutOfMemoryError\n"
        "    print('took', size, file=sys.stderr)\n"
        "    return Held(size)\n",
        encoding="utf-8",
    )
    gb, mb = 1 << 30, 1 << 20
    orders = [gb, 0, 70 * gb, 66 * gb, 30 * gb, 100 * gb + 5 * mb, 102 * gb]
    done = subprocess.run(
        [sys.executable, "-c", ballast.BALLAST],
        input="".join(f"{size}\n" for size in orders),
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # The last is too much by more than it looks for: the small piece is left out.
    held = [gb, 0, 70 * gb, 66 * gb, 30 * gb, 100 * gb - mb, 96 * gb]
    assert done.stdout.splitlines() == ["ready", *(f"held {size}" for size in held)]
    # Pieces of 32 GB stay where they are.
    took = [gb, 32 * gb, 32 * gb, 6 * gb, 2 * gb, 30 * gb, *[32 * gb] * 3, 4 * gb - mb]
    assert done.stderr.split("took ")[1:] == [f"{size}\n" for size in took]
