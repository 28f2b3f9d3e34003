"""`eval`: how well a model predicts a text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli.blocks import Command, Section, group, option
from streamconv.cli.completion import words
from streamconv.cli.options import (
    ADAPTER_PLACE,
    ALLOW_MISSING,
    ALLOW_PICKLE,
    BASE_REVISION,
    FOLDER,
    IGNORE_EXTRA,
    MERGE_BASE,
    MOE_LAYOUT,
    SHOW,
    TOKENIZER,
    adapter_option,
    base_option,
    resources,
)
from streamconv.cli.printing import answer
from streamconv.cli.progress import progress
from streamconv.cli.signals import interrupt_on_signals
from streamconv.planning.options import EVALUATE_DEFAULTS
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.evaluation import Comparison, Evaluation

_REFERENCE = group(
    option(
        Section.REFERENCE,
        "--reference",
        defaults=EVALUATE_DEFAULTS,
        type=FOLDER,
        metavar="MODEL",
        help="Compare with this model: KL divergence from it, and how often both find the same token most likely.",
    ),
    option(
        Section.REFERENCE,
        "--reference-adapter",
        defaults=EVALUATE_DEFAULTS,
        type=FOLDER,
        metavar="ADAPTER",
        help="An adapter on the reference, not merged.",
    ),
    option(
        Section.REFERENCE,
        "--reference-merge-base",
        defaults=EVALUATE_DEFAULTS,
        metavar="FORMAT",
        help="The base of that adapter, as in --merge-base.",
    ),
    option(
        Section.REFERENCE,
        "--reference-cache",
        defaults=EVALUATE_DEFAULTS,
        type=click.Path(),
        metavar="DIR",
        help="Keep what the reference answers in this folder: the next model is compared without running it again.",
    ),
    option(
        Section.REFERENCE,
        "--greedy-tokens",
        defaults=EVALUATE_DEFAULTS,
        metavar="N",
        help="Also compare greedy continuations of so many tokens; reads the reference up to N more times.",
    ),
)
TEXT = group(
    option(
        Section.TEXT,
        "--data",
        required=True,
        type=click.Path(),
        metavar="FILE",
        help="Text to predict: .txt, or .jsonl with text or messages, for which the chat template is used.",
    ),
    option(
        Section.TEXT,
        "--tokens",
        defaults=EVALUATE_DEFAULTS,
        metavar="N",
        help="Tokens to take from the beginning of the text.",
    ),
    option(
        Section.TEXT,
        "--sequence-length",
        defaults=EVALUATE_DEFAULTS,
        metavar="N",
        help="Tokens in a sequence; the first of each is given, not predicted.",
    ),
)


@click.command("eval", cls=Command)
@click.argument("model", type=FOLDER, required=False)
@group(
    base_option(
        allow_from_autoenv=False, help="Instead of MODEL: the base of an adapter that is not merged."
    ),
    BASE_REVISION,
    adapter_option(allow_from_autoenv=False, help="The PEFT adapter on --base."),
    ADAPTER_PLACE,
    TEXT,
    _REFERENCE,
    MERGE_BASE,
    TOKENIZER,
    MOE_LAYOUT,
    ALLOW_MISSING,
    ALLOW_PICKLE,
    IGNORE_EXTRA,
    option(
        Section.RESOURCES,
        "--dtype",
        defaults=EVALUATE_DEFAULTS,
        metavar="DTYPE",
        shell_complete=words("float32", "float16", "bfloat16"),
        help="What weights are brought to and all is computed in: float32, bfloat16, float16.",
    ),
    resources(EVALUATE_DEFAULTS),
    SHOW,
)
def eval_command(as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure how well a model predicts a text, one decoder layer in memory at a time.

    \b
    streamconv eval ./merged-4bit --data valid.txt
    streamconv eval --base ./llama --adapter ./my-qlora --merge-base nf4-dq --data valid.txt
    streamconv eval ./merged-4bit --data valid.txt --reference ./llama --reference-adapter ./my-qlora
    """
    from streamconv.evaluation import evaluate

    with interrupt_on_signals(), progress("eval", quiet) as on_progress:
        found = evaluate(**given, on_progress=on_progress)
    if as_json:
        answer(*json.dumps(found.as_json(), indent=1).splitlines())
    elif not quiet:
        _show(found)


def _show(found: Evaluation) -> None:
    adapter = f" + {found.adapter}" if found.adapter else ""
    answer(f"{found.model}{adapter}: {found.target}")
    answer(
        f"perplexity {found.perplexity:.4f} on {found.predicted_tokens} tokens of {found.data} "
        f"({found.sequences} x {found.sequence_length}, {found.dtype})"
    )
    if found.comparison is not None:
        _show_comparison(found.comparison)
    answer(
        f"read {format_size(found.bytes_read)} in {found.seconds:.1f} s, "
        f"peak memory {format_size(found.peak_ram_bytes)}"
    )


def _show_comparison(found: Comparison) -> None:
    adapter = f" + {found.reference_adapter}" if found.reference_adapter else ""
    answer(f"reference {found.reference}{adapter}: {found.reference_target}")
    answer(
        f"perplexity {found.reference_perplexity:.4f}; KL(reference || model) {found.kl:.5f} nats a token; "
        f"the same most likely token at {found.top1_agreement:.2%}"
    )
    if found.greedy is not None:
        parted = [place for place in found.greedy.first_differing if place is not None]
        mean = f", first differing at token {sum(parted) / len(parted):.1f} on average" if parted else ""
        answer(
            f"{found.greedy.identical:.0%} of greedy continuations identical over {found.greedy.tokens} tokens{mean}"
        )
