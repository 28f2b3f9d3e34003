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
from streamconv.adapters.combine import Mixture, combine
from streamconv.adapters.combined import Rule
from streamconv.adapters.source import BaseParameters, MoeLayout
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.equalization.equalizer import COLUMNS as SCALES_OF_COLUMNS
from streamconv.equalization.equalizer import ROWS as SCALES_OF_ROWS
from streamconv.equalization.equalizer import Equalizer
from streamconv.errors import AdapterError
from streamconv.formats.base import matrix_shape
from streamconv.planning.gguf_pieces import ColumnsOfExpert, RowsOfExpert
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
        named = {saved_name(key): tensor for key, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors")

    def read(self, folder: Path) -> Adapter:
        parameters = {name: Parameter(name, shape) for name, shape in self.weights.items()}
        return read_adapter(open_storage(str(folder)), parameters, {}, None, self.moe)


def saved_name(key: str) -> str:
    """The name of a tensor in the file: one whose key is no path belongs to all modules."""
    return f"base_model.model.{key}" if "." in key else f"base_model.{key}"


def drawn(shapes: Mapping[str, Shape], seed: int) -> Tensors:
    """Normally distributed values. DoRA's magnitudes are norms, and positive."""
    torch.manual_seed(seed)
    found = {name: torch.randn(shape) for name, shape in shapes.items()} | _indices(shapes)
    return {name: tensor.abs() if "magnitude" in name else tensor for name, tensor in found.items()}


def drawn_small(shapes: Mapping[str, Shape], seed: int) -> Tensors:
    """Integers from -3 to 3: of these, sums and products have no rounding in any order, and zeros are among them."""
    torch.manual_seed(seed)
    found = {name: torch.randint(-3, 4, shape).float() for name, shape in shapes.items()} | _indices(shapes)
    # Of two rows and so skew-symmetric, the Cayley transform is a rotation by nothing or a right angle.
    found |= {name: 2 * tensor.sign().triu(1) for name, tensor in found.items() if name.endswith("boft_R")}
    found |= {
        name: _far_apart(shape) for name, shape in shapes.items() if name.endswith(("logits_A", "logits_B"))
    }
    found |= {
        name: _of_length_two(shape) for name, shape in shapes.items() if "delora_" in name and RANK in shape
    }
    found |= {name: _small_reflections(*shape) for name, shape in shapes.items() if name.endswith("hra_u")}
    return {name: tensor.abs() + 1 if "magnitude" in name else tensor for name, tensor in found.items()}


def _indices(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Whole numbers, for tensors of indices alone, that any axis of a weight has."""
    return {
        name: torch.randint(0, 5, shape).float() for name, shape in shapes.items() if name.endswith("indices")
    }


def _of_length_two(shape: Shape) -> Tensor:
    """Rows of A, or columns of B, with ones in four places."""
    longer = torch.rand(max(shape), RANK).argsort(dim=0)
    found = (longer < 4).float()
    return found if shape[1] == RANK else found.T.contiguous()


def _far_apart(shape: Shape) -> Tensor:
    """Logits of which the greatest has all of the softmax."""
    return 1000 * torch.rand(shape).argsort(dim=-1).float()


def _small_reflections(inputs: int, count: int) -> Tensor:
    """Columns whose lengths, as they are and across one another, are powers of two."""
    found = torch.zeros(inputs, count)
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])
    found[torch.randperm(inputs)[:4]] = signs[:count].T.float()
    return found


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


def _rows_alone(weights: Tensors, tensors: Tensors) -> Tensors:
    found = weights["layer.weight"].clone()
    found[list(TOKENS)] = tensors["layer.trainable_tokens_delta"]
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


def _adalora(weights: Tensors, tensors: Tensors) -> Tensors:
    """Of convolutions the kernels are flattened."""
    a, b, values = (tensors[f"layer.lora_{role}"] for role in "ABE")
    weight = weights["layer.weight"]
    delta = ADALORA_ALPHA / (RANK + 1e-5) * b @ (values * a)
    return {"layer.weight": weight + delta.reshape(weight.shape)}


def _adalora_pruned(weights: Tensors, tensors: Tensors) -> Tensors:
    a, b, values = (tensors[f"layer.lora_{role}"] for role in "ABE")
    kept = {"layer.lora_A": a[[0, 3]], "layer.lora_B": b[:, [0, 3]], "layer.lora_E": values[[0, 3]]}
    return _adalora(weights, kept)


def _adalora_of_conv1d(weights: Tensors, tensors: Tensors) -> Tensors:
    found = _adalora({"layer.weight": weights["layer.weight"].T}, tensors)
    return {"layer.weight": found["layer.weight"].T}


def _lokr(weights: Tensors, tensors: Tensors) -> Tensors:
    """The right factor has the kernel, in the file flattened."""
    left = tensors["layer.lokr_w1_a"] @ tensors["layer.lokr_w1_b"]
    right = tensors["layer.lokr_w2_a"] @ tensors["layer.lokr_w2_b"]
    weight = weights["layer.weight"]
    return {"layer.weight": weight + SCALING * torch.kron(left, right).reshape(weight.shape)}


def _lokr_whole(weights: Tensors, tensors: Tensors) -> Tensors:
    product = torch.kron(tensors["layer.lokr_w1"], tensors["layer.lokr_w2"])
    return {"layer.weight": weights["layer.weight"] + SCALING * product}


def _lokr_tucker(weights: Tensors, tensors: Tensors) -> Tensors:
    core, a, b = (tensors[f"layer.lokr_{role}"] for role in ("t2", "w2_a", "w2_b"))
    right = torch.einsum("ijkl,io,jc->ockl", core, a, b).contiguous()
    product = torch.kron(tensors["layer.lokr_w1"][:, :, None, None], right)
    return {"layer.weight": weights["layer.weight"] + SCALING * product}


def _ln_tuning(weights: Tensors, tensors: Tensors) -> Tensors:
    return {f"layer.{role}": tensors[f"layer.ln_tuning_layers.{role}"] for role in ("weight", "bias")}


def _miss(weights: Tensors, tensors: Tensors) -> Tensors:
    block = tensors["layer.miss_block"]
    rows, columns = torch.arange(ROWS) % block.shape[1], torch.arange(COLUMNS) % block.shape[0]
    return {"layer.weight": weights["layer.weight"] + block[columns][:, rows].T}


def _bat(weights: Tensors, tensors: Tensors) -> Tensors:
    """Blocks of five outputs and inputs."""
    blocks = tensors["layer.bone_block"]
    count, rank, _ = blocks.shape
    weight = weights["layer.weight"].reshape(count, rank, -1, rank)
    found = weight + torch.einsum("aqbt,ats->aqbs", weight, blocks) + blocks[:, :, None]
    return {"layer.weight": found.reshape(count * rank, -1)}


def _boft(weights: Tensors, tensors: Tensors) -> Tensors:
    """Permutations as matrices; kernels are flattened."""
    weight, raw = weights["layer.weight"], tensors["layer.boft_R"]
    flat = weight.flatten(1)
    inputs, size = flat.shape[1], raw.shape[-1]
    skew = (raw - raw.mT) / 2
    one = torch.eye(size, dtype=torch.float64)
    turned = (one - skew) @ torch.linalg.inv(one + skew)
    for number, blocks in enumerate(turned):
        order = list(range(inputs))
        if number:
            halves = [order[start : start + size // 2] for start in range(0, inputs, size // 2)]
            width = 2 << number
            groups = [halves[start : start + width] for start in range(0, len(halves), width)]
            order = [place for group in groups for half in (*group[::2], *group[1::2]) for place in half]
        permutation = torch.eye(inputs, dtype=torch.float64)[order]
        flat = flat @ (permutation @ _block_diagonal(blocks.flatten(0, 1), len(blocks)) @ permutation.T).T
    scaled = flat * tensors["layer.boft_s"].reshape(-1, 1)
    return {"layer.weight": scaled.reshape(weight.shape)}


def _hra(weights: Tensors, tensors: Tensors) -> Tensors:
    """Kernels flattened, if there are any; one reflection after the other."""
    weight, columns = weights["layer.weight"], tensors["layer.hra_u"]
    found = weight.flatten(1)
    for u in (columns / columns.norm(dim=0)).T:
        found = found - 2 * torch.outer(found @ u, u)
    return {"layer.weight": found.reshape(weight.shape)}


def _c3a(weights: Tensors, tensors: Tensors) -> Tensors:
    """Kernel [(j - p) mod n] in row p and column j of its block."""
    kernels = tensors["layer.c3a_kernel"]
    place = torch.arange(kernels.shape[2])
    blocks = kernels[:, :, (place - place[:, None]) % len(place)]
    return {"layer.weight": weights["layer.weight"] + blocks.transpose(1, 2).reshape(ROWS, COLUMNS) / COLUMNS}


def _shira(weights: Tensors, tensors: Tensors) -> Tensors:
    """Places that are listed twice get both numbers."""
    rows, columns = tensors["layer.shira_indices"].long()
    found = weights["layer.weight"].clone()
    found.index_put_((rows, columns), tensors["layer.shira_weight"], accumulate=True)
    return {"layer.weight": found}


def _fourier_delta(tensors: Tensors, outputs: int, inputs: int) -> Tensor:
    spectrum = torch.zeros(outputs * inputs, dtype=torch.float64)
    places = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(777))
    numbers = tensors["layer.fourierft_spectrum"]
    spectrum[places[: len(numbers)]] = numbers
    delta: Tensor = 150 * torch.fft.ifft2(spectrum.reshape(outputs, inputs)).real
    return delta


def _fourier(weights: Tensors, tensors: Tensors) -> Tensors:
    return {"layer.weight": weights["layer.weight"] + _fourier_delta(tensors, ROWS, COLUMNS)}


def _mixed(logits: Tensor, bank: Tensor) -> Tensor:
    """Pieces of a factor, each of the two vectors with the greatest logits."""
    greatest, indices = logits.topk(2, dim=-1)
    return (greatest.softmax(-1).unsqueeze(-1) * bank[indices]).sum(-2)


def _chosen(tensors: Tensors, role: str) -> Tensor:
    indices = tensors[f"layer.vblora_logits_{role}_topk_indices"].long()
    stored = tensors[f"layer.vblora_logits_{role}_topk_weights"]
    weights = torch.cat([stored, 1 - stored], dim=-1)
    return (weights.unsqueeze(-1) * tensors["vblora_vector_bank"][indices]).sum(-2)


def _vblora(weights: Tensors, tensors: Tensors) -> Tensors:
    a, b = (_mixed(tensors[f"layer.vblora_logits_{role}"], tensors["vblora_vector_bank"]) for role in "AB")
    delta = b.transpose(1, 2).reshape(ROWS, RANK) @ a.reshape(RANK, COLUMNS)
    return {"layer.weight": weights["layer.weight"] + delta}


def _vblora_chosen(weights: Tensors, tensors: Tensors) -> Tensors:
    a, b = (_chosen(tensors, role) for role in "AB")
    delta = b.transpose(1, 2).reshape(ROWS, RANK) @ a.reshape(RANK, COLUMNS)
    return {"layer.weight": weights["layer.weight"] + delta}


def _randlora(weights: Tensors, tensors: Tensors) -> Tensors:
    """The shared projections are larger than the layer; rows of one and columns of the other are in other orders."""
    scales, gains = tensors["layer.randlora_lambda"], tensors["layer.randlora_gamma"]
    a = torch.einsum("kb,ky,by->kby", scales, tensors["randlora_A"][:, 0, :COLUMNS], gains)
    b = tensors["randlora_B"][:ROWS, : scales.shape[1]]
    delta = b.reshape(ROWS, -1) @ a.reshape(-1, COLUMNS)
    return {"layer.weight": weights["layer.weight"] + SCALING * delta}


def _hira(weights: Tensors, tensors: Tensors) -> Tensors:
    """Kernels flattened, if there are any."""
    weight = weights["layer.weight"]
    product = tensors["layer.hira_B"].flatten(1) @ tensors["layer.hira_A"].flatten(1)
    return {"layer.weight": weight * (1 + product.reshape(weight.shape))}


def _hira_of_embedding(weights: Tensors, tensors: Tensors) -> Tensors:
    product = tensors["layer.hira_embedding_B"] @ tensors["layer.hira_embedding_A"]
    return {"layer.weight": weights["layer.weight"] * (1 + product.T)}


def _delora(weights: Tensors, tensors: Tensors) -> Tensors:
    a, b, bound, norms = (tensors[f"layer.delora_{role}"] for role in ("A", "B", "lambda", "w_norm"))
    sizes = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return {"layer.weight": weights["layer.weight"] + b @ torch.diag(bound / RANK / sizes) @ a * norms}


def _hra_orthogonal(weights: Tensors, tensors: Tensors) -> Tensors:
    """Gram-Schmidt; then they may all be at once."""
    found: list[Tensor] = []
    for column in tensors["layer.hra_u"].T:
        u = column
        for other in found:
            u = u - (other @ u) * other
        found.append(u / u.norm())
    u = torch.stack(found, dim=1)
    return {"layer.weight": weights["layer.weight"] - 2 * (weights["layer.weight"] @ u) @ u.T}


def _vera(weights: Tensors, tensors: Tensors) -> Tensors:
    """The shared projections are larger than the layer."""
    a, b = tensors["vera_A"][:, :COLUMNS], tensors["vera_B"][:ROWS]
    scale, gain = (tensors[f"layer.vera_lambda_{role}"].unsqueeze(1) for role in "db")
    return {"layer.weight": weights["layer.weight"] + (gain * b) @ (scale * a)}


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


# A scaling without rounding, so that what is exact stays so.
ADALORA_ALPHA = SCALING * (RANK + 1e-5)
ADALORA = {"peft_type": "ADALORA", "r": None, "init_r": RANK, "lora_alpha": ADALORA_ALPHA}


def _singular(inputs: int, outputs: int) -> Mapping[str, Shape]:
    return {"layer.lora_A": (RANK, inputs), "layer.lora_B": (outputs, RANK), "layer.lora_E": (RANK, 1)}


MISS = {"peft_type": "MISS", "lora_alpha": None}
BOFT = {"peft_type": "BOFT", "r": None, "lora_alpha": None, "boft_block_size": 2, "boft_block_num": 0}
LOKR = {"peft_type": "LOKR", "lora_alpha": None, "alpha": ALPHA}


def _lokr_factors(a: int, c: int, b: int, d: int) -> Mapping[str, Shape]:
    """Of a left factor [a, c] and a right one [b, d]."""
    return {
        "layer.lokr_w1_a": (a, RANK),
        "layer.lokr_w1_b": (RANK, c),
        "layer.lokr_w2_a": (b, RANK),
        "layer.lokr_w2_b": (RANK, d),
    }


NO_RANK = {"r": None, "lora_alpha": None}
FOURIER = {
    "peft_type": "FOURIERFT",
    "n_frequency": 700,
    "scaling": 150,
    "random_loc_seed": 777,
    **NO_RANK,
}
VBLORA = {"peft_type": "VBLORA", "lora_alpha": None, "topk": 2, "num_vectors": 8, "vector_length": 3}
HIRA = {"peft_type": "HIRA", "lora_alpha": None}
HRA = {"peft_type": "HRA", "lora_alpha": None}
# Two products in a row.
TWICE = 2.0**-20
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
        "rows-alone": Form(
            LINEAR,
            {"layer.trainable_tokens_delta": (len(TOKENS), COLUMNS)},
            _rows_alone,
            {"peft_type": "TRAINABLE_TOKENS", "r": None, "lora_alpha": None, "token_indices": list(TOKENS)},
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
        "adalora": Form(LINEAR, _singular(COLUMNS, ROWS), _adalora, ADALORA),
        "adalora-conv1d": Form(LINEAR, _singular(ROWS, COLUMNS), _adalora_of_conv1d, ADALORA),
        "adalora-conv": Form(CONV, _singular(105, 13), _adalora, ADALORA),
        "adalora-pruned": Form(
            LINEAR,
            _singular(COLUMNS, ROWS),
            _adalora_pruned,
            {**ADALORA, "rank_pattern": {"layer.lora_E": [True, False, False, True]}},
        ),
        "lokr": Form(LINEAR, _lokr_factors(15, 12, 10, 8), _lokr, LOKR),
        "lokr-whole": Form(LINEAR, {"layer.lokr_w1": (10, 8), "layer.lokr_w2": (15, 12)}, _lokr_whole, LOKR),
        "lokr-conv": Form({"layer.weight": (12, 6, 3, 5)}, _lokr_factors(4, 3, 3, 30), _lokr, LOKR),
        "lokr-tucker": Form(
            {"layer.weight": (12, 6, 3, 5)},
            {
                "layer.lokr_w1": (4, 3),
                "layer.lokr_t2": (RANK, RANK, 3, 5),
                "layer.lokr_w2_a": (RANK, 3),
                "layer.lokr_w2_b": (RANK, 2),
            },
            _lokr_tucker,
            LOKR,
        ),
        "ln-tuning": Form(
            {"layer.weight": (COLUMNS,), "layer.bias": (COLUMNS,)},
            {"layer.ln_tuning_layers.weight": (COLUMNS,), "layer.ln_tuning_layers.bias": (COLUMNS,)},
            _ln_tuning,
            {"peft_type": "LN_TUNING", "r": None, "lora_alpha": None},
        ),
        "miss": Form(LINEAR, {"layer.miss_block": (7, ROWS)}, _miss, {**MISS, "r": 7}),
        "miss-mini": Form(
            LINEAR,
            {"layer.miss_block": (8, 15)},
            _miss,
            {**MISS, "r": 8, "init_weights": "mini", "mini_r": 15},
        ),
        "bone-bat": Form(
            {"layer.weight": (150, 95)},
            {"layer.bone_block": (30, 5, 5)},
            _bat,
            {**MISS, "peft_type": "BONE", "r": 5, "init_weights": "bat"},
        ),
        "boft": Form(
            LINEAR, {"layer.boft_R": (3, 48, 2, 2), "layer.boft_s": (ROWS, 1)}, _boft, BOFT, 2.0**-20
        ),
        "boft-conv": Form(
            {"layer.weight": (13, 6, 3, 3)},
            {"layer.boft_R": (1, 27, 2, 2), "layer.boft_s": (1, 13)},
            _boft,
            BOFT,
            2.0**-20,
        ),
        "hra": Form(LINEAR, {"layer.hra_u": (COLUMNS, RANK)}, _hra, HRA, TWICE),
        "c3a": Form(
            LINEAR, {"layer.c3a_kernel": (50, 32, 3)}, _c3a, {"peft_type": "C3A", "block_size": 3, **NO_RANK}
        ),
        "shira": Form(
            LINEAR,
            {"layer.shira_weight": (ROWS + COLUMNS,), "layer.shira_indices": (2, ROWS + COLUMNS)},
            _shira,
            {"peft_type": "SHIRA", "r": 1, "lora_alpha": None},
        ),
        "fourier": Form(LINEAR, {"layer.fourierft_spectrum": (700,)}, _fourier, FOURIER),
        "vblora": Form(
            LINEAR,
            {
                "layer.vblora_logits_A": (RANK, 32, 8),
                "layer.vblora_logits_B": (50, RANK, 8),
                "vblora_vector_bank": (8, 3),
            },
            _vblora,
            VBLORA,
        ),
        "vblora-chosen": Form(
            LINEAR,
            {
                "layer.vblora_logits_A_topk_indices": (RANK, 32, 2),
                "layer.vblora_logits_A_topk_weights": (RANK, 32, 1),
                "layer.vblora_logits_B_topk_indices": (50, RANK, 2),
                "layer.vblora_logits_B_topk_weights": (50, RANK, 1),
                "vblora_vector_bank": (8, 3),
            },
            _vblora_chosen,
            {**VBLORA, "save_only_topk_weights": True},
        ),
        "randlora": Form(
            LINEAR,
            {
                "layer.randlora_lambda": (RANK, 24),
                "layer.randlora_gamma": (24, COLUMNS),
                "randlora_A": (RANK, 1, COLUMNS + 7),
                "randlora_B": (ROWS + 7, 26, RANK),
            },
            _randlora,
            {"peft_type": "RANDLORA", "lora_alpha": None, "randlora_alpha": ALPHA},
            TWICE,
        ),
        "hira": Form(LINEAR, {"layer.hira_A": (RANK, COLUMNS), "layer.hira_B": (ROWS, RANK)}, _hira, HIRA),
        "hira-conv": Form(
            CONV, {"layer.hira_A": (RANK, 7, 3, 5), "layer.hira_B": (13, RANK, 1, 1)}, _hira, HIRA
        ),
        "hira-embedding": Form(
            LINEAR,
            {"layer.hira_embedding_A": (RANK, ROWS), "layer.hira_embedding_B": (COLUMNS, RANK)},
            _hira_of_embedding,
            HIRA,
        ),
        "delora": Form(
            LINEAR,
            {
                "layer.delora_A": (RANK, COLUMNS),
                "layer.delora_B": (ROWS, RANK),
                "layer.delora_lambda": (1,),
                "layer.delora_w_norm": (COLUMNS,),
            },
            _delora,
            {"peft_type": "DELORA", "lora_alpha": None},
        ),
        "hra-orthogonal": Form(
            LINEAR, {"layer.hra_u": (COLUMNS, RANK)}, _hra_orthogonal, {**HRA, "apply_GS": True}, TWICE
        ),
        "hra-conv": Form({"layer.weight": (13, 7, 3, 3)}, {"layer.hra_u": (63, RANK)}, _hra, HRA, TWICE),
        "vera": Form(
            LINEAR,
            {
                "layer.vera_lambda_b": (ROWS,),
                "layer.vera_lambda_d": (RANK,),
                "vera_A": (RANK, COLUMNS + 7),
                "vera_B": (ROWS + 7, RANK),
            },
            _vera,
            {"peft_type": "VERA", "lora_alpha": None},
        ),
        "oft-conv": Form({"layer.weight": (13, 8, 1, 1)}, {"layer.oft_R.weight": (2, 6)}, _oft, OFT),
    }
)


@dataclass(frozen=True, slots=True)
class Together:
    """Several adapters of forms, each with a weight, and the rule by which they are combined, if there is one.

    Weights are such that the roots of their products with a scaling are whole.
    """

    forms: Sequence[str]
    weights: tuple[float, ...]
    rule: Rule | None = None


MIXTURES: Mapping[str, Together] = MappingProxyType(
    {
        "several": Together(("dora", "ia3-feedforward", "loha"), (0.5, 2.0, -0.5)),
        "several-reduce": Together(("lora", "ia3-feedforward", "dora-conv1d"), (0.5, 2.0, -0.5)),
        "several-whole": Together(("dora-conv1d", "oft-conv1d"), (0.5, 2.0)),
        "several-factors": Together(("lora", "lora"), (8.0, -2.0), Rule("ties", 0.5, 0)),
        "several-deltas": Together(("dora", "lora"), (1.0, -2.0), Rule("dare_ties", 0.5, 0)),
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


def several(
    folder: Path, mixture: Together, draw: Callable[[Mapping[str, Shape], int], Tensors]
) -> Sequence[Work]:
    """The updates of several adapters, made one."""
    folder.mkdir()
    forms = [FORMS[name] for name in mixture.forms]
    for number, form in enumerate(forms):
        form.write(folder / str(number), draw(form.tensors, 3 + number))
    adapters = [form.read(folder / str(number)) for number, form in enumerate(forms)]
    parameters = {name: Parameter(name, shape) for form in forms for name, shape in form.weights.items()}
    base = BaseParameters(parameters, {}, None)
    weights = draw(forms[0].weights, 2)
    return [
        Work(
            f"{type(update).__name__} of {update.parameter}",
            update,
            as_matrix(weights[update.parameter]),
            load(update.parts),
        )
        for update in combine(adapters, Mixture(mixture.weights, mixture.rule), base).updates
    ]


def scalings(draw: Callable[[Mapping[str, Shape], int], Tensors]) -> Sequence[Work]:
    """What no adapter holds: a weight rescaled on both sides, a norm that multiplies by 1 + w, and the last expert of a
    parameter of two, whose own rows of the factors are the latter half.
    """
    shapes = {SCALES_OF_ROWS: (ROWS,), SCALES_OF_COLUMNS: (COLUMNS,)}
    both = Equalizer("layer.weight", (ROWS, COLUMNS), tuple(shapes))
    norm = Equalizer("norm.weight", (COLUMNS,), (SCALES_OF_COLUMNS,), shift=1.0)
    experts = Equalizer("experts", (2, ROWS, COLUMNS), tuple(shapes))
    last = RowsOfExpert("experts.1", experts, first=ROWS)
    scales, weights = draw(shapes, 1), draw({"layer": both.shape, "norm": norm.shape}, 2)
    of_norm = {SCALES_OF_COLUMNS: scales[SCALES_OF_COLUMNS]}
    of_experts = draw({**shapes, SCALES_OF_ROWS: (2 * ROWS,)}, 3)
    return [
        Work("Equalizer of a weight", both, as_matrix(weights["layer"]), scales),
        Work("Equalizer of a norm", norm, as_matrix(weights["norm"]), of_norm),
        Work("RowsOfExpert of the last", last, as_matrix(weights["layer"]), of_experts),
    ]


def turned(folder: Path, draw: Callable[[Mapping[str, Shape], int], Tensors]) -> Sequence[Work]:
    """What is added to the odd columns of an expert, the latter half of a parameter's rows, as rows."""
    (added,) = works(folder, FORMS["lora"], draw)
    inputs, columns = ROWS // 2, range(1, COLUMNS, 2)
    update = ColumnsOfExpert("experts.1.up", added.update, ROWS - inputs, inputs, COLUMNS, columns)
    weights = draw({"experts.1.up": (len(columns), inputs)}, 2)
    return [Work("ColumnsOfExpert of the last", update, weights["experts.1.up"], added.parts)]


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
