"""Carries an evaluation out: walk the reference, walk the model, and compare what their heads answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.dtypes import DENSE
from streamconv.errors import InputError, OptionError
from streamconv.evaluation.budget import Budget, plan_budget
from streamconv.evaluation.kept_reference import Draft, KeptReference, kept_reference
from streamconv.evaluation.measures import Divergence, Tally
from streamconv.evaluation.options import EvaluationOptions
from streamconv.evaluation.result import Comparison, Evaluation, Greedy
from streamconv.forward.activations import hold_activations
from streamconv.forward.skeleton import build_planned
from streamconv.forward.text import load_tokenizer, read_windows
from streamconv.forward.walk import Walk
from streamconv.forward.weights import WeightSource
from streamconv.memory_errors import is_out_of_memory, ran_out
from streamconv.pipeline.preparation import Prepared, prepare
from streamconv.planning.devices import AUTO, no_room, short_of_memory
from streamconv.planning.memory import one_cell_bytes
from streamconv.planning.options import Job
from streamconv.progress import OnProgress, anonymous_bytes
from streamconv.running.device_use import in_use

# Sequences whose greedy continuations are compared: each token of these may cost a walk.
GREEDY_SEQUENCES = 16


class _Gauge:
    """Counts bytes read and samples memory; progress is that of the main pass, without greedy continuations."""

    def __init__(self, on_progress: OnProgress, on_gpu: bool) -> None:
        self._on_progress, self._on_gpu, self._total = on_progress, on_gpu, 0
        self._before = anonymous_bytes(on_gpu)
        self.read = self.peak = 0

    def start(self, total: int) -> None:
        self._total = total
        self._on_progress(0, total)

    def add(self, nbytes: int) -> None:
        self.read += nbytes
        self.peak = max(self.peak, anonymous_bytes(self._on_gpu) - self._before)
        if self._total:
            self._on_progress(min(self.read, self._total), self._total)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model ready to be walked."""

    prepared: Prepared
    walk: Walk


def run_evaluation(options: EvaluationOptions, on_progress: OnProgress) -> Evaluation:
    """See `evaluate`. Raises InputError, ResourceError where a model, text or budget is not fit for it."""
    started = time.monotonic()
    jobs = [job for job in (options.subject, options.reference) if job is not None]
    everything = [_prepare(job) for job in jobs]
    gauge = _Gauge(on_progress, not everything[0].plan.device.is_cpu)
    with ExitStack() as stack:
        subjects = [stack.enter_context(_open(prepared, gauge.add)) for prepared in everything]
        _check(subjects, options)
        with everything[-1 if options.tokenizer_of_reference else 0].tokenizer.as_folder() as folder:
            tokenizer = load_tokenizer(folder)
        windows = read_windows(options.data, tokenizer, options.sequences, options.sequence_length)
        walks = [subject.walk for subject in subjects]
        budget = plan_budget(walks, windows, options.subject.options, _cell_bytes(everything))
        short = short_of_memory(walks[0].device, budget.vram)
        if short and options.subject.device != AUTO:
            raise no_room(options.subject.device, short)
        if short:
            return run_evaluation(_on_cpu(options), on_progress)
        kept = _kept(options, everything, walks, windows)
        gauge.start(_bytes_to_read(walks, kept))
        with in_use(walks[0].device):
            try:
                tallies = score(walks, windows, budget, kept)
                greedy = _greedy(walks, windows, budget, options.greedy_tokens, kept)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                remedy = "Give it a smaller --max-vram, a shorter --sequence-length, or use --device cpu"
                raise ran_out(walks[0].device.name, error, remedy) from error
    return _evaluation(options, everything, tallies, greedy, gauge, budget, time.monotonic() - started)


def _evaluation(
    options: EvaluationOptions,
    everything: Sequence[Prepared],
    tallies: Tally | Divergence,
    greedy: Greedy | None,
    gauge: _Gauge,
    budget: Budget,
    seconds: float,
) -> Evaluation:
    model = tallies.model if isinstance(tallies, Divergence) else tallies
    losses = model.losses()
    return Evaluation(
        model=options.subject.base,
        adapter=options.subject.adapter,
        target=_target(everything[0]),
        data=str(options.data),
        dtype=options.subject.options.dtype,
        sequence_length=options.sequence_length,
        sequences=options.sequences,
        predicted_tokens=losses.numel(),
        perplexity=_perplexity(losses),
        losses=_by_sequence(losses),
        comparison=_comparison(everything[-1], tallies, greedy) if isinstance(tallies, Divergence) else None,
        seconds=seconds,
        bytes_read=gauge.read,
        peak_ram_bytes=gauge.peak,
        planned_ram_bytes=budget.ram,
    )


# -- models ----------------------------------------------------------------------------------------------------------


def _prepare(job: Job) -> Prepared:
    """The job planned and on this machine."""
    prepared = prepare(job)
    for storage, files in prepared.downloads():
        storage.fetch(files, lambda _: None)
    return prepared


@contextmanager
def _open(prepared: Prepared, on_bytes: Callable[[int], None]) -> Iterator[_Subject]:
    plan, dtype = prepared.plan, DENSE[prepared.job.options.dtype].torch
    skeleton = build_planned(plan, prepared.base.index, dtype)
    device = plan.device
    with WeightSource(plan, device, on_bytes) as source:
        yield _Subject(prepared, Walk(skeleton, source, device))
        source.check_unchanged()


def _cell_bytes(everything: Sequence[Prepared]) -> int:
    """Bytes that the cells of a weight take while it is put together, of the largest there is."""
    plans = [prepared.plan for prepared in everything]
    steps = ([placed.step for shard in plan.shards for placed in shard.steps] for plan in plans)
    found = [one_cell_bytes(each, plan.device) for each, plan in zip(steps, plans, strict=True)]
    return 0 if plans[0].device.is_cpu else max(found)


def _on_cpu(options: EvaluationOptions) -> EvaluationOptions:
    """The evaluation where a GPU's memory is taken, and which device it is was left open."""
    reference = options.reference and replace(options.reference, device="cpu")
    return replace(options, subject=replace(options.subject, device="cpu"), reference=reference)


def _check(subjects: list[_Subject], options: EvaluationOptions) -> None:
    for subject in subjects:
        config = subject.walk.skeleton.text_config
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and options.sequence_length > longest:
            raise OptionError(
                f"--sequence-length {options.sequence_length} is more than the {longest} positions of "
                f"{subject.walk.skeleton.location}; give that or less"
            )
    sizes = [subject.walk.vocabulary for subject in subjects]
    if len(set(sizes)) > 1:
        raise InputError(
            f"{options.subject.base} has a vocabulary of {sizes[0]} and the reference one of {sizes[1]}; only models "
            "of one vocabulary can be compared"
        )


def _target(prepared: Prepared) -> str:
    """Description of the evaluated weights, in words."""
    if prepared.adapter is None:
        return f"{prepared.base.quantized}, dequantized" if prepared.base.quantized else "as stored"
    return prepared.plan.target.reason


# -- a reference whose answers are kept ------------------------------------------------------------------------------


def _kept(
    options: EvaluationOptions, everything: Sequence[Prepared], walks: Sequence[Walk], windows: Tensor
) -> KeptReference | None:
    """Folder of the reference's answers, if there is one and they are to be kept."""
    if options.reference_cache is None or options.reference is None:
        return None
    walk = walks[-1]
    subject, reference = (prepared.plan for prepared in everything)
    found = kept_reference(options.reference_cache, reference, windows, walk.hidden, walk.dtype)
    return replace(found, is_of_subject=subject.fingerprint == reference.fingerprint)


def _bytes_to_read(walks: Sequence[Walk], kept: KeptReference | None) -> int:
    """Bytes to read in the main pass; of a reference whose states are kept, the head's."""
    if kept is None or kept.states() is None:
        return sum(walk.bytes_of_a_pass for walk in walks)
    return walks[0].bytes_of_a_pass + walks[1].head_bytes


@contextmanager
def _answered(walk: Walk, windows: Tensor, budget: Budget, kept: KeptReference | None) -> Iterator[Tensor]:
    """Hidden states of the reference's last layer for `windows`, from where they are kept."""
    found = None if kept is None else kept.states()
    if found is not None:
        yield found
        return
    with _walked(walk, windows, budget) as states:
        if kept is not None:
            walk.source.check_unchanged()
            kept.keep_states(states)
        yield states


# -- scores ----------------------------------------------------------------------------------------------------------


def score(
    walks: list[Walk], windows: Tensor, budget: Budget, kept: KeptReference | None = None
) -> Tally | Divergence:
    """The model's tally; with a reference, which is walked second, that of both."""
    with ExitStack() as stack:
        held = [stack.enter_context(_walked(walks[0], windows, budget))]
        if kept is not None and kept.is_of_subject and kept.states() is None:
            walks[0].source.check_unchanged()
            kept.keep_states(held[0])
        held += [stack.enter_context(_answered(walk, windows, budget, kept)) for walk in walks[1:]]
        answers = [
            walk.logits(windows, states, budget.batch, budget.height)
            for walk, states in zip(walks, held, strict=True)
        ]
        # Only sums come back from a GPU: the logits of 65,536 tokens are 34 GB.
        targets = windows[:, 1:].to(walks[0].device.torch)
        if len(walks) == 1:
            tally = Tally(targets)
            for rows, sequences, logits in answers[0]:
                tally.add(sequences, rows, _predicting(logits))
            return tally
        divergence = Divergence.between(targets)
        for (rows, sequences, model), (_, _, reference) in zip(*answers, strict=True):
            divergence.add(sequences, rows, _predicting(reference), _predicting(model))
        return divergence


@contextmanager
def _walked(walk: Walk, windows: Tensor, budget: Budget) -> Iterator[Tensor]:
    """Hidden states of the model's last layer for `windows`."""
    shape = (*windows.shape, walk.hidden)
    with hold_activations(shape, walk.dtype, budget.states) as states:
        walk.run(windows, states, budget.batch)
        yield states


def _predicting(logits: Tensor) -> Tensor:
    """Logits of all tokens but the last, which predicts nothing that is known; where they were computed."""
    return logits[:, :-1].float()


def _greedy(
    walks: list[Walk], windows: Tensor, budget: Budget, tokens: int, kept: KeptReference | None
) -> Greedy | None:
    """Position at which greedy continuations of the reference and the model part, over `tokens` tokens."""
    if not tokens:
        return None
    model, reference = walks
    chosen = windows[:GREEDY_SEQUENCES]
    prompt = chosen.shape[1] // 2
    prompts = chosen[:, :prompt]
    draft = None if kept is None else kept.draft(tokens)
    if draft is None:
        draft = _draft(reference, prompts, chosen[:, prompt : prompt + tokens], budget)
        if kept is not None:
            reference.source.check_unchanged()
            kept.keep_draft(draft)
    # The model's own continuation is the same until the first token at which it would have chosen another.
    differs = _continuation(model, prompts, draft.tokens, budget) != draft.tokens
    first = [row.nonzero()[0].item() if row.any() else None for row in differs]
    same = sum(place is None for place in first) / len(first)
    return Greedy(tokens, same, tuple(None if place is None else int(place) for place in first), draft.passes)


def _draft(reference: Walk, prompts: Tensor, guess: Tensor, budget: Budget) -> Draft:
    """The reference's own greedy continuations, as long as `guess`.

    What it finds most likely after a draft is its own continuation as far as the draft was, and one token further; so
    at most as many walks as tokens, and far fewer where drafts are good (Jacobi iteration).
    """
    passes, is_final = 0, False
    while passes < guess.shape[1] and not is_final:
        found = _continuation(reference, prompts, guess, budget)
        passes, is_final, guess = passes + 1, torch.equal(found, guess), found
    return Draft(guess, passes)


def _continuation(walk: Walk, prompts: Tensor, draft: Tensor, budget: Budget) -> Tensor:
    """The most likely token at each place of `draft` after `prompts` and the draft before it."""
    tally = score([walk], torch.cat([prompts, draft], dim=1), budget)
    assert isinstance(tally, Tally)
    return tally.best[:, prompts.shape[1] - 1 :]


def _comparison(reference: Prepared, found: Divergence, greedy: Greedy | None) -> Comparison:
    losses, kl, same = found.reference.losses(), found.kl(), found.agreement().double()
    return Comparison(
        reference=reference.job.base,
        reference_adapter=reference.job.adapter,
        reference_target=_target(reference),
        reference_perplexity=_perplexity(losses),
        reference_losses=_by_sequence(losses),
        kl=float(kl.mean()),
        kl_by_sequence=_by_sequence(kl),
        top1_agreement=float(same.mean()),
        top1_by_sequence=_by_sequence(same),
        greedy=greedy,
    )


def _perplexity(losses: Tensor) -> float:
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else float(losses.mean().exp())


def _by_sequence(values: Tensor) -> tuple[float, ...]:
    return tuple(values.mean(dim=1).tolist())
