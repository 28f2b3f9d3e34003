"""The statistics that codes are chosen by are those of a plain loop, whatever the family; and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, PhiConfig, Qwen2MoeConfig

from streamconv.calibration import layers as walk
from streamconv.calibration.groups import Recorder
from streamconv.calibration.layer_files import LayerFiles
from streamconv.calibration.moments import Moments
from streamconv.calibration.need import batch_of
from streamconv.errors import InputError, OptionError
from streamconv.forward.matrices import OwnParameter, WeightMatrix
from streamconv.forward.skeleton import build_skeleton
from streamconv.forward.text import load_tokenizer, read_windows
from streamconv.forward.walk import Walk
from streamconv.forward.weights import WeightSource
from streamconv.output.sidecars import RESIDUAL_TENSORS
from streamconv.pipeline import build_job, convert, merge, prepare
from streamconv.pipeline.runner import run
from streamconv.progress import StopRequest
from streamconv.rounding.feedback import FeedbackOptions, QuantizedWeight, Statistics, feedback
from streamconv.rounding.metric import Metric
from tests.calibration.subjects import (
    LENGTH,
    QUICK,
    TOKENS,
    calibrated,
    parts_in,
    save_subject,
    subject_in,
)
from tests.forward.test_walk import SIZES
from tests.parity.opening import dequantized, open_model
from tests.tiny import edit_tensors, llama_config

MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


@dataclass(frozen=True, slots=True)
class Family:
    """`groups` are the linear layers of one decoder layer that are given one input, in the order they run."""

    config: Any
    groups: Sequence[Sequence[str]]


LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
NEOX = ["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]
SHARED = "mlp.shared_expert"
FAMILIES = {
    "llama": Family(llama_config(), LLAMA),
    "gpt_neox, parallel": Family(
        GPTNeoXConfig(**{key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}), NEOX
    ),
    # One norm for both branches: the MLP's first layer has the input of the attention's.
    "phi": Family(
        PhiConfig(**SIZES),
        [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"],
            ["self_attn.dense"],
            ["mlp.fc2"],
        ],
    ),
    "mixtral": Family(MixtralConfig(**SIZES, num_local_experts=3), LLAMA[:2]),
    "qwen2_moe": Family(
        Qwen2MoeConfig(**SIZES, **MOE, num_experts=4, shared_expert_intermediate_size=24),
        [
            *LLAMA[:2],
            [f"{SHARED}.gate_proj", f"{SHARED}.up_proj", "mlp.shared_expert_gate"],
            [f"{SHARED}.down_proj"],
        ],
    ),
}


@dataclass
class Seen:
    """What `feedback` was given and answered, by name of the weight, in order."""

    statistics: dict[str, Statistics] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    directions: dict[str, Tensor | None] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()

    def watched(
        target: Tensor,
        statistics: Statistics,
        encoder: Any,
        options: FeedbackOptions,
        directions: Tensor | None,
        base: Any,
        metric: Callable[[], Metric] | None,
    ) -> QuantizedWeight:
        # Statistics belong to whoever is given them.
        found.statistics[encoder.name] = replace(
            statistics,
            hessian=statistics.hessian.clone(),
            cross=None if statistics.cross is None else statistics.cross.clone(),
        )
        found.targets[encoder.name] = target.clone()
        found.directions[encoder.name] = directions
        if metric is not None:
            found.metrics[encoder.name] = metric()
        options = replace(options, sweeps=0, refits=0)
        return feedback(target, statistics, encoder, options, directions, base, metric)

    monkeypatch.setattr(walk, "feedback", watched)
    return found


def merged(folder: Path, residual_rank: int = 0) -> Path:
    """The output of a merge that calibrates what lies in `folder`."""
    merge(
        folder / "base",
        folder / "adapter",
        folder / "out",
        quant="nf4-dq",
        calibration=folder / "text.txt",
        calibration_tokens=TOKENS,
        calibration_sequence_length=LENGTH,
        residual_rank=residual_rank,
    )
    return folder / "out"


def repairs(out: Path, name: str) -> Tensor:
    """B A of the residual adapter for the weight `name`."""
    factors = load_file(out / RESIDUAL_TENSORS)
    down, up = (
        factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"].float()
        for part in "AB"
    )
    product: Tensor = up @ down
    return product


@contextmanager
def inputs_of(module: nn.Module, kept: list[Tensor]) -> Iterator[None]:
    hook = module.register_forward_pre_hook(
        lambda _, given: kept.append(given[0].reshape(-1, given[0].shape[-1]))
    )
    yield
    hook.remove()


def plain_statistics(
    targets: Path, chosen: Mapping[str, Tensor], layers: str, groups: Sequence[Sequence[str]], windows: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """H and C of every weight by running whole models: one of all targets, one that becomes what was chosen."""
    reference, quantized = (
        AutoModelForCausalLM.from_pretrained(targets, dtype=torch.float32).eval() for _ in range(2)
    )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for number in range(len(reference.get_submodule(layers))):
        for group in groups:
            paths = [f"{layers}.{number}.{name}" for name in group]
            both: list[Tensor] = []
            for model in (reference, quantized):
                kept: list[Tensor] = []
                with inputs_of(model.get_submodule(paths[0]), kept), torch.no_grad():
                    model(windows, use_cache=False)
                both.append(torch.cat(kept))
            x, z = both
            for path in paths:
                found[f"{path}.weight"] = (z.T @ z / len(z), x.T @ z / len(z))
                quantized.get_submodule(path).weight.data = chosen[f"{path}.weight"].float()
    return found


@pytest.mark.parametrize(("family", "rank"), [*((family, 0) for family in FAMILIES), ("llama", 3)])
def test_statistics_are_those_of_a_plain_loop(family: str, rank: int, seen: Seen, tmp_path: Path) -> None:
    """What was chosen has the residual adapter with it, where there is one."""
    config, groups = FAMILIES[family].config, FAMILIES[family].groups
    names = {name.rpartition(".")[2] for group in groups for name in group}
    adapted = tuple(sorted(names - {"shared_expert_gate"}))[:3]
    save_subject(tmp_path, config, adapted)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "targets", quant="none", dtype="float32")
    chosen = {
        f"{name}.weight": value for name, value in dequantized(open_model(merged(tmp_path, rank))).items()
    }
    if rank:
        chosen = {name: value.float() + repairs(tmp_path / "out", name) for name, value in chosen.items()}
    windows = read_windows(tmp_path / "text.txt", load_tokenizer(tmp_path / "base"), TOKENS // LENGTH, LENGTH)
    layers = "gpt_neox.layers" if "neox" in family else "model.layers"
    expected = plain_statistics(tmp_path / "targets", chosen, layers, groups, windows)
    assert list(seen.statistics) == list(expected)
    for name, (hessian, cross) in expected.items():
        given = seen.statistics[name]
        assert given.tokens == TOKENS
        torch.testing.assert_close(given.hessian, hessian, rtol=1e-4, atol=1e-5)
        assert given.cross is not None
        torch.testing.assert_close(given.cross, cross, rtol=1e-4, atol=1e-5)
    of_layers = [f"{layers}.{number}" for number in range(len(expected) // len(names))]
    for group in [[f"{layer}.{name}.weight" for name in group] for layer in of_layers for group in groups]:
        assert len({id(seen.metrics[name]) for name in group}) == 1, "factors are made once a group"


# -- what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_subject(tmp_path_factory.mktemp("walked"), llama_config())
    convert(folder / "base", folder / "nf4-dq", quant="nf4-dq")
    return folder


def test_the_output_has_what_was_chosen(folder: Path, seen: Seen, tmp_path: Path) -> None:
    """Pass 2 copies the bytes of pass 1."""
    work = tmp_path / "work"
    found = calibrated(prepared_in(folder).subject, work)
    out = run(prepared_in(folder), tmp_path / "out", lambda done, total: None, StopRequest())
    assert out.kept_by_weight.keys() == found.keys() == seen.targets.keys()
    written = {**load_file(tmp_path / "out" / "model.safetensors")}
    chosen = parts_in(work)
    assert len(chosen) == 6 * 14
    for name, tensor in chosen.items():
        assert torch.equal(written[name], tensor), name


def prepared_in(folder: Path) -> Any:
    job = build_job(
        folder / "base",
        folder / "adapter",
        quant="nf4-dq",
        calibration=folder / "text.txt",
        calibration_tokens=TOKENS,
        calibration_sequence_length=LENGTH,
    )
    return prepare(job)


@pytest.mark.parametrize(("base", "merge_base"), [("nf4-dq", "original"), ("base", "nf4-dq")])
def test_an_update_of_nothing_leaves_the_base(
    folder: Path, tmp_path: Path, base: str, merge_base: str
) -> None:
    copytree(folder, tmp_path / "all")
    path = tmp_path / "all" / "adapter" / "adapter_model.safetensors"
    # An adapter of nothing at all is refused; so one weight changes, which runs last.
    last = "model.layers.1.mlp.down_proj"
    put = {
        name: torch.zeros_like(tensor)
        for name, tensor in load_file(path).items()
        if "lora_B" in name and last not in name
    }
    edit_tensors(path, put=put)
    subject = subject_in(tmp_path / "all", base=base, merge_base=merge_base, quant="nf4-dq")
    found = calibrated(subject, tmp_path / "work")
    assert len(found) == 14
    stored = load_file(folder / "nf4-dq" / "model.safetensors")
    for name, tensor in parts_in(tmp_path / "work").items():
        is_same = torch.equal(tensor, stored[name])
        assert is_same or name.startswith(last), name
    name = f"{last}.weight"
    assert not torch.equal(parts_in(tmp_path / "work")[name], stored[name])


def test_a_kept_update_is_weighed_as_elsewhere(folder: Path, tmp_path: Path) -> None:
    """<Q - B, D> / ||D||² from the files alone, in float64."""
    subject = subject_in(folder, base="nf4-dq")
    found = calibrated(subject, tmp_path / "work")
    merge(folder / "nf4-dq", folder / "adapter", tmp_path / "target", quant="none", dtype="float32")
    target = load_file(tmp_path / "target" / "model.safetensors")
    convert(folder / "nf4-dq", tmp_path / "dense", quant="none", dtype="float32")
    base = load_file(tmp_path / "dense" / "model.safetensors")
    for name, each in found.items():
        delta = target[name].double() - base[name].double()
        assert each.kept is not None
        assert each.kept.delta == pytest.approx(float(delta.square().sum()), rel=1e-6)
        assert 0.8 < each.kept.kept / each.kept.delta < 1.2
        assert 0 < each.notes["relative_error"] < 0.2
        assert 0.8 < each.notes["kept_h"] < 1.2


def test_the_reference_stream_is_what_eval_computes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerFiles, "remove_states", lambda _: None)
    calibrated(subject_in(folder), tmp_path)
    prepared = prepare(build_job(folder / "base", folder / "adapter", quant="none", dtype="float32"))
    windows = read_windows(folder / "text.txt", load_tokenizer(folder / "base"), TOKENS // LENGTH, LENGTH)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with WeightSource(prepared.plan, prepared.plan.device, lambda _: None) as source:
        skeleton = build_skeleton(prepared.base.index.config, "base", torch.float32)
        walked = Walk(skeleton, source, prepared.plan.device)
        states = torch.empty(*windows.shape, walked.hidden)
        walked.run(windows, states, batch_of(LENGTH))
    torch.set_num_threads(threads)
    found = torch.from_file(str(tmp_path / "reference-0"), size=states.numel()).view(states.shape)
    assert torch.equal(found, states)


@pytest.mark.parametrize("lora", ["plain", "dora"])
def test_directions_are_the_adapters(folder: Path, seen: Seen, tmp_path: Path, lora: str) -> None:
    place = folder
    if lora == "dora":
        place = save_subject(tmp_path, llama_config(), ("q_proj",), {"use_dora": True})
    calibrated(subject_in(place, feedback=replace(QUICK, preserve_delta=0.3)), tmp_path / "work")
    name = "model.layers.0.self_attn.q_proj"
    adapter = load_file(place / "adapter" / "adapter_model.safetensors")
    given = seen.directions[f"{name}.weight"]
    assert given is not None
    if lora == "plain":
        assert torch.equal(given, adapter[f"base_model.model.{name}.lora_A.weight"].float())
        return
    base = load_file(place / "base" / "model.safetensors")[f"{name}.weight"].float()
    delta = seen.targets[f"{name}.weight"] - base
    torch.testing.assert_close(given @ given.T, torch.eye(4))
    # They hold as much of the update as any four directions can.
    best = torch.linalg.svdvals(delta)[:4].square().sum()
    torch.testing.assert_close((delta @ given.T).square().sum(), best, rtol=1e-3, atol=0)
    assert seen.directions["model.layers.0.mlp.up_proj.weight"] is None


def test_what_no_update_touches_is_calibrated_too(folder: Path, tmp_path: Path) -> None:
    found = calibrated(subject_in(folder, adapter=None), tmp_path)
    assert len(found) == 14
    assert all(each.kept is None and "kept_h" not in each.notes for each in found.values())


def test_too_short_a_text(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--calibration-tokens 64 is too few: .*down_proj.* has 72 inputs"):
        subject_in(folder, tokens=64)
    with pytest.raises(InputError, match=r"text\.txt has 2000 tokens.*--calibration-tokens 1984"):
        calibrated(subject_in(folder, tokens=4096), tmp_path)


# -- experts of their own -------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Experts as modules: tokens go to the first or the second by their first entry, none to the third."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.out = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == (number == 0) if number < 2 else torch.zeros(len(x), dtype=torch.bool)
            y[chosen] = expert(x[chosen])
        found: Tensor = self.out(y)
        return found


def test_experts_are_groups_of_their_own() -> None:
    module, recorder = Routed(), Recorder()
    linears: dict[str, WeightMatrix] = {
        name: OwnParameter(f"{name}.weight", child, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    for sign in (1, -1):  # the second expert is first called in the second batch
        with recorder.watching(linears, lambda group, given: None):
            module(sign * torch.rand(8, 4))
    assert [group.names for group in recorder.groups] == [["experts.0"], ["out"], ["experts.1"]]
    assert recorder.missing(linears) == ["experts.2"]


EXPERTS = "model.layers.0.mlp.experts"


def test_experts_of_one_parameter_are_calibrated_each_by_its_own_tokens(seen: Seen, tmp_path: Path) -> None:
    """H of the first layer by a plain model: transformers holds the experts of a layer in one parameter."""
    sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 64}
    save_subject(tmp_path, MixtralConfig(**sizes, num_local_experts=4), ("q_proj", "v_proj"))
    options: dict[str, Any] = {
        "calibration": tmp_path / "text.txt",
        "calibration_tokens": TOKENS,
        "calibration_sequence_length": LENGTH,
    }
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    merge(base, adapter, tmp_path / "out", quant="w4a16", group_size=32, **options)
    merge(base, adapter, tmp_path / "nearest", quant="w4a16", group_size=32, rounding="nearest")
    merge(base, adapter, tmp_path / "targets", quant="none", dtype="float32")
    assert len([name for name in seen.statistics if ".experts." in name]) == 3 * 4
    found, nearest = (decoded_in(tmp_path / name) for name in ("out", "nearest"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "targets", dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    attention = model.model.layers[0].self_attn
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.get_submodule(part).weight.data = found[f"model.layers.0.self_attn.{part}.weight"]
    given: list[tuple[Tensor, Tensor]] = []
    experts = model.get_submodule(EXPERTS)
    experts.register_forward_pre_hook(lambda _, arguments: given.append((arguments[0], arguments[1])))
    windows = read_windows(tmp_path / "text.txt", load_tokenizer(base), TOKENS // LENGTH, LENGTH)
    with torch.no_grad():
        model(windows, use_cache=False)
    ((hidden, chosen),) = given
    counts, ratios = [], []
    for number in range(4):
        stored = {
            part: f"model.layers.0.block_sparse_moe.experts.{number}.{part}.weight"
            for part in ("w1", "w2", "w3")
        }
        z = hidden[(chosen == number).any(-1)]
        counts.append(len(z))
        inner = torch.nn.functional.silu(z @ found[stored["w1"]].T) * (z @ found[stored["w3"]].T)
        for part, inputs in (("w1", z), ("w3", z), ("w2", inner)):
            statistics, hessian = seen.statistics[stored[part]], inputs.T @ inputs / max(1, len(inputs))
            known = min(1.0, len(inputs) / 2 / inputs.shape[1])
            expected = known * hessian + (1 - known) * hessian.diagonal().mean() * torch.eye(len(hessian))
            assert statistics.tokens == len(inputs)
            assert statistics.cross is None
            if len(inputs):
                torch.testing.assert_close(statistics.hessian, expected, rtol=1e-4, atol=1e-6)
            target = seen.targets[stored[part]]
            errors = [target - values[stored[part]] for values in (found, nearest)]
            ours, theirs = (float(((error @ hessian) * error).sum()) for error in errors)
            if known == 1:
                ratios.append(ours / theirs)
    assert sum(counts) == 2 * TOKENS
    assert len(ratios) > 6
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.8


def decoded_in(folder: Path) -> dict[str, Tensor]:
    """All weights of an output, as a loader sees them."""
    dense = folder.with_name(f"{folder.name}-dense")
    convert(folder, dense, quant="none", dtype="float32")
    found: dict[str, Tensor] = load_file(dense / "model.safetensors")
    return found


def test_few_tokens_count_for_what_they_are() -> None:
    inputs = torch.randn(6, 4)
    moments = Moments(crosses=True)
    moments.add(inputs, inputs)
    found = moments.statistics(4, torch.device("cpu"))
    seen = inputs.T @ inputs / 6
    torch.testing.assert_close(found.hessian, 0.75 * seen + 0.25 * seen.diagonal().mean() * torch.eye(4))
    assert found.cross is None
    assert torch.equal(Moments(crosses=True).statistics(4, torch.device("cpu")).hessian, torch.eye(4))


def test_other_tokens_are_not_crossed() -> None:
    """An expert may be given other tokens in the quantized stream."""
    moments = Moments(crosses=True)
    moments.add(torch.randn(20, 4), torch.randn(20, 4))
    moments.add(torch.randn(20, 4), torch.randn(19, 4))
    assert moments.statistics(4, torch.device("cpu")).cross is None
