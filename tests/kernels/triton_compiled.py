"""Compile the loops in Triton to PTX and machine code without a device, as launches of the kernels ask for them.

Run as a program, in a process in which Triton does not interpret: prints what PTX holds, as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton import compile as compile_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamconv.dtypes import BF16, F16, F32
from streamconv.kernels import Start, in_triton
from streamconv.kernels.grids import E2M1, E4M3, INT4, INT8, NF4, Grid
from streamconv.kernels.in_triton import TritonKernels

_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8"}
# Arithmetic of floats in PTX, as "mul.rn.f32".
_FLOATS = re.compile(
    r"^\s*(?:@%\w+ )?((?:add|sub|mul|div|fma|mad|sqrt|rcp|rsqrt|ex2|lg2)\.[\w.]*f(?:16|32|64))\b", re.M
)
Launch = tuple[Any, tuple[Any, ...], Mapping[str, Any], int]


def launches(grids: Mapping[str, Grid]) -> list[Launch]:
    """The launches of every method of the kernels for `grids`; none is made."""
    found: list[Launch] = []

    def note(
        loop: Any,
        count: int,
        part: int,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        warps: int = 4,
    ) -> None:
        del count, part
        found.append((loop, arguments, constants, warps))

    in_triton.launch = note
    kernels = TritonKernels()
    kernels.uniform(-3, 5, torch.empty(64))
    for grid in grids.values():
        _all_methods(kernels, grid)
    return found


def _all_methods(kernels: TritonKernels, grid: Grid) -> None:
    count = grid.block + 1  # a short block makes its own branch, of the loops that have one
    values, out, codes = torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.uint8)
    scales, packed = torch.ones(2), torch.zeros(count // 2 + 1, dtype=torch.uint8)
    kernels.nearest(values, grid, None, codes)
    kernels.nearest(values, grid, scales, codes)
    kernels.search(values[: grid.block], grid, scales[:1], out[: grid.block])
    kernels.stochastic(values, grid, scales, Start(codes, out), values, codes)
    kernels.kept(codes, grid, values, out, out, torch.zeros(2))
    kernels.distance(values, out, grid.block)
    kernels.unpack_pairs(packed, codes)
    kernels.pack_pairs(packed, packed)
    for dtype in (F32, BF16, F16):
        kernels.decode(codes, grid, scales, dtype, out)
    if grid in (NF4, E2M1):
        kernels.decode_pairs(packed, grid, scales, BF16, out)


def ptx_of(launch: Launch, capability: int, may_fuse: bool = False) -> str:
    """PTX of a loop; its machine code was made from it."""
    loop, arguments, constants, warps = launch
    names = loop.arg_names
    numbers = {name: _type(each, name) for name, each in zip(names, arguments, strict=False)}
    source = ASTSource(
        loop,
        signature={name: numbers.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
    )
    options = {"enable_fp_fusion": may_fuse, "num_warps": warps}
    made = compile_for(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    found: str = made.asm["ptx"]
    return found


def _type(argument: Any, name: str) -> str:
    if isinstance(argument, Tensor):
        return _TYPES[argument.dtype]
    return "i64" if name in ("key", "first") else "i32"


def main() -> None:
    """Operations of floats by loop and capability, and of those that were allowed to fuse."""
    capabilities = [int(each) for each in sys.argv[1].split(",")]
    grids: dict[str, Grid] = {"nf4": NF4}
    if len(sys.argv) > 2:
        grids |= {
            "int8": INT8.of_width(4096),
            "e2m1": E2M1,
            "e4m3": E4M3.of_block(11008),
            "int4": INT4.of_block(128),
        }
    rows, seen = [], set()
    for launch in launches(grids):
        key = (launch[0].__name__, tuple(launch[2].items()), len(launch[1]))
        if key in seen:
            continue
        seen.add(key)
        for capability in capabilities:
            ptx = ptx_of(launch, capability)
            rows.append([launch[0].__name__, capability, Counter(_FLOATS.findall(ptx)), ".ftz" in ptx])
    kept = next(each for each in launches(grids) if each[0].__name__ == "kept")
    fused = Counter(_FLOATS.findall(ptx_of(kept, capabilities[0], may_fuse=True)))
    print(json.dumps({"rows": rows, "fused": fused}))


if __name__ == "__main__":
    main()
