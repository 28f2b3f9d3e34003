"""Comparisons made up, for what is done with their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamconv.comparison.bootstrap import mean, perplexity_difference
from streamconv.comparison.recommendation import recommend
from streamconv.comparison.result import (
    DONE,
    FAILED,
    LEFT_OUT,
    Compared,
    Failure,
    Numbers,
    Reference,
    Row,
    Speed,
    Text,
)
from streamconv.comparison.strategies import STRATEGIES

SEQUENCES = 34
LOSSES = tuple(np.random.default_rng(0).normal(3.2, 0.2, SEQUENCES).tolist())


def numbers(kl: float, bits: float = 5.0, worse: float = 0.0, load: int | None = 10**8) -> Numbers:
    """KL and bits as given, losses `worse` than the reference's by as much in the mean, with some noise."""
    noise = np.random.default_rng(int(1e6 * kl) + 1).normal(0.0, 1.0, SEQUENCES)
    noise -= noise.mean()
    losses = tuple((np.array(LOSSES) + worse + 0.1 * kl * noise).tolist())
    kls = tuple((kl * (1 + 0.2 * noise)).tolist())
    return Numbers(
        tensor_bytes=int(bits * 10**6 / 8),
        size_bytes=int(bits * 10**6 / 8) + 5000,
        bits_per_weight=bits,
        perplexity=float(np.exp(np.mean(losses))),
        perplexity_difference=perplexity_difference(losses, LOSSES),
        kl=mean(kls),
        top1_agreement=1 - kl / 2,
        greedy_identical=0.5,
        greedy_first_differing=3.5,
        kept_delta=0.97,
        merge_seconds=12.5,
        merge_resumed=False,
        merge_peak_ram_bytes=10**8,
        evaluate_seconds=30.0,
        losses=losses,
        kl_by_sequence=kls,
        speed=Speed(load, None, 2.0, 11.5, 32, "cpu", None),
    )


def row(name: str, found: Numbers | None, *, quant: str | None = "nf4-dq", target: str = "T") -> Row:
    residual = " --residual-rank 16" if name.startswith("residual") else ""
    command = None if quant is None else f"streamconv merge --quant {quant}{residual} -o merged"
    return Row(name, "as its name says", target, quant, "nearest", command, DONE, found)


def failed(name: str, message: str = "the disk <is> full") -> Row:
    failure = Failure("merging", "ResourceError", message, 5)
    return Row(name, "feedback", "T", "nf4-dq", "feedback", "streamconv merge", FAILED, failure=failure)


def left_out(name: str) -> Row:
    return Row(name, "feedback", "F", "gptq", None, None, LEFT_OUT, reason="it needs --calibration")


def compared(rows: Sequence[Row], max_bits: float | None = None) -> Compared:
    return Compared(
        base="./Llama & <co>",
        adapter="me/my-qlora",
        quantized=None,
        merge_base="nf4-dq",
        weights=10**6,
        text=Text("valid.txt", "0" * 64, SEQUENCES, 512, "float32", 16),
        calibration={"name": "train.txt", "tokens": 16384, "sequence_length": 512, "sha256": "1" * 64},
        reference=Reference("T", "as trained", float(np.exp(np.mean(LOSSES))), LOSSES),
        rows=tuple(rows),
        advice=recommend(rows, max_bits),
        machine={
            "processor": "a processor",
            "cores": 2,
            "memory_bytes": 2**34,
            "device": "cpu",
            "streamconv": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "bitsandbytes": "0.50.2",
        },
        out="compared",
        seconds=100.0,
    )


def full() -> Compared:
    """A row for every strategy there may be: two failed, one was left out, one would not open."""
    kls = np.geomspace(0.004, 0.4, len(STRATEGIES))
    rows = []
    for each, kl in zip(STRATEGIES, kls, strict=True):
        quant = each.quant if each.quant != "own" else "nf4-dq"
        bits = 16.0 if quant in (None, "none") else 9.1 if quant in ("int8", "w8a16") else 6.6
        rows.append(row(each.name, numbers(float(kl), bits, float(kl) / 2), quant=quant, target=each.target))
    rows[2] = row("unmerged-T", numbers(0.0, 6.7), quant=None)
    return compared([*rows, failed("broken"), left_out("no-text")])
