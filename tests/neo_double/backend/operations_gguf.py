import torch


class Q8_0:
    """32 values a block: an fp16 scale and 32 signed bytes in the file; baking turns the scale into the compute dtype."""

    block, file_bytes = 32, 34

    @classmethod
    def bake(cls, parameter):
        if parameter.baked:
            return
        rows = parameter.data.view(torch.uint8).reshape(-1, cls.file_bytes)
        scale = rows[:, :2].contiguous().view(torch.float16).to(parameter.computation_dtype)
        parameter.data = torch.cat([scale.view(torch.uint8), rows[:, 2:]], 1).contiguous()
        parameter.baked = True

    @classmethod
    def dequantize_pytorch(cls, parameter):
        if not parameter.baked:
            raise ValueError("GGUF Tensor is not baked!")
        scale = parameter.data[:, :2].contiguous().view(parameter.computation_dtype)
        return (scale * parameter.data[:, 2:].contiguous().view(torch.int8)).view(parameter.shape)

    @classmethod
    def quantize_pytorch(cls, data, parent):
        blocks = data.reshape(-1, cls.block)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        values = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks)).round().to(torch.int8)
        parent.data = torch.cat([scale.to(parent.computation_dtype).view(torch.uint8), values.view(torch.uint8)], 1)
        return parent


class ParameterGGUF(torch.nn.Parameter):
    """`data` are the blocks, `shape` is the weight's."""

    def __new__(cls, data, *args, **kwargs):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, gguf_cls=None, shape=None, computation_dtype=torch.float16, baked=False):
        self.gguf_cls = gguf_cls
        self.real_shape = torch.Size(shape)
        self.computation_dtype = computation_dtype
        self.baked = baked

    @property
    def shape(self):
        return self.real_shape

    def copy_with_data(self, data):
        return ParameterGGUF(data, self.gguf_cls, self.real_shape, self.computation_dtype, self.baked)

    def to(self, *args, **kwargs):
        return self.copy_with_data(self.data.to(*args, **kwargs))


def dequantize_tensor(tensor):
    if tensor is None or getattr(tensor, "gguf_cls", None) is None:
        return tensor
    return tensor.gguf_cls.dequantize_pytorch(tensor)
