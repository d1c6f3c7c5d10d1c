"""Compiles the kernels for cards that are not here: needs Triton, no GPU.

    python benchmarks/compile_kernels.py [--targets 75,80,86,89,90,120] [--kinds "nf4 64,Q4_K baked by bf16"] [--ranks 0,16,64] [--dtypes bf16]

Prints a line per kernel: seconds, bytes of the cubin, registers spilled by no means (the cubin tells), shared memory.
Writes nothing but Triton's own cache; `TRITON_CACHE_DIR` moves it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from lib_lora_guard.kernels.launch import Kernel
from lib_lora_guard.kernels.recipes import KRONECKER, ONE_TOKEN, bucket_of, split_kind
from lib_lora_guard.kernels.token_product import TokenProduct

KINDS = (
    "fp8 e4m3", "fp8 e4m3 scaled", "fp8 e5m2", "fp8 e4m3 odd", "int8 scaled", "nf4 64 by {}", "nf4 64 nested256 by {}", "fp4 64 by {}",
    "nf4 64 crossing by {}", "nf4 4096 by {}", "Q8_0 baked by {}", "Q4_0 baked by {}", "Q4_K baked by {}", "Q5_0 by {}", "Q5_K by {}",
    "Q6_K by {}", "Q8_0", "Q4_0", "Q4_K", "loha fp8 e4m3", "loha nf4 64 by {}", "loha Q8_0 baked by {}", "lokr fp8 e4m3", "lokr fp8 e4m3 scaled",
    "lokr fp8 e4m3 odd", "lokr int8 scaled", "lokr nf4 64 by {}", "lokr nf4 64 crossing by {}", "lokr fp4 64 nested256 by {}",
    "lokr Q8_0 baked by {}", "lokr Q4_0 baked by {}", "lokr Q4_K baked by {}", "lokr Q6_K by {}",
    "dora fp8 e4m3", "dora nf4 64 by {}", "dora Q8_0 baked by {}", "dora loha fp8 e4m3", "dora lokr nf4 64 by {}",
    "token nf4 64 by {}", "token fp4 64 nested256 by {}", "token nf4 128 by {}",
)  # fmt: skip
"""Every form of every kernel; {} is the layer's dtype. A LoKr has no rank: its two kernels are those of 16 and 1. A product with one token
has one kernel for all ranks, compiled with strengths by rank, and a second one, for `down`, that is the same for all kinds."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


_POINTERS = {
    "DATA": "*u8", "WORDS2": "*i16", "WORDS4": "*i32", "SCALE": "*fp32", "LEVELS": "*fp32", "ABSMAX": "*fp32", "CODE": "*fp32",
    "NESTED_SCALE": "*fp32", "OFFSET": "*fp32", "PER_RANK": "*fp32", "ROW_SCALE": "*fp32", "LOW": "*fp32",
}  # fmt: skip


def compiled(
    kind: str, dtype: torch.dtype, rank: int, compute_capability: int, per_rank: bool = False, fragments: bool = False
) -> object:
    """Returns Triton's compiled kernel, with its PTX and cubin in `asm`.

    Args:
        kind: `Stored.kind`.
        dtype: fp16 or bf16.
        rank: The joined rank, 0 for none.
        compute_capability: 75 for sm_75.
        per_rank: With a strength for each rank.
        fragments: The kernel of `fragment_kernels.py`, where that makes this.

    Raises:
        Exception: Triton's own, where it cannot compile the kernel.
    """
    layer = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    if split_kind(kind).form == ONE_TOKEN:
        product = TokenProduct(kind, dtype, per_rank)
        pointers = {
            **_POINTERS,
            "DATA": "*i32",
            "TOKEN": "*i32",
            **({"ABSMAX": "*u8"} if product.constants["NESTED"] else {}),
        }
        return _compiled(product.function, product.constants, product.options, pointers, layer, compute_capability)
    bucket = bucket_of(rank)
    assert bucket is not None
    kernel = Kernel(kind, dtype, bucket, rank % 16 == 0, per_rank, fragments=fragments)
    function = kernel.function
    constants = {name: value for name, value in kernel.constants.items() if name in function.arg_names}
    if "NATIVE" in constants:
        constants["NATIVE"] = compute_capability >= 89
    pointers = {**_POINTERS, **({"ABSMAX": "*u8"} if constants.get("NESTED") else {})}
    if constants.get("FORM") == "int8":
        pointers["DATA"] = "*i8"
    if kernel.function.fn.__name__.startswith("bnb4") and not kernel.constants["CROSSING"]:
        pointers["DATA"] = "*i32"
    return _compiled(function, constants, kernel.options, pointers, layer, compute_capability)


def compiled_down(dtype: torch.dtype, compute_capability: int) -> object:
    """Returns the kernel for `down` of a product with one token, as `compiled` does the others."""
    product = TokenProduct("token nf4 64", dtype, False)
    layer = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    pointers = {**_POINTERS, "OUT": "*fp32"}
    return _compiled(
        product.down_function, product.down_constants, product.options, pointers, layer, compute_capability
    )


def _compiled(
    function: Any,
    constants: dict[str, Any],
    options: dict[str, Any],
    pointers: dict[str, str],
    layer: str,
    compute_capability: int,
) -> object:
    import triton
    from triton.backends.compiler import GPUTarget

    signature, attributes = {}, {}
    for number, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper() or name in pointers:
            signature[name] = pointers.get(name, layer)
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "alpha" else "i32"
    return triton.compile(
        _source(function, signature, constants, attributes),
        target=GPUTarget("cuda", compute_capability, 32),
        options=options,
    )


def _source(function: Any, signature: dict[str, str], constants: dict[str, Any], attributes: dict[Any, Any]) -> object:
    """Returns the source as the Triton that is here wants it."""
    from triton.compiler import ASTSource

    try:
        return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    except TypeError:  # Triton 3.2 and older
        pass
    aligned = [number for (number,) in attributes]
    signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    try:
        from triton.backends.compiler import AttrsDescriptor

        hints = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    except (ImportError, AttributeError):
        from triton.compiler import AttrsDescriptor

        hints = AttrsDescriptor(divisible_by_16=aligned, equal_to_1=())
    return ASTSource(fn=function, signature=signature, constants=constants, attrs=hints)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="75,80,86,89,90,120")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--ranks", default="0,16,64,128,256")
    parser.add_argument("--dtypes", default="bf16,fp16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, failed = [], 0
    for target in map(int, options.targets.split(",")):
        for kind in options.kinds.split(","):
            ranks = {KRONECKER: (16, 1), ONE_TOKEN: (16,)}.get(
                split_kind(kind).form, [int(rank) for rank in options.ranks.split(",")]
            )
            for name in options.dtypes.split(","):
                for rank in ranks:
                    row = {"target": target, "kind": kind.format(name), "dtype": name, "rank": rank}
                    begin = time.perf_counter()
                    try:
                        made = compiled(row["kind"], DTYPES[name], rank, target, kind.startswith(ONE_TOKEN))
                        if kind.startswith(ONE_TOKEN):
                            compiled_down(DTYPES[name], target)
                        row |= {"cubin_bytes": len(made.asm["cubin"]), "shared_bytes": made.metadata.shared}
                    except Exception as error:
                        failed += 1
                        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                    row["seconds"] = round(time.perf_counter() - begin, 2)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    print(f"{len(rows)} kernels, {failed} failed, {sum(row['seconds'] for row in rows):.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
