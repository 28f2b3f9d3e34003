"""Weights of every format in memory, as `tools/bench/formats` has them written and read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.base import Decoder, Encoder, Surveyed, Weight, matrix_shape
from streamconv.formats.dense import DenseDecoder
from streamconv.formats.ggml_blocks import GgmlDecoder
from streamconv.formats.gguf import PREFIX
from streamconv.formats.rows import in_file_order
from streamconv.kernels.ggml import BLOCK_TYPES
from streamconv.planning.plan import Rewrite
from streamconv.rounding import ROUNDINGS
from streamconv.running.cell import cells
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Workers
from streamconv.storage import open_storage

Shape = tuple[int, int]
NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Encoding:
    """A bfloat16 matrix, its encoder, and where its main part goes."""

    weight: Tensor
    encoder: Encoder
    out: Tensor
    workers: Workers

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.weight.nbytes + sum(spec.nbytes for spec in self.encoder.parts)

    def run(self) -> tuple[Encoder, tuple[bytes, ...], Tensor]:
        """Return the encoder as it comes to be known, the parts after the main one, and that as a file has it."""
        encoder, raw = self.encoder, self.weight.view(torch.uint8).view(-1)
        rows = range(self.weight.shape[0])
        if isinstance(encoder, Surveyed) and not encoder.is_known:
            found = torch.empty(-(-len(rows) // 64))
            self._work(encoder, 64).greatest(raw, rows, found)
            encoder = encoder.knowing(float(found.max()))
        work = self._work(encoder, encoder.cell_rows)
        work.rewrite(raw, rows, self.out).wait()
        return encoder, work.finish()[0], in_file_order(encoder.order, self.out)

    def _work(self, encoder: Encoder, height: int) -> WeightWork:
        decoder = DenseDecoder(BF16, self.weight.shape[1])
        shape = tuple(self.weight.shape)
        stored = Weight(NAME, shape, BF16, BF16.name, decoder, MappingProxyType({}))
        step = Rewrite(NAME, stored, (), encoder, None if encoder.grid is None else ROUNDINGS["nearest"])
        return WeightWork(step, {}, [], _CPU, 0, self.workers, height)


@dataclass(frozen=True, slots=True)
class Decoding:
    """A weight as a file has it, and the float32 matrix that it becomes."""

    decoder: Decoder
    main: Tensor
    side: Mapping[str, Tensor]
    out: Tensor
    workers: Workers

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.main.nbytes + sum(each.nbytes for each in self.side.values()) + self.out.nbytes

    def run(self) -> None:
        form, order = self.main, self.decoder.order
        if order is not None:
            form = torch.empty_like(self.main)
            order.from_file(self.main, range(order.lines), form)
        scales = self.decoder.scales(self.side)
        self.workers.map(partial(self._decode, form, scales), range(len(self.out)))

    def _decode(self, form: Tensor, scales: Tensor | None, number: int, part: range) -> None:
        del number
        offset, grid, columns = self.decoder.row_offset, self.decoder.grid, self.out.shape[1]
        for rows in cells(part):
            raw, own = form[offset(rows.start) : offset(rows.stop)], scales
            if scales is not None and grid is not None:
                own = scales[rows.start * columns // grid.block : -(-rows.stop * columns // grid.block)]
            self.decoder.decode(raw, rows, own, self.out[rows.start : rows.stop])


def work_on(name: str, shape: Shape, workers: Workers) -> tuple[Encoding | None, Decoding]:
    """What writes the format, unless it is only read, and what reads it."""
    if name.removeprefix(PREFIX) in BLOCK_TYPES and name.startswith(PREFIX):
        return _ggml(name, shape, workers)
    if name in _FOREIGN:
        weight, main, side = _read(*_FOREIGN[name](name, shape))
        rows, columns = matrix_shape(weight.shape)
        encoding = None if weight.keep is None else _encoding(weight.keep, (rows, columns), workers)
    else:
        storage_format = FORMATS[name]
        encoding = _encoding(storage_format.encoder(NAME, shape, BF16), shape, workers)
        config = storage_format.quantization_config(BF16, (NAME,), ())
        weight, main, side = _read(_tensors(*encoding.run()), config)
    out = torch.empty(matrix_shape(weight.shape))
    return encoding, Decoding(weight.decoder, main, side, out, workers)


def _encoding(encoder: Encoder, shape: Shape, workers: Workers) -> Encoding:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    return Encoding(weight, encoder, torch.empty(encoder.row_offset(shape[0]), dtype=torch.uint8), workers)


def _ggml(name: str, shape: Shape, workers: Workers) -> tuple[Encoding | None, Decoding]:
    kind, out = BLOCK_TYPES[name.removeprefix(PREFIX)], torch.empty(shape)
    if name in FORMATS:
        encoding = _encoding(FORMATS[name].encoder(NAME, shape, BF16), shape, workers)
        main = encoding.run()[2]
    else:
        encoding = None
        main = torch.randint(0, 256, (shape[0] * kind.row_bytes(shape[1]),), dtype=torch.uint8)
    return encoding, Decoding(GgmlDecoder(kind, shape[1]), main, {}, out, workers)


def _tensors(encoder: Encoder, tail: tuple[bytes, ...], main: Tensor) -> dict[str, Tensor]:
    specs = (*encoder.parts[1:], *(constant.spec for constant in encoder.constants))
    contents = (*tail, *(constant.content for constant in encoder.constants))
    found = {encoder.parts[0].name: _shaped(main, encoder.parts[0])}
    for spec, content in zip(specs, contents, strict=True):
        found[spec.name] = _shaped(torch.frombuffer(bytearray(content), dtype=torch.uint8), spec)
    return found


def _shaped(raw: Tensor, spec: TensorSpec) -> Tensor:
    return raw.view(spec.dtype.torch).view(spec.shape)


def _read(
    tensors: dict[str, Tensor], quantization: Mapping[str, Any] | None
) -> tuple[Weight, Tensor, Mapping[str, Tensor]]:
    """The weight that a checkpoint of these tensors has, the bytes of its main part, and its other parts."""
    config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16"}
    if quantization is not None:
        config["quantization" if "mode" in quantization else "quantization_config"] = dict(quantization)
    with tempfile.TemporaryDirectory() as folder, TensorReader() as reader:
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (weight,) = find_weights(read_index(open_storage(folder)))
        parts = {role: reader.load(part) for role, part in weight.parts.items()}
    main = parts.pop(weight.decoder.main)
    return weight, main.view(-1).view(torch.uint8), parts


# -- what is read and not written --------------------------------------------------------------------------------


def _gptq(name: str, shape: Shape) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    rows, columns = shape
    bits = 8 if "8 bit" in name else 4
    groups = torch.arange(columns, dtype=torch.int32) // 128
    count = columns // 128
    tensors = {
        "qweight": _words(columns * bits // 32, rows),
        "qzeros": _words(count, rows * bits // 32),
        "scales": (torch.rand(count, rows) * 0.01).half(),
        "g_idx": groups[torch.randperm(columns)],
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": 128, "desc_act": True, "sym": False}
    return {f"{MODULE}.{role}": each for role, each in tensors.items()}, config


def _mlx(name: str, shape: Shape) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    rows, columns = shape
    bits = int(name.removeprefix("mlx"))
    scales = (torch.randn(rows, columns // 64) * 0.01).bfloat16()
    tensors = {
        NAME: _words(rows, columns * bits // 32).view(torch.uint32),
        f"{MODULE}.scales": scales,
        f"{MODULE}.biases": scales.clone(),
    }
    return tensors, {"group_size": 64, "bits": bits, "mode": "affine"}


def _modelopt(name: str, shape: Shape) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    del name
    rows, columns = shape
    tensors = {
        NAME: torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        f"{MODULE}.weight_scale": (torch.rand(rows, columns // 16) * 100).to(torch.float8_e4m3fn),
        f"{MODULE}.weight_scale_2": torch.tensor(1e-4),
    }
    return tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}


def _gpt_oss(name: str, shape: Shape) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    del name
    rows, columns = shape
    parameter = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{parameter}_blocks": torch.randint(0, 256, (1, rows, columns // 32, 16), dtype=torch.uint8),
        f"{parameter}_scales": torch.randint(115, 125, (1, rows, columns // 32), dtype=torch.uint8),
    }
    return tensors, {"quant_method": "mxfp4"}


def _words(rows: int, columns: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)


_FOREIGN: Mapping[str, Callable[[str, Shape], tuple[dict[str, Tensor], Mapping[str, Any]]]] = {
    "gptq, activation order": _gptq,
    "gptq, 8 bit, activation order": _gptq,
    "mlx2": _mlx,
    "mlx3": _mlx,
    "mlx5": _mlx,
    "mlx6": _mlx,
    "nvfp4, ModelOpt": _modelopt,
    "gpt-oss": _gpt_oss,
}
