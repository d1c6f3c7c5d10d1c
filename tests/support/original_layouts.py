"""Checkpoints in the authors' own layouts, each row with a number of its own: what a conversion makes of it shows.

Written as the models' constructors count their blocks, with the names of Stability's, CompVis' and BFL's checkpoints.
"""

from bisect import bisect

import torch


class Checkpoint:
    """Original names -> row numbers (unique over the checkpoint) and the real shapes."""

    def __init__(self, layers):
        """`layers`: (module, rows, columns, tensors), columns 0 for a norm, tensors such as "weight bias"."""
        self.tensors, self.shapes, self._firsts, self._columns, first = {}, {}, [], [], 1
        for module, rows, columns, names in layers:
            for name in names.split():
                key, matrix = f"{module}.{name}", columns and "weight" in name
                ids = torch.arange(first, first + rows)
                self.tensors[key] = ids[:, None] if matrix else ids
                self.shapes[key] = (rows, columns) if matrix else (rows,)
                self._firsts.append(first)
                self._columns.append(columns)
                first += rows

    def shapes_of(self, converted):
        """Real shapes of a converted checkpoint: its rows, the original's columns."""
        return {
            name: (len(ids), self._columns_of(int(ids.flatten()[0]))) if ids.ndim > 1 else (len(ids),)
            for name, ids in converted.items()
        }

    def _columns_of(self, row):
        return self._columns[bisect(self._firsts, row) - 1]


def ldm_unet(channels, depths, mid_depth, context, *, label=0, per_level=2):
    """The modules of CompVis' U-Net, counted as its constructor does: one input block per layer and per downsampler."""

    def resnet(name, before, after):
        yield name + ".in_layers.0", before, 0, "weight bias"
        yield name + ".in_layers.2", after, before, "weight bias"
        yield name + ".emb_layers.1", after, 8, "weight bias"
        yield name + ".out_layers.0", after, 0, "weight bias"
        yield name + ".out_layers.3", after, after, "weight bias"
        if before != after:
            yield name + ".skip_connection", after, before, "weight bias"

    def attention(name, width, depth):
        for top in ("norm", "proj_in", "proj_out"):
            yield f"{name}.{top}", width, 0 if top == "norm" else width, "weight bias"
        for n in range(depth):
            block = f"{name}.transformer_blocks.{n}"
            for attn, source in (("attn1", width), ("attn2", context)):
                yield f"{block}.{attn}.to_q", width, width, "weight"
                yield f"{block}.{attn}.to_k", width, source, "weight"
                yield f"{block}.{attn}.to_v", width, source, "weight"
                yield f"{block}.{attn}.to_out.0", width, width, "weight bias"
            yield f"{block}.ff.net.0.proj", 8 * width, width, "weight bias"
            yield f"{block}.ff.net.2", width, 4 * width, "weight bias"
            yield from ((f"{block}.norm{i}", width, 0, "weight bias") for i in (1, 2, 3))

    yield "time_embed.0", 8, 4, "weight bias"
    yield "time_embed.2", 8, 8, "weight bias"
    if label:
        yield "label_emb.0.0", 8, label, "weight bias"
        yield "label_emb.0.2", 8, 8, "weight bias"
    yield "input_blocks.0.0", channels[0], 4, "weight bias"
    n, width, skips = 1, channels[0], [channels[0]]
    for level, (after, depth) in enumerate(zip(channels, depths, strict=True)):
        for _ in range(per_level):
            yield from resnet(f"input_blocks.{n}.0", width, after)
            width = after
            if depth:
                yield from attention(f"input_blocks.{n}.1", width, depth)
            skips.append(width)
            n += 1
        if level < len(channels) - 1:
            yield f"input_blocks.{n}.0.op", width, width, "weight bias"
            skips.append(width)
            n += 1
    yield from resnet("middle_block.0", width, width)
    yield from attention("middle_block.1", width, mid_depth)
    yield from resnet("middle_block.2", width, width)
    n = 0
    for level in reversed(range(len(channels))):
        for index in range(per_level + 1):
            yield from resnet(f"output_blocks.{n}.0", width + skips.pop(), channels[level])
            width = channels[level]
            if depths[level]:
                yield from attention(f"output_blocks.{n}.1", width, depths[level])
            if level and index == per_level:
                yield f"output_blocks.{n}.{2 if depths[level] else 1}.conv", width, width, "weight bias"
            n += 1
    yield "out.0", width, 0, "weight bias"
    yield "out.2", 4, width, "weight bias"


SD15 = {"channels": (4, 8, 12, 12), "depths": (1, 1, 1, 0), "mid_depth": 1, "context": 6}
SDXL = {"channels": (4, 8, 12), "depths": (0, 2, 3), "mid_depth": 3, "context": 6, "label": 10}
REFINER = {"channels": (4, 8, 12, 12), "depths": (0, 2, 2, 0), "mid_depth": 2, "context": 6, "label": 10}


def bfl(hidden, double, single, *, chroma=False):
    for name, columns in (("img_in", 64), ("txt_in", 4096)):
        yield name, hidden, columns, "weight bias"
    if chroma:
        guidance = "distilled_guidance_layer."
        yield guidance + "in_proj", 20, 8, "weight bias"
        yield guidance + "out_proj", hidden, 20, "weight bias"
        for n in range(2):
            yield f"{guidance}layers.{n}.in_layer", 20, 20, "weight bias"
            yield f"{guidance}layers.{n}.out_layer", 20, 20, "weight bias"
            yield f"{guidance}norms.{n}", 20, 0, "scale"
    else:
        for name, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
            yield f"{name}.in_layer", hidden, columns, "weight bias"
            yield f"{name}.out_layer", hidden, hidden, "weight bias"
        yield "final_layer.adaLN_modulation.1", 2 * hidden, hidden, "weight bias"
    for n in range(double):
        for x in ("img", "txt"):
            block = f"double_blocks.{n}.{x}_"
            if not chroma:
                yield block + "mod.lin", 6 * hidden, hidden, "weight bias"
            yield block + "attn.qkv", 3 * hidden, hidden, "weight bias"
            yield block + "attn.proj", hidden, hidden, "weight bias"
            yield from ((f"{block}attn.norm.{y}_norm", 128, 0, "scale") for y in ("query", "key"))
            yield block + "mlp.0", 4 * hidden, hidden, "weight bias"
            yield block + "mlp.2", hidden, 4 * hidden, "weight bias"
    for n in range(single):
        block = f"single_blocks.{n}."
        if not chroma:
            yield block + "modulation.lin", 3 * hidden, hidden, "weight bias"
        yield block + "linear1", 7 * hidden, hidden, "weight bias"
        yield block + "linear2", hidden, 5 * hidden, "weight bias"
        yield from ((f"{block}norm.{y}_norm", 128, 0, "scale") for y in ("query", "key"))
    yield "final_layer.linear", 64, hidden, "weight bias"


def mmdit(hidden, blocks, dual):
    yield "x_embedder.proj", hidden, 16, "weight bias"
    yield "context_embedder", hidden, 4096, "weight bias"
    for name, columns in (("t_embedder", 256), ("y_embedder", 2048)):
        yield f"{name}.mlp.0", hidden, columns, "weight bias"
        yield f"{name}.mlp.2", hidden, hidden, "weight bias"
    for n in range(blocks):
        for x in ("x_block", "context_block"):
            block, last = f"joint_blocks.{n}.{x}.", x == "context_block" and n == blocks - 1
            for attn in ("attn", "attn2") if x == "x_block" and n in dual else ("attn",):
                yield f"{block}{attn}.qkv", 3 * hidden, hidden, "weight bias"
                yield from ((f"{block}{attn}.ln_{y}", 4, 0, "weight") for y in "qk")
                if not last:
                    yield f"{block}{attn}.proj", hidden, hidden, "weight bias"
            gates = 2 if last else 9 if x == "x_block" and n in dual else 6
            yield block + "adaLN_modulation.1", gates * hidden, hidden, "weight bias"
            if not last:
                yield block + "mlp.fc1", 4 * hidden, hidden, "weight bias"
                yield block + "mlp.fc2", hidden, 4 * hidden, "weight bias"
    yield "final_layer.adaLN_modulation.1", 2 * hidden, hidden, "weight bias"
    yield "final_layer.linear", 64, hidden, "weight bias"


def open_clip(width, layers):
    yield "token_embedding", 50, width, "weight"
    yield "ln_final", width, 0, "weight bias"
    for n in range(layers):
        block = f"transformer.resblocks.{n}."
        yield block + "attn", 3 * width, width, "in_proj_weight in_proj_bias"
        yield block + "attn.out_proj", width, width, "weight bias"
        yield block + "mlp.c_fc", 4 * width, width, "weight bias"
        yield block + "mlp.c_proj", width, 4 * width, "weight bias"
        yield from ((f"{block}ln_{i}", width, 0, "weight bias") for i in (1, 2))
