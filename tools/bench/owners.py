"""Encoders and decoders of the libraries that own formats, timed in a process that waits for its turn.

    python -m tools.bench.owners OWNER ROWS COLUMNS THREADS CLOCK

reads lines. For the name of a format it makes a matrix, does all once, and prints the directions it can do; for one of
these it prints the seconds that it took. Run by `tools/bench/formats`, in the environment where the owner is installed.
A matrix is random, in memory, and comes as the library likes it best. What GPTQ and AWQ files mean is stated as
operations on tensors, as their readers have them: shift, mask, subtract, multiply.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], object]
Calls = Mapping[str, Call]
ENCODE, DECODE = "encode", "decode"
CLOCKS = ("wall", "cpu")


def _matrix(rows: int, columns: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()


# -- torch -------------------------------------------------------------------------------------------------------


def torch_casts(name: str, rows: int, columns: int) -> Calls:
    """Floats, by torch's own casts."""
    import torch

    weight = _matrix(rows, columns)
    dtype = getattr(torch, name)
    stored = weight.to(dtype)
    return {ENCODE: lambda: weight.to(dtype, copy=True), DECODE: lambda: stored.to(torch.float32, copy=True)}


def bitsandbytes(name: str, rows: int, columns: int) -> Calls:
    from bitsandbytes import functional

    weight = _matrix(rows, columns)
    if name == "int8":
        half = weight.half()
        codes, scales, _ = functional.int8_vectorwise_quant(half)
        return {
            ENCODE: lambda: functional.int8_vectorwise_quant(half),
            DECODE: lambda: functional.int8_vectorwise_dequant(codes, scales),
        }
    kind, nested = name.removesuffix("-dq"), name.endswith("-dq")

    def encode() -> Any:
        return functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)

    packed, state = encode()
    return {ENCODE: encode, DECODE: lambda: functional.dequantize_4bit(packed, state)}


_PRESETS = {
    "w4a16": "W4A16",
    "w4a16-asym": "W4A16_ASYM",
    "w8a16": "W8A16",
    "w8a8": "W8A8",
    "fp8": "FP8_DYNAMIC",
    "nvfp4a16": "NVFP4A16",
    "mxfp4a16": "MXFP4A16",
}


def compressed_tensors(name: str, rows: int, columns: int) -> Calls:
    """Scales by the least and the greatest value, as llm-compressor's plainest observer has them, and `compress`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from torch import nn

    weight = _matrix(rows, columns)
    scheme = preset_name_to_scheme(_PRESETS[name], ["Linear"])
    packing = BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, scheme).value)
    args = scheme.weights

    def encode() -> dict[str, Any]:
        blocks = weight.view(rows, -1, args.group_size or columns)
        given: dict[str, Any] = {"weight": weight}
        if args.strategy == "tensor_group":
            given["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
        scale, zero = calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), args, global_scale=given.get("weight_global_scale")
        )
        found: dict[str, Any] = packing.compress(
            given | {"weight_scale": scale, "weight_zero_point": zero}, scheme
        )
        return found

    stored = encode()
    return {ENCODE: encode, DECODE: lambda: packing.decompress(stored, scheme)}


def transformers(name: str, rows: int, columns: int) -> Calls:
    """Conversions of finegrained FP8, and the decoding of gpt-oss; both run while a model is loaded or saved."""
    import torch

    if name == "gpt-oss":
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks = torch.randint(0, 256, (1, rows, columns // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(115, 125, (1, rows, columns // 32), dtype=torch.uint8)
        return {DECODE: lambda: convert_moe_packed_tensors(blocks, exponents)}
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    quantizer: Any = SimpleNamespace(quantization_config=FineGrainedFP8Config())
    quantize, dequantize = Fp8Quantize(quantizer), Fp8Dequantize(quantizer)
    weight, key = _matrix(rows, columns), "proj.weight"
    stored = quantize.convert({key: weight})
    return {
        ENCODE: lambda: quantize.convert({key: weight}),
        DECODE: lambda: dequantize.convert(stored, source_patterns=list(stored)),
    }


def modelopt(name: str, rows: int, columns: int) -> Calls:
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    del name
    weight = _matrix(rows, columns)
    stored, scale, double_scale = NVFP4QTensor.quantize(weight, 16)
    given = {"scale": scale, "double_scale": double_scale, "block_sizes": {-1: 16}}
    return {
        ENCODE: lambda: NVFP4QTensor.quantize(weight, 16),
        DECODE: lambda: stored.dequantize(torch.bfloat16, **given),
    }


def words_in_torch(name: str, rows: int, columns: int) -> Calls:
    """GPTQ and AWQ in groups of 128: shifts, and products with scales looked up for every input or spread over it."""
    import torch

    method, bits = name.partition("-")[0], 8 if "8 bit" in name else 4
    count, group = 32 // bits, 128
    places = [0, 2, 4, 6, 1, 3, 5, 7] if method == "awq" else list(range(count))
    shifts = torch.arange(count, dtype=torch.int32) * bits
    shifts_of = torch.empty_like(shifts).scatter_(0, torch.tensor(places), shifts)
    weight = _matrix(rows, columns).half().T.contiguous()  # [in, out]
    groups = torch.arange(columns, dtype=torch.int32) // group
    if "activation order" in name:
        groups = groups[torch.randperm(columns)]

    def encode() -> tuple[Any, ...]:
        order = torch.argsort(groups, stable=True)
        blocks = weight[order].view(-1, group, rows)
        low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
        scales = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
        zeros = (-low / scales).round().clamp(0, 2**bits - 1).to(torch.int32)
        codes = (weight / scales[groups] + zeros[groups]).round().clamp(0, 2**bits - 1).to(torch.int32)
        if method == "awq":
            return packed_beside(codes), packed_beside(zeros), scales
        return packed_above(codes), packed_beside(zeros - 1), scales

    def packed_above(codes: Any) -> Any:
        words = torch.zeros(codes.shape[0] // count, codes.shape[1], dtype=torch.int32)
        for place in range(count):
            words |= codes[place::count] << place * bits
        return words

    def packed_beside(codes: Any) -> Any:
        words = torch.zeros(codes.shape[0], codes.shape[1] // count, dtype=torch.int32)
        for place in range(count):
            words |= (codes[:, places[place] :: count] & 2**bits - 1) << place * bits
        return words

    qweight, qzeros, scales = encode()

    def decode() -> Any:
        mask = 2**bits - 1
        zeros = (qzeros.unsqueeze(2) >> shifts_of & mask).view(scales.shape)
        if method == "awq":
            codes = (qweight.unsqueeze(2) >> shifts_of & mask).view(columns, rows)
            return (codes - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)
        codes = (qweight.unsqueeze(1) >> shifts[None, :, None] & mask).view(columns, rows)
        return scales[groups] * (codes - (zeros + 1)[groups])

    return {ENCODE: encode, DECODE: decode}


# -- others ------------------------------------------------------------------------------------------------------


def mlx(name: str, rows: int, columns: int) -> Calls:
    import mlx.core as mx

    bits = int(name.removeprefix("mlx"))
    weight = (mx.random.normal((rows, columns)) * 0.02).astype(mx.bfloat16)
    mx.eval(weight)
    stored = mx.quantize(weight, group_size=64, bits=bits)
    mx.eval(stored)
    return {
        ENCODE: lambda: mx.eval(mx.quantize(weight, group_size=64, bits=bits)),
        DECODE: lambda: mx.eval(mx.dequantize(*stored, group_size=64, bits=bits)),
    }


def ggml(name: str, rows: int, columns: int) -> Calls:
    """ggml's own code, its rows shared between threads, as llama.cpp's quantizer has it; without importance."""
    import ctypes
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import gguf
    import llama_cpp
    import numpy as np

    library: Any = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib/libggml-base.so"))
    place, whole = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, place, place, whole, whole, whole, place]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    name = name.removeprefix("gguf:")
    spelled = name if name.startswith(("iq", "tq")) else name.replace("_k", "_K")
    to_floats = getattr(library, f"dequantize_row_{spelled}")
    to_floats.argtypes, to_floats.restype = [place, place, whole], None
    kind = gguf.GGMLQuantizationType[name.upper()]
    line = columns // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
    values = (np.random.default_rng(0).standard_normal((rows, columns), np.float32) * 0.02).astype(np.float32)
    codes = np.random.default_rng(0).integers(0, 256, (rows, line), np.uint8)
    out, raw = np.empty_like(values), np.empty_like(codes)
    pool = ThreadPoolExecutor(_threads())
    parts = [part for part in np.array_split(np.arange(rows), _threads()) if part.size]

    def on_all(work: Callable[[int, int], object]) -> None:
        list(pool.map(lambda part: work(int(part[0]), part.size), parts))

    def encode(first: int, count: int) -> None:
        given, into = values.ctypes.data, raw.ctypes.data
        library.ggml_quantize_chunk(kind, given, into, first * columns, count, columns, None)

    def decode(first: int, count: int) -> None:
        to_floats(codes[first:].ctypes.data, out[first:].ctypes.data, count * columns)

    calls: dict[str, Call] = {DECODE: lambda: on_all(decode)}
    if not name.startswith("iq"):
        calls[ENCODE] = lambda: on_all(encode)
    return calls


def gguf_py(name: str, rows: int, columns: int) -> Calls:
    """numpy, in which gguf-py quantizes and dequantizes."""
    import gguf
    import numpy as np
    from gguf import quants

    name = name.removeprefix("gguf:")
    kind = gguf.GGMLQuantizationType[name.upper()]
    line = columns // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32) * np.float32(0.02)
    codes = np.random.default_rng(0).integers(0, 256, (rows, line), np.uint8)
    np.seterr(all="ignore")
    calls: dict[str, Call] = {DECODE: lambda: quants.dequantize(codes, kind)}
    try:
        quants.quantize(values[:1], kind)
    except NotImplementedError:
        return calls
    return calls | {ENCODE: lambda: quants.quantize(values, kind)}


OWNERS: Mapping[str, Callable[[str, int, int], Calls]] = {
    "torch": torch_casts,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "transformers": transformers,
    "ModelOpt": modelopt,
    "torch, as GPTQModel and AutoAWQ": words_in_torch,
    "mlx.core": mlx,
    "ggml": ggml,
    "gguf-py": gguf_py,
}


def seconds_of(call: Call, clock: str, threads: int) -> float:
    """Seconds that `call` takes: by a clock, or those of all processors over the threads that share the work."""
    now = time.perf_counter if clock == CLOCKS[0] else time.process_time
    started = now()
    call()
    return (now() - started) / (1 if clock == CLOCKS[0] else threads)


def _threads() -> int:
    return int(sys.argv[4])


def main() -> None:
    owner, rows, columns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if owner not in ("mlx.core", "ggml", "gguf-py"):
        import torch

        torch.set_num_threads(_threads())
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    calls: Calls = {}
    for line in sys.stdin:
        asked = line.strip()
        if asked in calls:
            print(seconds_of(calls[asked], sys.argv[5], _threads()), file=answers, flush=True)
            continue
        calls = OWNERS[owner](asked, rows, columns)
        for call in calls.values():
            call()
        print(" ".join(calls), file=answers, flush=True)


if __name__ == "__main__":
    main()
