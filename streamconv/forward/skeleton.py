"""A causal language model without weights, built from config.json by transformers, and where its parts are.

Only classes that transformers itself has are built: code of a model's repository never runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from streamconv.checkpoint.config import edit_config
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.planning.plan import Plan
from streamconv.system_errors import lacking

# So many layers or experts a config may count whatever the checkpoint holds, which may have fused them.
_MOST_WITHOUT_TENSORS = 2000


@dataclass(frozen=True, slots=True)
class Skeleton:
    """`model` has parameters on the meta device, and real buffers.

    `layers` are its decoder layers by module path, in order; `embedding` and `head` are paths, too. `stored` is what
    a checkpoint holds of it: parameters and persistent buffers by name.
    """

    model: Any
    location: str
    layers: Mapping[str, nn.Module]
    embedding: str
    head: str
    stored: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def text_config(self) -> Any:
        """The part of the config that is about text; the config itself, where there is nothing else."""
        return self.model.config.get_text_config(decoder=True)

    def module(self, path: str) -> nn.Module:
        found: nn.Module = self.model.get_submodule(path)
        return found

    def others(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that are neither in a layer nor embedding nor head, by path."""
        special = (*self.layers, self.embedding, self.head)
        for path, module in self.model.named_modules():
            if not any(path == one or path.startswith(f"{one}.") for one in special):
                yield path, module


def build_skeleton(config: Mapping[str, Any], location: str, dtype: torch.dtype) -> Skeleton:
    """The model that `config` describes, in `dtype`.

    Raises UnsupportedError, which names it, for a model that transformers does not have or that cannot be walked.
    """
    model = _build(config, location, dtype)
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise UnsupportedError(
            f"{location}: {type(model).__name__} cannot be run layer by layer: its embedding is a "
            f"{type(embedding).__name__} and its output head a {type(head).__name__}, expected Embedding and Linear"
        )
    layers = {paths[id(layer)]: layer for layer in _layers(model, location)}
    return Skeleton(model, location, layers, paths[id(embedding)], paths[id(head)], model.state_dict())


def build_planned(plan: Plan, index: CheckpointIndex, dtype: torch.dtype) -> Skeleton:
    """The model that `plan` makes of the base in `index`, unquantized. Raises what `build_skeleton` does."""
    if plan.head is not None:
        raise UnsupportedError(
            f"the adapter makes a {plan.head.architecture} of {index.storage.location}, and only language models are"
            " run; merge it first, and evaluate it with the library it was trained with"
        )
    check_counts(index.config, len(index.tensors), index.storage.location)
    config = edit_config(
        index.config, dtype=None, quantization=None, untie=plan.untied, vocab_size=plan.vocab_size
    )
    return build_skeleton(config, index.storage.location, dtype)


def check_counts(config: Mapping[str, Any], tensors: int, location: str) -> None:
    """Raise CheckpointError for a number of layers or experts that a checkpoint of so many `tensors` cannot have.

    transformers makes an object of each before it looks at any.
    """
    for level in (config, *(each for each in config.values() if isinstance(each, Mapping))):
        for name, value in level.items():
            is_count = isinstance(value, int) and ("layer" in name or "expert" in name)
            if is_count and value > max(_MOST_WITHOUT_TENSORS, tensors):
                raise CheckpointError(
                    f"{location}: config.json: {name} is {shown(value)}, and the checkpoint has {tensors} tensors;"
                    " correct it, or download the file again"
                )


def _build(config: Mapping[str, Any], location: str, dtype: torch.dtype) -> Any:
    model_type = config.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            f"{location}: transformers {transformers.__version__} has no model type {model_type!r}, and code of a "
            "model's repository is never run; a newer transformers may have it"
        )
    try:
        parsed = transformers.CONFIG_MAPPING[model_type].from_dict(dict(config))
        if type(parsed) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{model_type} has no causal language model there")
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(
                parsed, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # every config class and model raises its own
        reason = " ".join(str(error).split())
        raise lacking(error) or UnsupportedError(
            f"{location}: transformers {transformers.__version__} cannot build the model of config.json: {reason}"
        ) from error
    return model.eval()


def _layers(model: Any, location: str) -> Sequence[nn.Module]:
    """The decoder layers: the one list of them in the text model."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [
        module
        for module in (decoder or model).modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(found) != 1:
        raise UnsupportedError(
            f"{location}: {type(model).__name__} cannot be run layer by layer: it has {len(found)} lists of "
            f"{count} decoder layers, expected one"
        )
    return list(found[0])
