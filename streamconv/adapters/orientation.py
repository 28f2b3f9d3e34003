"""Orientation of a linear layer's weight: [out, in] as `nn.Linear` stores it, or [in, out] as `Conv1D` does."""

from __future__ import annotations

from streamconv.adapters.base import Parameter
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.source import BaseParameters
from streamconv.checkpoint.types import Shape
from streamconv.errors import UnsupportedError

# Models of transformers that use Conv1D (`transformers/pytorch_utils.py`), and what they call such layers.
_CONV1D_MODELS = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def is_transposed(
    parameter: Parameter,
    shape: Shape,
    outputs: int | None,
    inputs: int | None,
    config: AdapterConfig,
    base: BaseParameters,
) -> bool | None:
    """Whether the weight, of `shape` in training, is stored as [in, out]; None where it has another shape than either.

    `outputs` or `inputs` are None where the adapter does not tell. The parameter may know; else the shape says, or
    where both fit, as in a square one, the model does. `fan_in_fan_out` decides last. PEFT sets it to what the last
    layer it wrapped needed, and the bitsandbytes layers leave a wrong value as it is. Raises UnsupportedError where it
    contradicts the model.
    """
    plain, transposed = (
        len(shape) == 2 and _fits(shape, sides) for sides in ((outputs, inputs), (inputs, outputs))
    )
    if parameter.transposed is not None:
        return parameter.transposed if (transposed if parameter.transposed else plain) else None
    if plain != transposed:
        return transposed
    if not plain:
        return None
    layer = parameter.name.split(".")[-2]
    if str(base.config.get("model_type")) in _CONV1D_MODELS:  # config.json may hold anything
        return layer in _CONV1D_LAYERS
    if config.flag("fan_in_fan_out"):
        is_square = "is square, so its shape" if shape[0] == shape[1] else "fits either way, so its shape"
        raise UnsupportedError(
            f"{parameter.name} {is_square} does not tell whether it is stored as [in, out], as"
            f" fan_in_fan_out in {config.name} says; no model of type {base.config.get('model_type')!r} is"
            " known to store weights so: if its layers are nn.Linear, set fan_in_fan_out to false"
        )
    return False


def _fits(shape: Shape, sides: tuple[int | None, int | None]) -> bool:
    return all(side in (None, size) for side, size in zip(sides, shape, strict=True))
