"""FP8 weights as DeepSeek, compressed-tensors, FBGEMM and ModelOpt store them.

    P.weight            F8_E4M3 [out, in]
    P.weight_scale_inv  float32 [⌈out/128⌉, ⌈in/128⌉]: DeepSeek-V3 (`inference/fp8_cast_bf16.py`), `quant_method` fp8
    P.weight_scale      a scale for the tensor, a row, a block: compressed-tensors (`float-quantized`), FBGEMM, ModelOpt

Scales multiply. Those of activations lie beside and say nothing of the weight. Written are `fp8`, which is FP8_DYNAMIC
of compressed-tensors, a scale a row and activations quantized as they come; and `fp8-block`, as DeepSeek-V3 has it. A
base of any other kind keeps its own storage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import BF16, DENSE, F16, F32, Dtype
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats.base import NO_MARKS, Json, Marks, Weight, check_tensor, config_says, refusal
from streamconv.formats.compressed import (
    METHOD,
    InGroups,
    arguments,
    formats_of,
    groups_of,
    part_of,
    weights_of,
)
from streamconv.formats.dense import largest_dtype
from streamconv.formats.fp8_storage import (
    CODE,
    EXPONENTS,
    MAIN,
    Blocks,
    Fp8Decoder,
    Fp8Encoder,
    Fp8TensorEncoder,
    grid_of_blocks,
)
from streamconv.formats.linear import means
from streamconv.formats.undecoded import find_each
from streamconv.kernels.grids import E4M3, TableGrid

INVERSE, SCALE = "weight_scale_inv", "weight_scale"
_SCALES = (INVERSE, SCALE)
ACTIVATIONS = (
    "input_scale",
    "input_global_scale",
    "activation_scale",
    "input_scale_ub",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "input_zero_point",
)
"""Last components of tensors about activations, which a weight in 16 bit has no use for."""
_BLOCK = 128
_BLOCKS = grid_of_blocks(_BLOCK, _BLOCK)
_STORAGES = frozenset({"float-quantized", "naive-quantized", "mxfp8-quantized"})
# Only to say what a scale a row amounts to.
_USUAL_COLUMNS = 4096


# -- reading -----------------------------------------------------------------------------------------------


def find_fp8(free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
    """Weights with scales of either name. Raises CheckpointError where those of one are missing or do not fit."""
    mains = [tensor for name, tensor in free.items() if tensor.dtype == CODE and name.endswith(f".{MAIN}")]
    dtype = largest_dtype(free, but=(*_SCALES, *ACTIVATIONS))
    return find_each(
        [main.name.removesuffix(f".{MAIN}") for main in mains],
        lambda module: _weight(free[f"{module}.{MAIN}"], free, quantization, dtype),
        free,
        "fp8",
    )


def _weight(
    main: StoredTensor, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any], dtype: Dtype
) -> Weight:
    module = main.name.removesuffix(MAIN)
    role = next((role for role in _SCALES if module + role in free), None)
    if role is None and module + "scale" in free:
        raise refusal(f"{main.name} is", f"{main.dtype} with another kind of scales beside it (scale)")
    if role is None:
        raise CheckpointError(
            f"{main.name} is {main.dtype}, and has no {' or '.join(_SCALES)} beside it; the checkpoint is incomplete,"
            " download it again"
        )
    scales = free[module + role]
    rows, columns = _matrix(main)
    blocks = _blocks(scales, rows, columns, quantization)
    counts = blocks.counts
    shapes = (counts, *(((), (1,)) if counts == (1, 1) else ((rows,),) if counts == (rows, 1) else ()))
    check_tensor(scales, ("F32", "BF16", "F16", *(each.code for each in EXPONENTS)), shapes)
    others = {each: free[module + each] for each in ACTIVATIONS if module + each in free}
    if role == SCALE and scales.dtype in (BF16, F16):
        dtype = scales.dtype  # compressed-tensors gives them the type of the weight
    form = _form(role, scales, blocks, dtype, quantization)
    decoder = Fp8Decoder(main.name, scales.name, role, blocks, dtype)
    spec = TensorSpec(scales.name, scales.dtype, scales.shape)
    kind = Fp8TensorEncoder if blocks.is_one else Fp8Encoder
    keep = kind(form, main.name, main.shape, dtype, spec, role, blocks)
    parts = {MAIN: main, role: scales, **others}
    return Weight(main.name, main.shape, dtype, form, decoder, parts, keep)


def _matrix(main: StoredTensor) -> tuple[int, int]:
    if len(main.shape) != 2 or not min(main.shape):
        raise CheckpointError(f"{main.file.name}: {main.name}: found {list(main.shape)}, expected a matrix")
    return main.shape[0], main.shape[1]


def _blocks(scales: StoredTensor, rows: int, columns: int, quantization: Mapping[str, Any]) -> Blocks:
    """Blocks that share a scale, by the scales' shape, and by the config where they are many."""
    stated = _stated(quantization)
    if scales.shape in ((), (1,), (1, 1)) and rows * columns > 1:
        if stated is not None and stated[0] >= rows and stated[1] >= columns:
            return Blocks(rows, columns, *stated)
        is_row = rows == 1 and "channel" in {each.get("strategy") for each in weights_of(quantization)}
        return Blocks(rows, columns, rows, columns, is_one=not is_row)
    if scales.shape in ((rows,), (rows, 1)):
        is_narrow = stated is not None and stated[0] == 1 and stated[1] < columns
        return Blocks(rows, columns, 1, stated[1] if stated is not None and is_narrow else columns)
    return Blocks(rows, columns, *(stated or (_BLOCK, _BLOCK)))


def _stated(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Block that the config states: `weight_block_size`, or the `block_structure` or `group_size` of a group."""
    found = [quantization.get("weight_block_size")]
    for weights in weights_of(quantization):
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            continue  # of other modules
        found += [weights.get("block_structure"), [1, weights.get("group_size")]]
    for each in found:
        if (
            isinstance(each, list)
            and len(each) == 2
            and all(isinstance(side, int) and side > 0 for side in each)
        ):
            return each[0], each[1]
    return None


def _form(
    role: str, scales: StoredTensor, blocks: Blocks, dtype: Dtype, quantization: Mapping[str, Any]
) -> str:
    """Name of the format that stores weights so; with remarks, where a file differs from what is written."""
    stated = _stated(quantization)
    is_block = role == INVERSE or (stated is not None and (blocks.height, blocks.width) == stated)
    if is_block:
        size = (blocks.height, blocks.width)
        remarks = [f"blocks of {size[0]} x {size[1]}"] if size != (_BLOCK, _BLOCK) else []
        remarks += [role] if role != INVERSE else []
        usual = F32
    else:
        remarks = ["a scale a tensor"] if blocks.is_one else []
        remarks += (
            ["scales in one axis"] if not blocks.is_one and len(scales.shape) == 1 and blocks.rows > 1 else []
        )
        usual = dtype
    remarks += [f"scales in {scales.dtype}"] if scales.dtype != usual else []
    remarks += ["static activations"] if is_static(quantization) else []
    return ", ".join(["fp8-block" if is_block else "fp8", *remarks])


def is_static(quantization: Mapping[str, Any]) -> bool:
    """Whether the config tells of scales of activations or of a KV cache, which are in the file."""
    inputs = [group.get("input_activations") for group in groups_of(quantization)]
    return (
        quantization.get("activation_scheme") == "static"
        or bool(quantization.get("kv_cache_scheme"))
        or any(isinstance(each, Mapping) and each.get("dynamic") is False for each in inputs)
    )


def written_form(name: str) -> str:
    """Name of the format that is written, of weights that a reader of FP8 calls `name`."""
    plain = name.partition(", ")[0]
    return plain if plain in ("fp8", "fp8-block") else name


def _check_codes(config: Mapping[str, Any], where: str) -> None:
    """Refuse what `fp8` and `fbgemm_fp8` may say of codes other than E4M3; the tensors tell the rest."""
    fmt = config.get("fmt", "e4m3")
    if fmt != "e4m3":
        raise refusal(config_says(where), f"fp8 with fmt {shown(fmt)}")


def _check_modelopt(config: Mapping[str, Any], where: str) -> None:
    algorithm = config.get("quant_algo")
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"):
        raise refusal(config_says(where), f"modelopt, {shown(algorithm)}")


def _check_compressed(config: Mapping[str, Any], where: str) -> None:
    config = part_of(config, _STORAGES)
    weights = weights_of(config)
    are_fp8 = bool(weights) and all(
        (each.get("type"), each.get("num_bits")) == ("float", 8) for each in weights
    )
    if not are_fp8 or formats_of(config) - _STORAGES:
        raise refusal(config_says(where), f"{METHOD}, and its format is {shown(config.get('format'))}")


_MARKS = Marks(
    side_suffixes=tuple(f".{role}" for role in _SCALES),
    owned=("weight", *_SCALES, *ACTIVATIONS),
    methods=MappingProxyType(
        {
            "fp8": _check_codes,
            "fbgemm_fp8": _check_codes,
            "modelopt": _check_modelopt,
            METHOD: _check_compressed,
        }
    ),
)


# -- the formats -------------------------------------------------------------------------------------------


def _fits(shape: Shape) -> bool:
    """Whether codes end where scales may begin. A single row is a gate, which vLLM expects in 16 bit."""
    return len(shape) == 2 and shape[0] > 1 and math.prod(shape) > 0 and math.prod(shape) % 4 == 0


def _check_encoded(format_name: str, name: str, shape: Shape, dtype: Dtype) -> None:
    if len(shape) != 2 or not math.prod(shape) or not name.endswith(f".{MAIN}"):
        raise UnsupportedError(
            f"{name} has shape {list(shape)}; {format_name} stores matrices of modules only: exclude it with --ignore"
        )
    if dtype.name not in DENSE:
        raise UnsupportedError(
            f"{name} is {dtype}; {format_name} stores weights of {', '.join(DENSE)}: exclude it with --ignore"
        )


@dataclass(frozen=True, slots=True)
class Fp8Format(InGroups):
    """compressed-tensors' FP8_DYNAMIC: a scale a row, in the type of the weight. It finds FP8 weights of any kind."""

    name: str
    grid: TableGrid = E4M3
    layout: str = "compressed-tensors, 8-bit floats (E4M3) with a scale a row; 8-bit activations, too"
    loaders: str = "vLLM, transformers with compressed-tensors"
    library: str = METHOD
    family: str = METHOD
    has_partners: bool = True
    load_in: None = None
    skips_by_path: bool = True
    expert_loaders: tuple[str, ...] = ("transformers with compressed-tensors", "vLLM")
    config_copy: str | None = None
    marks: Marks = _MARKS

    @property
    def bits_per_weight(self) -> float:
        return 8 + 16 / _USUAL_COLUMNS

    def fits(self, name: str, shape: Shape) -> bool:
        del name
        return _fits(shape)

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format."""
        return find_fp8(free, quantization)

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> Fp8Encoder:
        """See Format."""
        _check_encoded(self.name, name, shape, dtype)
        rows, columns = shape
        scale = TensorSpec(name.removesuffix(MAIN) + SCALE, dtype, (rows, 1))
        return Fp8Encoder(self.name, name, shape, dtype, scale, SCALE, Blocks(rows, columns, 1, columns))

    def module_config(self) -> Json:
        """See Mixable."""
        return {
            "format": "float-quantized",
            "input_activations": arguments("float", 8, "token", dynamic=True),
            "output_activations": None,
            "weights": arguments("float", 8, "channel"),
        }


@dataclass(frozen=True, slots=True)
class Fp8BlockFormat:
    """DeepSeek-V3's FP8: float32 scales of blocks of 128 rows and columns."""

    name: str
    grid: TableGrid = _BLOCKS
    layout: str = "DeepSeek's, 8-bit floats (E4M3) with a float32 scale for 128 x 128; 8-bit activations, too"
    loaders: str = "vLLM, SGLang, transformers"
    library: None = None
    load_in: None = None
    skips_by_path: bool = True
    expert_loaders: tuple[str, ...] = ("transformers", "vLLM", "SGLang")
    config_copy: str | None = None
    marks: Marks = NO_MARKS

    @property
    def bits_per_weight(self) -> float:
        return 8 + 32 / _BLOCK**2

    def fits(self, name: str, shape: Shape) -> bool:
        """Whole blocks, or less than one: transformers 5.23 takes 960 rows for eight blocks of 120, and vLLM none."""
        del name
        return _fits(shape) and all(side < _BLOCK or side % _BLOCK == 0 for side in shape)

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Fp8Format finds them all."""
        del free, quantization
        return ()

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> Fp8Encoder:
        """See Format."""
        _check_encoded(self.name, name, shape, dtype)
        blocks = Blocks(shape[0], shape[1], _BLOCK, _BLOCK)
        scale = TensorSpec(name.removesuffix(MAIN) + INVERSE, F32, blocks.counts)
        return Fp8Encoder(self.name, name, shape, dtype, scale, INVERSE, blocks)

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """The keys of DeepSeek-V3's config, and the list that Qwen3's has."""
        del dtype
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": _names(skipped, quantized),
            "quant_method": "fp8",
            "weight_block_size": [_BLOCK, _BLOCK],
        }


def _names(skipped: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """Entries of a skip list as this config has them: whole paths, or ends of paths; no expressions.

    Raises UnsupportedError where such an entry would mean a module that is quantized.
    """
    names = []
    for entry in skipped:
        name = entry.removeprefix(r"re:(?:.*\.)?").removesuffix("$").replace("\\", "")
        if name.startswith("re:"):
            raise UnsupportedError(
                "experts that are one parameter would stay in 16 bit, which the config of fp8-block cannot say in a "
                "way that all loaders read: choose --quant fp8"
            )
        module = next((each for each in quantized if means(name, each.removesuffix(f".{MAIN}"))), None)
        if module is not None:
            raise UnsupportedError(
                f"{name} must stay in 16 bit, but loaders would take that name for {module} too; quantize both or "
                "neither, or choose --quant fp8"
            )
        names.append(name)
    return names
