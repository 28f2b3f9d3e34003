"""Settings of compressed-tensors in config.json: what formats read of them, and how several are written.

Source: compressed-tensors `quantization/quant_config.py`, `quantization/lifecycle/apply.py`, `utils/match.py`; vLLM's
`compressed_tensors/utils.py`. A module gets the settings of the first group with a target that means it: a whole path,
after `re:` a regular expression from the start of the path, or a class (`Linear`). Which group is the first is not the
same for all loaders, and vLLM takes a class before the parts of a layer that it fuses. So where there are several
groups, none has a class, and no module is meant by targets of two.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from streamconv.dtypes import Dtype
from streamconv.formats.base import Json, Mixable
from streamconv.formats.linear import HEAD_NAMES, module_of
from streamconv.formats.targets import expressions

METHOD = "compressed-tensors"
# The format of a config whose groups name their own.
MIXED = "mixed-precision"
# What the formats of groups may be for a checkpoint of several to be read: each is read by one of the readers.
_READ = frozenset(
    {
        "pack-quantized",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
    }
)


def groups_of(quantization: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The settings of each group of modules; none where the config has no groups."""
    groups = quantization.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    return [group for group in found if isinstance(group, Mapping)]


def formats_of(quantization: Mapping[str, Any]) -> frozenset[str]:
    """Names of all storage formats that a config names, of its own or of a group."""
    named = [quantization.get("format"), *(group.get("format") for group in groups_of(quantization))]
    return frozenset(name for name in named if isinstance(name, str))


def weights_of(quantization: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Settings of the weights of each group."""
    found = [group.get("weights") for group in groups_of(quantization)]
    return [weights for weights in found if isinstance(weights, Mapping)]


def unread_in(quantization: Mapping[str, Any]) -> frozenset[str]:
    """Formats of groups that are not read."""
    return formats_of(quantization) - _READ - {MIXED}


def part_of(quantization: Mapping[str, Any], storages: Collection[str]) -> Mapping[str, Any]:
    """The settings without the groups of other formats than `storages`, where groups name their own.

    As a config of these groups alone would be, of the first one's format. Others are returned as they are, and so are
    those with a group in a format that is not read at all.
    """
    groups = quantization.get("config_groups")
    if quantization.get("format") != MIXED or not isinstance(groups, Mapping):
        return quantization
    if unread_in(quantization):
        return quantization
    own = {
        name: group
        for name, group in groups.items()
        if isinstance(group, Mapping) and group.get("format") in storages
    }
    found = next((group["format"] for group in own.values()), MIXED)
    return {**quantization, "format": found, "config_groups": own}


def config_of(groups: Sequence[tuple[Json, Sequence[str]]], skipped: Sequence[str]) -> Json:
    """The `quantization_config` of groups of modules: the settings of each, with its targets.

    A group names its format only where they differ: the releases before there were mixed ones refuse that key.
    """
    storages = {settings["format"] for settings, _ in groups}
    return {
        "config_groups": {
            f"group_{number}": _group(settings, targets, names_format=len(storages) > 1)
            for number, (settings, targets) in enumerate(groups)
        },
        "format": MIXED if len(storages) > 1 else next(iter(storages)),
        "global_compression_ratio": None,
        "ignore": list(skipped),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def arguments(
    kind: str,
    bits: int,
    strategy: str,
    *,
    group_size: int | None = None,
    dynamic: bool = False,
    symmetric: bool = True,
) -> Json:
    """Settings of weights or activations. The keys that every release knows: it refuses others within a group."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": group_size,
        "num_bits": bits,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": symmetric,
        "type": kind,
    }


class InGroups(Protocol):
    """Members of a Mixable format that a config has in groups of modules, alone or beside others."""

    def module_config(self) -> Json:
        """See Mixable."""

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """See Format."""
        del dtype  # that of the model, as the scales have it
        return config_of([(self.module_config(), class_targets(quantized))], skipped)

    def mixed_config(
        self, dtype: Dtype, groups: Sequence[tuple[Mixable, Sequence[str]]], skipped: Sequence[str]
    ) -> Json:
        """See Mixable."""
        del dtype
        return mixed_config(groups, skipped)


def class_targets(quantized: Sequence[str]) -> list[str]:
    """Targets that mean all linear modules which the skip list does not name.

    Heads are of a class of their own in vLLM and SGLang, which look for their names.
    """
    heads = [module for module in map(module_of, quantized) if module.rpartition(".")[2] in HEAD_NAMES]
    return ["Linear", *(rf"re:(?:.*\.)?{re.escape(head)}$" for head in sorted(heads))]


def mixed_config(groups: Sequence[tuple[Mixable, Sequence[str]]], skipped: Sequence[str]) -> Json:
    """The `quantization_config` of weights in several formats, each with the names of its own."""
    modules = [[module_of(name) for name in names] for _, names in groups]
    targets = [
        [f"re:{target.expression}" if target.is_expression else target.expression for target in each]
        for each in expressions(modules)
    ]
    settings = [storage_format.module_config() for storage_format, _ in groups]
    return config_of(list(zip(settings, targets, strict=True)), skipped)


def _group(settings: Json, targets: Sequence[str], *, names_format: bool) -> Json:
    group = {**settings, "targets": list(targets)}
    if not names_format:
        del group["format"]
    return dict(sorted(group.items()))
