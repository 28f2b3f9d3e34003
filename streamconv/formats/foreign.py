"""Quantized checkpoints that are recognised but not read, and how they are recognised.

Sources: `quant_method` of transformers' `utils/quantization_config.py`; tensor names of bitsandbytes,
AutoGPTQ, AutoAWQ, compressed-tensors, DeepSeek-V3 (`weight_scale_inv`), gpt-oss (`_blocks`, `_scales`), HQQ
and torchao.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.index import CheckpointIndex
from streamconv.dtypes import Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats import mlx
from streamconv.formats.base import Reader, config_says, refusal

_BY_SUFFIX: Mapping[str, str] = MappingProxyType(
    {
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


def refuse_foreign(index: CheckpointIndex, formats: Collection[Reader]) -> None:
    """Raise UnsupportedError if the checkpoint is quantized in a way that none of `formats` reads."""
    config = quantization_of(index)
    if _is_mlx(config or index.config.get("quantization")):
        raise refusal(
            config_says(index.storage.location),
            "quantized by MLX (its original is the model that mlx_lm.convert was given)",
        )
    if config:
        _refuse_method(index.storage.location, config, formats)
    where = index.storage.location
    owned = {each.marks.owned for each in formats if is_read_by(each, config, where)}
    for name, tensor in index.tensors.items():
        if any(_is_owned(name, roles, index) for roles in owned):
            continue
        kind = next((kind for suffix, kind in _BY_SUFFIX.items() if name.endswith(suffix)), None)
        if kind is None and _is_fp8(tensor.dtype):
            kind = f"{tensor.dtype} (fp8)"
        if kind is not None:
            raise refusal(f"{index.storage.location}: {name} shows that the checkpoint is", kind)


def quantization_of(index: CheckpointIndex) -> Mapping[str, Any]:
    """Settings of the quantization in config.json; empty if there are none."""
    keys = ("quantization_config", "compression_config", "quantization")
    found = next((index.config[key] for key in keys if index.config.get(key)), None)
    if not isinstance(found, Mapping):
        return {}
    return {**found, "quant_method": mlx.METHOD} if mlx.is_mlx(found) else found


def is_read_by(reader: Reader, config: Mapping[str, Any], where: str) -> bool:
    """Whether a reader reads checkpoints of this quantization."""
    check = reader.marks.methods.get(str(config.get("quant_method")))
    try:
        if check is not None:
            check(config, where)
    except UnsupportedError:
        return False
    return check is not None


def _is_owned(name: str, roles: tuple[str, ...], index: CheckpointIndex) -> bool:
    """Whether a tensor is one of the `roles` of a weight that a format finds, and judges."""
    module, _, role = name.rpartition(".")
    return role in roles and f"{module}.{roles[0]}" in index.tensors


def _refuse_method(where: str, config: Mapping[str, Any], formats: Collection[Reader]) -> None:
    method = config.get("quant_method")
    checks = [check for each in formats for name, check in each.marks.methods.items() if name == method]
    if checks and not any(is_read_by(each, config, where) for each in formats):
        for check in checks:  # each has a reason; the first is that of the format written
            check(config, where)
    if not checks:
        raise refusal(config_says(where), str(method) if method else "quantized in an unnamed way")


def _is_mlx(config: object) -> bool:
    """Whether these settings are as `mlx_lm.convert` writes them: under `quantization`, and in newer versions twice."""
    return (
        isinstance(config, Mapping)
        and "quant_method" not in config
        and {"group_size", "bits"} <= config.keys()
    )


def _is_fp8(dtype: Dtype) -> bool:
    return dtype.code.startswith("F8_")
