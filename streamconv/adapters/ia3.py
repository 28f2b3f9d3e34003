"""IA³: outputs, or the inputs of a feed-forward layer, each times a trained gain l (Liu et al. 2022, arXiv 2205.05638,
§3.3), as `peft/tuners/ia3/layer.py` has it:

    outputs:  diag(l) W,  l ∘ b        inputs:  W diag(l)

A convolution's gains are of its channels. One in groups has in/groups of them in a kernel: gain g·in/groups + i is for
channel i of the outputs of group g.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parameter, Parts, State, Update
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, AdapterConfig
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.ranks import expression_of
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>ia3_l)")


@dataclass(frozen=True, slots=True)
class GainUpdate(ByRows):
    """Part `gain`, a number for each output (`of_outputs`) or each input; W is [out, in], with `transposed` [in, out],
    [out, in/groups, *kernel], or a bias [out].
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    of_outputs: bool
    transposed: bool = False

    @property
    def held_bytes(self) -> int:
        """A gain for each line of a convolution's kernels, and the channels that these are of."""
        return (4 + 3 * 8) * math.prod(self.shape[:-1]) if len(self.shape) > 2 else 0

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """Gains of rows, or of columns, as the weight is stored."""
        gain = parts["gain"].flatten()
        if len(self.shape) > 2:
            return {"rows": gain[self._channels(gain.numel(), device)]}
        is_of_rows = len(self.shape) == 2 and self.of_outputs != self.transposed
        return {"rows" if is_of_rows else "columns": gain}

    def _channels(self, count: int, device: torch.device) -> Tensor:
        """Channel, of `count`, that each line of the kernels' last axis belongs to."""
        lines = torch.arange(math.prod(self.shape[:-1]), device=device) // math.prod(self.shape[2:-1])
        outputs = lines // self.shape[1]
        if self.of_outputs:
            return outputs
        groups = count // self.shape[1]
        return outputs // (self.shape[0] // groups) * self.shape[1] + lines % self.shape[1]

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` times its gains, in place."""
        if "columns" in prepared:
            return cell.mul_(prepared["columns"])
        return cell.mul_(prepared["rows"][rows.start : rows.stop].unsqueeze(1))

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return constants.get(self.parts["gain"].name) == 1


def read_ia3(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of an IA3 adapter. Raises AdapterError where tensors do not fit base or config."""
    modules = by_module(source, _KEY).items()
    return tuple(
        update for module, parts in modules for update in _updates(module, parts["ia3_l"], source, base)
    )


def _updates(module: str, gain: StoredTensor, source: Source, base: BaseParameters) -> Sequence[Update]:
    parameter = base.get(f"{module}.weight", gain.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    of_inputs = is_feedforward(source.config, source.trained(module))
    parts = MappingProxyType({"gain": gain})
    transposed = False
    if len(shape) > 2:
        _check_conv(gain, parameter, shape, of_inputs, source.config)
    else:
        transposed = _orientation(gain, parameter, shape, of_inputs, source.config, base)
    weight = GainUpdate(parameter.name, shape, parts, not of_inputs, transposed)
    bias = base.find(f"{module}.bias")
    if of_inputs or bias is None:
        return (weight,)
    if bias.shape != (math.prod(gain.shape),):
        raise _misfit(gain, bias, of_inputs, source.config)
    return weight, GainUpdate(bias.name, bias.shape, parts, of_outputs=True)


def is_feedforward(config: AdapterConfig, module: str) -> bool:
    """Whether `feedforward_modules` means the module, by the end of its path, or by a regular expression of all of it
    (`_check_target_module_feedforward` in `peft/tuners/ia3/model.py`).
    """
    field = "feedforward_modules"
    if not isinstance(config.fields.get(field), str):
        return module.endswith(config.names(field)) if config.names(field) else False
    pattern = config.text(field)
    return expression_of(config, field, pattern, pattern).fits_all_of(module)


def _orientation(
    gain: StoredTensor,
    parameter: Parameter,
    shape: Shape,
    of_inputs: bool,
    config: AdapterConfig,
    base: BaseParameters,
) -> bool:
    """Whether the weight is stored as [in, out], for gains [1, in] or [out, 1]."""
    count = math.prod(gain.shape)
    outputs, inputs = (None, count) if of_inputs else (count, None)
    is_gain = gain.shape == ((1, count) if of_inputs else (count, 1))
    transposed = is_transposed(parameter, shape, outputs, inputs, config, base) if is_gain else None
    if transposed is None:
        raise _misfit(gain, parameter, of_inputs, config)
    return transposed


def _check_conv(
    gain: StoredTensor, parameter: Parameter, shape: Shape, of_inputs: bool, config: AdapterConfig
) -> None:
    """Raise AdapterError unless gains [1, channels, 1, ...] are of the outputs, or of the inputs in whole groups."""
    count = math.prod(gain.shape)
    fits = count == shape[0]
    if of_inputs:
        fits = count > 0 and count % shape[1] == 0 and shape[0] % (count // shape[1]) == 0
    if not fits or gain.shape != (1, count, *(1 for _ in shape[2:])):
        raise _misfit(gain, parameter, of_inputs, config)


def _misfit(gain: StoredTensor, parameter: Parameter, of_inputs: bool, config: AdapterConfig) -> AdapterError:
    side = (
        "input, as feedforward_modules lists it"
        if of_inputs
        else "output, as feedforward_modules does not list it"
    )
    return AdapterError(
        f"{gain.name} has shape {list(gain.shape)}, expected a number for each {side}, of {parameter.name} of the base,"
        f" {list(parameter.shape)}; was the adapter trained on this base, and are {config.name} and the tensors of one"
        " adapter?"
    )


IA3 = Method(
    label="IA3",
    read=read_ia3,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "feedforward_modules": USED,
            "fan_in_fan_out": USED,
            "init_ia3_weights": NO_EFFECT,
        }
    ),
    keys=r"ia3_\w+",
    neutral="one (all ia3_l)",
    formula="diag(l) W and l ∘ b; W diag(l) for feedforward_modules",
    layers=("Linear", "Conv1D", "convolutions"),
    multiplies=True,
    orients=True,
)
