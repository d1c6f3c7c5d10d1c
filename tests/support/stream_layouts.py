"""Flux.2, Qwen-Image and Hunyuan Video in true size: `(module, rows, columns, tensors)` as in `original_layouts`.

Counted as the constructors of diffusers' transformers (transformer_flux2.py, transformer_qwenimage.py) and of
black-forest-labs' flux2 count them.
"""


def bfl2(hidden, double, single, *, text=7680, guidance=False):
    """Flux.2 in black-forest-labs' names."""
    yield "img_in", hidden, 128, "weight"
    yield "txt_in", hidden, text, "weight"
    for name in ("time_in", "guidance_in") if guidance else ("time_in",):
        yield f"{name}.in_layer", hidden, 256, "weight"
        yield f"{name}.out_layer", hidden, hidden, "weight"
    for x in ("img", "txt"):
        yield f"double_stream_modulation_{x}.lin", 6 * hidden, hidden, "weight"
    yield "single_stream_modulation.lin", 3 * hidden, hidden, "weight"
    for n in range(double):
        for x in ("img", "txt"):
            block = f"double_blocks.{n}.{x}_"
            yield block + "attn.qkv", 3 * hidden, hidden, "weight"
            yield block + "attn.proj", hidden, hidden, "weight"
            yield from ((f"{block}attn.norm.{y}_norm", 128, 0, "scale") for y in ("query", "key"))
            yield block + "mlp.0", 6 * hidden, hidden, "weight"
            yield block + "mlp.2", hidden, 3 * hidden, "weight"
    for n in range(single):
        block = f"single_blocks.{n}."
        yield block + "linear1", 9 * hidden, hidden, "weight"
        yield block + "linear2", hidden, 4 * hidden, "weight"
        yield from ((f"{block}norm.{y}_norm", 128, 0, "scale") for y in ("query", "key"))
    yield "final_layer.adaLN_modulation.1", 2 * hidden, hidden, "weight"
    yield "final_layer.linear", 128, hidden, "weight"


def qwen(hidden, blocks):
    """Qwen-Image, whose only names are those of diffusers."""
    yield "img_in", hidden, 64, "weight bias"
    yield "txt_in", hidden, 3584, "weight bias"
    yield "txt_norm", 3584, 0, "weight"
    for n, columns in ((1, 256), (2, hidden)):
        yield f"time_text_embed.timestep_embedder.linear_{n}", hidden, columns, "weight bias"
    for n in range(blocks):
        block = f"transformer_blocks.{n}."
        for x in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            yield f"{block}attn.{x}", hidden, hidden, "weight bias"
        for x in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{block}attn.{x}", 128, 0, "weight"
        for x in ("img", "txt"):
            yield f"{block}{x}_mod.1", 6 * hidden, hidden, "weight bias"
            yield f"{block}{x}_mlp.net.0.proj", 4 * hidden, hidden, "weight bias"
            yield f"{block}{x}_mlp.net.2", hidden, 4 * hidden, "weight bias"
    yield "norm_out.linear", 2 * hidden, hidden, "weight bias"
    yield "proj_out", 64, hidden, "weight bias"


def hunyuan_video(hidden=3072, double=20, single=40):
    """Hunyuan Video in Tencent's names, its blocks alone."""
    yield "txt_in.individual_token_refiner.blocks.0.norm1", hidden, 0, "weight bias"
    for n in range(double):
        for x in ("img", "txt"):
            yield f"double_blocks.{n}.{x}_mod.linear", 6 * hidden, hidden, "weight bias"
            yield f"double_blocks.{n}.{x}_attn_qkv", 3 * hidden, hidden, "weight bias"
            yield f"double_blocks.{n}.{x}_attn_proj", hidden, hidden, "weight bias"
    for n in range(single):
        yield f"single_blocks.{n}.linear1", 7 * hidden, hidden, "weight bias"
        yield f"single_blocks.{n}.linear2", hidden, 5 * hidden, "weight bias"


def matrices(layers):
    """`{module: (rows, columns)}` of every layer that multiplies."""
    return {module: (rows, columns) for module, rows, columns, _ in layers if columns}


def in_diffusers(module, rows, columns):
    """The modules of diffusers that a matrix of `bfl2` is, with their shapes."""
    if module.startswith("double_blocks."):
        _, n, stream, *rest = module.split(".")
        image, kind = stream.startswith("img"), (stream[4:], *rest)
        block = f"transformer_blocks.{n}."
        if kind == ("attn", "qkv"):
            names = ("to_q", "to_k", "to_v") if image else ("add_q_proj", "add_k_proj", "add_v_proj")
            return {f"{block}attn.{name}": (rows // 3, columns) for name in names}
        names = {
            ("attn", "proj"): "attn.to_out.0" if image else "attn.to_add_out",
            ("mlp", "0"): "ff.linear_in" if image else "ff_context.linear_in",
            ("mlp", "2"): "ff.linear_out" if image else "ff_context.linear_out",
        }
        return {block + names[kind]: (rows, columns)}
    if module.startswith("single_blocks."):
        _, n, layer = module.split(".")
        inner = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}[layer]
        return {f"single_transformer_blocks.{n}.{inner}": (rows, columns)}
    outside = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }
    name = outside.get(module) or module.replace("_modulation_img.lin", "_modulation_img.linear").replace(
        "_modulation_txt.lin", "_modulation_txt.linear"
    ).replace("stream_modulation.lin", "stream_modulation.linear")
    for theirs, ours in (("time_in.", "timestep"), ("guidance_in.", "guidance")):
        for layer, number in (("in_layer", 1), ("out_layer", 2)):
            if module == theirs + layer:
                name = f"time_guidance_embed.{ours}_embedder.linear_{number}"
    return {name: (rows, columns)}
