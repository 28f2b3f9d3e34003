"""The smallest merge there could be: all tensors in memory, float32, updates applied cell by cell."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter, State, Tie, Update, UpdateAccess
from streamconv.checkpoint.index import CheckpointIndex, read_index
from streamconv.checkpoint.reader import TensorReader
from streamconv.storage import open_storage
from tests.tiny import load_base

CELL_ROWS = 64
LLAMA_TIE = Tie("model.embed_tokens.weight", "lm_head.weight")
GPT2_TIE = Tie("transformer.wte.weight", "lm_head.weight")


def read(base: Path, adapter: Path) -> Adapter:
    """The adapter, read against the base as the planner does it."""
    index = read_index(open_storage(str(base)))
    return read_adapter(open_storage(str(adapter)), parameters(index), index.config, tie(index))


def parameters(index: CheckpointIndex) -> dict[str, Parameter]:
    return {name: Parameter(name, tensor.shape) for name, tensor in index.tensors.items()}


def tie(index: CheckpointIndex) -> Tie | None:
    if not index.config["tie_word_embeddings"]:
        return None
    return GPT2_TIE if index.config["model_type"] == "gpt2" else LLAMA_TIE


def merged_tensors(base: Path, adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of the result, float32. An untied head starts from the embedding."""
    index = read_index(open_storage(str(base)))
    with TensorReader() as reader:
        tensors = {name: reader.load(stored).float() for name, stored in index.tensors.items()}
        if adapter.untie:
            pair = tie(index)
            assert pair is not None
            tensors[pair.head] = tensors[pair.embedding].clone()
        for replace in adapter.replaces:
            tensors[replace.parameter] = reader.load(replace.tensor).float()
        for update in adapter.updates:
            parts = {role: reader.load(stored).float() for role, stored in update.parts.items()}
            tensors[update.parameter] = updated(update, tensors[update.parameter], parts)
    return tensors


def updated(update: Update, weight: Tensor, parts: dict[str, Tensor], cell_rows: int = CELL_ROWS) -> Tensor:
    """`weight` after the update, a cell at a time; the weight itself is left as it is."""
    cells = [range(i, min(i + cell_rows, len(weight))) for i in range(0, len(weight), cell_rows)]
    prepared = update.prepare(parts, weight.device)
    state: State = ()
    if update.access is not UpdateAccess.ROW:
        for rows in cells:
            state = update.reduce(weight[rows.start : rows.stop], rows, prepared, state)
        state = update.conclude(prepared, state)
    out = weight.clone()
    for rows in cells:
        out[rows.start : rows.stop] = update.apply(
            weight[rows.start : rows.stop].clone(), rows, prepared, state
        )
    return out


def merged_model(base: Path, adapter: Adapter) -> PreTrainedModel:
    """A fresh model of the base's class that holds the merged tensors and nothing else."""
    config = copy.deepcopy(load_base(base).config)
    if adapter.untie:
        config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(merged_tensors(base, adapter), strict=False)
    assert not unexpected
    assert adapter.untie or set(missing) <= {"lm_head.weight"}
    assert not (adapter.untie and missing)
    return model
