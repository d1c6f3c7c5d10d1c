"""The effect of stacked host patches on a weight, written for clarity: the reference that the product is held against.

Every formula is spelled with explicit loops or full Kronecker / einsum products in the dtype of the weight given
(tests use float64). It shares no code with the product, and the double of Forge uses it as its own merge.
Sources: the papers named in lib_lora_guard/adapters; patch format and order of operations as in `forge-facts`.
"""

import torch


def merge_reference(patches, weight, calculators=None):
    """`patches`: `[strength, value, strength_model, offset, function]` entries; returns a new tensor."""
    weight = weight.clone()
    for strength, value, strength_model, offset, function in patches:
        part = weight if offset is None else weight.narrow(*offset)
        part = part.clone() * strength_model
        part = _one(part, value, strength, function or (lambda d: d), calculators or {})
        if offset is None:
            weight = part
        else:
            weight.narrow(*offset).copy_(part)
    return weight


def _one(weight, value, strength, function, calculators):
    if isinstance(value, list):
        return weight + strength * merge_reference(value[1:], value[0].to(weight), calculators)
    if len(value) == 1:
        return weight + strength * value[0].to(weight)
    kind, content = value
    if kind == "set":
        return content[0].to(weight)
    if kind == "diff":
        return weight + strength * content[0].to(weight)
    if kind in calculators:
        return calculators[kind](weight, strength, content)
    delta, magnitude = {"lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora}[kind](weight, *content)
    delta = delta.reshape(weight.shape)
    if magnitude is None:
        return weight + function(strength * delta)
    patched = weight + function(delta)
    flat = patched.flatten(1) if weight.dim() == 2 else patched
    if magnitude.shape[0] == weight.shape[0]:
        norm = torch.stack([row.norm() for row in weight])
        scale = (magnitude.to(weight).flatten() / (norm + torch.finfo(weight.dtype).eps)).reshape(
            -1, *[1] * (weight.dim() - 1)
        )
    else:
        norm = torch.stack([flat[:, column].norm() for column in range(weight.shape[1])])
        scale = (magnitude.to(weight).flatten() / (norm + torch.finfo(weight.dtype).eps)).reshape(
            1, -1, *[1] * (weight.dim() - 2)
        )
    return weight + strength * (patched * scale - weight)


def _lora(weight, up, down, alpha, mid, magnitude):
    up, down = up.to(weight).flatten(1), down.to(weight)
    if mid is not None:
        mid = mid.to(weight)
        product = torch.zeros(up.shape[0], down.shape[1], *mid.shape[2:], dtype=weight.dtype)
        for out in range(up.shape[1]):
            for inner in range(down.shape[0]):
                outer = torch.einsum("o,i->oi", up[:, out], down[inner].flatten())
                product += outer[..., None, None] * mid[out, inner]
    else:
        product = up @ down.flatten(1)
    return product * (1.0 if alpha is None else alpha / down.shape[0]), magnitude


def _loha(weight, w1a, w1b, alpha, w2a, w2b, t1, t2, magnitude):
    def side(a, b, core):
        if core is None:
            return a.to(weight) @ b.to(weight)
        return torch.einsum("rskl,ro,si->oikl", core.to(weight), a.to(weight), b.to(weight)).flatten(1)

    scale = 1.0 if alpha is None else alpha / w1b.shape[0]
    return side(w1a, w1b, t1) * side(w2a, w2b, t2) * scale, magnitude


def _lokr(weight, w1, w2, alpha, w1a, w1b, w2a, w2b, t2, magnitude):
    rank = None
    if w1 is None:
        rank, w1 = w1b.shape[0], w1a.to(weight) @ w1b.to(weight)
    if w2 is None:
        rank = w2b.shape[0]
        if t2 is None:
            w2 = w2a.to(weight) @ w2b.to(weight)
        else:
            w2 = torch.einsum("rskl,ro,si->oikl", t2.to(weight), w2a.to(weight), w2b.to(weight))
    w1, w2 = w1.to(weight), w2.to(weight)
    rows = []
    for i in range(w1.shape[0]):
        rows.append(torch.cat([w1[i, j] * w2 for j in range(w1.shape[1])], 1))
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return torch.cat(rows) * scale, magnitude


def _glora(weight, a1, a2, b1, b2, alpha, magnitude):
    """New layout: `a1` (in, r), `a2` (r, in), `b1` (out, r), `b2` (r, in * kernel). Old: `a1` (r, in), `a2` (in, r),
    `b1` (r, in), `b2` (out, r). A square weight of both readings is old."""
    a1, a2, b1, b2 = (t.to(weight).flatten(1) for t in (a1, a2, b1, b2))
    flat = weight.flatten(1)
    if b2.shape[0] == weight.shape[0] and a2.shape[0] == a1.shape[1] == flat.shape[1]:
        scale = 1.0 if alpha is None else alpha / a1.shape[0]
        return (b2 @ b1 + flat @ a2 @ a1) * scale, magnitude
    scale = 1.0 if alpha is None else alpha / a2.shape[0]
    channels = weight.movedim(1, -1) @ (a1 @ a2)
    return (b1 @ b2 + channels.movedim(-1, 1).flatten(1)) * scale, magnitude
