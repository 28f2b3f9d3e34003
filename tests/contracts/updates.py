"""Adapters of every form that is read, small enough to be written anew for a test, and what each must do.

A form names the base's parameters and the adapter's tensors by their shapes; values are drawn where they are needed.
The updates are those that the reader makes of such a file, so no test knows how one is constructed. How one is run,
and how it says that it was never trained, stands at the end, in functions that alone name the protocol's members.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter, Parts, State, Update, UpdateAccess
from streamconv.adapters.source import MoeLayout
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.equalization.equalizer import COLUMNS as SCALES_OF_COLUMNS
from streamconv.equalization.equalizer import ROWS as SCALES_OF_ROWS
from streamconv.equalization.equalizer import Equalizer
from streamconv.errors import AdapterError
from streamconv.formats.base import matrix_shape
from streamconv.storage import open_storage

Tensors = Mapping[str, Tensor]
Maths = Callable[[Tensors, Tensors], Tensors]
"""Weights and the adapter's tensors, float64, to the weights that differ."""

RANK, ALPHA = 4, 2.0
SCALING = ALPHA / RANK
# The last of three cells has 22 rows.
ROWS, COLUMNS = 150, 96
EXPERTS = 3


@dataclass(frozen=True, slots=True)
class Form:
    """`maths` follows the paper; it is off by `tolerance` at most, relative to the greatest value, where the result is
    more than one rounding away from it. `targets` may be none where trained tensors are all there is.
    """

    weights: Mapping[str, Shape]
    tensors: Mapping[str, Shape]
    maths: Maths
    fields: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 2.0**-22
    targets: Sequence[str] = ("layer",)
    moe: MoeLayout = field(default_factory=MoeLayout)

    @property
    def config(self) -> Mapping[str, Any]:
        common = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(self.targets)}
        return common | dict(self.fields)

    def write(self, folder: Path, tensors: Tensors) -> None:
        """The adapter as PEFT would save it."""
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors")

    def read(self, folder: Path) -> Adapter:
        parameters = {name: Parameter(name, shape) for name, shape in self.weights.items()}
        return read_adapter(open_storage(str(folder)), parameters, {}, None, self.moe)


def drawn(shapes: Mapping[str, Shape], seed: int) -> Tensors:
    """Normally distributed values. DoRA's magnitudes are norms, and positive."""
    torch.manual_seed(seed)
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {name: tensor.abs() if "magnitude" in name else tensor for name, tensor in found.items()}


def drawn_small(shapes: Mapping[str, Shape], seed: int) -> Tensors:
    """Integers from -3 to 3: of these, sums and products have no rounding in any order, and zeros are among them."""
    torch.manual_seed(seed)
    found = {name: torch.randint(-3, 4, shape).float() for name, shape in shapes.items()}
    return {name: tensor.abs() + 1 if "magnitude" in name else tensor for name, tensor in found.items()}


# -- the maths -----------------------------------------------------------------------------------------------------


def _delta(tensors: Tensors) -> Tensor:
    """s·B A [out, in] of the one layer."""
    return SCALING * tensors["layer.lora_B.weight"] @ tensors["layer.lora_A.weight"]


def _lora(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": weights["layer.weight"] + _delta(tensors)}


def _lora_of_conv1d(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": weights["layer.weight"] + _delta(tensors).T}


def _lora_of_embedding(weights: Tensors, tensors: Tensors) -> Tensors:
    delta = SCALING * tensors["layer.lora_embedding_B"] @ tensors["layer.lora_embedding_A"]
    return {"layer.weight": weights["layer.weight"] + delta.T}


def _lora_of_parts(weights: Tensors, tensors: Tensors) -> Tensors:
    """Of the gate, the first half of the rows, or of up, the second, or of both."""
    weight = weights["layer.gate_up_proj.weight"].clone()
    for half, name in zip(weight.chunk(2), ("gate_proj", "up_proj"), strict=True):
        if f"layer.{name}.lora_A.weight" in tensors:
            half.add_(
                SCALING * tensors[f"layer.{name}.lora_B.weight"] @ tensors[f"layer.{name}.lora_A.weight"]
            )
    return {"layer.gate_up_proj.weight": weight}


def _lora_with_bias(weights: Tensors, tensors: Tensors) -> Tensors:
    bias = weights["layer.bias"] + SCALING * tensors["layer.lora_B.bias"]
    return {**_lora(weights, tensors), "layer.bias": bias}


def _to_norms(updated: Tensor, magnitude: Tensor) -> Tensor:
    """Outputs, the first axis of `updated`, each with the norm that was trained."""
    norms = updated.flatten(1).norm(dim=1)
    found: Tensor = updated * (magnitude.flatten() / norms).reshape(-1, *(1 for _ in updated.shape[1:]))
    return found


def _dora(weights: Tensors, tensors: Tensors) -> Tensors:
    updated = weights["layer.weight"] + _delta(tensors)
    return {"layer.weight": _to_norms(updated, tensors["layer.lora_magnitude_vector"])}


def _dora_of_conv1d(weights: Tensors, tensors: Tensors) -> Tensors:
    updated = weights["layer.weight"].T + _delta(tensors)
    return {"layer.weight": _to_norms(updated, tensors["layer.lora_magnitude_vector"]).T}


def _conv(weights: Tensors, tensors: Tensors) -> Tensors:
    a, b = tensors["layer.lora_A.weight"], tensors["layer.lora_B.weight"]
    delta = SCALING * torch.einsum("or,rikl->oikl", b.flatten(1), a)
    return {"layer.weight": weights["layer.weight"] + delta}


def _conv_dora(weights: Tensors, tensors: Tensors) -> Tensors:
    updated = _conv(weights, tensors)["layer.weight"]
    return {"layer.weight": _to_norms(updated, tensors["layer.lora_magnitude_vector"])}


def _without_largest(weight: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    found: Tensor = weight - (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    return found


def _pissa(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": _without_largest(weights["layer.weight"]) + _delta(tensors)}


def _pissa_of_conv1d(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": (_without_largest(weights["layer.weight"].T) + _delta(tensors)).T}


def _olora(weights: Tensors, tensors: Tensors) -> Tensors:
    weight = weights["layer.weight"]
    q = torch.linalg.qr(weight[:, :RANK])[
        0
    ]  # what the first factors make is a projection, whatever their signs
    return {"layer.weight": weight - SCALING * q @ (q.T @ weight) + _delta(tensors)}


def _kasa(weights: Tensors, tensors: Tensors) -> Tensors:
    u, s, vh = torch.linalg.svd(weights["layer.weight"], full_matrices=False)
    kept = (u[:, :-RANK] * s[:-RANK]) @ vh[:-RANK]
    scaled = tensors["layer.lora_diag"].unsqueeze(1) * tensors["layer.lora_A.weight"]
    return {"layer.weight": kept + SCALING * tensors["layer.lora_B.weight"] @ scaled}


def _block_diagonal(stored: Tensor, blocks: int) -> Tensor:
    """Blocks that are stored one below the other, on the diagonal."""
    height, width = stored.shape[0] // blocks, stored.shape[1]
    full = stored.new_zeros(stored.shape[0], width * blocks)
    for block in range(blocks):
        rows, columns = (slice(block * size, (block + 1) * size) for size in (height, width))
        full[rows, columns] = stored[rows]
    return full


def _blocks_of_a(weights: Tensors, tensors: Tensors) -> Tensors:
    full = _block_diagonal(tensors["layer.lora_A.weight"], 2)
    return {"layer.weight": weights["layer.weight"] + SCALING * tensors["layer.lora_B.weight"] @ full}


def _blocks_of_b(weights: Tensors, tensors: Tensors) -> Tensors:
    full = _block_diagonal(tensors["layer.lora_B.weight"], 2)
    return {"layer.weight": weights["layer.weight"] + SCALING * full @ tensors["layer.lora_A.weight"]}


GROUP = 2


def _pooled_delta(tensors: Tensors) -> Tensor:
    """[out, in]: inputs are pooled to the mean of a group, times the number of groups."""
    a = tensors["layer.lora_A.weight"]
    pooled = a.repeat_interleave(GROUP, dim=1) / GROUP * a.shape[1]
    return SCALING * tensors["layer.lora_B.weight"] @ pooled


def _pooled(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": weights["layer.weight"] + _pooled_delta(tensors)}


def _pooled_of_conv1d(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": weights["layer.weight"] + _pooled_delta(tensors).T}


def _of_expert(tensors: Tensors, expert: int, expert_major: bool = False) -> Tensor:
    """s·B A of one expert."""
    a, b = tensors["experts.lora_A.weight"], tensors["experts.lora_B.weight"]
    columns = slice(expert * RANK, (expert + 1) * RANK) if expert_major else slice(expert, None, EXPERTS)
    return SCALING * b[:, columns] @ a[expert * RANK : (expert + 1) * RANK]


def _fused(weights: Tensors, tensors: Tensors) -> Tensors:
    deltas = torch.stack([_of_expert(tensors, expert) for expert in range(EXPERTS)])
    return {"experts.down_proj": weights["experts.down_proj"] + deltas}


def _fused_middle(weights: Tensors, tensors: Tensors) -> Tensors:
    deltas = torch.stack([_of_expert(tensors, expert).T for expert in range(EXPERTS)])
    return {"experts.down_proj": weights["experts.down_proj"] + deltas}


def _apart(weights: Tensors, tensors: Tensors) -> Tensors:
    found = {}
    for expert in range(EXPERTS):
        gate, up = _of_expert(tensors, expert, expert_major=True).chunk(2)
        for name, delta in (("gate_proj", gate), ("up_proj", up)):
            key = f"experts.{expert}.{name}.weight"
            found[key] = weights[key] + delta
    return found


TOKENS = (149, 3, 64, 63)


def _rows(weights: Tensors, tensors: Tensors) -> Tensors:
    found = weights["layer.weight"].clone()
    found[list(TOKENS)] = tensors["layer.token_adapter.trainable_tokens_delta"]
    return {"layer.weight": found}


def _saved(weights: Tensors, tensors: Tensors) -> Tensors:
    return {**_lora(weights, tensors), "norm.weight": tensors["norm.weight"]}


def _loha(weights: Tensors, tensors: Tensors) -> Tensors:
    """Kernels flattened, if there are any."""
    one, other = (tensors[f"layer.hada_{w}_a"] @ tensors[f"layer.hada_{w}_b"] for w in ("w1", "w2"))
    weight = weights["layer.weight"]
    return {"layer.weight": weight + SCALING * (one * other).reshape(weight.shape)}


def _loha_tucker(weights: Tensors, tensors: Tensors) -> Tensors:
    found: Tensor = torch.ones((), dtype=torch.float64)
    for number in "12":
        core, a, b = (
            tensors[f"layer.hada_{role}"] for role in (f"t{number}", f"w{number}_a", f"w{number}_b")
        )
        found = found * torch.einsum("ijkl,jc,io->ockl", core, b, a)
    return {"layer.weight": weights["layer.weight"] + SCALING * found}


IA3 = {"peft_type": "IA3", "r": None, "lora_alpha": None}
FEEDFORWARD = {**IA3, "feedforward_modules": ["layer"]}


def _gains(weights: Tensors, tensors: Tensors) -> Tensors:
    """Of outputs, the first axis of weight and bias."""
    gains = tensors["layer.ia3_l"].flatten()
    return {
        name: weight * gains.reshape(-1, *(1 for _ in weight.shape[1:])) for name, weight in weights.items()
    }


def _gains_of_columns(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": weights["layer.weight"] * tensors["layer.ia3_l"].flatten()}


def _gains_of_channels(weights: Tensors, tensors: Tensors) -> Tensors:
    """Three groups of outputs have seven channels each."""
    weight, gains = weights["layer.weight"], tensors["layer.ia3_l"].reshape(3, 7)
    return {"layer.weight": weight * gains.repeat_interleave(4, dim=0)[:, :, None, None]}


def _rotation(triangles: Tensor, size: int) -> Tensor:
    """Block-diagonal [in, in], of five terms of the Neumann series."""
    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(triangles), size, size, dtype=torch.float64)
    q[:, rows, columns] = triangles
    q = q - q.mT
    one = torch.eye(size, dtype=torch.float64)
    blocks = one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    return _block_diagonal(blocks.flatten(0, 1), len(blocks))


def _oft(weights: Tensors, tensors: Tensors) -> Tensors:
    """Kernels are 1 x 1."""
    weight = weights["layer.weight"]
    turned = weight.flatten(1) @ _rotation(tensors["layer.oft_R.weight"], 4).T
    return {"layer.weight": turned.reshape(weight.shape)}


def _oft_of_conv1d(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": _rotation(tensors["layer.oft_R.weight"], 5) @ weights["layer.weight"]}


def _oft_of_embedding(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": weights["layer.weight"] @ _rotation(tensors["layer.oft_embedding_R.weight"], 4)}


OFT = {
    "peft_type": "OFT",
    "peft_version": "0.21.2",
    "r": 0,
    "lora_alpha": None,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "oft_block_size": 4,
}


# -- the forms -----------------------------------------------------------------------------------------------------

LINEAR = {"layer.weight": (ROWS, COLUMNS)}
FACTORS = {"layer.lora_A.weight": (RANK, COLUMNS), "layer.lora_B.weight": (ROWS, RANK)}
CONV1D_FACTORS = {"layer.lora_A.weight": (RANK, ROWS), "layer.lora_B.weight": (COLUMNS, RANK)}
MAGNITUDE = "layer.lora_magnitude_vector"
CONV = {"layer.weight": (13, 7, 3, 5)}
CONV_FACTORS = {"layer.lora_A.weight": (RANK, 7, 3, 5), "layer.lora_B.weight": (13, RANK, 1, 1)}
CONV_MAGNITUDE = {MAGNITUDE: (1, 13, 1, 1)}
FUSED = {"experts.down_proj": (EXPERTS, 50, 24)}
APART = {f"experts.{e}.{name}.weight": (70, 24) for e in range(EXPERTS) for name in ("gate_proj", "up_proj")}


def _experts(axis_a: int, axis_b: int) -> Mapping[str, Shape]:
    return {
        "experts.lora_A.weight": (EXPERTS * RANK, axis_a),
        "experts.lora_B.weight": (axis_b, EXPERTS * RANK),
    }


def _target(name: str) -> Mapping[str, Any]:
    return {"target_parameters": [f"experts.{name}"]}


# Singular vectors in float32; test_initial.py has them with values well apart.
SVD = 2e-5
BDLORA = {"use_bdlora": {"nblocks": 2}}
LOHA = {"peft_type": "LOHA", "lora_alpha": None, "alpha": ALPHA}
HADA = {"w1_a": (ROWS, RANK), "w1_b": (RANK, COLUMNS), "w2_a": (ROWS, RANK), "w2_b": (RANK, COLUMNS)}
HADA_CONV = {"w1_a": (13, RANK), "w1_b": (RANK, 105), "w2_a": (13, RANK), "w2_b": (RANK, 105)}
HADA_TUCKER = {
    "w1_a": (RANK, 13),
    "w1_b": (RANK, 7),
    "t1": (RANK, RANK, 3, 5),
    "w2_a": (RANK, 13),
    "w2_b": (RANK, 7),
    "t2": (RANK, RANK, 3, 5),
}


def _hada(roles: Mapping[str, Shape]) -> Mapping[str, Shape]:
    return {f"layer.hada_{role}": shape for role, shape in roles.items()}


QALORA = {"use_qalora": True, "qalora_group_size": GROUP}

TWO_IN_ONE: Mapping[str, Shape] = {"layer.gate_up_proj.weight": (ROWS, COLUMNS)}


def _of_part(name: str) -> Mapping[str, Shape]:
    return {f"layer.{name}.lora_A.weight": (RANK, COLUMNS), f"layer.{name}.lora_B.weight": (ROWS // 2, RANK)}


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "lora": Form(LINEAR, FACTORS, _lora),
        "lora-conv1d": Form(LINEAR, CONV1D_FACTORS, _lora_of_conv1d),
        "lora-embedding": Form(
            LINEAR,
            {"layer.lora_embedding_A": (RANK, ROWS), "layer.lora_embedding_B": (COLUMNS, RANK)},
            _lora_of_embedding,
        ),
        "lora-bias": Form(
            {**LINEAR, "layer.bias": (ROWS,)},
            {**FACTORS, "layer.lora_B.bias": (ROWS,)},
            _lora_with_bias,
            {"lora_bias": True},
        ),
        "dora": Form(LINEAR, {**FACTORS, MAGNITUDE: (ROWS,)}, _dora, {"use_dora": True}),
        "dora-conv1d": Form(
            LINEAR, {**CONV1D_FACTORS, MAGNITUDE: (COLUMNS,)}, _dora_of_conv1d, {"use_dora": True}
        ),
        "conv": Form(CONV, CONV_FACTORS, _conv),
        "conv-dora": Form(CONV, {**CONV_FACTORS, **CONV_MAGNITUDE}, _conv_dora, {"use_dora": True}),
        "pissa": Form(LINEAR, FACTORS, _pissa, {"init_lora_weights": "pissa"}, SVD),
        "pissa-conv1d": Form(LINEAR, CONV1D_FACTORS, _pissa_of_conv1d, {"init_lora_weights": "pissa"}, SVD),
        "olora": Form(LINEAR, FACTORS, _olora, {"init_lora_weights": "olora"}, SVD),
        "kasa": Form(LINEAR, {**FACTORS, "layer.lora_diag": (RANK,)}, _kasa, {"kasa_config": {}}, SVD),
        "blocks-of-a": Form(
            LINEAR, {**FACTORS, "layer.lora_A.weight": (RANK, COLUMNS // 2)}, _blocks_of_a, BDLORA
        ),
        "blocks-of-b": Form(
            LINEAR, {**FACTORS, "layer.lora_B.weight": (ROWS, RANK // 2)}, _blocks_of_b, BDLORA
        ),
        "pooled": Form(LINEAR, {**FACTORS, "layer.lora_A.weight": (RANK, COLUMNS // GROUP)}, _pooled, QALORA),
        "pooled-conv1d": Form(
            LINEAR,
            {**CONV1D_FACTORS, "layer.lora_A.weight": (RANK, ROWS // GROUP)},
            _pooled_of_conv1d,
            QALORA,
        ),
        "experts": Form(FUSED, _experts(24, 50), _fused, _target("down_proj"), targets=()),
        "experts-middle": Form(FUSED, _experts(50, 24), _fused_middle, _target("down_proj"), targets=()),
        "experts-apart": Form(
            APART,
            _experts(24, 140),
            _apart,
            _target("gate_up_proj"),
            targets=(),
            moe=MoeLayout(order="expert-major"),
        ),
        "a-part": Form(TWO_IN_ONE, _of_part("up_proj"), _lora_of_parts, targets=("up_proj",)),
        "parts": Form(
            TWO_IN_ONE,
            {**_of_part("gate_proj"), **_of_part("up_proj")},
            _lora_of_parts,
            targets=("gate_proj", "up_proj"),
        ),
        "rows": Form(
            LINEAR,
            {"layer.token_adapter.trainable_tokens_delta": (len(TOKENS), COLUMNS)},
            _rows,
            {"trainable_token_indices": list(TOKENS)},
            targets=(),
        ),
        "saved": Form(
            {**LINEAR, "norm.weight": (COLUMNS,)},
            {**FACTORS, "norm.weight": (COLUMNS,)},
            _saved,
            {"modules_to_save": ["norm"]},
        ),
        "loha": Form(LINEAR, _hada(HADA), _loha, LOHA),
        "loha-conv": Form(CONV, _hada(HADA_CONV), _loha, LOHA),
        "loha-tucker": Form(CONV, _hada(HADA_TUCKER), _loha_tucker, {**LOHA, "use_effective_conv2d": True}),
        "ia3": Form({**LINEAR, "layer.bias": (ROWS,)}, {"layer.ia3_l": (ROWS, 1)}, _gains, IA3),
        "ia3-feedforward": Form(LINEAR, {"layer.ia3_l": (1, COLUMNS)}, _gains_of_columns, FEEDFORWARD),
        "ia3-conv1d": Form(LINEAR, {"layer.ia3_l": (COLUMNS, 1)}, _gains_of_columns, IA3),
        "ia3-conv": Form(CONV, {"layer.ia3_l": (1, 13, 1, 1)}, _gains, IA3),
        "ia3-conv-feedforward": Form(
            {"layer.weight": (12, 7, 3, 5)}, {"layer.ia3_l": (1, 21, 1, 1)}, _gains_of_channels, FEEDFORWARD
        ),
        "oft": Form(LINEAR, {"layer.oft_R.weight": (24, 6)}, _oft, OFT),
        "oft-embedding": Form(LINEAR, {"layer.oft_embedding_R.weight": (24, 6)}, _oft_of_embedding, OFT),
        "oft-conv1d": Form(
            LINEAR, {"layer.oft_R.weight": (30, 10)}, _oft_of_conv1d, {**OFT, "oft_block_size": 5}
        ),
        "oft-conv": Form({"layer.weight": (13, 8, 1, 1)}, {"layer.oft_R.weight": (2, 6)}, _oft, OFT),
    }
)


# -- updates at work -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """An update with what it is run on: `parts` as they are loaded, `weight` float32 [rows, columns]."""

    name: str
    update: Update
    weight: Tensor
    parts: Tensors


def works(folder: Path, form: Form, draw: Callable[[Mapping[str, Shape], int], Tensors]) -> Sequence[Work]:
    """The updates of a form, each on the weight of its parameter as the base has it."""
    form.write(folder, draw(form.tensors, 1))
    weights = draw(form.weights, 2)
    return [
        Work(
            f"{type(update).__name__} of {update.parameter}",
            update,
            as_matrix(weights[update.parameter]),
            load(update.parts),
        )
        for update in form.read(folder).updates
    ]


def scalings(draw: Callable[[Mapping[str, Shape], int], Tensors]) -> Sequence[Work]:
    """What no adapter holds: a weight rescaled on both sides, and a norm that multiplies by 1 + w."""
    shapes = {SCALES_OF_ROWS: (ROWS,), SCALES_OF_COLUMNS: (COLUMNS,)}
    both = Equalizer("layer.weight", (ROWS, COLUMNS), tuple(shapes))
    norm = Equalizer("norm.weight", (COLUMNS,), (SCALES_OF_COLUMNS,), shift=1.0)
    scales, weights = draw(shapes, 1), draw({"layer": both.shape, "norm": norm.shape}, 2)
    of_norm = {SCALES_OF_COLUMNS: scales[SCALES_OF_COLUMNS]}
    return [
        Work("Equalizer of a weight", both, as_matrix(weights["layer"]), scales),
        Work("Equalizer of a norm", norm, as_matrix(weights["norm"]), of_norm),
    ]


def as_matrix(weight: Tensor) -> Tensor:
    return weight.reshape(matrix_shape(tuple(weight.shape)))


def load(parts: Mapping[str, StoredTensor]) -> Tensors:
    with TensorReader() as reader:
        return {role: reader.load(stored).float() for role, stored in parts.items()}


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells in which the first pass, if there is one, and the second see a weight; the second's in any order.

    `repeats`: the first pass does every cell twice, as if the first attempt had failed.
    """

    reduced: Sequence[range]
    applied: Sequence[range]
    repeats: bool = False


def run_update(work: Work, cells: Cells) -> Tensor:
    """The weight after the update, every cell in memory of its own."""
    learnt = learn(work, cells)
    out = torch.empty_like(work.weight)
    for rows in cells.applied:
        cell = work.weight[rows.start : rows.stop].clone()
        out[rows.start : rows.stop] = apply(work, cell, rows, learnt)
    return out


@dataclass(frozen=True, slots=True)
class Learnt:
    """What `apply` is given: what was prepared of the parts, and learnt of the whole weight."""

    prepared: Parts
    state: State

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (*self.prepared.values(), *self.state)


def learn(work: Work, cells: Cells) -> Learnt:
    """What is known before the first row is changed; cells are given to the first pass as views of the weight."""
    update = work.update
    state: State = ()
    prepared = update.prepare(work.parts, work.weight.device)
    if update.access is UpdateAccess.ROW:
        return Learnt(prepared, ())
    for rows in cells.reduced:
        for _ in range(2 if cells.repeats else 1):
            found = update.reduce(work.weight[rows.start : rows.stop], rows, prepared, state)
        state = found
    return Learnt(prepared, update.conclude(prepared, state))


def apply(work: Work, cell: Tensor, rows: range, learnt: Learnt) -> Tensor:
    return work.update.apply(cell, rows, learnt.prepared, learnt.state)


def says_untrained(form: Form, folder: Path, tensors: Tensors) -> bool:
    """Whether an adapter with these tensors is refused because every one of its updates is neutral."""
    form.write(folder, tensors)
    try:
        form.read(folder)
    except AdapterError as error:
        if "never trained" in str(error):
            return True
        raise
    return False
