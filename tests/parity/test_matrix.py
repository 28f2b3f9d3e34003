"""Every method on every kind of layer and of base: PEFT's live model, from files alone.

A table says which cells there are and why the others are empty. Adapters are saved by PEFT, in float32 and trained by
random steps; each cell is one merge. Layers are single, so that outputs of one are compared as they come out of it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS
from tests.parity.opening import relative_difference, tensors
from tests.tiny import edit_json, edit_tensors, read_tensors

VOCABULARY, INPUTS, OUTPUTS = 40, 24, 48


class Layers(nn.Module):
    """One layer of each kind; that of Conv1D, whose model is of another type, by itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "conv1d":
            self.c_fc = Conv1D(OUTPUTS, INPUTS)
            return
        self.embed_tokens = nn.Embedding(VOCABULARY, INPUTS)
        self.up_proj = nn.Linear(INPUTS, OUTPUTS)
        self.gate_proj = nn.Linear(INPUTS, OUTPUTS, bias=False)
        self.conv = nn.Conv2d(8, 12, 3)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.norm = nn.LayerNorm(INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        """Unused: layers are called by themselves."""
        return x


@dataclass(frozen=True, slots=True)
class Layer:
    """`module` of `Layers`, and what is put into it; a base of `model_type` has it."""

    module: str
    probe: Callable[[], Tensor]
    model_type: str = "llama"


LAYERS = {
    "linear": Layer("up_proj", lambda: torch.randn(7, INPUTS)),
    "conv1d": Layer("c_fc", lambda: torch.randn(7, INPUTS), "gpt2"),
    "conv2d": Layer("conv", lambda: torch.randn(2, 8, 6, 5)),
    "embedding": Layer("embed_tokens", lambda: torch.arange(VOCABULARY)),
    "norm": Layer("norm", lambda: torch.randn(7, INPUTS)),
}
# Of a layer with a bias, PEFT's live layer of trained rows leaves that out.
NO_BIAS = Layer("gate_proj", lambda: torch.randn(7, INPUTS))
# A rotation of pixels that a larger kernel sees several times is none of its weight.
POINTWISE = Layer("pointwise", lambda: torch.randn(2, 8, 6, 5))


@dataclass(frozen=True, slots=True)
class Row:
    """A method. `config` is PEFT's for a target; `holes`: why there is no cell, by layer; `layers`: those that it needs
    instead of the table's; `older_name`: what PEFT called it when it saved such files.
    """

    config: Callable[[str], PeftConfig]
    holes: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    older_name: str | None = None


def made(name: str, **options: Any) -> Callable[[str], PeftConfig]:
    return lambda target: getattr(peft, name)(target_modules=[target], **options)


NONE = "PEFT has none"
LINEAR_ALONE = {"conv1d": NONE, "conv2d": NONE, "embedding": NONE, "norm": NONE}
NO_EMBEDDING = {"embedding": NONE, "norm": NONE}
NO_CONVOLUTION = {"conv2d": NONE, "embedding": NONE, "norm": NONE}
NO_CONV1D = {"conv1d": NONE, "embedding": NONE, "norm": NONE}

METHODS: Mapping[str, Row] = {
    "LORA": Row(made("LoraConfig", r=4, lora_alpha=6), {"norm": NONE}),
    "LORA, DoRA": Row(made("LoraConfig", r=4, lora_alpha=6, use_dora=True), {"norm": NONE}),
    "TRAINABLE_TOKENS": Row(
        made("TrainableTokensConfig", token_indices=[1, 7, 39]),
        {"conv1d": NONE, "conv2d": NONE, "norm": NONE},
        {"linear": NO_BIAS},
    ),
    "ADALORA": Row(made("AdaLoraConfig", init_r=4, target_r=2, lora_alpha=6, total_step=9), NO_EMBEDDING),
    "OFT": Row(
        made("OFTConfig", oft_block_size=4, use_cayley_neumann=False),
        {"conv1d": NONE, "norm": NONE},
        {"conv2d": POINTWISE},
    ),
    "IA3": Row(made("IA3Config", feedforward_modules=[], init_ia3_weights=False), NO_EMBEDDING),
    "LOKR": Row(made("LoKrConfig", r=2, alpha=6, init_weights=False), NO_CONV1D),
    "LOHA": Row(made("LoHaConfig", r=4, alpha=6, init_weights=False), NO_CONV1D),
    "VERA": Row(made("VeraConfig", r=4), NO_CONVOLUTION),
    "LN_TUNING": Row(made("LNTuningConfig"), {}),
    "MISS": Row(made("MissConfig", r=4), LINEAR_ALONE),
    "MISS, bat": Row(made("MissConfig", r=4, init_weights="bat"), LINEAR_ALONE),
    "BONE": Row(made("MissConfig", r=4), LINEAR_ALONE, older_name="bone"),
    "BOFT": Row(made("BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=1), NO_CONV1D),
    "HRA": Row(made("HRAConfig", r=4), NO_CONV1D),
    "FOURIERFT": Row(made("FourierFTConfig", n_frequency=30), NO_CONVOLUTION),
    "RANDLORA": Row(made("RandLoraConfig", r=4, randlora_alpha=6, save_projection=True), NO_CONVOLUTION),
    "VBLORA": Row(made("VBLoRAConfig", r=2, num_vectors=8, vector_length=8), NO_CONVOLUTION),
    "SHIRA": Row(made("ShiraConfig", r=2), LINEAR_ALONE),
    "C3A": Row(made("C3AConfig", block_size=8), LINEAR_ALONE),
    "HIRA": Row(made("HiraConfig", r=4), {"norm": NONE}),
    "DELORA": Row(made("DeloraConfig", r=4, delora_lambda=6), LINEAR_ALONE),
}


CELLS = [(name, layer) for name, row in METHODS.items() for layer in LAYERS if layer not in row.holes]
HOLES = [(name, layer) for name, row in METHODS.items() for layer in row.holes]


def test_every_method_has_a_row() -> None:
    assert {name.partition(",")[0] for name in METHODS} == set(ADAPTERS)


@pytest.mark.parametrize(("name", "layer"), HOLES)
def test_a_hole_is_one_in_peft(name: str, layer: str) -> None:
    """Such a layer is refused there; AttributeError is what it comes to where that is not checked."""
    with pytest.raises((ValueError, TypeError, AttributeError)):
        live_of(name, layer, Layers(layer).state_dict())


def target(name: str, layer: str) -> Layer:
    return METHODS[name].layers.get(layer, LAYERS[layer])


def live_of(name: str, layer: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """PEFT's model on `weights`, every trained tensor moved by random amounts, the same for any weights."""
    model = Layers(layer)
    model.load_state_dict(weights)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orientation, and of a model without a config
        live: nn.Module = get_peft_model(model, METHODS[name].config(target(name, layer).module)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return live


def save_live(live: nn.Module, older_name: str | None, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a targeted embedding is saved, too
        live.save_pretrained(folder)  # type: ignore[operator]  # a method of PEFT's
    if older_name is not None:
        names = read_tensors(folder / TENSORS)
        edit_tensors(folder / TENSORS, rename={each: each.replace("miss", older_name) for each in names})
        edit_json(folder / CONFIG, peft_type=older_name.upper(), bias="none", peft_version="0.15.2")
    return folder


# -- bases ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by layer and base: one of Conv1D, and one for all others; nf4 holds linear layers, the rest as it was."""
    folder = tmp_path_factory.mktemp("matrix")
    torch.manual_seed(0)
    for layer, found in LAYERS.items():
        where = folder / layer
        if layer not in ("linear", "conv1d"):
            (folder / layer).symlink_to(folder / "linear")
            continue
        weights = {key: 0.3 * torch.randn(value.shape) for key, value in Layers(layer).state_dict().items()}
        for base, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            stored = {key: value.to(dtype) for key, value in weights.items()}
            fields = {"model_type": found.model_type, "tie_word_embeddings": False, "vocab_size": VOCABULARY}
            (where / base).mkdir(parents=True)
            (where / base / "config.json").write_text(json.dumps(fields))
            save_file(stored, where / base / "model.safetensors", {"format": "pt"})
        if layer == "linear":
            streamconv.convert(where / "float32", where / "nf4", quant="nf4")
    return folder


def values(bases: Path, layer: str, base: str) -> dict[str, Tensor]:
    """What the base's weights are, float32; in nf4 by bitsandbytes, from the weights that were rounded."""
    found = tensors(bases / layer / ("float32" if base == "nf4" else base))
    if base == "nf4":
        for key in ("up_proj.weight", "gate_proj.weight"):
            codes, state = quantize_4bit(found[key], quant_type="nf4")
            found[key] = dequantize_4bit(codes, state)
    return {key: value.float() for key, value in found.items()}


# -- cells ---------------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, layer: Layer, prefix: str = "") -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of sparse tensors
        found: Tensor = model.get_submodule(f"{prefix}{layer.module}")(layer.probe())
    return found


def merged_by_peft(live: nn.Module) -> Mapping[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of sparse tensors
        found: Mapping[str, Tensor] = live.merge_and_unload().state_dict()  # type: ignore[operator]  # a method of PEFT's
    return found


def is_live(found: Mapping[str, Tensor], live: nn.Module, name: str, layer: str) -> None:
    """Weights as PEFT merges them, and outputs as its live layer has them; others as they were."""
    where = target(name, layer)
    wanted = outputs(live, where, "base_model.model.")
    merged = Layers(layer)
    merged.load_state_dict(found)
    assert relative_difference(outputs(merged, where), wanted) < 1e-5
    expected = merged_by_peft(live)
    for key, tensor in found.items():
        assert relative_difference(tensor, expected[key]) < 1e-5, key


@pytest.mark.parametrize(("name", "layer"), CELLS)
def test_a_float32_base_gives_the_live_model(tmp_path: Path, bases: Path, name: str, layer: str) -> None:
    before = values(bases, layer, "float32")
    live = live_of(name, layer, before)
    adapter = save_live(live, METHODS[name].older_name, tmp_path / "adapter")
    streamconv.merge(bases / layer / "float32", adapter, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found.keys() == before.keys()
    weight = f"{target(name, layer).module}.weight"
    assert relative_difference(found[weight], before[weight]) > 0.01
    is_live(found, live, name, layer)


@pytest.mark.parametrize(("name", "layer"), CELLS)
def test_a_bfloat16_base_gives_its_result_rounded_once(
    tmp_path: Path, bases: Path, name: str, layer: str
) -> None:
    """Of PEFT's sums, which are of another order, to the neighbour where they lie on the middle between two."""
    live = live_of(name, layer, values(bases, layer, "bf16"))
    adapter = save_live(live, METHODS[name].older_name, tmp_path / "adapter")
    streamconv.merge(bases / layer / "bf16", adapter, tmp_path / "out")
    expected = merged_by_peft(live)
    for key, tensor in tensors(tmp_path / "out").items():
        wide = expected[key].double()
        slack = 1e-6 * wide.abs().max()
        assert tensor.dtype == torch.bfloat16
        assert bool((tensor >= (wide - slack).bfloat16()).all()), key
        assert bool((tensor <= (wide + slack).bfloat16()).all()), key


@pytest.mark.parametrize(("name", "layer"), [cell for cell in CELLS if cell[1] != "conv1d"])
def test_an_nf4_base_gives_the_live_model_of_its_values(
    tmp_path: Path, bases: Path, name: str, layer: str
) -> None:
    live = live_of(name, layer, values(bases, layer, "nf4"))
    adapter = save_live(live, METHODS[name].older_name, tmp_path / "adapter")
    streamconv.merge(bases / layer / "nf4", adapter, tmp_path / "out", quant="none", dtype="float32")
    found = tensors(tmp_path / "out")
    if layer == "linear":
        streamconv.merge(bases / layer / "float32", adapter, tmp_path / "rounded", merge_base="nf4")
        rounded = tensors(tmp_path / "rounded")
        assert all(torch.equal(rounded[key], tensor) for key, tensor in found.items())
    is_live(found, live, name, layer)


def test_nf4_has_no_conv1d(tmp_path: Path, bases: Path) -> None:
    with pytest.raises(UnsupportedError, match="is a Conv1D"):
        streamconv.convert(bases / "conv1d" / "float32", tmp_path / "out", quant="nf4")
