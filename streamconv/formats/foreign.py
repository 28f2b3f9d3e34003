"""Quantized checkpoints that are recognised but not read, and how they are recognised.

Sources: `quant_method` of transformers' `utils/quantization_config.py`; tensor names of bitsandbytes,
AutoGPTQ, AutoAWQ, compressed-tensors, DeepSeek-V3 (`weight_scale_inv`), gpt-oss (`_blocks`, `_scales`), HQQ
and torchao.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.index import CheckpointIndex
from streamconv.dtypes import Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats import pack_quantized

_BY_SUFFIX: Mapping[str, str] = MappingProxyType(
    {
        ".qweight": "GPTQ or AWQ",
        ".qzeros": "GPTQ or AWQ",
        ".weight_packed": "compressed-tensors",
        ".weight_scale_inv": "block-wise fp8",
        ".weight_scale": "fp8 or int8 (compressed-tensors, FBGEMM)",
        "_proj_blocks": "mxfp4",
        "_proj_scales": "mxfp4",
        ".W_q": "HQQ",
        "._weight_qdata": "torchao",
        ":_weight_qdata": "torchao",
    }
)


def refuse_foreign(index: CheckpointIndex) -> None:
    """Raise UnsupportedError if the checkpoint is quantized in a way that no format here reads."""
    config = quantization_of(index)
    if config:
        _refuse_method(index, config)
    reads_packed = config.get("quant_method") == pack_quantized.METHOD
    for name, tensor in index.tensors.items():
        if reads_packed and _is_packed(name, index):
            continue
        kind = next((kind for suffix, kind in _BY_SUFFIX.items() if name.endswith(suffix)), None)
        if kind is None and _is_fp8(tensor.dtype):
            kind = f"{tensor.dtype} (fp8)"
        if kind is not None:
            raise _refusal(f"{index.storage.location}: {name} shows that the checkpoint is", kind)


def quantization_of(index: CheckpointIndex) -> Mapping[str, Any]:
    """What config.json says of the quantization; empty if nothing."""
    config = index.config.get("quantization_config") or index.config.get("compression_config")
    return config if isinstance(config, Mapping) else {}


def _is_packed(name: str, index: CheckpointIndex) -> bool:
    """Whether a tensor is a part of a weight that `pack_quantized` finds, and judges."""
    module, _, role = name.rpartition(".")
    return role in (pack_quantized.MAIN, pack_quantized.SCALES) and (
        f"{module}.{pack_quantized.MAIN}" in index.tensors
    )


def _refuse_method(index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    where = f"{index.storage.location}: config.json says that the checkpoint is"
    method = config.get("quant_method")
    if method == pack_quantized.METHOD:
        pack_quantized.read_schemes(config, where)
    elif method != "bitsandbytes":
        raise _refusal(where, str(method) if method else "quantized in an unnamed way")


def _is_fp8(dtype: Dtype) -> bool:
    return dtype.code.startswith("F8_")


def _refusal(where: str, kind: str) -> UnsupportedError:
    return UnsupportedError(f"{where} {kind}, which is not supported yet; give the 16-bit base model instead")
