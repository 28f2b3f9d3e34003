"""Experts of a mixture in a quantized output, for notes of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from streamconv.formats.base import Format
from streamconv.formats.linear import is_expert, matches, module_of
from streamconv.formats.stacks import ExpertStacker, expert_loaders, rounded_again
from streamconv.planning.apart import is_only_served


def notes_on_experts(
    quant: Format | None, config: Mapping[str, Any], weights: Iterable[str], quantized: frozenset[str]
) -> Iterator[str]:
    """Sentences on `weights` of experts, of which those are stored as `quant` that are `quantized`; and on others that
    loaders would round again.
    """
    again = rounded_again(quant, config)
    if again and not any(matches(module_of(name), again) for name in quantized):
        yield f"{', '.join(again)} stays in 16 bit, as mlx-lm would decode it and round it once more"
    experts = [name for name in weights if is_expert(name)]
    if quant is None or not experts:
        return
    if not expert_loaders(quant, config):
        yield f"experts stay in 16 bit, as {_unopened(quant, config)}"
    elif not any(map(is_expert, quantized)):
        yield "experts stay in 16 bit"
    elif not opens_in_transformers(quant, config):
        loaders = " and ".join(servers_of(quant))
        yield f"experts are quantized: for {loaders}; transformers 5, which fuses experts, opens no such {quant.name}"


def _unopened(quant: Format, config: Mapping[str, Any]) -> str:
    if isinstance(quant, ExpertStacker):
        able = ", ".join(sorted(quant.families))
        return (
            f"{quant.name} has them quantized for {able} alone, and this model is {config.get('model_type')}"
        )
    return f"no program opens {quant.name} with experts quantized"


def opens_in_transformers(quant: Format, config: Mapping[str, Any]) -> bool:
    """Whether transformers opens a model of this config with quantized experts."""
    return len(servers_of(quant)) < len(quant.expert_loaders) and not is_only_served(config)


def servers_of(quant: Format) -> list[str]:
    """Programs other than transformers that open it with quantized experts."""
    return [loader for loader in quant.expert_loaders if not loader.startswith("transformers")]
