"""Compile the kernels of CUDA devices to PTX and machine code, for which none is needed, and say what is in them.

    python -m tools.triton_code docs/results/triton.json

Every method of the kernels is called with Triton's launches noted in place of made, and each loop compiled as it was
asked for. Noted of one: its operations on floats, whether anything flushes to 0 (`.ftz`), and what ptxas says of the
machine code: registers of a thread and bytes of its stack, which spills go to. One loop is compiled once more with what
launches forbid, the fusing of a product and a sum: that shows that the operations would be seen.

`--loops`, `--grids` and `--capabilities` choose some; without a file all is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamconv.dtypes import BF16, F16, F32
from streamconv.kernels import Start, in_triton, triton_columns, triton_loops
from streamconv.kernels.grids import E2M1, E4M3, INT4, INT8, NF4, Grid
from streamconv.kernels.in_triton import TritonKernels

GRIDS: Mapping[str, Grid] = {
    "nf4": NF4,
    "e2m1": E2M1,
    "int4": INT4.of_block(128),
    "int8": INT8.of_width(4096),
    "e4m3": E4M3.of_block(11008),
}
CAPABILITIES = (80, 86, 89, 90, 100, 120)
_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8"}
# Arithmetic of floats in PTX, as "mul.rn.f32".
_FLOATS = re.compile(
    r"^\s*(?:@!?%\w+ )?((?:add|sub|mul|div|fma|mad|sqrt|rcp|rsqrt|ex2|lg2)\.[\w.]*f(?:16|32|64))\b", re.M
)


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch that was asked for, for a grid, and not made."""

    loop: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    warps: int
    grid: str

    @property
    def name(self) -> str:
        return str(self.loop.__name__)


def launches(grids: Mapping[str, Grid]) -> list[Launch]:
    """The distinct launches of every method of the kernels."""
    found: dict[tuple[object, ...], Launch] = {}
    names: list[str] = []

    def note(
        loop: Any,
        count: int,
        part: int,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        warps: int = 4,
    ) -> None:
        del count, part
        asked = Launch(loop, arguments, constants, warps, names[-1])
        found.setdefault((asked.name, *constants.items()), asked)

    in_triton.launch = note
    kernels = TritonKernels()
    for name, grid in grids.items():
        names.append(name)
        _call(kernels, grid)
    return list(found.values())


def _call(kernels: TritonKernels, grid: Grid) -> None:
    """Call all methods; a short block makes a branch of its own in the loops that have one."""
    count = grid.block + 1
    values, out, codes = torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.uint8)
    scales, packed = torch.ones(2), torch.zeros(count // 2 + 1, dtype=torch.uint8)
    kernels.uniform(-3, 5, values)
    kernels.nearest(values, grid, None, codes)
    kernels.nearest(values, grid, scales, codes)
    kernels.search(values[: grid.block], grid, scales[:1], out[: grid.block])
    kernels.stochastic(values, grid, scales, Start(codes, out), values, codes)
    kernels.stochastic(values, grid, scales, None, values, codes)
    kernels.kept(codes, grid, values, out, out, torch.zeros(2))
    kernels.distance(values, out, grid.block)
    kernels.unpack_pairs(packed, codes)
    kernels.pack_pairs(packed, packed)
    for dtype in (F32, BF16, F16):
        kernels.decode(codes, grid, scales, dtype, out)
    kernels.decode_pairs(packed, NF4, scales, BF16, out)
    panel, of_panel, coupling = torch.zeros(5, 64), torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(5, 5)
    for dtype, is_first in ((BF16, True), (BF16, False), (F16, False), (F32, False)):
        given = (panel, panel, coupling, None, grid, panel, dtype)
        kernels.quantize_columns(*given, of_panel, panel, is_first)


def compiled(launch: Launch, capability: int, may_fuse: bool = False) -> Any:
    """What Triton makes of a launch."""
    names = launch.loop.arg_names
    types = {name: _type(each, name) for name, each in zip(names, launch.arguments, strict=False)}
    source = ASTSource(
        launch.loop,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(launch.constants),
    )
    options = {"enable_fp_fusion": may_fuse, "num_warps": launch.warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(argument: Any, name: str) -> str:
    if isinstance(argument, Tensor):
        return _TYPES[argument.dtype]
    return "i64" if name in ("key", "first") else "i32"


def seen_in(ptx: str) -> dict[str, int]:
    """Operations on floats, and how often each."""
    return dict(sorted(Counter(_FLOATS.findall(ptx)).items()))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "loop.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", text)}


def source_hash() -> str:
    """SHA-256 of the loops' files."""
    files = (triton_loops.__file__, triton_columns.__file__)
    return hashlib.sha256(b"".join(Path(each).read_bytes() for each in files)).hexdigest()


def report(capabilities: tuple[int, ...], loops: set[str], grids: set[str]) -> dict[str, Any]:
    """All of it, as JSON holds it."""
    chosen = {name: grid for name, grid in GRIDS.items() if not grids or name in grids}
    known = launches(chosen)
    asked = [each for each in known if not loops or each.name in loops]
    rows = []
    for launch in asked:
        for capability in capabilities:
            made = compiled(launch, capability)
            ptx = made.asm["ptx"]
            rows.append(
                {
                    "loop": launch.name,
                    "grid": launch.grid,
                    "capability": capability,
                    "floats": seen_in(ptx),
                    "flushes": ".ftz" in ptx,
                    **resources(made.asm["cubin"]),
                }
            )
    search = next(each for each in known if each.name == "search")
    fused = seen_in(compiled(search, capabilities[0], may_fuse=True).asm["ptx"])
    return {"triton": triton.__version__, "source": source_hash(), "if_fused": fused, "rows": rows}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--capabilities", nargs="*", type=int, default=CAPABILITIES)
    parser.add_argument("--loops", nargs="*", default=())
    parser.add_argument("--grids", nargs="*", default=())
    arguments = parser.parse_args()
    found = report(tuple(arguments.capabilities), set(arguments.loops), set(arguments.grids))
    rows = ",\n".join(f"    {json.dumps(row)}" for row in found.pop("rows"))
    text = json.dumps(found)[:-1] + f', "rows": [\n{rows}\n]}}\n'
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
