"""How well a model predicts a text, layers streamed: perplexity, and KL and agreement with a reference."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from streamconv.errors import OptionError
from streamconv.evaluation.options import MAX_RAM, EvaluationOptions, evaluation_options
from streamconv.evaluation.result import Comparison, Evaluation, Greedy
from streamconv.pipeline.job import Folder, OnProgress, quiet

__all__ = ["Comparison", "Evaluation", "EvaluationOptions", "Greedy", "evaluate"]


def evaluate(
    model: Folder | None = None,
    *,
    data: Folder,
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
    on_progress: OnProgress = quiet,
) -> Evaluation:
    """Perplexity of a checkpoint, or of a base with an adapter that is not merged, on the text in the file `data`.

    Keywords are the options of `streamconv eval`. Needs `streamconv[eval]`: without it, raises OptionError; otherwise
    a StreamconvError, whose `exit_code` is what the command would have ended with.
    """
    options = evaluation_options(
        model,
        data,
        base=base,
        adapter=adapter,
        merge_base=merge_base,
        reference=reference,
        reference_adapter=reference_adapter,
        reference_merge_base=reference_merge_base,
        sequence_length=sequence_length,
        tokens=tokens,
        greedy_tokens=greedy_tokens,
        dtype=dtype,
        device=device,
        max_ram=max_ram,
        max_vram=max_vram,
        moe_layout=moe_layout,
        tokenizer=tokenizer,
        allow_pickle=allow_pickle,
        base_revision=base_revision,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
    )
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"an evaluation needs {' and '.join(missing)}, not installed here; run pip install 'streamconv[eval]'"
        )
    found: Evaluation = import_module(_SCORING).run_evaluation(options, on_progress)
    return found


# What the extra `eval` brings, and what is imported once it is there.
_NEEDED = ("transformers", "accelerate")
_SCORING = "streamconv.evaluation.scoring"
