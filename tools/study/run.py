"""The study: every strategy on every bed, written by `streamconv merge` and judged by stock transformers.

What is done is kept in docs/results/study-BED.json after every step, and not done again; `--anew STRATEGY` forgets it.
Models are opened, and their codes read, by transformers and bitsandbytes: nothing of streamconv has part in judging.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from tools.bench.results import RESULTS, load, machine, save
from tools.make_demo_base import make_demo_base
from tools.perplexity import Subject, be_quiet, dequantized, read_windows
from tools.perplexity import load as open_model
from tools.study import synthetic
from tools.study.beds import (
    BEDS,
    BLOCK,
    DEMO_BASE,
    ONE_SIDED,
    TARGETS,
    VALUES,
    Bed,
    OnGrid,
    delta_to_step,
    described,
    is_clamped,
    kept_share,
    nearest_codes,
    quantize,
    read_tensors,
    rounded,
    streamconv,
    unpack,
)

WORK = Path(".study")
MADE_BY = "tools/study/run"
SYNTHETIC, SIZES = "synthetic", "sizes"
NAMES = (SYNTHETIC, SIZES, *BEDS)


# -- strategies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """A model made of its parts on opening: nothing is merged."""

    name: str
    label: str
    adapter: bool
    load_in_nf4_dq: bool


@dataclass(frozen=True, slots=True)
class Merged:
    """An nf4-dq file that `streamconv merge` writes with `options`; `calibrated`: it is given the calibration text.

    `residual`: a residual adapter comes with it, and is judged on top of it.
    """

    name: str
    label: str
    target: str
    options: tuple[str, ...]
    calibrated: bool = False
    residual: bool = False


REFERENCE = Opened("T", "T, unmerged", adapter=True, load_in_nf4_dq=True)
OPENED = (
    REFERENCE,
    Opened("F", "F, unmerged", adapter=True, load_in_nf4_dq=False),
    Opened("base", "base, 16 bit", adapter=False, load_in_nf4_dq=False),
    Opened("base-nf4", "base, nf4-dq", adapter=False, load_in_nf4_dq=True),
)
SEEDS = (0, 1, 2)


def _written(
    name: str, label: str, target: str, rounding: str, *more: str, calibrated: bool = False
) -> Merged:
    options = ("--quant", "nf4-dq", *TARGETS[target], "--rounding", rounding, *more)
    return Merged(name, label, target, options, calibrated)


def _feedback(name: str, label: str, target: str, *more: str) -> Merged:
    return _written(name, label, target, "feedback", *more, calibrated=True)


DELTA_TERM = ("--preserve-delta", "0.3")

NEAREST_T = _written("nearest-T", "nearest of T", "T", "nearest")
NEAREST_F = _written("nearest-F", "nearest of F", "F", "nearest")
STOCHASTIC_T = tuple(
    _written(f"stochastic-T-{seed}", f"stochastic of T, seed {seed}", "T", "stochastic", "--seed", str(seed))
    for seed in SEEDS
)
ADAPTIVE_T = _written("adaptive-T", "adaptive of T", "T", "adaptive")
SEARCH_T = _written("search-T", "search of T", "T", "search")
WEIGHED_SEARCH_T = _written("search-T-text", "search of T, weighed by text", "T", "search", calibrated=True)
FEEDBACK_T = _feedback("feedback-T", "feedback of T", "T")
TERM_FEEDBACK_T = _feedback("feedback-T-delta", "feedback of T, delta term", "T", *DELTA_TERM)
ONE_SIDED_T = _feedback("feedback-T-onesided", "one-sided feedback of T", "T", *ONE_SIDED)
TERM_ONE_SIDED_T = _feedback(
    "feedback-T-onesided-delta", "one-sided feedback of T, delta term", "T", *ONE_SIDED, *DELTA_TERM
)
FEEDBACK_F = _feedback("feedback-F", "feedback of F", "F")
RESIDUAL_T = replace(
    _feedback(
        "feedback-T-residual", "feedback of T, residual adapter r 16 on top", "T", "--residual-rank", "16"
    ),
    residual=True,
)
FEEDBACK = (FEEDBACK_T, TERM_FEEDBACK_T, ONE_SIDED_T, TERM_ONE_SIDED_T, FEEDBACK_F, RESIDUAL_T)
MERGED = (NEAREST_T, NEAREST_F, *STOCHASTIC_T, ADAPTIVE_T, SEARCH_T, WEIGHED_SEARCH_T, *FEEDBACK)

# One update in several sizes, for where nearest rounding of T begins to do better than stochastic.
SCALED, FACTORS = BEDS["faq-kjv-light"], (1, 2, 3, 4, 5, 6, 8)
BY_SIZE = (NEAREST_T, *STOCHASTIC_T, ADAPTIVE_T)


def scaled(factor: int, folder: Path) -> Bed:
    """The bed SCALED with its update so many times as large; the adapter is written to `folder`."""
    adapter = folder / "adapters" / f"{SCALED.adapter.name}-x{factor}"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(SCALED.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": factor * config["lora_alpha"]})
    )
    return replace(SCALED, name=adapter.name, adapter=adapter)


# -- the judge -----------------------------------------------------------------------------------------------
#
# With p the reference's distribution of the next token and q the model's, KL = sum p (log p - log q), in nats a token.


@dataclass(frozen=True, slots=True)
class Verdict:
    """One number a sequence, nats a token: the loss, and KL from the reference; top-1 agreement over all tokens."""

    losses: list[float]
    kl: list[float]
    agreement: float


@torch.inference_mode()
def hidden_states(model: Any, windows: Tensor) -> Tensor:
    """What goes into the output head for every window [window, token]: [window, token, hidden], float32."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    states = [inner.model(window[None], use_cache=False).last_hidden_state[0] for window in windows]
    return torch.stack(states)


@torch.inference_mode()
def judge(hidden: Tensor, reference: Tensor, head: Tensor, windows: Tensor) -> Verdict:
    """Compare hidden states [window, token, hidden] of a model with the `reference`'s, before one output `head`.

    The head is [vocabulary, hidden], the same for both.
    """
    losses, kl, agreed = [], [], 0
    for ours, theirs, window in zip(hidden, reference, windows, strict=True):
        log_q = (ours[:-1] @ head.T).log_softmax(dim=-1)
        log_p = (theirs[:-1] @ head.T).log_softmax(dim=-1)
        losses.append(-log_q.gather(1, window[1:, None]).double().mean().item())
        agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
        log_q.sub_(log_p).neg_()
        kl.append((log_p.exp_().mul_(log_q)).sum(dim=-1, dtype=torch.float64).mean().item())
    return Verdict(losses, kl, agreed / (windows.shape[0] * (windows.shape[1] - 1)))


def output_head(model: Any) -> Tensor:
    """The output embeddings [vocabulary, hidden], float32: every model of a bed has the same."""
    head: Tensor = model.get_output_embeddings().weight.detach()
    return head


def states_of(subject: Subject, windows: Tensor, cache: Path | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states and output head of `subject`, kept in `cache` where one is given."""
    if cache and cache.exists():
        kept: tuple[Tensor, Tensor] = torch.load(cache, weights_only=True)
        return kept
    model = open_model(subject)
    found = hidden_states(model, windows), output_head(model)
    del model
    gc.collect()
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    return found


# -- every adapted weight: sizes, shares, distributions, without a forward pass ------------------------------


OUTLIER = 6.0  # root mean squares


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted weight [out, in] of a bed: the original W, its nf4-dq form and the adapter's update D."""

    name: str
    weight: Tensor
    base: OnGrid
    delta: Tensor

    @property
    def target(self) -> Tensor:
        return self.base.values + self.delta


def layers(base: Path, base_nf4: Path, adapter: Path) -> Iterator[Layer]:
    """Every adapted weight: `base` in 16 bit, `base_nf4` the same in nf4-dq, LoRA `adapter`."""
    stored, packed = read_tensors(base), codes_of(base_nf4)
    for name, delta in deltas(adapter):
        yield Layer(name, stored[f"{name}.weight"].float(), packed[name], delta)


def deltas(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Module names and D = alpha / r B A (float32) of a plain LoRA adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    stored = read_tensors(adapter)
    for key in sorted(stored):
        if key.endswith("lora_A.weight"):
            A, B = stored[key].float(), stored[key.replace("lora_A", "lora_B")].float()
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            yield name, config["lora_alpha"] / config["r"] * (B @ A)


def codes_of(folder: Path) -> dict[str, OnGrid]:
    """Every 4-bit weight of a checkpoint by module name, as transformers and bitsandbytes open it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: unpack(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def describe(layer: Layer) -> dict[str, Any]:
    """Sizes of one weight, what nearest rounding of T makes of it, and its distribution before and after."""
    base, target = layer.base, layer.target
    nearest = quantize(target)
    still = nearest_codes(target, base.scales)
    moved, moved_alone = nearest.codes != base.codes, still != base.codes
    before = base.scales.flatten()[::BLOCK]
    return {
        "name": layer.name,
        "elements": target.numel(),
        "ratio": delta_to_step(layer.delta, base),
        "delta_square": _norm(layer.delta) ** 2,
        "delta_kurtosis": shape(layer.delta)["kurtosis"] - 3,
        "delta_to_weight": _norm(layer.delta) / _norm(base.values),
        "error_to_delta": _norm(layer.weight - base.values) / _norm(layer.delta),
        "kept": kept_share(nearest.values, base.values, layer.delta),
        "kept_on_fixed_scales": kept_share(VALUES[still.long()] * base.scales, base.values, layer.delta),
        "changed": _share(moved),
        "changed_on_fixed_scales": _share(moved_alone),
        "scale_moved": ((nearest.scales.flatten()[::BLOCK] - before).abs() / before).mean().item(),
        "clamped": _share(is_clamped(target, base.scales)),
        "shape_before": shape(base.values),
        "shape_of_target": shape(target),
        "shape_after": shape(nearest.values),
    }


def shape(weight: Tensor) -> dict[str, float]:
    """Kurtosis (3 for a normal distribution), largest magnitude in root mean squares, share beyond OUTLIER of them."""
    values = weight.double().flatten()
    centred = values - values.mean()
    rms = values.square().mean().sqrt()
    return {
        "kurtosis": (centred.pow(4).mean() / centred.square().mean().square()).item(),
        "largest": (values.abs().max() / rms).item(),
        "outliers": _share(values.abs() > OUTLIER * rms),
    }


def compare(adapted: Mapping[str, Layer], out: Path, target: str) -> dict[str, Any]:
    """Of a finished nf4-dq output: codes that differ from the base's, and the kept delta of every adapted weight."""
    found = codes_of(out)
    changed = {name: _share(found[name].codes != layer.base.codes) for name, layer in adapted.items()}
    kept = {
        name: kept_share(
            found[name].values, layer.base.values if target == "T" else layer.weight, layer.delta
        )
        for name, layer in adapted.items()
    }
    size = {name: layer.delta.numel() for name, layer in adapted.items()}
    square = {name: _norm(layer.delta) ** 2 for name, layer in adapted.items()}
    return {
        "changed": _weighted(changed, size),
        "kept": _weighted(kept, square),
        "kept_by_weight": kept,
    }


def _weighted(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(values[name] * weights[name] for name in values) / sum(weights.values())


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()


# -- all strategies on all beds ------------------------------------------------------------------------------


def study(bed: Bed, wanted: Callable[[str], bool], tell: Callable[[str], None]) -> None:
    """Fill in what is missing in the results of `bed`."""
    path = results_path(bed)
    results = load(path) or {"bed": described(bed), "machine": {}, "rows": {}, "weights": []}
    work = WORK / bed.name
    windows = read_windows(bed.base, bed.held_out, bed.windows, bed.tokens)
    every: tuple[Opened | Merged, ...] = (*OPENED, *MERGED)
    rows = [row for row in every if wanted(row.name) and row.name not in results["rows"]]
    if not rows and results["weights"]:
        return
    reference, head = states_of(bed.trained, windows, work / "T.pt")
    adapted = _adapted(bed, work)
    if not results["weights"]:
        tell(f"{bed.name}: what nearest rounding does to every weight")
        results["weights"] = [rounded(describe(layer)) for layer in adapted.values()]
        save(path, MADE_BY, results)
    for row in rows:
        tell(f"{bed.name}: {row.label}")
        found = _opened(bed, row, windows, reference, head) if isinstance(row, Opened) else None
        if isinstance(row, Merged):
            found = _merged(bed, row, windows, reference, head, adapted)
        results["machine"] = machine(work)
        results["rows"][row.name] = {**rounded(found), "commit": results["machine"]["commit"]}
        save(path, MADE_BY, results)


def results_path(bed: Bed) -> Path:
    return RESULTS / f"study-{bed.name}.json"


def _adapted(bed: Bed, work: Path) -> Mapping[str, Layer]:
    base_nf4 = work / "base-nf4"
    if not base_nf4.exists():
        streamconv("convert", "--base", str(bed.base), "-o", str(base_nf4), "--quant", "nf4-dq")
    return {layer.name: layer for layer in layers(bed.base, base_nf4, bed.adapter)}


def _opened(bed: Bed, row: Opened, windows: Tensor, reference: Tensor, head: Tensor) -> dict[str, Any]:
    subject = Subject(bed.base, bed.adapter if row.adapter else None, row.load_in_nf4_dq)
    states = reference if row is REFERENCE else states_of(subject, windows)[0]
    return {"label": row.label, **asdict(judge(states, reference, head, windows))}


def _merged(
    bed: Bed,
    row: Merged,
    windows: Tensor,
    reference: Tensor,
    head: Tensor,
    adapted: Mapping[str, Layer],
) -> dict[str, Any]:
    """Write the output of `row`, judge it and remove it."""
    out = WORK / bed.name / row.name
    options = [*row.options, *(bed.calibration_options if row.calibrated else ())]
    shutil.rmtree(out, ignore_errors=True)
    cost = streamconv(
        "merge", "--base", str(bed.base), "--adapter", str(bed.adapter), "-o", str(out), *options
    )
    report = json.loads(cost.stdout)
    found = {
        "label": row.label,
        "target": row.target,
        "options": options,
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "kept_delta": report["kept_delta"],
        "not_exact": not_exact(out),
        **compare(adapted, out, row.target),
        **asdict(judge(states_of(Subject(out), windows)[0], reference, head, windows)),
    }
    if row.residual:
        # Of the file alone; the row's own verdict is that with the adapter.
        found["alone"] = {key: found[key] for key in ("losses", "kl", "agreement")}
        found["residual"] = report["residual"]
        states = states_of(Subject(out, out / "residual"), windows)[0]
        found |= asdict(judge(states, reference, head, windows))
    shutil.rmtree(out)
    return found


def not_exact(out: Path) -> list[str]:
    """Modules of an nf4 output whose weights bitsandbytes and streamconv decode differently, in any bit."""
    dense = out.with_name(f"{out.name}-dense")
    shutil.rmtree(dense, ignore_errors=True)
    streamconv("convert", "--base", str(out), "-o", str(dense), "--quant", "none")
    ours = read_tensors(dense)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    wrong = [
        name
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
        and not torch.equal(dequantized(module), ours[f"{name}.weight"])
    ]
    shutil.rmtree(dense)
    return wrong


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/study/run", description=__doc__)
    parser.add_argument("subjects", nargs="*", help=f"{', '.join(NAMES)}; all, unless some are named")
    parser.add_argument(
        "--threads", type=int, default=2, help="of the judge; results depend on it in the last bits"
    )
    parser.add_argument("--only", action="append", default=[], help="a strategy; repeatable")
    parser.add_argument("--anew", action="append", default=[], help="a strategy to measure again; repeatable")
    options = parser.parse_args(arguments)
    if unknown := set(options.subjects) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    be_quiet()
    torch.set_num_threads(options.threads)
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {what}", flush=True)

    chosen = options.subjects or NAMES
    if any(name in chosen and bed.base == DEMO_BASE for name, bed in BEDS.items()):
        make_demo_base(DEMO_BASE)
    if SYNTHETIC in chosen:
        _synthetic(options.anew, tell)
    if SIZES in chosen:
        _sizes(tell)
    for bed in (bed for name, bed in BEDS.items() if name in chosen):
        _forget(bed, options.anew)
        study(bed, lambda name: not options.only or name in options.only, tell)


def _synthetic(anew: Sequence[str], tell: Callable[[str], None]) -> None:
    path = RESULTS / f"study-{SYNTHETIC}.json"
    if path.exists() and SYNTHETIC not in anew:
        return
    tell("synthetic layers")
    found = {"dead_zone": synthetic.dead_zone(), "compensated": synthetic.compensated()}
    save(path, MADE_BY, {"machine": machine(RESULTS), "seeds": list(synthetic.SEEDS), **rounded(found)})


def _sizes(tell: Callable[[str], None]) -> None:
    """KL of what is rounded without text, for one update in several sizes."""
    path = RESULTS / f"study-{SIZES}.json"
    results = load(path) or {"machine": {}, "sizes": {}}
    for factor in FACTORS:
        if str(factor) in results["sizes"]:
            continue
        tell(f"{SCALED.name}: {factor} times the update")
        bed = scaled(factor, WORK)
        work = WORK / f"{bed.name}-work"
        windows = read_windows(bed.base, bed.held_out, bed.windows, bed.tokens)
        reference, head = states_of(bed.trained, windows, work / "T.pt")
        adapted = _adapted(bed, work)
        found: dict[str, Any] = {"ratios": [describe(layer)["ratio"] for layer in adapted.values()]}
        for row in BY_SIZE:
            measured = _merged(bed, row, windows, reference, head, adapted)
            found[row.name] = {"kept": measured["kept"], "kl": measured["kl"]}
        results["sizes"][str(factor)] = rounded(found)
        save(path, MADE_BY, results | {"machine": machine(work)})


def _forget(bed: Bed, names: Sequence[str]) -> None:
    if results := load(results_path(bed)):
        rows = {name: row for name, row in results["rows"].items() if name not in names}
        save(results_path(bed), MADE_BY, results | {"rows": rows})


if __name__ == "__main__":
    main()
