"""Files written by the gguf package's own writer read back equal, and as its own reader reads them."""

import numpy
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from lib_lora_guard.files import open_header, read_tensors
from lib_lora_guard.files.gguf_types import GGUF_TYPES


def close(reader):
    """The reader maps the file; Windows keeps it locked until the map is gone."""
    reader.data._mmap.close()


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.gguf"
    random = numpy.random.default_rng(0)
    values = random.standard_normal((6, 512)).astype(numpy.float32)
    plain = {
        "f32": values[:, :5].copy(), "f16": values[:, :3].astype(numpy.float16), "f64": values[0].astype(numpy.float64),
        "i8": random.integers(-128, 127, (4, 3), numpy.int8), "i16": random.integers(-9, 9, 7).astype(numpy.int16),
        "i32": random.integers(-9, 9, (2, 3, 4, 1)).astype(numpy.int32), "i64": random.integers(-9, 9, (5, 2)),
    }  # fmt: skip
    blocks = {}
    for form in ("Q4_0", "Q8_0", "Q5_1", "BF16"):
        blocks[form] = quants.quantize(values, GGMLQuantizationType[form])
    for form in ("Q4_K", "Q6_K", "IQ4_XS"):  # the package cannot make these; any bytes are blocks
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[form]]
        blocks[form] = random.integers(0, 255, (6, 512 // block * block_bytes)).astype(numpy.uint8)
    writer = GGUFWriter(path, "flux")
    writer.add_name("a ä model")
    writer.add_uint32("flux.block_count", 19)
    writer.add_float32("adapter.lora.alpha", 16.0)
    writer.add_bool("flux.guidance", True)
    writer.add_array("comfy.gguf.orig_shape.x", [320, 4, 3, 3])
    writer.add_token_list([f"token{n}" for n in range(300)])
    writer.add_token_scores([n / 7 for n in range(300)])
    for name, array in plain.items():
        writer.add_tensor(name, array)
    for form, array in blocks.items():
        writer.add_tensor(f"block.{form}", array, raw_dtype=GGMLQuantizationType[form])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values, plain, blocks


def test_header(written):
    path, _, plain, blocks = written
    header = open_header(path)
    expected = {
        "general.architecture": "flux", "general.name": "a ä model", "flux.block_count": "19", "adapter.lora.alpha": "16",
        "flux.guidance": "true", "comfy.gguf.orig_shape.x": "[320, 4, 3, 3]", "tokenizer.ggml.tokens": "[300 values]",
        "tokenizer.ggml.scores": "[300 values]",
    }  # fmt: skip
    assert header.metadata == expected
    assert list(header.tensors) == [*plain, *(f"block.{form}" for form in blocks)]
    reader = GGUFReader(path)
    facts = {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist())[::-1], t.data_offset, t.n_bytes) for t in reader.tensors
    }
    close(reader)
    assert {e.name: (e.format, e.shape, e.start, e.bytes) for e in header.tensors.values()} == facts


def test_tensors(written):
    path, values, plain, blocks = written
    tensors = read_tensors(open_header(path))
    for name, array in plain.items():
        assert tensors[name].dtype == torch.from_numpy(array).dtype
        assert torch.equal(tensors[name], torch.from_numpy(array))
    bf16 = blocks.pop("BF16")
    assert tensors["block.BF16"].dtype == torch.bfloat16
    assert torch.equal(tensors["block.BF16"].view(torch.uint8), torch.from_numpy(bf16))
    assert torch.equal(tensors["block.BF16"], torch.from_numpy(values).bfloat16())
    for form, array in blocks.items():
        assert torch.equal(tensors[f"block.{form}"], torch.from_numpy(array))


def test_types_are_the_packages():
    theirs = {int(form): (form.name, *size) for form, size in GGML_QUANT_SIZES.items()}
    assert {number: tuple(form) for number, form in GGUF_TYPES.items() if number in theirs} == theirs
