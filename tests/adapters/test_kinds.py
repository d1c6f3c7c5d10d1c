"""A kind of adapter that this file makes up: one call registers it, and everything knows it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from support.make import rand
from support.measure import assert_same

from lib_lora_guard import LoraGuard
from lib_lora_guard.adapters import Adapter, Term
from lib_lora_guard.adapters.base import PatchCost, add_delta, mismatch
from lib_lora_guard.adapters.files import lora_of_header, open_lora
from lib_lora_guard.adapters.forms import LowRank
from lib_lora_guard.adapters.kinds import KINDS, HostTuple, Kind, register, unregister
from lib_lora_guard.adapters.patch_tuples import parse_value, value_of
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.models.evidence import Evidence
from lib_lora_guard.planning.costs import on_the_fly_cost


@dataclass(frozen=True, eq=False)
class OuterAdapter(Adapter):
    """`delta = gain * rows x columns`: the made-up kind. It has a cheap form."""

    kind: ClassVar[str] = "outer"
    rows_factor: torch.Tensor
    columns_factor: torch.Tensor
    gain: float = 1.0

    @property
    def rank(self):
        return 1

    def check(self, shape, *, may_expand):
        gives = (self.rows_factor.numel(), self.columns_factor.numel())
        if gives != tuple(shape):
            raise mismatch("outer product", gives, shape)

    def patch(self, weight, strength, function):
        delta = torch.outer(self.rows_factor.to(weight), self.columns_factor.to(weight))
        return add_delta(weight, delta, strength * self.gain, function)

    def cheap_forward(self):
        return LowRank(self.rows_factor[:, None], self.columns_factor[None, :], self.gain)

    def patch_cost(self):
        return PatchCost(passes=3, copies=1)


@dataclass(frozen=True, eq=False)
class GateAdapter(Adapter):
    """`W' = W (1 + s gate)`, elementwise: another one, which only the weight side has."""

    kind: ClassVar[str] = "gate"
    gate: torch.Tensor

    def check(self, shape, *, may_expand):
        if tuple(self.gate.shape) != tuple(shape):
            raise mismatch("gate", self.gate.shape, shape)

    def patch(self, weight, strength, function):
        return weight.mul_(1 + strength * self.gate.to(weight))


def make_outer(found):
    return OuterAdapter(**{**found.fields, "gain": float(found.fields.get("gain", 1.0))})


OUTER = Kind(
    "outer",
    make_outer,
    keys={"outer_gain": "gain"},
    peft_keys={"outer_rows": "rows_factor", "outer_columns": "columns_factor"},
    numbers=frozenset({"gain"}),
    host=HostTuple(OuterAdapter, ("rows_factor", "columns_factor"), ("gain",)),
    size=lambda shapes: (shapes["rows_factor"][0], shapes["columns_factor"][0]),
)
GATE = Kind("gate", lambda found: GateAdapter(**found.fields), keys={"gate_weight": "gate"})


@pytest.fixture
def made_up_kinds():
    register(OUTER)
    register(GATE)
    yield
    unregister("outer")
    unregister("gate")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 24), torch.nn.Linear(24, 8)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data.copy_(rand(*parameter.shape, seed=seed, scale=0.1))
        self.requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x))


X = rand(5, 16, seed=40)
ROWS, COLUMNS, GATE_OF_SECOND = rand(24, seed=41), rand(16, seed=42), rand(8, 24, seed=43)


def write(path, **more):
    tensors = {"first.outer_rows": ROWS, "first.outer_columns.default": COLUMNS, "first.outer_gain": torch.tensor(2)}
    save_file({**tensors, "second.gate_weight": GATE_OF_SECOND, **more}, str(path))
    return path


def patched_by_hand(strength):
    model = Model()
    model.first.weight += strength * 2 * torch.outer(ROWS, COLUMNS)
    model.second.weight *= 1 + strength * GATE_OF_SECOND
    return model(X)


@pytest.mark.usefixtures("made_up_kinds")
class TestMadeUpKinds:
    @pytest.mark.parametrize(
        ("mode", "counts"),
        [("auto", (1, 1, 0)), ("bypass", (1, 1, 0)), ("on_the_fly", (0, 2, 0)), ("merge", (0, 0, 2))],
    )
    def test_are_read_planned_applied_and_removed(self, mode, counts, tmp_path):
        path, model = write(tmp_path / "made_up.safetensors"), Model()
        base = model(X)
        guard = LoraGuard(model)
        report = guard.apply([(path, 0.7)], mode=mode)
        (lora,) = report.loras
        assert (lora.used, lora.skipped, lora.lost) == (2, [], [])
        assert tuple(lora.modes[name] for name in ("bypass", "on_the_fly", "merge")) == counts
        assert_same(model(X), patched_by_hand(0.7), base)
        guard.remove()
        assert torch.equal(model(X), base)

    def test_of_a_wrong_size_are_refused_with_their_own_words(self, tmp_path):
        path, model = write(tmp_path / "made_up.safetensors", **{"first.outer_rows": rand(20, seed=1)}), Model()
        with pytest.raises(ValueError, match=r"made_up\.safetensors.*outer product gives \[20, 16\]"):
            LoraGuard(model).apply([(path, 1.0)])

    def test_without_a_field_are_incomplete(self, tmp_path):
        save_file({"first.outer_rows": ROWS}, str(tmp_path / "half.safetensors"))
        with pytest.raises(LoraFileError, match=r"incomplete .a outer without 'columns_factor'"):
            lora_of_header(open_lora(tmp_path / "half.safetensors"))

    def test_are_known_from_the_header_alone_with_their_single_numbers(self, tmp_path):
        file = lora_of_header(open_lora(write(tmp_path / "made_up.safetensors")))
        assert {key: adapter.kind for key, adapter in file.adapters.items()} == {
            ("first", "weight"): "outer",
            ("second", "weight"): "gate",
        }
        assert file.adapters["first", "weight"].gain == 2.0

    def test_tell_the_size_of_their_modules(self, tmp_path):
        shapes = lora_of_header(open_lora(write(tmp_path / "made_up.safetensors"))).shapes
        assert Evidence.of_lora(shapes).names == {"first": (24, 16), "second": (None, None)}

    def test_are_read_from_patches_of_the_host_and_written_as_such(self):
        adapter = parse_value(("outer", (ROWS, COLUMNS)), {})
        assert value_of(adapter) == ("outer", (ROWS, COLUMNS, 1.0))
        assert value_of(GateAdapter(GATE_OF_SECOND))[0] == "lora_guard"
        assert ("outer" in KINDS.host, "gate" in KINDS.host) == (True, False)

    def test_say_what_they_cost(self):
        adapter = OuterAdapter(ROWS, COLUMNS)
        cost = on_the_fly_cost([Term(adapter, 1.0)], (24, 16), True, 2)
        assert (cost.workspace_bytes, cost.step_bytes, cost.step_flops) == (24 * 16 * 2, 3 * 24 * 16 * 2, 2 * 24 * 16)
        by_default = on_the_fly_cost([Term(GateAdapter(GATE_OF_SECOND), 1.0)], (8, 24), True, 2)
        assert by_default.workspace_bytes == 3 * 4 * 8 * 24


def test_a_kind_that_is_not_registered_is_unknown(tmp_path):
    model = Model()
    with pytest.raises(LoraFileError, match="no LoRA keys found"):
        LoraGuard(model).apply([(write(tmp_path / "made_up.safetensors"), 1.0)])


@pytest.mark.usefixtures("made_up_kinds")
@pytest.mark.parametrize(
    "kind",
    [
        Kind("outer", make_outer),
        Kind("other", make_outer, keys={"outer_rows": "rows_factor"}),
        Kind("other", make_outer, keys={"alpha": "gain"}),
        Kind("other", make_outer, keys={"a.b.c.d": "gain"}),
    ],
    ids=["name", "key of another kind", "key that all share", "key of four parts"],
)
def test_a_name_or_key_that_is_taken_or_never_looked_at_is_refused(kind):
    with pytest.raises(ValueError, match=kind.name):
        register(kind)
    assert "other" not in KINDS.host


def test_to_remove_a_kind_that_is_not_there_is_an_error():
    with pytest.raises(KeyError):
        unregister("outer")
