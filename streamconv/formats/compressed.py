"""Settings of compressed-tensors in config.json, for the formats that it names only in its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METHOD = "compressed-tensors"


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
