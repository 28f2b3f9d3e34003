"""Names of a model's weights in its class and in files, as transformers itself converts them; no weight is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.pytorch_utils import Conv1D

# Sizes that cost time to build and have no part in names.
FEW = {
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
}


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Weights of a class and of its files, by name without `.weight`.

    `in_files` has the linear layers that are stored as they are, by their name in the class.
    """

    config: Mapping[str, Any]
    of_class: frozenset[str]
    of_files: frozenset[str]
    in_files: Mapping[str, str]


def weight_names(model_type: str, class_name: str) -> WeightNames:
    """Names of a class with its default config, of few layers. Raises what the class does where it needs more."""
    with torch.device("meta"):
        model = getattr(transformers, class_name)(_few(CONFIG_MAPPING[model_type]()))
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = conversions  # what save_pretrained reverts
    state = model.state_dict()
    files = revert_weight_conversion(model, dict(state))
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    others = [each for each in conversions if not isinstance(each, WeightRenaming)]
    stored: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for name in files:
        loaded, pattern = rename_source_key(name, renamings, others, model.base_model_prefix, state)
        stored[loaded].append((name, pattern))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    in_files = {
        name: stored[f"{name}.weight"][0][0].removesuffix(".weight")
        for name in linear
        if [pattern for _, pattern in stored[f"{name}.weight"]] == [None]
    }
    config = model.config.to_dict() | {"architectures": [class_name]}
    return WeightNames(config, frozenset(state), frozenset(files), in_files)


def _few(config: PretrainedConfig) -> PretrainedConfig:
    for inner in list(vars(config).values()):
        if isinstance(inner, PretrainedConfig):
            _few(inner)
    for name, number in FEW.items():
        found = getattr(config, name, None)
        if isinstance(found, int) and found > number:
            setattr(config, name, number)
    return config
