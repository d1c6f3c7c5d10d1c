"""Checkpoints of the models of 2025 and 2026 in their authors' own layouts, for `original_layouts.Checkpoint`.

Names as Forge Neo's modules have them (backend/nn/lumina.py, krea.py, anima.py, wan.py, flux.py); sizes as small as told.
"""


def next_dit(hidden, key_value, layers, refiners, *, z_image):
    """Lumina 2 (`key_value` rows of keys, as many of values) or Z-Image (modulation of 256, biases as there)."""
    time, mlp = (256, 3 * hidden) if z_image else (1024, 4 * hidden)
    yield "x_embedder", hidden, 64, "weight bias"
    yield "t_embedder.mlp.0", 1024, 256, "weight bias"
    yield "t_embedder.mlp.2", time, 1024, "weight bias"
    yield "cap_embedder.0", 10, 0, "weight"
    yield "cap_embedder.1", hidden, 10, "weight bias"
    for stack, count in (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", layers)):
        for n in range(count):
            block = f"{stack}.{n}."
            yield block + "attention.qkv", hidden + 2 * key_value, hidden, "weight"
            yield block + "attention.out", hidden, hidden, "weight"
            yield from ((f"{block}attention.{x}_norm", 4, 0, "weight") for x in "qk")
            for name, rows, columns in (("w1", mlp, hidden), ("w2", hidden, mlp), ("w3", mlp, hidden)):
                yield f"{block}feed_forward.{name}", rows, columns, "weight"
            for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                yield block + name, hidden, 0, "weight"
            if stack != "context_refiner":
                yield f"{block}adaLN_modulation.{0 if z_image else 1}", 4 * hidden, time, "weight bias"
    yield "final_layer.linear", 64, hidden, "weight bias"
    yield "final_layer.adaLN_modulation.1", hidden, time, "weight bias"


def krea2(hidden, key_value, text, blocks):
    for name, rows, columns in (
        ("first", hidden, 64), ("tmlp.0", hidden, 8), ("tmlp.2", hidden, hidden), ("tproj.1", 6 * hidden, hidden),
        ("txtmlp.1", hidden, text), ("txtmlp.3", hidden, hidden), ("last.linear", 64, hidden),
    ):  # fmt: skip
        yield name, rows, columns, "weight bias"
    yield "txtmlp.0", text, 0, "scale"
    yield "txtfusion.projector", 1, 3, "weight"
    yield "last.norm", hidden, 0, "scale"
    yield "last.modulation", 2 * hidden, 0, "lin"
    stacks = (
        ("blocks", blocks, hidden, key_value),
        *((f"txtfusion.{x}_blocks", 2, text, text) for x in ("layerwise", "refiner")),
    )
    for stack, count, width, narrow in stacks:
        for n in range(count):
            block = f"{stack}.{n}."
            for name, rows in (("wq", width), ("wk", narrow), ("wv", narrow), ("gate", width), ("wo", width)):
                yield f"{block}attn.{name}", rows, width, "weight"
            yield from ((f"{block}attn.qknorm.{x}norm", 4, 0, "scale") for x in "qk")
            for name, rows, columns in (("gate", 24, width), ("up", 24, width), ("down", width, 24)):
                yield f"{block}mlp.{name}", rows, columns, "weight"
            yield from ((block + name, width, 0, "scale") for name in ("prenorm", "postnorm"))
            if stack == "blocks":
                yield block + "mod", 6 * width, 0, "lin"


def cosmos(hidden, text, blocks):
    """Cosmos-Predict2, and Anima without its adapter."""
    yield "x_embedder.proj.1", hidden, 68, "weight"
    yield "t_embedder.1.linear_1", hidden, hidden, "weight"
    yield "t_embedder.1.linear_2", 3 * hidden, hidden, "weight"
    yield "t_embedding_norm", hidden, 0, "weight"
    for n in range(blocks):
        block = f"blocks.{n}."
        for attention, source in (("self_attn", hidden), ("cross_attn", text)):
            yield f"{block}{attention}.q_proj", hidden, hidden, "weight"
            yield f"{block}{attention}.k_proj", hidden, source, "weight"
            yield f"{block}{attention}.v_proj", hidden, source, "weight"
            yield f"{block}{attention}.output_proj", hidden, hidden, "weight"
            yield from ((f"{block}{attention}.{x}_norm", 4, 0, "weight") for x in "qk")
        yield block + "mlp.layer1", 4 * hidden, hidden, "weight"
        yield block + "mlp.layer2", hidden, 4 * hidden, "weight"
        for part in ("self_attn", "cross_attn", "mlp"):
            yield f"{block}adaln_modulation_{part}.1", 4, hidden, "weight"
            yield f"{block}adaln_modulation_{part}.2", 3 * hidden, 4, "weight"
    yield "final_layer.linear", 64, hidden, "weight"
    yield "final_layer.adaln_modulation.1", 4, hidden, "weight"
    yield "final_layer.adaln_modulation.2", 2 * hidden, 4, "weight"


def wan(hidden, text, image, blocks):
    yield "patch_embedding", hidden, 16, "weight bias"
    for name, columns in (("time_embedding", 8), ("text_embedding", text)):
        yield name + ".0", hidden, columns, "weight bias"
        yield name + ".2", hidden, hidden, "weight bias"
    yield "time_projection.1", 6 * hidden, hidden, "weight bias"
    yield "img_emb.proj.0", image, 0, "weight bias"
    yield "img_emb.proj.1", image, image, "weight bias"
    yield "img_emb.proj.3", hidden, image, "weight bias"
    yield "img_emb.proj.4", hidden, 0, "weight bias"
    yield "head.head", 64, hidden, "weight bias"
    yield "head", 2 * hidden, 0, "modulation"
    for n in range(blocks):
        block = f"blocks.{n}."
        for attention, layers in (("self_attn", "q k v o"), ("cross_attn", "q k v o k_img v_img")):
            yield from ((f"{block}{attention}.{x}", hidden, hidden, "weight bias") for x in layers.split())
            yield from ((f"{block}{attention}.norm_{x}", hidden, 0, "weight") for x in "qk")
        yield block + "cross_attn.norm_k_img", hidden, 0, "weight"
        yield block + "norm3", hidden, 0, "weight bias"
        yield block + "ffn.0", 4 * hidden, hidden, "weight bias"
        yield block + "ffn.2", hidden, 4 * hidden, "weight bias"
        yield f"blocks.{n}", 6 * hidden, 0, "modulation"


def flux2(hidden, double, single):
    yield "img_in", hidden, 64, "weight"
    yield "txt_in", hidden, 10, "weight"
    for name in ("time_in", "guidance_in"):
        yield name + ".in_layer", hidden, 8, "weight"
        yield name + ".out_layer", hidden, hidden, "weight"
    for name, times in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        yield name + ".lin", times * hidden, hidden, "weight"
    for n in range(double):
        for x in ("img", "txt"):
            block = f"double_blocks.{n}.{x}_"
            yield block + "attn.qkv", 3 * hidden, hidden, "weight"
            yield block + "attn.proj", hidden, hidden, "weight"
            yield from ((f"{block}attn.norm.{y}_norm", 8, 0, "scale") for y in ("query", "key"))
            yield block + "mlp.0", 6 * hidden, hidden, "weight"
            yield block + "mlp.2", hidden, 3 * hidden, "weight"
    for n in range(single):
        block = f"single_blocks.{n}."
        yield block + "linear1", 9 * hidden, hidden, "weight"
        yield block + "linear2", hidden, 4 * hidden, "weight"
        yield from ((f"{block}norm.{y}_norm", 8, 0, "scale") for y in ("query", "key"))
    yield "final_layer.linear", 64, hidden, "weight"
    yield "final_layer.adaLN_modulation.1", 2 * hidden, hidden, "weight"
