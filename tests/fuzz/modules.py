"""The tensors of one module in every kind of adapter, and, where its formula is short, the weight that it should give."""

import math
import random
from dataclasses import dataclass, field

import torch

Tensors = dict[str, torch.Tensor]


@dataclass
class Made:
    """Tensors by the end of their names. `wanted(weight, strength, tensors)` gives the patched weight in float64 from what the
    file holds of them; None where other tests have the formula. `parameter` is what it changes."""

    tensors: Tensors
    wanted: object = None
    parameter: str = "weight"
    singles: tuple = ()
    """Ends of names whose tensor is a single number: those keep a dtype of their own."""
    fixed: tuple = ()
    """Ends of names whose tensor is written as it is."""
    more: dict = field(default_factory=dict)
    """Settings that belong to it."""


class Values:
    """Random tensors of one file."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(62))

    def __call__(self, *shape, scale=0.1):
        return torch.randn(shape, generator=self.generator) * scale


def rank_of(rng):
    return rng.choice((1, 2, 3, 4, 4, 4, 8, 16))


def with_alpha(rng, made, spelled="alpha"):
    """Most trainers write alpha; the formulas read it back from the file."""
    if rng.random() < 0.7:
        made.tensors[spelled] = torch.tensor(rng.choice((1.0, 2.0, 4.0, 0.5)))
        if rng.random() < 0.2:
            made.tensors[spelled] = made.tensors[spelled].reshape(1)
        made.singles = (*made.singles, spelled)
    return made


def scale_from(tensors, rank):
    return float(tensors["alpha"].flatten()[0]) / rank if "alpha" in tensors else 1.0


def product(up, down):
    return up.flatten(1) @ down.flatten(1)


LORA_SPELLINGS = {
    "kohya": ("lora_up.weight", "lora_down.weight"),
    "peft": ("lora_B.weight", "lora_A.weight"),
    "peft_named": ("lora_B.style.weight", "lora_A.style.weight"),
    "peft_bare": ("lora_B", "lora_A"),
    "diffusers": ("lora.up.weight", "lora.down.weight"),
    "processor": ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
}


def lora(values, rng, shape, spelling=None, magnitude=None):
    up_name, down_name = LORA_SPELLINGS[spelling or rng.choice(list(LORA_SPELLINGS))]
    rank = rank_of(rng)
    up, down = values(shape[0], rank, *[1] * (len(shape) - 2)), values(rank, *shape[1:])
    made = Made({up_name: up, down_name: down})
    if magnitude is not None:
        made.tensors[magnitude] = (
            values(shape[0], 1).abs() + 0.5 if magnitude == "dora_scale" else values(shape[0]).abs() + 0.5
        )

    def wanted(weight, strength, tensors):
        delta = product(tensors[up_name], tensors[down_name]).reshape(weight.shape) * scale_from(tensors, rank)
        if magnitude is None:
            return weight + strength * delta
        rows = (-1, *[1] * (weight.dim() - 1))
        norm = weight.flatten(1).norm(dim=1).reshape(rows)
        dora = (weight + delta) * tensors[magnitude].reshape(rows) / norm
        return weight + strength * (dora - weight)

    square = magnitude == "dora_scale" and (len(shape) > 2 or shape[0] == shape[1])
    made.wanted = None if square else wanted
    return with_alpha(rng, made)


def lora_mid(values, rng, shape):
    rank = rank_of(rng)
    made = Made(
        {
            "lora_up.weight": values(shape[0], rank, *[1] * (len(shape) - 2)),
            "lora_down.weight": values(rank, shape[1], *[1] * (len(shape) - 2)),
            "lora_mid.weight": values(rank, rank, *(shape[2:] or (1, 1))),
        }
    )

    def wanted(weight, strength, tensors):
        up, down, mid = (tensors[f"lora_{part}.weight"] for part in ("up", "down", "mid"))
        delta = torch.einsum("or,rs...,si->oi...", up.flatten(1), mid, down.flatten(1))
        return weight + strength * scale_from(tensors, rank) * delta.reshape(weight.shape)

    made.wanted = wanted if len(shape) > 2 else None
    return with_alpha(rng, made)


def loha(values, rng, shape):
    rank, inner = rank_of(rng), math.prod(shape[1:])
    names = [f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"]
    made = Made({name: values(*((shape[0], rank) if name[-1] == "a" else (rank, inner))) for name in names})

    def wanted(weight, strength, tensors):
        one, two = (tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"] for n in (1, 2))
        return weight + strength * scale_from(tensors, rank) * (one * two).reshape(weight.shape)

    made.wanted = wanted
    return with_alpha(rng, made)


def loha_tucker(values, rng, shape):
    rank, kernel = rank_of(rng), shape[2:] or (1, 1)
    sizes = {"t1": (rank, rank, *kernel), "t2": (rank, rank, *kernel)}
    sizes |= {f"w{n}_a": (rank, shape[0]) for n in (1, 2)} | {f"w{n}_b": (rank, shape[1]) for n in (1, 2)}
    return with_alpha(rng, Made({f"hada_{name}": values(*size) for name, size in sizes.items()}))


def lokr(values, rng, shape):
    out, inner, kernel = shape[0], shape[1], shape[2:]
    first = [rng.choice([n for n in (1, 2, 4) if size % n == 0]) for size in (out, inner)]
    rank = rank_of(rng)
    second = (out // first[0], inner // first[1])
    tensors = {}
    if rng.random() < 0.5:
        tensors["lokr_w1"] = values(*first)
    else:
        tensors |= {"lokr_w1_a": values(first[0], rank), "lokr_w1_b": values(rank, first[1])}
    whole = rng.random() < 0.5
    if whole:
        tensors["lokr_w2"] = values(*second, *kernel)
    elif kernel and rng.random() < 0.5:
        tensors |= {
            "lokr_w2_a": values(rank, second[0]),
            "lokr_w2_b": values(rank, second[1]),
            "lokr_t2": values(rank, rank, *kernel),
        }
    else:
        tensors |= {"lokr_w2_a": values(second[0], rank), "lokr_w2_b": values(rank, second[1] * math.prod(kernel))}
    made = Made(tensors)

    def wanted(weight, strength, found):
        one = found["lokr_w1"] if "lokr_w1" in found else found["lokr_w1_a"] @ found["lokr_w1_b"]
        two = found["lokr_w2"] if whole else found["lokr_w2_a"] @ found["lokr_w2_b"]
        scale = 1.0 if whole and "lokr_w1" in found else scale_from(found, rank)
        two = two.reshape(*second, *kernel)
        delta = torch.kron(one.reshape(*first, *[1] * len(kernel)), two)
        return weight + strength * scale * delta.reshape(weight.shape)

    made.wanted = None if "lokr_t2" in tensors else wanted
    return with_alpha(rng, made)


def glora(values, rng, shape):
    out, inner, rank = shape[0], math.prod(shape[1:]), rank_of(rng)
    sizes = ((rank, inner), (inner, rank), (rank, inner), (out, rank))
    if rng.random() < 0.5:
        sizes = ((inner, rank), (rank, inner), (out, rank), (rank, inner))
    return with_alpha(
        rng, Made({f"{n}.weight": values(*s) for n, s in zip(("a1", "a2", "b1", "b2"), sizes, strict=True)})
    )


def block_of(rng, size):
    return rng.choice([n for n in (2, 4, 8) if size % n == 0] or [size])


def oft(values, rng, shape):
    block = block_of(rng, shape[0])
    made = Made({"oft_blocks": values(shape[0] // block, block, block)})
    if rng.random() < 0.3:
        made.tensors["rescale"] = 1 + values(shape[0], *[1] * (len(shape) - 1))
    return with_alpha(rng, made)


def oft_of_parts(values, rng, shape):
    third = shape[0] // 3
    block = block_of(rng, third)
    return with_alpha(rng, Made({f"oft_blocks.{n}": values(third // block, block, block) for n in range(3)}))


def oft_ready(values, rng, shape):
    block = block_of(rng, shape[0])
    return Made({"oft_diag": torch.linalg.qr(values(shape[0] // block, block, block))[0].contiguous()})


def oft_of_peft(values, rng, shape):
    inner = math.prod(shape[1:])
    block = block_of(rng, inner)
    named = rng.choice(("oft_R.weight", "oft_R.style.weight"))
    made = Made({named: values(inner // block, block * (block - 1) // 2)}, more={"oft_block_size": block})
    if rng.random() < 0.3:
        made.tensors["dora_scale"] = values(shape[0], 1).abs() + 0.5
    if rng.random() < 0.3:
        made.more |= {"coft": True, "eps": rng.choice((6e-5, 1e-3))}
    return made


def _stages(rng, size):
    return rng.choice((1, 2)) if size % 8 == 0 else 1


def boft(values, rng, shape):
    return with_alpha(rng, Made({"oft_blocks": values(_stages(rng, shape[0]), shape[0] // 4, 4, 4)}))


def boft_of_peft(values, rng, shape):
    inner = math.prod(shape[1:])
    named = rng.choice(("boft_R", "boft_R.default"))
    tensors = {named: values(_stages(rng, inner), inner // 4, 4, 4), named.replace("_R", "_s"): 1 + values(shape[0], 1)}
    return Made(tensors, more={"boft_block_size": 4})


def ia3(values, rng, shape):
    on_input = rng.random() < 0.5
    made = Made(
        {"weight": values(shape[1 if on_input else 0]), "on_input": torch.tensor(on_input)}, fixed=("on_input",)
    )

    def wanted(weight, strength, tensors):
        axis = [1] * weight.dim()
        axis[1 if on_input else 0] = -1
        return weight * (1 + strength * tensors["weight"].reshape(axis))

    made.wanted = wanted
    return made


def ia3_of_peft(values, rng, shape):
    side = rng.choice((0, 1))
    axis = [1, 1]
    axis[1 - side] = shape[1 - side]
    return Made(
        {rng.choice(("ia3_l", "ia3_l.style")): 1 + values(*axis)},
        more={"feedforward_modules": rng.choice(([], ["proj"], ".*proj", "[", None, 5))},
    )


def diff(values, rng, shape):
    return Made(
        {rng.choice(("diff", "diff", "w_norm")): values(*shape)}, lambda w, s, t: w + s * next(iter(t.values()))
    )


def set_weight(values, rng, shape):
    return Made({"set_weight": values(*shape)})


def bias(values, rng, shape):
    return Made(
        {rng.choice(("diff_b", "b_norm")): values(shape[0])}, lambda b, s, t: b + s * next(iter(t.values())), "bias"
    )


def bias_of_peft(values, rng, shape):
    made = lora(values, rng, shape, "peft")
    made.tensors["lora_B.bias"], made.wanted = values(shape[0]), None
    return made


def set_bias(values, rng, shape):
    return Made({"base_layer.bias": values(shape[0])}, None, "bias")


def embedding(values, rng, shape):
    rank = rank_of(rng)
    name = rng.choice(("", ".style"))
    return Made({f"lora_embedding_A{name}": values(rank, shape[0]), f"lora_embedding_B{name}": values(shape[1], rank)})


def whole(values, rng, shape):
    tensors = {"weight": values(*shape)} | ({"bias": values(shape[0])} if rng.random() < 0.6 else {})
    return Made(
        tensors,
        more=rng.choice(
            (
                {},
                {"modules_to_save": ["norm", "img_in"]},
                {"bias": "all"},
                {"modules_to_save": rng.choice(("x", 5, [5], [""]))},
            )
        ),
    )


def saved(values, rng, shape):
    return Made({"modules_to_save.default.weight": values(*shape)})


OTHER_KINDS = (
    "hira_A", "hira_B", "vera_lambda_b", "vera_lambda_d", "c3a_kernel.style", "fourierft_spectrum.style", "bone_block", "hra_u",
    "miss_block", "randlora_lambda", "road_theta", "shira_weight", "vblora_logits_A", "ln_tuning_layers.weight", "delora_A",
    "gralora_A", "waveft_spectrum", "trainable_tokens_delta", "internal_xlora_classifier.x", "lora_E", "lora_ranknum", "lora_diag",
    "lambda_layer", "q_layer.weight", "p_layer.weight", "prompt_embeddings", "osf_U", "poly_lora_A", "adaption_prompt", "cpt_x",
    "lora_C.weight", "lora_A_bd.weight", "hada_w3_a", "lokr_w4", "oft_S.weight", "unknown_field", "scale", "lora_gate.weight",
)  # fmt: skip


def other(values, rng, shape):
    """A kind of PEFT or LyCORIS that is only known by name, or a field that no kind has."""
    made = Made({rng.choice(OTHER_KINDS): values(rank_of(rng), shape[-1])})
    if rng.random() < 0.6:
        beside = lora(values, rng, shape)
        made.tensors, made.singles = {**beside.tensors, **made.tensors}, beside.singles
    return made


def lonely(values, rng, shape):
    """Fields without the factors they belong to."""
    name = rng.choice(
        (
            "alpha",
            "dora_scale",
            "magnitude",
            "scalar",
            "rescale",
            "lora_mid.weight",
            "hada_t1",
            "lokr_t2",
            "on_input",
            "lora_up.weight",
            "lora_B.bias",
            "lora_magnitude_vector",
        )
    )
    return Made({name: values(*rng.choice(((), (1,), shape[:1], (*shape[:1], 1))))})


def with_scalar(values, rng, shape):
    made = rng.choice((loha, lokr, lora))(values, rng, shape)
    made.tensors["scalar"], made.wanted = torch.tensor(0.5), None
    made.singles = (*made.singles, "scalar")
    return made


MATRIX = {
    "lora": lora,
    "lora_mid": lora_mid,
    "dora": lambda v, r, s: lora(v, r, s, magnitude=r.choice(("dora_scale", "magnitude", "lora_magnitude_vector"))),
    "loha": loha,
    "loha_tucker": loha_tucker,
    "lokr": lokr,
    "glora": glora,
    "oft": oft,
    "oft_of_parts": oft_of_parts,
    "oft_ready": oft_ready,
    "oft_of_peft": oft_of_peft,
    "boft": boft,
    "boft_of_peft": boft_of_peft,
    "ia3": ia3,
    "ia3_of_peft": ia3_of_peft,
    "lora_bias": bias_of_peft,
    "scalar": with_scalar,
    "embedding": embedding,
    "other": other,
}
"""Kinds for weights of two and more dimensions."""
ANY = {
    "diff": diff,
    "set_weight": set_weight,
    "bias": bias,
    "set_bias": set_bias,
    "whole": whole,
    "saved": saved,
    "lonely": lonely,
}
"""Kinds for parameters of every shape."""
KINDS = {**MATRIX, **ANY}


def make(kind, values, rng, shape):
    """The tensors of a module; a kind of matrices on a parameter that is none takes it for one."""
    if kind in MATRIX and len(shape) < 2:
        shape = (*shape, 4, 4)[:2]
    if kind in ("bias", "set_bias", "whole") and not shape:
        shape = (4,)
    return KINDS[kind](values, rng, shape)
