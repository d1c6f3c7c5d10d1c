"""Files that would take memory or time: huge headers, names, settings and tensors. Each is tried in a process of its own.

A child is a fork: its highest resident memory is set back first, so what it counts is what the file took.
"""

import contextlib
import ctypes
import io
import json
import math
import os
import resource
import struct
import time
import traceback

import torch
from support.fake_models import BITS, flux_shapes, stored
from support.machine_speed import times_slower_now

from lib_lora_guard import LoraGuard, cli
from lib_lora_guard.errors import LoraGuardError

from . import checks, files, models

MOST_CPU_SECONDS = 10.0
WIDTHS = {**BITS, "F64": 64, "F8_E5M2": 8}
"""Bits of a value."""


def write_safetensors(path, tensors):
    """`tensors`: name to (dtype, shape); all zeros, which the disk does not hold."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * WIDTHS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    _header(path, json.dumps(header).encode(), at)


def _header(path, raw, data_bytes=0):
    """A header as it is, and zeros behind it that the disk does not hold."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + data_bytes)


def _table(path, names, shape=(1,), dtype="F32", metadata=None, size=4):
    """The same small tensor under many names."""
    shape, parts = json.dumps(list(shape)), [f'"__metadata__":{json.dumps(metadata)}'] if metadata else []
    for n, name in enumerate(names):
        parts.append(f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{n * size},{n * size + size}]}}')
    _header(path, ("{" + ",".join(parts) + "}").encode(), size * len(names))


def _many(count, pattern, **more):
    return lambda path: _table(path, [pattern.format(n) for n in range(count)], **more)


def _one(text, data_bytes=4):
    return lambda path: _header(path, text().encode(), data_bytes)


def _pair(out, inner, rank, dtype="BF16", module="blocks.0.proj", more=None):
    """One LoRA, whose numbers are all zero."""
    tensors = {
        f"{module}.lora_B.weight": (dtype, (out, rank)),
        f"{module}.lora_A.weight": (dtype, (rank, inner)),
        **(more or {}),
    }
    return lambda path: write_safetensors(path, tensors)


def _settings(entries):
    """LoRAs with 1000 modules and a configuration."""
    names = [f"blocks.{n}.proj.lora_{side}.weight" for n in range(1000) for side in "AB"]
    return lambda path: _table(path, names, (1, 1), metadata={"lora_adapter_metadata": entries()})


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
ENDS = (
    "lora_up.weight", "alpha", "weight", "bias", "norm.weight", "diff", "diff_b", "hada_w1_a", "oft_blocks", "oft_blocks.0", "on_input", "lora_A.style.weight",
    "lora_magnitude_vector", "x", "modules_to_save.default.weight", "base_layer.bias", "hira_A", "to_q_lora.up.weight", "weight.absmax",
)  # fmt: skip
BOMBS = {
    "900,000 keys": _many(900_000, "a{}.alpha"),
    "900,000 keys without a module": _many(900_000, "{}"),
    "a name of 90 MB": _one(lambda: f'{{"{"a" * 90_000_000}.alpha":{ENTRY}}}'),
    "a name of 90 MB of dots": _one(lambda: f'{{"{"." * 90_000_000}alpha":{ENTRY}}}'),
    "40 names of 95,000": _many(40, "{:095000d}.lora_up.weight"),
    "3.9 million underscores": _one(lambda: f'{{"lora_unet_{"_" * 3_900_000}.alpha":{ENTRY}}}'),
    "a name of 3.9 million parts": _one(lambda: f'{{"{"a." * 1_900_000}lora_up.weight":{ENTRY}}}'),
    "a prefix 300,000 times": _one(lambda: f'{{"{"lora_unet_" * 300_000}x.lora_up.weight":{ENTRY}}}'),
    "metadata of 90 MB": _one(lambda: f'{{"__metadata__":{{"a":"{"b" * 90_000_000}"}},"x.alpha":{ENTRY}}}'),
    "settings of 90 MB": _one(lambda: f'{{"__metadata__":{{"lora_adapter_metadata":"{"b" * 90_000_000}"}},"x.alpha":{ENTRY}}}'),
    "kohya's text of 90 MB": _one(lambda: f'{{"__metadata__":{{"ss_network_args":"{"[" * 90_000_000}","ss_network_dim":"{"9" * 5_000_000}"}},"x.alpha":{ENTRY}}}'),
    "900,000 metadata entries": _one(lambda: '{"__metadata__":{' + ",".join(f'"k{n}":"v"' for n in range(900_000)) + f'}},"x.alpha":{ENTRY}}}'),
    "90 MB of blanks": _one(lambda: "{" + " " * 90_000_000 + f'"x.alpha":{ENTRY}}}'),
    "90 MB of brackets": _one(lambda: "[" * 90_000_000),
    "a shape of 40 million sizes": _one(lambda: f'{{"x.alpha":{{"dtype":"F32","shape":[{"1," * 40_000_000}1],"data_offsets":[0,4]}}}}'),
    "an offset of 90 million digits": _one(lambda: f'{{"x.alpha":{{"dtype":"F32","shape":[1],"data_offsets":[0,{"4" * 90_000_000}]}}}}'),
    "a dtype of 90 MB": _one(lambda: f'{{"x.alpha":{{"dtype":"{"F" * 90_000_000}","shape":[1],"data_offsets":[0,4]}}}}'),
    "90 MB of escapes": _one(lambda: f'{{"{chr(92) + "u0041"}{(chr(92) + "u0041") * 15_000_000}.alpha":{ENTRY}}}'),
    "half a header": lambda path: path.write_bytes(struct.pack("<Q", 99_000_000) + b"{" * 1000),
    "a checkpoint of 22 GB": lambda path: write_safetensors(path, stored(flux_shapes(), "BF16")),
    "a LoRA of 60 GB": _pair(32, 32, 500_000_000, "BF16"),
    "a LoRA of 200 GB beside a small one": _pair(32, 32, 4, more={"blocks.1.proj.lora_A.weight": ("BF16", (10**9, 100))}),
    "a rank of a million": _pair(32, 32, 1_000_000),
    "a rank of a million in fp8": _pair(32, 32, 1_000_000, "F8_E4M3"),
    "a rank of 400,000 in fp64": _pair(32, 32, 400_000, "F64"),
    "200 MB for another module": _pair(4_000_000, 32, 4, "F8_E5M2", module="elsewhere"),
    "200 MB that no kind knows": _pair(32, 32, 4, more={"emb_params": ("F32", (50_000_000,))}),
    "a whole weight of 200 MB": _pair(32, 32, 4, more={"blocks.1.norm.weight": ("F32", (50_000_000,))}),
    "LoKr of 4000 times 4000": lambda path: write_safetensors(path, {"blocks.0.proj.lokr_w1": ("F32", (4000, 4000)), "blocks.0.proj.lokr_w2": ("F32", (4000, 4000))}),
    "LoHa of 60,000 rows": lambda path: write_safetensors(path, {f"blocks.0.proj.hada_w{n}_{x}": ("F32", (60_000, 2) if x == "a" else (2, 60_000)) for n in (1, 2) for x in "ab"}),
    "OFT of 5000 blocks": lambda path: write_safetensors(path, {"blocks.0.proj.oft_blocks": ("F32", (5000, 100, 100))}),
    "a packed OFT of 2000": lambda path: write_safetensors(path, {"blocks.0.proj.oft_R.weight": ("F32", (1, 1_999_000))}),
    "20,000 patterns": _settings(lambda: json.dumps({"alpha_pattern": {f"blocks.{n}.(a|b)*x": 4 for n in range(20_000)}})),
    "hostile patterns": _settings(lambda: json.dumps({"rank_pattern": {f"(.*)*(.*a){{1,{n}}}$": 4 for n in range(1, 60)}, "lora_alpha": 4})),
    "a pattern of a million characters": _settings(lambda: json.dumps({"alpha_pattern": {"(a|b)*" * 150_000: 4}})),
    "a module list of 200,000": _settings(lambda: json.dumps({"modules_to_save": ["a"] * 200_000, "feedforward_modules": ["b"] * 100})),
    "settings 200,000 deep": _settings(lambda: '{"a":' * 200_000),
    "33,000 keys": _many(33_000, "m{}.diff"),
    **{f"16,000 keys with {end}": _many(16_000, f"m{{}}.{end}") for end in ENDS},
    "16,000 keys of one module": _many(16_000, "blocks.0.proj.field{}"),
    "16,000 adapter names": _many(16_000, "blocks.0.proj.lora_A.n{}.weight"),
    "16,000 LoRAs on one model": lambda path: _table(path, [f"blocks.{n}.proj.lora_{side}.weight" for n in range(8_000) for side in "AB"], (1, 1)),
    "16,000 parts of one layer": _many(16_000, "blocks.0.qkv.oft_blocks.{}", shape=(1, 1, 1)),
    "16,000 spellings": lambda path: _table(path, [f"{prefix}blocks{dot}{n}{dot}proj.alpha" for n in range(5_300) for prefix, dot in (("", "."), ("lora_unet_", "_"), ("module.", "."))]),
}  # fmt: skip
"""A function that writes the file, by what is wrong with it."""
ACTIONS = ("apply", "inspect", "plan", "forge")


def try_file(path, action, header_bytes, tensor_bytes, checkpoint):
    """Reads a file in a child; `{"grown": bytes, "seconds": CPU, "said": text, "fault": text or None}`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        # CPU time: a machine that is busy with something else must not end it.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 6 * MOST_CPU_SECONDS),) * 2)
        result = {"fault": "ended"}
        try:
            result = _in_child(path, action, checkpoint)
        except BaseException:
            result = {"fault": traceback.format_exc()[-1500:]}
        finally:
            with contextlib.suppress(OSError):
                os.write(writer, json.dumps(result).encode()[:60_000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    result = json.loads(text or b'{"fault": "the process was ended: no end in sight, or no memory"}')
    allowed = tensor_bytes + 8 * header_bytes + checks.MORE_BYTES
    if not result["fault"] and result["grown"] > allowed:
        result["fault"] = f"{result['grown'] / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB"
    seconds = 0 if result["fault"] else result["seconds"]
    if seconds > MOST_CPU_SECONDS and seconds > MOST_CPU_SECONDS * times_slower_now():
        result["fault"] = f"{seconds:.1f} s of CPU"
    return result


def _in_child(path, action, checkpoint):
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).malloc_trim(0)
    before, start = checks.reset_peak(), time.process_time()
    said, fault = _act(path, action, checkpoint)
    return {
        "grown": checks.peak_bytes() - before,
        "seconds": time.process_time() - start,
        "said": said[:600],
        "fault": fault,
    }


def _act(path, action, checkpoint):
    """`(text, fault)`."""
    try:
        if action == "apply":
            model = models.Blocks()
            return str(LoraGuard(model).apply([(path, 1.0)])), None
        if action == "forge":
            return _in_forge(path)
    except LoraGuardError as error:
        text = str(error)
        is_right = checks.is_line(text) and path.name in text
        return text, None if is_right else f"not a line with the file's name: {text[:300]}"
    out, err = io.StringIO(), io.StringIO()
    words = {"inspect": ["inspect", str(path)], "plan": ["plan", str(checkpoint), str(path), *checks.SIZES]}[action]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    text = out.getvalue() + err.getvalue()
    wrong = code not in (0, 1) or path.name not in text or not all(line.isprintable() for line in text.split("\n"))
    return text, f"{code}: {text[:300]}" if wrong else None


def _in_forge(path):
    from contract.lora_files import own_reader

    from lib_lora_guard.hosts.webui.lora_files import LoraFiles

    def handed(*args, **kwargs):
        raise checks.HandedError

    class Patcher:
        def __init__(self):
            self.model = models.Blocks()
            self.lora_patches = {}

        def clone(self):
            return self

        def add_patches(self, *, patches, **more):
            self.lora_patches = patches

    reader, patcher = LoraFiles(), Patcher()
    reader.load_for_models(handed, patcher, None, reader.load_state(own_reader(handed), str(path)), 1.0, 1.0, str(path))
    return "; ".join(reader.left_out.values()) or f"{len(patcher.lora_patches)} weights", None


def run(folder, only="", actions=ACTIONS, say=print):
    """Tries every bomb; returns `{(name, action): result}` with sizes."""
    torch.set_num_threads(1)
    checkpoint = checks.write_checkpoint(folder / "model.safetensors", "blocks")
    sound, found = files.good_file(folder / "sound.safetensors", "blocks"), {}
    with checks.quiet():
        for action in actions:
            _act(sound, action, checkpoint)
        for name, write in BOMBS.items():
            if only not in name:
                continue
            path = folder / "bomb.safetensors"
            write(path)
            with path.open("rb") as file:
                header = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            size = path.stat().st_size - header
            for action in actions:
                # No process may read a file that is larger than the RAM: nothing of it counts as allowed.
                allowed = size if size < 1e9 else 0
                result = found[name, action] = {
                    **try_file(path, action, header, allowed, checkpoint),
                    "header": header,
                    "size": size,
                }
                numbers = (
                    f"{result.get('grown', 0) / 1e6:7.0f} MB {result.get('seconds', 0):6.2f} s"
                    if "grown" in result
                    else ""
                )
                say(
                    f"{name:38} {action:8} header {header / 1e6:5.1f} MB {numbers}  {'FAULT ' + result['fault'] if result['fault'] else result['said'][:90]!r}"
                )
            path.unlink()
    return found
