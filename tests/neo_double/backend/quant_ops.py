"""Quantised tensors as comfy_kitchen's: one in fp8 with a scale, one in fp8 blocks whose scales lie in tiles of 128 rows."""

import dataclasses

import torch

TILE, BLOCK = 128, 16


@dataclasses.dataclass(frozen=True)
class Params:
    scale: torch.Tensor
    orig_dtype: torch.dtype
    orig_shape: tuple


class Fp8:
    Params = Params

    @classmethod
    def quantize(cls, tensor):
        scale = tensor.abs().amax().float() / 448
        return (tensor / scale).to(torch.float8_e4m3fn), Params(scale, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        return (qdata.float() * params.scale).to(params.orig_dtype)


class Tiled:
    """One scale for BLOCK values of a row. A tile holds the scales of 128 rows column by column."""

    Params = Params

    @classmethod
    def quantize(cls, tensor):
        rows, columns = tensor.shape
        scales = tensor.reshape(rows, -1, BLOCK).abs().amax(-1).float() / 448
        qdata = (tensor.reshape(rows, -1, BLOCK) / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).reshape(rows, columns)
        filled = torch.zeros(-(-rows // TILE) * TILE, scales.shape[1])
        filled[:rows] = scales
        tiles = filled.reshape(-1, TILE, scales.shape[1]).transpose(1, 2).reshape(filled.shape[0], -1).contiguous()
        return qdata, Params(tiles, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        rows, columns = qdata.shape
        if rows > params.scale.shape[0] or params.scale.shape[0] % TILE:
            raise ValueError("scales are whole tiles")
        blocks = columns // BLOCK
        scales = params.scale.reshape(-1, blocks, TILE).transpose(1, 2).reshape(-1, blocks)[:rows]
        dense = qdata.float().reshape(rows, blocks, BLOCK) * scales.unsqueeze(-1)
        return dense.reshape(rows, columns).to(params.orig_dtype)


LAYOUTS = {"TensorCoreFP8E4M3Layout": Fp8, "TensorCoreMXFP8Layout": Tiled}


class QuantizedTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, qdata, layout, params):
        shape = params.orig_shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, device=qdata.device, dtype=params.orig_dtype)

    def __init__(self, qdata, layout, params):
        self._qdata, self._layout_cls, self._params = qdata, layout, params

    @classmethod
    def from_float(cls, tensor, layout):
        return cls(*LAYOUTS[layout].quantize(tensor)[:1], layout, LAYOUTS[layout].quantize(tensor)[1])

    @property
    def layout_cls(self):
        return LAYOUTS[self._layout_cls]

    def dequantize(self):
        return self.layout_cls.dequantize(self._qdata, self._params)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        one = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            dtype = (kwargs or {}).get("dtype") or one._params.orig_dtype
            return cls(one._qdata, one._layout_cls, dataclasses.replace(one._params, orig_dtype=dtype))
        plain = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))
