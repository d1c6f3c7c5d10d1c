"""Save UNet, Save Checkpoint and ControlLora see what stock would show them. On the double and on the real Forge."""

import importlib
import inspect
import logging
import shutil
import sys
import threading
import types

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from support.live_memory import LiveMemory
from support.make import Net, host_value, rand
from support.measure import contribution_error, same_bits
from support.reference import merge_reference

from contract.host import REAL
from lib_lora_guard.hosts.forge import saving as forge_saving
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.patching.deferred import DeferredTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
WIDTH = 32
UNET = "model.diffusion_model."


class Whole(torch.nn.Module):
    """A model as the host's patcher holds it: what is saved is a part of it."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model


class TextModel(torch.nn.Module):
    """One block of a CLIP, by the names that converters look for."""

    def __init__(self, width=WIDTH):
        super().__init__()
        layer = torch.nn.Module()
        layer.self_attn = torch.nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(layer.self_attn, name, torch.nn.Linear(width, width))
        layer.layer_norm1 = torch.nn.LayerNorm(width)
        text_model = torch.nn.Module()
        text_model.encoder = torch.nn.Module()
        text_model.encoder.layers = torch.nn.ModuleList([layer])
        self.clip_g = torch.nn.Module()
        self.clip_g.transformer = torch.nn.Module()
        self.clip_g.transformer.text_model = text_model
        self.clip_g.transformer.text_projection = torch.nn.Linear(width, width, bias=False)


def filled(model, dtype, seed):
    state = {k: rand(*v.shape, seed=seed + n, scale=0.2) for n, (k, v) in enumerate(model.state_dict().items())}
    return {k: v.to(dtype) for k, v in state.items()}


def made(host, make, state, dtype):
    with host.operations.using_forge_operations(dtype=dtype, manual_cast_enabled=dtype != torch.float32):
        model = make()
    model.load_state_dict(state)
    for key, parameter in model.named_parameters():
        # Raw parameters do not take the layers' dtype.
        parameter.data = parameter.data.to(dtype) if dtype != torch.float8_e4m3fn else state[key].clone()
    return model.requires_grad_(False)


def patcher_of(host, model):
    cpu = torch.device("cpu")
    return host.base.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Sdxl:
    """What a converter for files does to a text encoder: renames, a transposed weight, q, k and v in one."""

    @staticmethod
    def for_saving(state):
        if REAL:
            from huggingface_guess import model_list

            return model_list.SDXLRefiner.process_clip_state_dict_for_saving(None, state)
        saved = {}
        start = "clip_g.transformer.text_model.encoder.layers.0."
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{start}self_attn.{n}_proj.{leaf}") for n in "qkv"]
            assert None not in parts
            joined = torch.empty((3 * WIDTH, *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device)
            for n, part in enumerate(parts):
                joined[n * WIDTH : (n + 1) * WIDTH] = part
            saved[f"conditioner.attn.in_proj_{leaf}"] = joined
        projection = state.pop("clip_g.transformer.text_projection.weight")
        saved["conditioner.text_projection"] = projection.transpose(0, 1).contiguous()
        return saved | {k.replace("clip_g.transformer", "conditioner"): v for k, v in state.items()}


def engine_class():
    """The host's engine, saving as its SDXL does: a function of a module that imports these two."""
    base = importlib.import_module("backend.diffusion_engine.base")
    code = (
        "def save_checkpoint(self, filename):\n"
        "    o, read = self.forge_objects, utils.get_state_dict_after_quant\n"
        "    sd = dict(read(o.unet.model.diffusion_model, prefix='model.diffusion_model.'))\n"
        "    sd.update(for_saving(read(o.clip.cond_stage_model, prefix='')))\n"
        "    sd.update(read(o.vae.first_stage_model, prefix='first_stage_model.'))\n"
        "    sf.save_file(sd, filename)\n"
        "    return filename\n"
    )
    utils = importlib.import_module("backend.utils")
    names = {"utils": utils, "sf": safetensors.torch, "for_saving": Sdxl.for_saving}
    exec(code, names)
    functions = {"__init__": lambda self: None, "save_checkpoint": names["save_checkpoint"]}
    return type("Engine", (base.ForgeDiffusionEngine,), functions)


def engine_of(host, unet, text=None, vae=None):
    engine = host.engine_class()
    engine.forge_objects = types.SimpleNamespace(
        unet=unet,
        clip=types.SimpleNamespace(cond_stage_model=text),
        vae=types.SimpleNamespace(first_stage_model=vae),
    )
    return engine


class LiveTensors(LiveMemory):
    """A deferred tensor has a storage that says its size and takes no memory."""

    def _note(self, tensor, is_new):
        if not isinstance(tensor, DeferredTensor):
            super()._note(tensor, is_new)


def patches_on(model, seed, prefix="diffusion_model."):
    """LoRAs on everything: whole weights, slices of the fused ones, a DoRA, a whole difference, norms and biases."""
    patches = {}
    for n, (key, parameter) in enumerate(model.named_parameters()):
        shape, key = tuple(parameter.shape), prefix + key
        if key.endswith("qkv.weight"):
            for i in range(3):
                patches[key, (0, i * WIDTH, WIDTH)] = host_value("lora", (WIDTH, WIDTH), seed + n + i)
        elif len(shape) == 2:
            patches[key] = host_value("lora", shape, seed + n, dora="output" if n % 2 else None)
        elif len(shape) == 4:
            patches[key] = host_value("lora", shape, seed + n)
        else:
            patches[key] = (rand(*shape, seed=seed + n, scale=0.05),)
    return patches


LORAS = (("a.safetensors", 0.8, 1), ("b.safetensors", -0.4, 40))


def with_loras(host, patcher, part, prefix="diffusion_model.", names=LORAS):
    clone = patcher.clone()
    for filename, strength, seed in names:
        clone.add_patches(filename=filename, patches=patches_on(part, seed, prefix), strength_patch=strength)
    return host.load(clone)


def truth(state, model, prefix="diffusion_model.", names=LORAS):
    values = {k: v.to(torch.float64) for k, v in state.items()}
    for _, strength, seed in names:
        for address, value in patches_on(model, seed, prefix).items():
            key, offset = (address, None) if isinstance(address, str) else address
            key = key.removeprefix(prefix)
            values[key] = merge_reference([[strength, value, 1.0, offset, None]], values[key])
    return values


def close_to(value, wanted, dtype):
    """Largest error in units of the storage's own rounding: half a step is right, one step is stock's neighbour."""
    wanted = wanted.double()
    step = torch.finfo(dtype).eps * wanted.abs().clamp_min(torch.finfo(dtype).tiny)
    if dtype == torch.float32:
        # fp32 sums of a few products of numbers near one.
        step = step.clamp_min(4e-7)
    return float(((value.double() - wanted).abs() / step).max())


class Setup:
    """A UNet, a text encoder and a VAE in the host's layers, and their engine."""

    def __init__(self, host, storage="bf16", width=WIDTH, depth=2):
        dtype = DTYPES[storage]
        self.host, self.dtype = host, dtype
        self.states = [filled(make(), dtype, s) for make, s in ((lambda: Net(width, depth), 1), (TextModel, 300))]
        net = made(host, lambda: Net(width, depth), self.states[0], dtype)
        text = made(host, TextModel, self.states[1], dtype)
        vae = made(host, lambda: Net(8, 1), filled(Net(8, 1), torch.float32, 9), torch.float32)
        self.net, self.text = net, text
        self.unet = host.load(patcher_of(host, Whole(net)))
        self.clip = host.load(patcher_of(host, text))
        self.engine = engine_of(host, self.unet, text, vae)

    def apply(self, names=LORAS):
        self.unet_with = with_loras(self.host, self.unet, self.net, names=names)
        self.clip_with = with_loras(self.host, self.clip, self.text, "", names=names)
        self.engine.forge_objects.unet = self.unet_with
        return self


@pytest.fixture
def saving(host):
    """Turns the guard on, with saving; what was built before it is stock's."""
    host.engine_class = engine_class()

    def start():
        takeover = forge.install()
        forge_saving.install(takeover.hooks, takeover.stacks.engines)
        return takeover

    yield start
    host.memory.current_loaded_models.clear()
    forge.uninstall()


@pytest.mark.parametrize("storage", DTYPES)
def test_a_saved_checkpoint_is_stocks(host, saving, storage, tmp_path, caplog):
    stock = Setup(host, storage).apply()
    stock.engine.save_checkpoint(str(tmp_path / "stock.safetensors"))
    stock.engine.save_unet(str(tmp_path / "stock_unet.safetensors"))
    host.memory.current_loaded_models.clear()
    saving()
    guard = Setup(host, storage)
    guard.engine.save_unet(str(tmp_path / "plain.safetensors"))
    guard.apply()
    before = {k: p.detach().clone() for k, p in guard.net.named_parameters() if p.dim() > 1}
    with caplog.at_level(logging.INFO, "lib_lora_guard"):
        assert guard.engine.save_checkpoint(str(tmp_path / "guard.safetensors")) == str(tmp_path / "guard.safetensors")
    guard.engine.save_unet(tmp_path / "guard_unet.safetensors")
    assert all(same_bits(guard.net.get_parameter(k), v) for k, v in before.items()), "saving changed the model"

    ours, theirs = load_file(tmp_path / "guard.safetensors"), load_file(tmp_path / "stock.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}
    assert {v.dtype for k, v in ours.items() if not k.startswith("first_stage")} == {guard.dtype}
    for key, value in ours.items():
        # Both are within half a step of the true value.
        assert close_to(value, theirs[key], value.dtype) <= 1.01, key
    unet = load_file(tmp_path / "guard_unet.safetensors")
    assert {UNET + k: v.dtype for k, v in unet.items()} == {k: v.dtype for k, v in ours.items() if k.startswith(UNET)}
    assert all(same_bits(value, ours[UNET + key]) for key, value in unet.items())

    wanted, plain = truth(guard.states[0], guard.net), load_file(tmp_path / "plain.safetensors")
    dropped = truth(guard.states[0], guard.net, names=LORAS[:1])
    for key, value in unet.items():
        assert same_bits(plain[key], guard.states[0][key])
        assert close_to(value, wanted[key], guard.dtype) <= (2 if storage == "fp32" else 0.51), key
        assert contribution_error(value, wanted[key], plain[key]) < contribution_error(
            dropped[key], wanted[key], plain[key]
        ), key
    said = [r.getMessage() for r in caplog.records if "guard.safetensors" in r.getMessage()]
    if storage == "fp8":
        assert "weights are stored as fp8_e4m3fn, and rounding to that loses most of a LoRA" in said[0]
        assert "lora-guard bake" in said[0]
    else:
        assert len(said) == 1
    assert "guard.safetensors saved" in said[-1]
    assert f"with LoRAs in {len(guard.states[0]) + len(guard.states[1])} of its weights" in said[-1]


@pytest.mark.parametrize("storage", ["scaled_fp8", "Q8_0"])
def test_what_cannot_take_a_lora_is_saved_as_stored_and_said(host, saving, storage, tmp_path, caplog):
    saving()
    patcher, _ = host.build(storage)
    net = patcher.model
    whole = host.load(patcher_of(host, Whole(net)))
    engine = engine_of(host, whole)
    engine.save_unet(str(tmp_path / "plain.safetensors"))
    keys = {k: (WIDTH * (3 if "qkv" in k else 1), WIDTH) for k in net.state_dict() if k.endswith(("qkv.weight", "proj.weight"))}  # fmt: skip
    clone = whole.clone()
    lora = {f"diffusion_model.{k}": host_value("lora", shape, n) for n, (k, shape) in enumerate(keys.items())}
    lora["diffusion_model.blocks.0.norm.weight"] = (rand(WIDTH, seed=3, scale=0.5),)
    clone.add_patches(filename="a", patches=lora, online_mode=True)
    engine.forge_objects.unet = host.load(clone)
    with caplog.at_level(logging.INFO, "lib_lora_guard"):
        engine.save_unet(str(tmp_path / "lora.safetensors"))
    plain, saved = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "lora.safetensors")
    assert plain.keys() == saved.keys()
    assert {k for k in plain if not same_bits(plain[k], saved[k])} == {"blocks.0.norm.weight"}
    name = "Q8_0" if storage == "Q8_0" else "fp8_e4m3fn"
    said = [r.getMessage() for r in caplog.records if "WITHOUT their LoRAs" in r.getMessage()]
    assert len(said) == 1
    assert f"lora.safetensors: {len(keys)} weights stored as {name} are saved as they are" in said[0]


def test_other_readers_get_merged_copies(host, saving):
    saving()
    setup = Setup(host).apply()
    utils = importlib.import_module("backend.utils")
    wanted = truth(setup.states[0], setup.net)
    state = utils.get_state_dict_after_quant(setup.net, "p.")
    assert {f"p.{k}" for k in wanted} == set(state)
    for key, value in wanted.items():
        copy = state[f"p.{key}"]
        assert type(copy) is torch.Tensor
        assert close_to(copy, value, setup.dtype) <= 0.51
        assert copy.data_ptr() != setup.net.get_parameter(key).data_ptr()
    assert set(utils.get_state_dict_after_quant(setup.net.blocks[1])) == set(setup.net.blocks[1].state_dict())


def test_a_save_needs_no_second_model_in_memory(host, saving, tmp_path):
    def peak_of(setup, name):
        with LiveTensors(*setup.net.parameters(), *setup.text.parameters()) as memory:
            setup.engine.save_unet(str(tmp_path / name))
        return memory.peak_bytes

    width, depth = 96, 6
    stock = peak_of(Setup(host, width=width, depth=depth).apply(()), "stock.safetensors")
    host.memory.current_loaded_models.clear()
    saving()
    setup = Setup(host, width=width, depth=depth)
    lora = {f"diffusion_model.blocks.{n}.{name}.weight": host_value("lora", shape, n) for n in range(depth) for name, shape in (("qkv", (3 * width, width)), ("conv", (width, width, 3, 3)))}  # fmt: skip
    clone = setup.unet.clone()
    clone.add_patches(filename="a", patches=lora)
    setup.engine.forge_objects.unet = host.load(clone)
    model = sum(p.numel() * p.element_size() for p in setup.net.parameters())
    largest = width * width * 9 * 4
    # The copy of the whole that stock makes before it makes the bytes; ours is one weight in fp32, its delta and result.
    assert stock >= model
    assert peak_of(setup, "guard.safetensors") <= 3 * largest < 0.8 * model


def sure_failure(kind, monkeypatch, tmp_path):
    if kind == "disk full":
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        return OSError, "needs"
    if kind == "no folder":
        return OSError, "no such folder"
    if kind == "interrupt":
        shared = types.ModuleType("modules.shared")

        class State:
            asked = 0

            @property
            def interrupted(self):
                self.asked += 1
                return self.asked > 3

        shared.state = State()
        monkeypatch.setitem(sys.modules, "modules.shared", shared)
        return Exception, "interrupted"
    original = torch.empty

    def failing(*args, **kwargs):
        if any(f.function == "value" for f in inspect.stack()[:12]):
            raise MemoryError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", failing)
    return MemoryError, "memory"


@pytest.mark.parametrize("kind", ["disk full", "no folder", "interrupt", "no memory"])
def test_a_save_that_fails_leaves_the_old_file_and_says_why(host, saving, kind, tmp_path, caplog, monkeypatch):
    saving()
    setup = Setup(host).apply()
    target = tmp_path / "model.safetensors"
    if kind == "no folder":
        target = tmp_path / "missing" / "model.safetensors"
    else:
        target.write_bytes(b"the old one")
    with monkeypatch.context() as patched:
        error, words = sure_failure(kind, patched, tmp_path)
        with pytest.raises(error):
            setup.engine.save_unet(str(target))
    if kind != "no folder":
        assert target.read_bytes() == b"the old one"
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        setup.engine.save_unet(str(target))
        assert load_file(target).keys() == setup.states[0].keys()
    assert "model.safetensors was not saved, and a file of that name is as it was: " in caplog.text
    assert words in caplog.text
    # This thread is in no save any more: copies are copies again.
    state = importlib.import_module("backend.utils").get_state_dict_after_quant(setup.net)
    assert all(type(value) is torch.Tensor for value in state.values())


class Lock:
    """With the host's interface: `acquire(blocking)`, no owner."""

    def __init__(self):
        self._lock = threading.Lock()
        self.taken = 0

    def acquire(self, blocking=True):
        got = self._lock.acquire(blocking)
        self.taken += got
        return got

    def release(self):
        self._lock.release()


@pytest.fixture
def queue_lock(monkeypatch):
    queue = types.ModuleType("modules.call_queue")
    queue.queue_lock = Lock()
    monkeypatch.setitem(sys.modules, "modules.call_queue", queue)
    return queue.queue_lock


def button(setup, path):
    """The save as the web page calls it."""
    names = {"__name__": "modules.ui_checkpoint_merger", "engine": setup.engine, "path": path}
    exec("def press():\n    return engine.save_unet(path)\n", names)
    return names["press"]


def test_the_button_waits_for_a_running_image(host, saving, queue_lock, tmp_path, caplog):
    saving()
    setup, path = Setup(host).apply(), tmp_path / "model.safetensors"
    queue_lock.acquire()
    thread = threading.Thread(target=button(setup, path))
    with caplog.at_level(logging.INFO, "lib_lora_guard"):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert not path.exists()
        assert "model.safetensors is saved as soon as what is running now has finished" in caplog.text
        queue_lock.release()
        thread.join(60)
    assert load_file(path).keys() == setup.states[0].keys()
    assert queue_lock.taken == 2
    assert queue_lock.acquire(False), "the lock was kept"


def test_whoever_holds_the_lock_himself_does_not_wait_for_it(host, saving, queue_lock, tmp_path):
    saving()
    setup = Setup(host).apply()
    queue_lock.acquire()
    setup.engine.save_unet(tmp_path / "held.safetensors")
    assert not queue_lock.acquire(False), "the lock of the caller was released"
    queue_lock.release()
    setup.engine.save_unet(tmp_path / "free.safetensors")
    assert queue_lock.taken == 2
    assert queue_lock.acquire(False)


def control_setup(host):
    """`(whole model, its plain state, control)`, tiny; the control model is the first part of the model."""
    controlnet = importlib.import_module("backend.patcher.controlnet")
    if not REAL:
        config = {"width": WIDTH}
        state = filled(Net(WIDTH), torch.bfloat16, 1)
        model = made(host, lambda: Net(WIDTH), state, torch.bfloat16)
        model.config = config
        weights = {"blocks.0.proj.weight": rand(WIDTH, WIDTH, seed=77)}
    else:
        from backend.nn.unet import IntegratedUNet2DConditionModel

        config = {"in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 32, "use_linear_in_transformer": True}  # fmt: skip
        state = filled(IntegratedUNet2DConditionModel(**config), torch.bfloat16, 1)
        model = made(host, lambda: IntegratedUNet2DConditionModel(**config), state, torch.bfloat16)
        # Forge's loader does so too.
        model._internal_dict = config
        weights = {"input_hint_block.0.weight": rand(16, 3, 3, 3, seed=77), "input_blocks.0.0.weight": rand(32, 4, 3, 3, seed=78), "middle_block.0.in_layers.2.up": rand(64, 2, seed=79), "lora_controlnet": torch.tensor([])}  # fmt: skip
    whole = Whole(model)
    whole.storage_dtype, whole.computation_dtype, whole.predictor = torch.bfloat16, torch.float32, None
    return whole, state, controlnet.ControlLora(weights)


def test_a_control_lora_sees_merged_weights_and_shares_the_others(host, saving):
    saving()
    whole, state, control = control_setup(host)
    net, first = whole.diffusion_model, "blocks.0." if not REAL else "input_blocks.1."
    patched = {k: v for k, v in state.items() if k.startswith(first) or k == "input_blocks.0.0.weight"}
    lora = {f"diffusion_model.{k}": host_value("lora", tuple(v.shape), n) if v.dim() in (2, 4) else (rand(*v.shape, seed=n, scale=0.1),) for n, (k, v) in enumerate(patched.items())}  # fmt: skip
    clone = patcher_of(host, whole).clone()
    clone.add_patches(filename="a", patches=lora, strength_patch=0.7)
    host.load(clone)
    with torch.inference_mode():
        control.pre_run(whole, lambda percent: percent)
    found = dict(control.control_model.named_parameters())
    own = [k for k in control.control_weights if k in state]
    merged = shared = 0
    for key, value in state.items():
        if key not in found:
            continue
        if key in own:
            assert same_bits(found[key], control.control_weights[key].to(torch.bfloat16)), key
        elif key in patched:
            wanted = merge_reference([[0.7, lora[f"diffusion_model.{key}"], 1.0, None, None]], value.double())
            assert close_to(found[key], wanted, torch.bfloat16) <= 0.51, key
            assert contribution_error(found[key], wanted, value) < 0.2, "the LoRA is not in it"
            merged += 1
        else:
            assert found[key].data_ptr() == net.get_parameter(key).data_ptr(), f"{key} is a copy"
            shared += 1
    assert merged > 5
    assert shared > 5 or not REAL
    assert own
    assert all(same_bits(net.get_parameter(k), v) for k, v in state.items() if v.dim() > 1), "the model was changed"


def test_everything_is_stocks_again_afterwards(host, saving, tmp_path):
    base = importlib.import_module("backend.diffusion_engine.base")
    controlnet = importlib.import_module("backend.patcher.controlnet")
    utils = importlib.import_module("backend.utils")
    places = [(utils, "get_state_dict_after_quant"), (safetensors.torch, "save_file"), (controlnet.ControlLora, "pre_run")]  # fmt: skip
    places += [(base.ForgeDiffusionEngine, name) for name in ("save_unet", "save_checkpoint")]
    before = [getattr(*place) for place in places]
    takeover = saving()
    inside = [getattr(*place) for place in places]
    assert all(a is not b for a, b in zip(before, inside, strict=True))
    count = len(takeover.hooks.hooks)
    saving()
    assert [getattr(*place) for place in places] == inside
    assert len(takeover.hooks.hooks) == count
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors", {"by": "others"})
    assert torch.equal(load_file(tmp_path / "other.safetensors")["a"], torch.ones(3))
    forge.uninstall()
    assert [getattr(*place) for place in places] == before


def test_another_forge_is_left_alone_and_said(host, saving, monkeypatch, caplog, tmp_path):
    base = importlib.import_module("backend.diffusion_engine.base")
    utils = importlib.import_module("backend.utils")
    controlnet = importlib.import_module("backend.patcher.controlnet")
    with monkeypatch.context() as patched:
        patched.delattr(utils, "get_state_dict_after_quant")
        patched.delattr(controlnet, "ControlLora")
        saving()
    assert "WITHOUT its LoRAs" in caplog.text
    assert "backend.utils.get_state_dict_after_quant is missing" in caplog.text
    assert "a ControlLora will see the model without its LoRAs" in caplog.text
    assert not hasattr(base.ForgeDiffusionEngine.save_unet, "lora_guard_hook")
    forge.uninstall()
    caplog.clear()

    class Elsewhere(base.ForgeDiffusionEngine):
        def save_unet(self, filename):
            raise NotImplementedError

    saving()
    assert "will take as much memory as it does in Forge itself: Elsewhere.save_unet does not call" in caplog.text
    assert not hasattr(safetensors.torch.save_file, "lora_guard_hook")
    setup = Setup(host).apply()
    setup.engine.save_unet(str(tmp_path / "merged.safetensors"))
    wanted = truth(setup.states[0], setup.net)
    for key, value in load_file(tmp_path / "merged.safetensors").items():
        assert close_to(value, wanted[key], setup.dtype) <= 0.51
    del Elsewhere.save_unet


def test_merges_suspended_for_a_move_are_saved_too(host, saving, tmp_path):
    saving()
    setup = Setup(host).apply()
    setup.engine.save_checkpoint(str(tmp_path / "before.safetensors"))
    host.memory.unload_all_models()
    norm = setup.net.blocks[0].norm.weight
    assert same_bits(norm, setup.states[0]["blocks.0.norm.weight"]), "nothing was suspended, nothing is tested"
    setup.engine.save_checkpoint(str(tmp_path / "after.safetensors"))
    before, after = load_file(tmp_path / "before.safetensors"), load_file(tmp_path / "after.safetensors")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
