"""The fields of PEFT's LoraConfig (0.21.2, `peft/tuners/lora/config.py`), and what each means for a merge."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from streamconv.adapters.config import (
    COMMON_FIELDS,
    NO_EFFECT,
    USED,
    AdapterConfig,
    Neutral,
    Rule,
    is_rank,
)
from streamconv.adapters.ranks import Ranks, alpha_patterns, rank_patterns
from streamconv.adapters.replication import read_ranges
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import AdapterError, UnsupportedError


@dataclass(frozen=True, slots=True)
class LoraSettings(Ranks):
    """Fields of a LoraConfig that decide a merge.

    `blocks` are those of BD-LoRA's block-diagonal factors, `group` the inputs that QA-LoRA pools.
    """

    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    lora_bias: bool = False
    initial: str | None = None
    blocks: int = 1
    group: int = 1
    target_parameters: tuple[str, ...] = ()
    peft_version: tuple[int, ...] | None = None

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / √r for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(config: AdapterConfig) -> LoraSettings:
    """Raises UnsupportedError for a variant that is not built, AdapterError for a field of a wrong type."""
    _check_variants(config)
    initial = _initial(config)
    if initial is not None and read_ranges(config):
        raise UnsupportedError(
            f"{config.name}: training began by taking something off the weights ({initial}), and layer_replication is"
            " set: copies of a layer share their weights in training, off which every copy took something, in turn;"
            " such an adapter cannot be merged"
        )
    return LoraSettings(
        name=config.name,
        r=config.rank("r"),
        alpha=config.number("lora_alpha"),
        rank_pattern=rank_patterns(config),
        alpha_pattern=alpha_patterns(config),
        use_rslora=config.flag("use_rslora"),
        use_dora=config.flag("use_dora"),
        lora_bias=config.flag("lora_bias"),
        initial=initial,
        blocks=_blocks(config),
        group=config.rank("qalora_group_size") if config.flag("use_qalora") else 1,
        fan_in_fan_out=config.flag("fan_in_fan_out"),
        target_parameters=config.names("target_parameters"),
        peft_version=_version(config.fields.get("peft_version")),
    )


def _check_variants(config: AdapterConfig) -> None:
    """Raise UnsupportedError for variants beside each other: PEFT makes no such adapter of most pairs."""
    changes_base = config.fields.get("init_lora_weights") in ("pissa", "olora")
    on = [
        *(field for field in ("use_dora", "use_qalora") if config.flag(field)),
        *(
            field
            for field in ("use_bdlora", "kasa_config")
            if config.section(field, _SECTIONS[field]) is not None
        ),
    ]
    if on and changes_base and on != ["use_dora"]:
        on.append(f"init_lora_weights {shown(config.fields['init_lora_weights'])}")
    if len(on) > 1:
        raise UnsupportedError(
            f"{config.name}: {' and '.join(on)} are set together, and what an adapter of both means is not known here"
        )


def _initial(config: AdapterConfig) -> str | None:
    """Initialisation that took something off the base, a key of INITIAL; None where nothing was taken."""
    if config.section("kasa_config", _SECTIONS["kasa_config"]) is not None:
        return "kasa"
    found = config.fields.get("init_lora_weights")
    return found if found in ("pissa", "olora") else None


def _blocks(config: AdapterConfig) -> int:
    section = config.section("use_bdlora", _SECTIONS["use_bdlora"])
    found = 1 if section is None else section.get("nblocks", 1)
    if not is_rank(found):
        raise AdapterError(
            f"{config.name}: nblocks in use_bdlora must be a positive whole number, found {shown(found)}"
        )
    return found


def _version(text: object) -> tuple[int, ...] | None:
    """`0.19.1` or `0.19.1.dev0@unknown` as numbers; None for anything else."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", text) if isinstance(text, str) else None
    return None if found is None else tuple(int(number or 0) for number in found.groups())


_CHANGED_BASE = (
    "such an adapter was trained on base weights that its initialisation had changed, in a way that cannot be repeated"
    " from the base alone (a randomized decomposition, or training data), and added to the unchanged base it gives a"
    " wrong model; save it with PEFT's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
)

# Fields of the objects that switch a variant on; but for nblocks they say what was trained, and how.
_SECTIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "use_bdlora": frozenset({"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}),
        "kasa_config": frozenset({"beta", "gamma"}),
    }
)

_OF_SWIFT = "this kind of layer of ms-swift 1.x is not supported; merge the adapter with ms-swift"

LORA_FIELDS: Mapping[str, Rule] = MappingProxyType(
    {
        **COMMON_FIELDS,
        "r": USED,
        "lora_alpha": USED,
        "rank_pattern": USED,
        "alpha_pattern": USED,
        "use_rslora": USED,
        "use_dora": USED,
        "fan_in_fan_out": USED,
        "lora_dropout": NO_EFFECT,
        "megatron_config": NO_EFFECT,
        "megatron_core": NO_EFFECT,
        "runtime_config": NO_EFFECT,
        "qalora_group_size": USED,  # only beside use_qalora
        # Each of these belongs to an init_lora_weights of its name.
        "eva_config": NO_EFFECT,
        "corda_config": NO_EFFECT,
        "lora_ga_config": NO_EFFECT,
        "loftq_config": NO_EFFECT,
        "init_lora_weights": Neutral(
            _CHANGED_BASE, (True, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")
        ),
        "bias": Neutral("expected none, all or lora_only", ("none", "all", "lora_only")),
        "lora_bias": USED,
        "target_parameters": USED,
        "trainable_token_indices": USED,
        "layer_replication": USED,
        "use_qalora": USED,
        "use_bdlora": USED,
        "kasa_config": USED,
        # These change training only; their tensors are UNUSED.
        "velora_config": NO_EFFECT,
        "monteclora_config": NO_EFFECT,
        "alora_invocation_tokens": Neutral(
            "an activated LoRA works only after its invocation tokens, so no merged weights are equal to it;"
            " serve it unmerged"
        ),
        "arrow_config": Neutral(
            "Arrow routes every token to other adapters, so no merged weights are equal to it; serve it"
            " unmerged"
        ),
        # Of PEFT before 0.4, which split fused attention layers: lora_B is then a convolution.
        "enable_lora": Neutral("adapters of MergedLinear (PEFT before 0.3) are not supported"),
        "merge_weights": NO_EFFECT,
        # ms-swift 1.x: rates of learning, the type that factors were trained in, and kinds of layers of its own.
        "swift_type": NO_EFFECT,
        "lora_dtype": NO_EFFECT,
        "lorap_lr_ratio": NO_EFFECT,
        "lorap_emb_lr": NO_EFFECT,
        "use_qa_lora": Neutral(_OF_SWIFT),
        "use_merged_linear": Neutral(_OF_SWIFT),
        "model_key_mapping": Neutral("names that ms-swift changed in training are not known here"),
    }
)

# What variants keep beside their factors for training alone, by the field that switches them on.
UNUSED: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "velora_config": re.compile(r".+\.lora_velora_embed(\..+)?"),
        "monteclora_config": re.compile(r".+\.lora_monteclora_sampler\..+"),
    }
)
