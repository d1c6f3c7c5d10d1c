"""Tests of an access: the parts it finds in a model, and those left when the model is gone."""

import gc

import pytest
import torch
from support.make import rand

from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.access import ModuleAccess, find_owner, is_linear, is_plain_convolution
from lib_lora_guard.patching.parameters import modules, named_parameters, own_parameters


@pytest.fixture
def model():
    return torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.Linear(3, 4)), "conv": torch.nn.Conv2d(2, 5, 3)})


def test_the_owner_of_a_parameter_is_found_by_its_dotted_name(model):
    assert find_owner(model, "a.0.weight") == (model["a"][0], "weight")
    assert find_owner(model["a"][0], "bias") == (model["a"][0], "bias")


@pytest.mark.parametrize("key", ["a.0", "a.1.weight", "a.0.weights", "a.0.in_features", "b.weight", "", "."])
def test_names_of_no_parameter_have_no_owner(model, key):
    assert find_owner(model, key) is None


def test_layers_whose_call_uses_their_weight_as_it_is():
    attention = torch.nn.MultiheadAttention(8, 2)
    assert is_linear(torch.nn.Linear(2, 2))
    assert not is_linear(attention.out_proj), "it is never called: the attention reads its weight"
    assert is_plain_convolution(torch.nn.Conv1d(4, 4, 3))
    assert not is_plain_convolution(torch.nn.Conv2d(4, 4, 3, groups=2))
    assert not is_plain_convolution(torch.nn.ConvTranspose2d(4, 4, 3))


def test_a_parameter_that_was_replaced_is_seen_and_another_object_in_its_place_raises(model):
    site = PlainAccess(model).site("a.0.weight")
    other = torch.nn.Parameter(rand(4, 3, seed=1))
    model["a"][0].weight = other
    assert site.parameter is other
    del model["a"][0].weight
    model["a"][0].weight = rand(4, 3, seed=1)
    with pytest.raises(TypeError, match=r"^a\.0\.weight is a Tensor, not a parameter$"):
        _ = site.parameter


class Halves(ModuleAccess):
    """A host that stores twice the values, as fp16."""

    def decoded_rows(self, site, start, length, device):
        return site.parameter.detach().narrow(0, start, length) / 2


@pytest.mark.parametrize("key", ["a.0.weight", "a.0.bias", "conv.weight"])
def test_decoded_rows_of_a_host_come_as_new_fp32_tensors(model, key):
    model.half()
    site, access = PlainAccess(model).site(key), Halves(model)
    wanted = site.parameter.detach().float() / 2
    rows, dense = access.rows(site, 1, 2, torch.device("cpu")), access.dense(site)
    assert torch.equal(rows, wanted[1:3])
    assert torch.equal(dense, wanted)
    assert rows.dtype == dense.dtype == torch.float32
    dense.zero_()
    assert torch.equal(access.dense(site), wanted)


@pytest.mark.parametrize(
    ("access_class", "text"),
    [(Halves, "Sequential has been unloaded"), (PlainAccess, "the Sequential this guard was made for is gone")],
)
def test_an_access_does_not_keep_its_model_alive(access_class, text):
    access = access_class(torch.nn.Sequential())
    gc.collect()
    with pytest.raises(ReferenceError, match=f"^{text}$"):
        _ = access.model


def test_parameters_come_as_torch_gives_them(model):
    model["shared"] = model["a"][0]
    model["tied"] = torch.nn.Linear(3, 4, bias=False)
    model["tied"].weight = model["a"][0].weight
    model["gap"] = None
    model.scale = torch.nn.Parameter(torch.ones(1))
    assert list(named_parameters(model).items()) == list(model.named_parameters())
    model["a"].whole = model
    assert modules(model) == list(model.modules())
    model["tied"].again = model["tied"].weight
    for one in modules(model):
        assert list(map(id, own_parameters(one))) == list(map(id, one.parameters(recurse=False)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_parameters_of_modules_that_keep_them_in_another_way(model):
    traced = torch.jit.trace(model["a"], torch.ones(1, 3))
    scripted = torch.jit.script(model["conv"])
    whole = torch.nn.Sequential(traced, scripted, torch.nn.Linear(1, 1))
    for one in (traced, scripted, whole):
        names, found = [name for name, _ in one.named_parameters()], named_parameters(one)
        assert (list(found), len(found)) == (names, len(names))
        assert all(map(torch.equal, found.values(), one.parameters()))
        owners = [find_owner(one, name) for name in names]
        assert all(torch.equal(getattr(*owner), found[name]) for owner, name in zip(owners, names, strict=True))
        assert [find_owner(one, name) for name in ("0.none", "none.weight")] == [None, None]
        assert modules(one) == list(one.modules())
        for part in modules(one):
            assert all(map(torch.equal, own_parameters(part), part.parameters(recurse=False)))
            assert len(own_parameters(part)) == len(list(part.parameters(recurse=False)))
    model.named_parameters = lambda: [("own", torch.nn.Parameter(torch.ones(1)))]
    assert list(named_parameters(model)) == ["own"]
    model.named_modules = lambda *_, **__: [("own", model["conv"])]
    assert modules(model) == [model["conv"]]
