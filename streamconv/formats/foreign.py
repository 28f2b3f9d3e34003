"""Quantized checkpoints that are recognised but not decoded, and how they are recognised.

Sources: `quant_method` of transformers' `utils/quantization_config.py`; tensor names of bitsandbytes,
AutoGPTQ, AutoAWQ, compressed-tensors, DeepSeek-V3 (`weight_scale_inv`), gpt-oss (`_blocks`, `_scales`), HQQ
and torchao.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.config import language_levels
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


def unread_quantization(index: CheckpointIndex, readers: Collection[Reader]) -> str | None:
    """Why none of `readers` reads what config.json says of the quantization, as a message; None where one does, or
    where it says nothing.
    """
    config, where = quantization_of(index), index.storage.location
    if not config or any(is_read_by(each, config, where) for each in readers):
        return None
    method = config.get("quant_method")
    for check in (each.marks.methods.get(str(method)) for each in readers):
        if check is None:
            continue
        try:
            check(config, where)
        except UnsupportedError as error:  # each has a reason; the first is that of the format written
            return str(error)
    return str(refusal(config_says(where), str(method) if method else "quantized in an unnamed way"))


def kind_of(quantization: Mapping[str, Any]) -> str:
    """Name of a quantization by its settings: the method, and the variant where one is named."""
    variants = (quantization.get(key) for key in ("format", "quant_algo", "mode"))
    named = [name for name in (quantization.get("quant_method"), *variants) if isinstance(name, str) and name]
    return " ".join(named) or "quantized in an unnamed way"


def is_rotated(quantization: Mapping[str, Any]) -> bool:
    """Whether all weights are in other coordinates than training had, those in 16 bit included."""
    return bool(quantization.get("transform_config"))


def strange_tensors(index: CheckpointIndex, readers: Collection[Reader]) -> Mapping[str, tuple[str, str]]:
    """Tensors that show a quantization of which the config says nothing: kind and message by name."""
    config, where = quantization_of(index), index.storage.location
    owned = {each.marks.owned for each in readers if is_read_by(each, config, where)}
    found: dict[str, tuple[str, str]] = {}
    for name, tensor in index.tensors.items():
        kind = next((kind for suffix, kind in _BY_SUFFIX.items() if name.endswith(suffix)), None)
        if kind is None and _is_fp8(tensor.dtype):
            kind = f"{tensor.dtype} (fp8)"
        if kind is not None and not any(_is_owned(name, roles, index) for roles in owned):
            found[name] = kind, str(refusal(f"{where}: {name} shows that the checkpoint is", kind))
            if len(tensor.shape) == 3 and _is_fp8(tensor.dtype):
                said = f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, experts fused in one tensor"
                found[name] = (
                    kind,
                    f"{said}, of which FP8 is not read yet; give the 16-bit base model instead",
                )
    return MappingProxyType(found)


def quantization_of(index: CheckpointIndex) -> Mapping[str, Any]:
    """Settings of the quantization in config.json; empty if there are none."""
    keys = ("quantization_config", "compression_config", "quantization")
    levels = language_levels(index.config)  # a model of text and images may have it with the text
    found = next((level[key] for level in levels for key in keys if level.get(key)), None)
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


def _is_fp8(dtype: Dtype) -> bool:
    return dtype.code.startswith("F8_")
