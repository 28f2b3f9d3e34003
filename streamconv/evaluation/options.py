"""What one evaluation is asked to do. Names, meanings and defaults of options are those of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from os import fspath
from pathlib import Path

from streamconv.errors import OptionError
from streamconv.pipeline.job import Folder, Job, build_job

MAX_RAM = "4GiB"
LEAST_LENGTH = 16


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Options checked and parsed as far as they can be without inputs.

    `subject` and `reference` are jobs whose output would be the dense weights that are evaluated.
    """

    subject: Job
    reference: Job | None
    data: Path
    sequence_length: int
    sequences: int
    greedy_tokens: int


def evaluation_options(
    model: Folder | None,
    data: Folder,
    *,
    base: Folder | None = None,
    adapter: Folder | None = None,
    merge_base: str = "original",
    reference: Folder | None = None,
    reference_adapter: Folder | None = None,
    reference_merge_base: str = "original",
    sequence_length: int = 512,
    tokens: int = 16384,
    greedy_tokens: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    max_ram: str | int = MAX_RAM,
    max_vram: str | int = "2GiB",
    moe_layout: str = "auto",
    tokenizer: str = "auto",
    allow_pickle: bool = False,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
) -> EvaluationOptions:
    """Options as given. Raises OptionError for what cannot be meant."""
    place = _subject(model, base, adapter)
    if reference is None and (reference_adapter is not None or greedy_tokens):
        raise OptionError(
            "--reference-adapter and --greedy-tokens are about a reference; add --reference MODEL"
        )
    if dtype.lower() == "auto":
        raise OptionError("--dtype says in what the model is computed; use float32, bfloat16 or float16")
    _check_lengths(sequence_length, tokens, greedy_tokens)

    def job(place: Folder, adapter: Folder | None, merge_base: str, revision: str | None) -> Job:
        return build_job(
            place,
            adapter,
            quant="none",
            dtype=dtype,
            merge_base=merge_base,
            moe_layout=moe_layout,
            allow_pickle=allow_pickle,
            device=device,
            max_ram=max_ram,
            max_vram=max_vram,
            tokenizer=tokenizer,
            base_revision=revision,
            adapter_revision=adapter_revision if adapter is not None else None,
            adapter_subfolder=adapter_subfolder if adapter is not None else None,
        )

    return EvaluationOptions(
        subject=job(place, adapter, merge_base, base_revision),
        reference=None
        if reference is None
        else job(reference, reference_adapter, reference_merge_base, None),
        data=Path(fspath(data)).expanduser(),
        sequence_length=sequence_length,
        sequences=tokens // sequence_length,
        greedy_tokens=greedy_tokens,
    )


def _subject(model: Folder | None, base: Folder | None, adapter: Folder | None) -> Folder:
    """The checkpoint that is evaluated, with the adapter on it or without."""
    if model is not None and base is not None:
        raise OptionError(
            "MODEL and --base are both given; name a finished model, or --base with --adapter for one not merged"
        )
    if model is not None and adapter is not None:
        raise OptionError("--adapter needs --base, the model it was trained on; give that instead of MODEL")
    place = model if model is not None else base
    if place is None:
        raise OptionError("nothing to evaluate: name a MODEL, or give --base and --adapter")
    return place


def _check_lengths(sequence_length: int, tokens: int, greedy_tokens: int) -> None:
    if sequence_length < LEAST_LENGTH:
        raise OptionError(f"--sequence-length {sequence_length} is too short; give {LEAST_LENGTH} or more")
    if tokens < sequence_length:
        raise OptionError(
            f"--tokens {tokens} is less than one sequence of {sequence_length}; give more, or a smaller"
            " --sequence-length"
        )
    if not 0 <= greedy_tokens <= sequence_length // 2:
        raise OptionError(
            f"--greedy-tokens {greedy_tokens} must be between 0 and {sequence_length // 2}, half of --sequence-length: "
            "the other half is the prompt"
        )
