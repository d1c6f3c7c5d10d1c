"""Layers that other code has had its hands on: their own forward stays, and a LoRA on them is right or refused by name."""

import copy
import functools
import pickle

import pytest
import torch
from safetensors.torch import save_file
from support.make import host_value, rand
from support.measure import assert_same, same_bits
from support.reference import merge_reference

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import LoraGuardError, ModeError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.hosts.plain.guard import LoraGuard
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.marked_class import class_of
from lib_lora_guard.planning.mode import Mode, Wish

OUT, IN, STRENGTH = 8, 12, 0.5
X = rand(3, IN, seed=1)
KINDS = {"lora": {}, "lokr": {}, "glora": {}, "diff": {}, "dora": {"dora": "output"}}
MODES = (Wish.AUTO, Wish.BYPASS, Wish.ON_THE_FLY, Wish.MERGE)


class Scaled(torch.nn.Linear):
    """A layer that is no `W x + b`, and that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        return 3 * super().forward(x).relu()


class Skip(torch.nn.Linear):
    """A layer that is switched off returns what it got."""

    def forward(self, x):
        return x


def linear(base=torch.nn.Linear, out=OUT, inner=IN):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return base(out_features=out, in_features=inner).requires_grad_(False)


def value_of(kind, shape=(OUT, IN)):
    return host_value("lora" if kind == "dora" else kind, shape, 3, **KINDS[kind])


class Patched:
    """A model with one LoRA on parameters, by `engine` itself: every kind has a host value."""

    def __init__(self, model, kind="lora", wish=Wish.AUTO, keys=("0.weight",), shape=(OUT, IN)):
        self.engine, self.access = Engine(), PlainAccess(model)
        self.access.shapes()
        value = value_of(kind, shape)
        terms = {key: [parse_term([STRENGTH, value, 1.0, None, None], {}, 0)] for key in keys}
        self.report = self.engine.change(self.access, [LoraRequest("style", STRENGTH, terms)], wish, leave_out=False)

    @property
    def mode(self):
        (attachment,) = self.engine.attached.values()
        return attachment.mode

    def remove(self):
        self.engine.change(self.access, [])


def merged(weight, kind="lora"):
    return merge_reference([[STRENGTH, value_of(kind, tuple(weight.shape)), 1.0, None, None]], weight.detach().double())


def with_weight(layer, weight):
    """A second layer of the same class that has `weight`: what a merge gives."""
    twin = copy.deepcopy(layer)
    twin.weight.data = weight.to(layer.weight.dtype)
    return twin


@pytest.mark.parametrize("wish", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_on_the_layer_runs_and_stays(kind, wish):
    layer = linear()
    plain = layer.forward
    own = layer.forward = lambda y: 3 * plain(y).relu()
    model, base = torch.nn.Sequential(layer), layer(X)
    wanted = 3 * torch.nn.functional.linear(X, merged(layer.weight, kind).float(), layer.bias).relu()
    patched = Patched(model, kind, wish)
    assert patched.mode is Mode.MERGE
    assert_same(model(X), wanted, base)
    assert layer.forward is own
    patched.remove()
    assert layer.forward is own
    assert same_bits(model(X), base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_with_a_forward_of_its_own_gets_another_weight(kind):
    layer = linear(Scaled)
    model, base = torch.nn.Sequential(layer), layer(X)
    wanted = with_weight(layer, merged(layer.weight, kind))(X)
    patched = Patched(model, kind, Wish.AUTO if kind != "diff" else Wish.ON_THE_FLY)
    assert patched.mode is Mode.ON_THE_FLY
    layer.calls = 5
    assert_same(model(X), wanted, base)
    assert (layer.calls, layer.last is X) == (6, True), "what a forward notes belongs to the layer"
    patched.remove()
    assert type(layer) is Scaled
    assert same_bits(model(X), base)


@pytest.mark.parametrize("base", [torch.nn.Linear, Scaled])
@pytest.mark.parametrize("kind", ["lora", "glora"])
def test_a_class_that_allows_no_subclass_is_never_patched_on_the_fly(kind, base):
    class Final(base):
        def __init_subclass__(cls):
            raise RuntimeError("no subclasses")

    layer = linear(Final)
    model, before = torch.nn.Sequential(layer), layer(X)
    wanted = with_weight(layer, merged(layer.weight, kind))(X)
    for wish in MODES:
        patched = Patched(model, kind, wish)
        assert patched.mode is not Mode.ON_THE_FLY
        assert_same(model(X), wanted, before)
        patched.remove()
        assert type(layer) is Final
        assert same_bits(model(X), before)


@pytest.mark.parametrize("wish", MODES)
def test_a_layer_that_returns_its_input_never_has_it_changed(wish):
    model = torch.nn.Sequential(linear(Skip, IN, IN))
    patched = Patched(model, "lora", wish, shape=(IN, IN))
    x = X.clone()
    assert same_bits(model(x), X), "its weight has no part in what it returns"
    assert same_bits(x, X)
    patched.remove()


def test_what_a_hook_has_put_in_the_place_of_the_output_is_not_written_into():
    model, kept = torch.nn.Sequential(linear()), torch.ones(3, OUT)
    patched = Patched(model, "lora", Wish.BYPASS)
    # Before the guard's own hook, although it came after it.
    handle = model[0].register_forward_hook(lambda layer, args, output: kept, prepend=True)
    first = model(X)
    assert same_bits(model(X), first)
    assert same_bits(kept, torch.ones(3, OUT))
    handle.remove()
    patched.remove()


@pytest.mark.parametrize("wish", MODES)
def test_hooks_of_others_get_the_output_of_the_patched_layer(wish):
    layer = linear()
    model = torch.nn.Sequential(layer)
    layer.register_forward_hook(lambda layer, args, output: 2 * output)
    base = model(X)
    wanted = 2 * torch.nn.functional.linear(X, merged(layer.weight).float(), layer.bias)
    patched = Patched(model, "lora", wish)
    assert_same(model(X), wanted, base)
    patched.remove()
    assert same_bits(model(X), base)


def test_a_wrapper_put_on_while_a_lora_is_on_stays_and_the_lora_goes():
    layer = linear()
    model, base = torch.nn.Sequential(layer), layer(X)
    patched = Patched(model, "glora")
    assert patched.mode is Mode.ON_THE_FLY
    inner, calls = layer.forward, []
    layer.forward = lambda y: (calls.append(1), inner(y))[1]
    assert not torch.equal(model(X), base)
    patched.remove()
    assert same_bits(model(X), base)
    assert len(calls) == 2


@pytest.mark.parametrize("wish", MODES)
def test_a_forward_that_accelerate_has_wrapped_is_known(wish):
    accelerate = pytest.importorskip("accelerate")
    layer = linear()
    model, base, weight = torch.nn.Sequential(layer), layer(X), layer.weight.detach().clone()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    wrapped, hook = layer.forward, layer._hf_hook
    for kind in ("lora", "lokr", "dora", "glora"):
        if wish is Wish.MERGE or kind == "glora":
            with pytest.raises(ModeError, match=r"0\.weight: its weight is not on the layer"):
                Patched(model, kind, wish)
        else:
            patched = Patched(model, kind, wish)
            assert patched.mode is Mode.BYPASS
            assert_same(model(X), torch.nn.functional.linear(X, merged(weight, kind).float(), model_bias(layer)), base)
            patched.remove()
        assert layer.forward is wrapped
        assert layer._hf_hook is hook
        assert same_bits(model(X), base)


def model_bias(layer):
    return layer._hf_hook.weights_map["bias"]


def test_a_compiled_forward_on_a_layer_is_the_layers_own():
    layer = linear()
    layer.forward = torch.compile(layer.forward, backend="eager")
    model, base = torch.nn.Sequential(layer), layer(X)
    patched = Patched(model)
    assert patched.mode is Mode.BYPASS
    assert_same(model(X), torch.nn.functional.linear(X, merged(layer.weight).float(), layer.bias), base)
    patched.remove()


@pytest.mark.parametrize("norm", ["old", "parametrised", "spectral"])
def test_computed_weights_take_what_needs_no_weight(norm):
    layer = linear()
    if norm == "old":
        # A UserWarning before torch 2.5.
        with pytest.warns((FutureWarning, UserWarning), match="weight_norm"):
            layer = torch.nn.utils.weight_norm(layer)
    elif norm == "parametrised":
        layer = torch.nn.utils.parametrizations.weight_norm(layer)
    else:
        layer = torch.nn.utils.parametrizations.spectral_norm(layer)
    model = torch.nn.Sequential(layer).eval().requires_grad_(False)
    base, weight = model(X), layer.weight.detach().clone()
    for kind in ("lora", "dora"):
        patched = Patched(model, kind)
        assert_same(model(X), torch.nn.functional.linear(X, merged(weight, kind).float(), layer.bias), base)
        patched.remove()
        assert same_bits(model(X), base)
    for kind, wish in (("glora", Wish.AUTO), ("diff", Wish.AUTO), ("lora", Wish.MERGE)):
        with pytest.raises(ModeError, match=r"0\.weight: its weight is computed anew for each call"):
            Patched(model, kind, wish)
    assert same_bits(model(X), base)


@pytest.mark.parametrize("mode", ["auto", "bypass", "on_the_fly", "merge"])
def test_a_module_with_two_names_takes_loras_for_both(tmp_path, mode):
    layer = linear(out=IN)
    model = torch.nn.ModuleDict({"first": layer, "second": layer})
    base, delta = layer(X), torch.zeros(IN, IN)
    tensors = {}
    for n, name in enumerate(("first", "second")):
        up, down = rand(IN, 2, seed=10 + n), rand(2, IN, seed=20 + n)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        delta += up @ down
        save_file({k: t for k, t in tensors.items() if k.startswith(name)}, str(tmp_path / f"{name}.safetensors"))
    save_file(tensors, str(tmp_path / "both.safetensors"))
    guard = LoraGuard(model)
    only = tensors["second.lora_up.weight"] @ tensors["second.lora_down.weight"]
    guard.apply([(tmp_path / "second.safetensors", 1.0)], mode=mode)
    assert_same(layer(X), base + X @ only.T, base)
    report = guard.apply([(tmp_path / "both.safetensors", 1.0)], mode=mode)
    assert_same(layer(X), base + X @ delta.T, base)
    assert report.loras[0].skipped == []
    guard.remove()
    assert same_bits(layer(X), base)


@pytest.mark.parametrize("wish", MODES)
def test_layers_that_their_parent_may_read_without_a_call_are_merged(wish):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = (
            torch.nn.TransformerEncoderLayer(IN, 2, 16, batch_first=True, dropout=0.0).eval().requires_grad_(False)
        )
    x = rand(2, 5, IN, seed=4)
    with torch.no_grad():
        base = encoder(x)
        patched = Patched(encoder, "lora", wish, keys=("linear1.weight",), shape=(16, IN))
        assert patched.mode is Mode.MERGE
        twin = copy.deepcopy(encoder)
        patched.remove()
        twin.linear1.weight.data = merged(encoder.linear1.weight).float()
        assert same_bits(encoder(x), base)
        patched = Patched(encoder, "lora", wish, keys=("linear1.weight",), shape=(16, IN))
        assert_same(encoder(x), twin(x), base)


@pytest.mark.parametrize("wish", MODES)
def test_attention_and_embeddings_are_patched_in_their_weights(wish):
    attention = torch.nn.MultiheadAttention(IN, 2, batch_first=True).eval().requires_grad_(False)
    embedding = torch.nn.Embedding(OUT, IN).requires_grad_(False)
    model = torch.nn.ModuleDict({"attention": attention, "embedding": embedding})
    x = rand(2, 5, IN, seed=4)
    with torch.no_grad():
        wanted = copy.deepcopy(attention)
        wanted.out_proj.weight.data = merged(attention.out_proj.weight).float()
        base, table = attention(x, x, x)[0], merged(embedding.weight)
        Patched(model, "lora", wish, keys=("attention.out_proj.weight",), shape=(IN, IN))
        assert_same(attention(x, x, x)[0], wanted(x, x, x)[0], base)
        one = Patched(model, "lora", wish, keys=("embedding.weight",))
        assert_same(embedding(torch.arange(OUT)), table.float(), embedding.weight * 0)
        one.remove()


@pytest.mark.parametrize("wish", [Wish.BYPASS, Wish.ON_THE_FLY])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_replica_of_data_parallel_has_the_lora_and_its_own_weight(kind, wish):
    layer = linear()
    model, base = torch.nn.Sequential(layer), layer(X)
    patched = Patched(model, kind, wish)
    replica = layer._replicate_for_data_parallel()
    # As `torch.nn.parallel.replicate` does it: copies on another device, which are no parameters.
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter.detach().clone())
    assert_same(replica(X), torch.nn.functional.linear(X, merged(layer.weight, kind).float(), layer.bias), base)
    if wish is Wish.ON_THE_FLY:
        replica.weight.zero_()
        assert not torch.allclose(replica(X), model(X)), "it has computed with the weight of the original"
    patched.remove()
    assert same_bits(model(X), base)


class Hidden(torch.Tensor):
    """A stand-in for a library's quantised tensor: it says that it is float, and gives no numbers but dequantised."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes.float() * self.scale

    def __repr__(self):
        return "Hidden"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func in (torch.ops.aten.t.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            return func(*[a.dequantize() if isinstance(a, cls) else a for a in args], **(kwargs or {}))
        raise NotImplementedError(f"{func} on a quantised tensor")


def quantised_model():
    layer = linear()
    codes = (layer.weight.data * 100).round().to(torch.int8)
    layer.weight = torch.nn.Parameter(Hidden(codes, 0.01), requires_grad=False)
    return torch.nn.Sequential(layer)


@pytest.mark.parametrize("wish", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_tensor_is_right_or_refused_by_name(kind, wish):
    model = quantised_model()
    layer = model[0]
    base, weight, parameter = model(X), layer.weight.dequantize(), layer.weight
    if wish is Wish.MERGE or kind in ("glora", "diff"):
        with pytest.raises(ModeError, match=r"^0\.weight: stored as \w+ Hidden"):
            Patched(model, kind, wish)
    else:
        patched = Patched(model, kind, wish)
        assert patched.mode is Mode.BYPASS
        assert_same(model(X), torch.nn.functional.linear(X, merged(weight, kind).float(), layer.bias), base)
        patched.remove()
    assert layer.weight is parameter
    assert same_bits(model(X), base)


class Packed(torch.nn.Linear):
    """A stand-in for a class that packs its weight in a way that the guard does not know."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.view(torch.int8).float() * 0.01, self.bias)


def test_a_weight_that_nothing_here_decodes_takes_no_dora():
    layer = linear(Packed)
    weight = (layer.weight.data * 100).round().to(torch.int8)
    layer.weight = torch.nn.Parameter(weight.view(torch.uint8), requires_grad=False)
    model, base = torch.nn.Sequential(layer), layer(X)
    patched = Patched(model)
    assert_same(model(X), torch.nn.functional.linear(X, merged(weight.float() * 0.01).float(), layer.bias), base)
    patched.remove()
    for kind, wish in (("dora", Wish.AUTO), ("glora", Wish.AUTO), ("lora", Wish.MERGE)):
        with pytest.raises(ModeError, match=r"0\.weight: stored as uint8"):
            Patched(model, kind, wish)
    assert same_bits(model(X), base)


@pytest.mark.parametrize("wish", [Wish.BYPASS, Wish.ON_THE_FLY])
def test_a_patched_layer_looks_like_its_class_and_is_not_copied_deeply(wish):
    layer = linear()
    model = torch.nn.Sequential(layer)
    patched = Patched(model, "lora", wish)
    assert isinstance(layer, torch.nn.Linear)
    assert class_of(layer) is torch.nn.Linear
    assert repr(layer) == repr(linear())
    assert type(layer).__module__ == torch.nn.Linear.__module__
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(LoraGuardError, match=r"take it off \(guard\.remove\(\)\) before copying or saving"):
            copied(layer)
    assert_same(copy.copy(layer)(X), layer(X), torch.zeros(3, OUT))
    patched.remove()
    assert type(copy.deepcopy(layer)) is torch.nn.Linear


# The libraries themselves; docs/layers.md has all of their layers, kinds and modes.


def bitsandbytes_layer(plain):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    layer.bias = plain.bias
    layer = layer.to("cpu")
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def torchao_layer(plain):
    ao = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(plain)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    return model[0], model[0].weight.dequantize()


def quanto_layer(plain):
    quanto = pytest.importorskip("optimum.quanto")
    model = torch.nn.Sequential(plain)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model[0], model[0].weight.dequantize()


def comfy_layer(plain):
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    quantised = tensor.QuantizedTensor.from_float(plain.weight.data, "TensorCoreFP8Layout")
    plain.weight = torch.nn.Parameter(quantised, requires_grad=False)
    return plain, plain.weight.dequantize()


def sdnq_layer(plain):
    quantizer = pytest.importorskip("sdnq.quantizer")
    from sdnq.utils import get_sdnq_params

    model = quantizer.sdnq_post_load_quant(torch.nn.Sequential(plain), weights_dtype="uint4", add_skip_keys=False)
    return model[0], model[0].sdnq_dequantizer(**get_sdnq_params(model[0]))


def hqq_layer(plain):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    layer = quantize.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
    return layer, layer.dequantize()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [bitsandbytes_layer, torchao_layer, quanto_layer, comfy_layer, sdnq_layer, hqq_layer])
def test_the_libraries_themselves(make):
    layer, weight = make(linear(out=256, inner=512))
    x, model = rand(3, 512, seed=1), torch.nn.Sequential(layer)
    with torch.no_grad():
        base = model(x)
    for kind in ("lora", "dora"):
        patched = Patched(model, kind, shape=(256, 512))
        assert patched.mode is Mode.BYPASS
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                output = model(x)
            wanted = torch.nn.functional.linear(x, merged(weight.reshape(256, 512), kind).float(), layer.bias)
            assert_same(output.detach(), wanted, base)
        patched.remove()
    for kind, wish in (("glora", Wish.AUTO), ("diff", Wish.AUTO), ("lora", Wish.MERGE)):
        with pytest.raises(ModeError, match=r"^0\.weight: stored as "):
            Patched(model, kind, wish, shape=(256, 512))
    with torch.no_grad():
        assert same_bits(model(x), base)


def test_a_wrapper_of_another_library_counts_as_unknown():
    layer = linear()
    inner = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(lambda y: 2 * inner(y)), inner)
    model = torch.nn.Sequential(layer)
    assert Patched(model).mode is Mode.MERGE
