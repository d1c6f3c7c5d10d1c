"""A sound file of a trainer, damaged: in its bytes, in the words of its header, or with a header out of a grammar.

`container` builds a file that is wrong in one known way. Here a whole file is taken and changed without a look at what it means, as a
bad disk, an editor or a broken converter does; then, often, length and offsets are put right again, so that what is read goes further.
"""

import json
import random
import re
import struct

from . import files

SOUND = 60
"""Sound files that the damaged ones are made of; each run makes them anew from its seed."""
LARGEST_BYTES = 4 << 20

WORDS = (
    "lora_up.weight", "lora_down.weight", "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora.up.weight", "alpha", "dora_scale",
    "lora_magnitude_vector", "hada_w1_a", "hada_t1", "lokr_w1", "lokr_w2_b", "lokr_t2", "oft_blocks", "oft_R.weight", "oft_diag", "rescale", "a1.weight", "b2.weight",
    "diff", "diff_b", "w_norm", "set_weight", "weight", "on_input", "ia3_l", "lora_mid.weight", "scalar", "bias", "lora_embedding_A", "scale_weight", "reshape_weight",
    "dtype", "shape", "data_offsets", "__metadata__", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "lora_adapter_metadata", "format",
    "lora_unet_", "lora_te1_", "lora_te2_", "diffusion_model.", "transformer.", "base_model.model.", "text_encoder.", "_orig_mod.", "lycoris_", "oft_unet_",
    "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "peft_type", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64", "I64", "BOOL", "F4", "U8", "C64",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "2", "4", "7", "8", "32", "255", "65536", "2147483647", "2147483648", "4294967296", "9007199254740993", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "1e3", "1.5", "-0.0", "1E400", "1e-400", "NaN", "Infinity", "-Infinity", "007", "0x10", "+1", "1_0", "9" * 4301, "null",
    "true", '"4"', "[]", "{}", "[4]",
)  # fmt: skip
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+\w.]+|[\[\]{}:,]|\s+', re.DOTALL)


def sound_files(seed, folder):
    """Whole files of every spelling, kind and dtype, each with the model that it is for."""
    rng, found = random.Random(f"sound {seed}"), []
    folder.mkdir()
    while len(found) < SOUND:
        file = files.make_file(folder, rng)
        if file.must_apply and file.tensor_bytes < LARGEST_BYTES:
            found.append((file.path.read_bytes(), file.model, file.storage))
        for path in folder.iterdir():
            path.unlink()
    return found


class Maker:
    """Makes the files of a run: `maker(folder, rng)`."""

    def __init__(self, seed, folder):
        self.sound = sound_files(seed, folder)

    def __call__(self, folder, rng):
        raw, model, storage = rng.choice(self.sound)
        file = files.FuzzFile(folder / "x.safetensors", model, storage)
        kind = rng.choice(("bytes", "bytes", "words", "words", "words", "entries", "entries", "grammar", "splice"))
        made = {
            "bytes": lambda: in_bytes(raw, rng),
            "words": lambda: in_words(raw, rng),
            "entries": lambda: in_entries(raw, rng),
            "grammar": lambda: of_grammar(raw, rng),
            "splice": lambda: spliced(raw, rng.choice(self.sound)[0], rng),
        }[kind]()
        file.facts[f"damage: {kind}"] += 1
        if rng.random() < 0.1:
            made = in_bytes(made, rng)
        if rng.random() < 0.5:
            made = refitted(made)
            file.facts["put right"] += 1
        file.path.write_bytes(made)
        length = int.from_bytes(made[:8], "little")
        file.header_bytes, file.tensor_bytes = min(length, len(made)), len(made)
        return file


def parted(raw):
    """`(header as text, values)`, as far as there are any."""
    length = min(int.from_bytes(raw[:8], "little"), len(raw) - 8)
    return raw[8 : 8 + max(0, length)].decode("utf-8", "surrogateescape"), raw[8 + max(0, length) :]


def joined(text, data):
    header = text.encode("utf-8", "surrogateescape") if not isinstance(text, bytes) else text
    return struct.pack("<Q", len(header)) + header + data


def in_bytes(raw, rng):
    """Flips, numbers of 1 to 8 bytes, blocks that are gone, doubled, moved or of zeros; half of it near the beginning."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        end = len(data) if rng.random() < 0.5 else min(len(data), 8 + int.from_bytes(data[:2], "little"))
        at, size = rng.randrange(max(1, end)), rng.choice((1, 1, 2, 4, 8, 64, 1000))
        how = rng.choice(("flip", "number", "gone", "double", "zero", "random", "cut", "move"))
        if how == "flip":
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif how == "number":
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, 1, 127, 128, 255, 256, 65535, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1))
            at = 0 if rng.random() < 0.2 else at
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
        elif how == "gone":
            del data[at : at + size]
        elif how == "double":
            data[at:at] = data[at : at + size]
        elif how == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif how == "random":
            data[at : at + size] = rng.randbytes(size)
        elif how == "cut":
            del data[at:]
        else:
            block = data[at : at + size]
            del data[at : at + size]
            to = rng.randrange(len(data) + 1)
            data[to:to] = block
    return bytes(data)


def in_words(raw, rng):
    """The header's text as words: some are exchanged, gone, doubled, or another of the format's own."""
    text, data = parted(raw)
    words = TOKEN.findall(text)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not words:
            break
        at, how = rng.randrange(len(words)), rng.choice(("word", "word", "number", "swap", "gone", "double", "glue"))
        word = words[at]
        if how == "word" and word.startswith('"'):
            words[at] = json.dumps(_renamed(word.strip('"'), rng))
        elif how == "number" and re.fullmatch(r"[\d.]+", word):
            words[at] = rng.choice(NUMBERS)
        elif how == "swap":
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        elif how == "gone":
            del words[at : at + rng.choice((1, 1, 2, 6))]
        elif how == "double":
            words[at:at] = words[at : at + rng.choice((1, 2, 8, 20))]
        elif how == "glue":
            words.insert(
                at,
                rng.choice(
                    (
                        " ",
                        "\n" * 50,
                        "\u0000",
                        "\ufeff",
                        "\u202e",
                        "//x",
                        "{",
                        "}",
                        "[",
                        "]",
                        ",",
                        ":",
                        '"',
                        "\\",
                        "\x1b[2J",
                        "é",
                    )
                ),
            )
    return joined("".join(words), data)


def _renamed(word, rng):
    """A name with a part of another one."""
    part = rng.choice(WORDS)
    module, dot, end = word.rpartition(".")
    return rng.choice(
        (
            part, f"{module}.{part}", f"{part}{word}", f"{word}.{part}", module, end, word.replace(".", "_"), word.replace("_", "."), word.upper(), word[::-1], word * 2,
            f"{word}\u0000", f"{word}\ud800", f"{module}{dot}{dot}{end}", word.replace("0", "00"), word.replace("weight", "default.weight"), f" {word} ", "x" * 300 + word,
        )
    )  # fmt: skip


def in_entries(raw, rng):
    """The header as JSON: entries renamed, their facts exchanged, their numbers others; offsets often made to fit again."""
    text, data = parted(raw)
    try:
        pairs = list(json.loads(text).items())
    except ValueError:
        return in_bytes(raw, rng)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        if not pairs:
            break
        at, how = (
            rng.randrange(len(pairs)),
            rng.choice(("rename", "rename", "drop", "copy", "fact", "exchange", "shape", "settings", "order")),
        )
        name, entry = pairs[at]
        if how == "rename":
            pairs[at] = (_renamed(name, rng), entry)
        elif how == "drop":
            del pairs[at]
        elif how == "copy":
            pairs.append((rng.choice((name, _renamed(name, rng))), json.loads(json.dumps(entry))))
        elif how == "fact" and isinstance(entry, dict) and entry:
            key = rng.choice(list(entry))
            pairs[at] = (
                name,
                {**entry, key: rng.choice((None, True, 0, -1, "", [], {}, [0, 4], "F32", 1e300, rng.choice(WORDS)))},
            )
        elif how == "exchange":
            other = rng.randrange(len(pairs))
            pairs[at], pairs[other] = (name, pairs[other][1]), (pairs[other][0], entry)
        elif how == "shape" and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            shape = list(entry["shape"])
            rng.shuffle(shape)
            pairs[at] = (
                name,
                {
                    **entry,
                    "shape": rng.choice((shape, shape[1:], [*shape, 1], [1, *shape], [n * 2 for n in shape], [])),
                },
            )
        elif how == "settings":
            pairs.insert(
                0,
                (
                    "__metadata__",
                    {
                        rng.choice(WORDS): _value(rng, 3, as_text=rng.random() < 0.9)
                        for _ in range(rng.choice((1, 2, 5)))
                    },
                ),
            )
        elif how == "order":
            rng.shuffle(pairs)
    body = ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in pairs)
    return joined("{" + body + "}", data)


def of_grammar(raw, rng):
    """A header that is JSON, often of the format's form, of words that the product knows."""
    _, data = parted(raw)
    if rng.random() < 0.2:
        return joined(json.dumps(_value(rng, 5)), data)
    pairs, at = [], 0
    modules = [
        rng.choice(("blocks.0.proj", "blocks.1.qkv", "lora_unet_blocks_0_proj", "x", ""))
        for _ in range(rng.choice((1, 1, 3)))
    ]
    for _ in range(rng.choice((0, 1, 2, 4, 12))):
        shape = [rng.choice((0, 1, 2, 4, 4, 8, 32, 32, 96)) for _ in range(rng.choice((0, 1, 2, 2, 2, 4)))]
        size = 4
        for n in shape:
            size *= n
        start = at if rng.random() < 0.9 else rng.randrange(at + 1)
        form = rng.choice(("F32", "F32", "F32", "BF16", "I32", rng.choice(WORDS)))
        size = size // 2 if form == "BF16" else size
        name = f"{rng.choice(modules)}.{rng.choice(WORDS)}"
        pairs.append((name, {"dtype": form, "shape": shape, "data_offsets": [start, start + size]}))
        at = start + size
    data = (data * (at // max(1, len(data)) + 1))[:at] if at < LARGEST_BYTES else data
    body = ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in pairs)
    return joined("{" + body + "}", data)


def _value(rng, depth, as_text=False):
    """A random JSON value; `as_text`: what a metadata entry is, often JSON in a text."""
    if as_text:
        return rng.choice((json.dumps(_value(rng, 3)), rng.choice(WORDS), rng.choice(NUMBERS), ""))
    kind = rng.randrange(7 if depth else 5)
    if kind < 5:
        return (None, rng.random() < 0.5, rng.randrange(-5, 2**40), rng.choice(WORDS), rng.uniform(-1e10, 1e10))[kind]
    several = range(rng.choice((0, 1, 2, 5)))
    if kind == 5:
        return [_value(rng, depth - 1) for _ in several]
    return {rng.choice(WORDS): _value(rng, depth - 1) for _ in several}


def spliced(one, other, rng):
    """The beginning of a file and the end of another, or the header of one before the values of the other."""
    if rng.random() < 0.5:
        return joined(parted(one)[0], parted(other)[1])
    return one[: rng.randrange(len(one))] + other[rng.randrange(len(other)) :]


def refitted(raw):
    """The same file with the length before its header, and the offsets in it, as its shapes say: a damage that a reader's first look lets
    through."""
    text, data = parted(raw)
    end = text.rfind("}")
    header = text[: end + 1] if end >= 0 else text
    try:
        pairs = json.loads(header, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return joined(header, data)
    widths, at, made = (
        {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "BOOL": 1},
        0,
        [],
    )
    for pair in pairs if isinstance(pairs, list) else []:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            return joined(header, data)
        name, entry = pair[0], _plain(pair[1])
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 20 for n in shape):
            size = widths.get(str(entry.get("dtype")), 4)
            for n in shape:
                size *= n
            if at + size < LARGEST_BYTES:
                entry["data_offsets"] = [at, at + size]
                at += size
        made.append(f"{json.dumps(name)}:{json.dumps(entry)}")
    data = (data * (at // max(1, len(data)) + 1))[:at] if data else bytes(at)
    return joined("{" + ",".join(made) + "}", data)


def _plain(value):
    """Pairs as a dictionary, all the way down."""
    if isinstance(value, list):
        if value and all(isinstance(one, tuple) for one in value):
            return {name: _plain(one) for name, one in value}
        return [_plain(one) for one in value]
    return value
