"""Which kernels are used: prepared in the background, refused once, said once, and never waited for."""

import ast
import logging
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_lora_guard.kernels import choice, fused, launch, recipes
from lib_lora_guard.kernels.choice import Kernels
from lib_lora_guard.kernels.factors import Factors, Sides
from lib_lora_guard.kernels.probe import ProbeError, sample

CPU, FP16, BF16 = torch.device("cpu"), torch.float16, torch.bfloat16
PACKAGE = Path(choice.__file__).parent


class FakeKernel:
    """Stands for a compiled kernel; `error` is raised where it is made, called or probed."""

    made, errors = [], {}
    has_new = False

    def __init__(self, kind, dtype, bucket, even_rank, per_rank, fragments=None):
        self.has_fragments = FakeKernel.has_new and fragments is None
        if self.has_fragments:
            kind += " in fragments"
        self.kind, self.place = kind, (kind, bucket, even_rank, per_rank)
        self.raise_of("make")
        FakeKernel.made.append(self.place)

    def raise_of(self, what):
        if error := FakeKernel.errors.get((self.kind, what)):
            raise error

    def __call__(self, stored, factors):
        self.raise_of("call")
        return torch.full(stored.shape, 7.0, dtype=FP16)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(FakeKernel, "made", [])
    monkeypatch.setattr(FakeKernel, "errors", {})
    monkeypatch.setattr(choice, "Kernel", FakeKernel)
    monkeypatch.setattr(choice, "probe", lambda kernel, rank, device: kernel.raise_of("probe"))
    monkeypatch.setattr(choice, "interprets", lambda: True)
    monkeypatch.setattr(choice, "load_triton", lambda: FakeKernel.made.append("triton"))
    monkeypatch.setattr(choice, "triton_version", lambda: (3, 9))
    monkeypatch.delenv(choice.SWITCH, raising=False)
    made = Kernels()
    monkeypatch.setattr(fused, "KERNELS", made)
    return made


def prepared(kernels, *kinds, ranks=(16,)):
    kernels.prepare(kinds, CPU, FP16, ranks)
    assert kernels.wait(10)


def test_a_kernel_is_ready_once_it_is_prepared_for_its_bucket(kernels):
    assert (kernels.state("int8"), kernels.ready("int8", CPU, FP16, 16)) == ("untried", False)
    prepared(kernels, "int8", ranks=(0, 5, 12, 16, 300))
    assert kernels.state("int8") == "works"
    assert [kernels.ready("int8", CPU, FP16, rank) for rank in (0, 3, 16, 17, 32, 257)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert not kernels.ready("int8", CPU, BF16, 16)
    made = list(FakeKernel.made)
    assert made[0] == "triton"
    assert len(made) == len(set(made)) == 7
    prepared(kernels, "int8", ranks=(0, 7))
    assert made == FakeKernel.made


def test_a_product_with_one_token_is_one_kernel_for_all_ranks(kernels, monkeypatch):
    probed = []
    monkeypatch.setattr(choice, "TokenProduct", lambda kind, dtype, per_rank: (kind, per_rank))
    monkeypatch.setattr(choice, "probe_token", lambda product, device: probed.append(product))
    prepared(kernels, "token nf4 64", ranks=(16, 8, 96, 300))
    kernels.prepare(["token nf4 64 crossing", "token int8"], CPU, FP16, [16], soon=True)
    assert kernels.wait(10)
    assert probed == [("token nf4 64", False), ("token nf4 64", True)]
    assert kernels.state("token nf4 64") == "works"
    assert [kernels.ready("token nf4 64", CPU, FP16, rank) for rank in (0, 1, 16, 256, 257)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert kernels.product("token nf4 64", CPU, FP16, 33, True) == ("token nf4 64", True)
    assert not kernels.ready("nf4 64", CPU, FP16, 16)
    assert all(kernels.state(kind).startswith("refused") for kind in ("token nf4 64 crossing", "token int8"))
    kernels.refuse("token nf4 64", "why")
    assert kernels.product("token nf4 64", CPU, FP16, 33, True) is None


def test_a_product_that_fails_is_given_up(kernels, monkeypatch):
    def failing(*_):
        raise RuntimeError("the driver says no")

    monkeypatch.setattr(choice, "TokenProduct", lambda *_: failing)
    monkeypatch.setattr(choice, "probe_token", lambda product, device: None)
    stored = sample("nf4 64", 3, 64, FP16, torch.Generator(), CPU)
    factors = Factors(torch.ones(3, 2), torch.ones(2, 64), 1.0)
    token = torch.ones(1, 64, dtype=FP16)
    assert fused.token_output(stored, factors, token, None) is None
    prepared(kernels, "token nf4 64")
    with pytest.raises(RuntimeError, match="says no"):
        fused.token_output(stored, factors, token, None)
    assert kernels.state("token nf4 64") == "refused: the driver says no"
    assert fused.token_output(stored, factors, token, None) is None


def test_what_a_stack_needs_is_compiled_before_what_one_may_need(kernels, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def probe(kernel, rank, device):
        begun.set()
        assert go_on.wait(10)

    monkeypatch.setattr(choice, "probe", probe)
    kernels.prepare(["int8", "nf4 64"], CPU, FP16, [32, 16, 64])
    assert begun.wait(10)
    kernels.prepare(["nf4 64"], CPU, FP16, [64, 128], soon=True)
    go_on.set()
    assert kernels.wait(10)
    first, *made = FakeKernel.made
    assert first == "triton"
    order = [(kind, bucket) for kind, bucket, _, per_rank in made if not per_rank]
    assert order == [
        ("int8", 32),
        ("nf4 64", 64),
        ("nf4 64", 128),
        ("nf4 64", 32),
        ("int8", 16),
        ("nf4 64", 16),
        ("int8", 64),
    ]


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("make", RuntimeError("ptxas failed\n.version 8.8\nmany lines"), "RuntimeError: ptxas failed…"),
        ("probe", ProbeError("3 of 9 values are wrong"), "ProbeError: 3 of 9 values are wrong"),
    ],
)
def test_an_error_or_a_wrong_value_refuses_a_kind_and_is_said_once(kernels, caplog, what, error, words):
    FakeKernel.errors["int8", what] = error
    with caplog.at_level(logging.INFO):
        prepared(kernels, "int8", "nf4 64", ranks=(16, 32))
        prepared(kernels, "int8", ranks=(64,))
    assert kernels.state("int8").startswith("refused: ")
    assert kernels.state("nf4 64") == "works"
    assert not kernels.ready("int8", CPU, FP16, 16)
    said = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert len(said) == 1
    assert f"The fused kernel for int8 is not used ({words})" in said[0]


def test_without_triton_all_are_refused_with_one_sentence(kernels, caplog):
    for kind in ("int8", "nf4 64"):
        FakeKernel.errors[kind, "make"] = ImportError("No module named 'triton'")
    with caplog.at_level(logging.INFO):
        prepared(kernels, "int8", "nf4 64")
    assert len(caplog.records) == 1
    assert "No module named 'triton'" in caplog.text
    assert all(state.startswith("refused: ") for state in kernels.states().values())


@pytest.mark.parametrize(
    ("version", "states", "words"),
    [
        ("3.1.0", ["refused", "refused", "refused"], "Triton 3.1 is older than 3.2, which the fused kernels need"),
        ("2.3.1+git", ["refused", "refused", "refused"], "Triton 2.3 is older than 3.2"),
        ("3.2.0", ["works", "refused", "works"], "nf4 64 is not used (it needs Triton 3.3, and 3.2 is installed)"),
        ("3.3.1.post7", ["works", "works", "works"], "fused kernels compiled and checked: 3, in "),
        ("main", ["works", "works", "works"], "fused kernels compiled and checked: 3, in "),
    ],
)
def test_a_triton_that_is_too_old_is_said_once_and_never_compiles(kernels, monkeypatch, caplog, version, states, words):
    class Checked(FakeKernel):
        def __init__(self, *place, **more):
            launch.triton_kernels()
            super().__init__(*place, **more)

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    # None: an import of it fails.
    kernels_module = None if states[0] == "refused" else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "lib_lora_guard.kernels.triton_kernels", kernels_module)
    monkeypatch.setattr(choice, "triton_version", launch.triton_version)
    monkeypatch.setattr(choice, "Kernel", Checked)
    kinds = ("int8", "nf4 64", "nf4 64 crossing")
    with caplog.at_level(logging.INFO):
        prepared(kernels, *kinds)
        prepared(kernels, *kinds, ranks=(16, 64))
    assert [kernels.state(kind).partition(":")[0] for kind in kinds] == states
    said = [record.getMessage() for record in caplog.records if "fused kernels compiled" not in record.getMessage()]
    assert len(said) == ("refused" in states)
    assert words in caplog.text
    stored = sample("int8", 3, 16, FP16, torch.Generator(), CPU)
    if states[0] == "refused":
        assert FakeKernel.made == ["triton"]  # the fixture's, in place of an import
        assert torch.equal(fused.fused_weight(stored, None, FP16), fused.dequantised(stored, FP16))


def test_out_of_memory_in_a_probe_is_no_refusal(kernels):
    FakeKernel.errors["int8", "probe"] = torch.cuda.OutOfMemoryError()
    prepared(kernels, "int8")
    assert kernels.state("int8") == "untried"
    FakeKernel.errors.clear()
    prepared(kernels, "int8")
    assert kernels.state("int8") == "works"


def test_the_twin_takes_over_where_a_kernel_fails_and_where_kernels_are_off(kernels, monkeypatch):
    stored = sample("int8", 3, 16, FP16, torch.Generator(), CPU)
    twin = fused.dequantised(stored, FP16)
    assert torch.equal(fused.fused_weight(stored, None, FP16), twin)
    prepared(kernels, "int8", ranks=(0,))
    assert fused.fused_weight(stored, None, FP16).unique().tolist() == [7.0]
    kernels.switch(False)
    assert torch.equal(fused.fused_weight(stored, None, FP16), twin)
    monkeypatch.setenv(choice.SWITCH, "0")
    kernels.switch(True)
    assert (kernels.enabled, kernels.ready("int8", CPU, FP16, 0)) == (False, False)
    monkeypatch.delenv(choice.SWITCH)
    kernels.switch(True)
    FakeKernel.errors["int8", "call"] = torch.cuda.OutOfMemoryError()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fused.fused_weight(stored, None, FP16)
    assert kernels.state("int8") == "works"
    FakeKernel.errors["int8", "call"] = RuntimeError("launch failed")
    with pytest.raises(RuntimeError, match="launch failed"):
        fused.fused_weight(stored, None, FP16)
    assert torch.equal(fused.fused_weight(stored, None, FP16), twin)
    assert kernels.state("int8") == "refused: launch failed"


def test_a_processor_and_fp32_have_no_kernels(kernels, monkeypatch):
    kernels.prepare(["int8"], CPU, torch.float32, [16])
    monkeypatch.setattr(choice, "interprets", lambda: False)
    kernels.prepare(["int8"], CPU, FP16, [16])
    assert (kernels.states(), FakeKernel.made) == ({}, [])


def test_what_a_card_cannot_have_is_said_when_a_lora_needs_it(kernels, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    card = torch.device("cuda", 0)
    kernels.prepare(["int8"], card, FP16, [16])
    assert (kernels.states(), caplog.records) == ({}, [])
    kernels.prepare(["int8"], card, FP16, [16], soon=True)
    assert kernels.wait(10)
    assert kernels.state("int8").startswith("refused: ")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("capability", "dtype", "why"), [((6, 1), FP16, "6.1"), ((7, 5), torch.bfloat16, "no bf16")])
def test_triton_compiles_nothing_for_a_card_that_is_too_old(kernels, monkeypatch, capability, dtype, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels.prepare(["int8"], torch.device("cuda", 0), dtype, [16], soon=True)
    assert kernels.wait(10)
    assert why in kernels.state("int8")
    assert FakeKernel.made in ([], ["triton"])


IMPORT_TRITON = ("triton_kernels", "token_kernels", "fragment_kernels")


def test_triton_is_imported_by_three_modules_which_are_imported_on_use():
    for file in sorted(PACKAGE.glob("*.py")):
        top = [
            node
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = {alias.name for node in top for alias in node.names}
        assert not {"triton", *IMPORT_TRITON} & names or file.stem in IMPORT_TRITON, file.name


@pytest.mark.parametrize("what", ["", "probe", "make"])
def test_the_newer_of_two_kernels_gives_way_to_the_older_one(kernels, monkeypatch, caplog, what):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(FakeKernel, "has_new", True)
    FakeKernel.errors["nf4 64 in fragments", what] = ProbeError("error 9, the twin's 1")
    if what == "make":
        # Not a kernel's fault: both are made before either is compiled.
        prepared(kernels, "nf4 64")
        assert kernels.state("nf4 64") == "refused: ProbeError: error 9, the twin's 1"
        return
    prepared(kernels, "nf4 64")
    assert kernels.state("nf4 64") == "works"
    expected = "nf4 64" if what else "nf4 64 in fragments"
    assert [kernels.kernel("nf4 64", CPU, FP16, 16, many).kind for many in (False, True)] == [expected] * 2
    assert ("error 9" in caplog.text) is bool(what)
    # Where memory ends neither is given up.
    FakeKernel.errors["nf4 64 in fragments", "probe"] = torch.cuda.OutOfMemoryError("CUDA out of memory")
    prepared(kernels, "nf4 64", ranks=(64,))
    assert (kernels.state("nf4 64"), kernels.ready("nf4 64", CPU, FP16, 64)) == ("works", False)


@pytest.mark.parametrize(
    ("kind", "layer", "bucket", "even", "takes"),
    [
        ("nf4 64 by bf16", "bf16", 16, True, True),
        ("fp4 128 nested256 by fp16", "fp16", 16, True, True),
        ("nf4 64 by bf16", "bf16", 16, False, False),  # 5 ranks, say
        ("nf4 64 by bf16", "bf16", 32, True, False),
        ("nf4 64 by bf16", "bf16", 0, True, False),
        ("nf4 64 by bf16", "fp16", 16, True, False),  # two roundings
        ("nf4 32 by bf16", "bf16", 16, True, False),
        ("nf4 64 crossing by bf16", "bf16", 16, True, False),
        ("dora nf4 64 by bf16", "bf16", 16, True, False),
        ("loha nf4 64 by bf16", "bf16", 16, True, False),
        ("lokr nf4 64 by bf16", "bf16", 16, True, False),
        ("fp8 e4m3", "bf16", 16, True, False),
    ],
)
def test_what_the_newer_kernel_makes(kind, layer, bucket, even, takes):
    assert recipes.takes_fragments(recipes.recipe_of(kind), layer, bucket, even) is takes


@pytest.mark.parametrize(
    ("setting", "card", "uses"),
    [("1", (8, 0), True), ("1", (7, 5), False), ("0", (9, 0), False), (None, (9, 0), False)],
)
def test_the_newer_kernel_is_for_cards_with_its_products_and_for_those_who_ask(monkeypatch, setting, card, uses):
    monkeypatch.delenv(launch.FRAGMENTS_SWITCH, raising=False)
    if setting is not None:
        monkeypatch.setenv(launch.FRAGMENTS_SWITCH, setting)
    monkeypatch.setattr(launch, "interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    assert launch.uses_fragments() is uses
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not launch.uses_fragments()


def test_a_lokr_has_kernels_for_two_widths(kernels):
    prepared(kernels, "lokr int8", ranks=(16, 1))
    prepared(kernels, "int8", ranks=(64, 16, 1))
    assert {place for place in FakeKernel.made if place[0] == "lokr int8"} == {
        ("lokr int8", 16, even, per_rank) for even in (True, False) for per_rank in (True, False)
    }
    assert {place[1] for place in FakeKernel.made if place[0] == "int8"} == {64, 16}
    stored = sample("int8", 6, 32, FP16, torch.Generator(), CPU)
    for columns in (16, 4):
        sides = Sides(torch.ones(3, 32 // columns, dtype=FP16), torch.ones(2, columns, dtype=FP16), 1.0)
        assert fused.fused_weight(stored, sides, FP16)[0, 0] == 7.0
    kernels.refuse("lokr int8", "wrong")
    assert fused.fused_weight(stored, sides, FP16)[0, 1] == stored.data[0, 1] + 1.0
    assert kernels.ready("int8", CPU, FP16, 16)
