"""Patterns by which a config tells loaders which modules are meant: one for many modules wherever that is possible.

A module's path in a file and in a loader may begin differently (`model.layers.0`, `model.language_model.layers.0`), so
patterns tell of its end: of `model.layers.3.mlp.experts.7.up_proj` the *ending* `mlp.experts.N.up_proj`, which is the
same in all layers, and where that does not do, `layers.3.mlp.experts.N.up_proj`, or the whole path.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_BEGINNING = r"(?:.*\.)?"
_NUMBER = r"\d+"
# Modules that vLLM makes one layer of (packed_modules_mapping in `vllm/model_executor/models`), by last components.
PARTNERS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
_FUSED: Mapping[str, str] = {part: fused for fused, parts in PARTNERS.items() for part in parts}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """A regular expression, matched from the start of a module's path to its end; or a whole path as it is."""

    expression: str
    is_expression: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """Place of a module: `head` is the path of the list of layers, `number` the layer, `ending` an expression.

    Of a module in no layer, `ending` is the whole path.
    """

    head: str
    number: str
    ending: str


def expressions(groups: Sequence[Sequence[str]]) -> list[list[ModulePattern]]:
    """Targets of each of several groups of modules: each module has one of its own group, and none of another."""
    places = {module: _place(module) for modules in groups for module in modules}
    owners = defaultdict[str, set[int]](set)
    for number, modules in enumerate(groups):
        for module in modules:
            owners[places[module].ending].add(number)
    return [
        _targets(number, modules, places, owners, _others(number, groups))
        for number, modules in enumerate(groups)
    ]


def fused_layer(module: str) -> str | None:
    """Path of the layer that vLLM makes of a module and others, which must share a format; None for one by itself."""
    if expert := _EXPERT.fullmatch(module):
        return expert[1]
    parent, _, last = module.rpartition(".")
    return f"{parent}.{_FUSED[last]}" if last in _FUSED else None


def fused_too(modules: Iterable[str]) -> list[str]:
    """The modules, and the layers that vLLM makes of some of them."""
    known = list(modules)
    return list(
        dict.fromkeys([*known, *(layer for each in known if (layer := fused_layer(each)) is not None)])
    )


def _others(number: int, groups: Sequence[Sequence[str]]) -> Mapping[str, Sequence[str]]:
    """Modules of all other groups, by the last component."""
    found = defaultdict[str, list[str]](list)
    for other, modules in enumerate(groups):
        for module in modules if other != number else ():
            found[_last(module)].append(module)
    return found


def _targets(
    number: int,
    modules: Sequence[str],
    places: Mapping[str, _Place],
    owners: Mapping[str, set[int]],
    others: Mapping[str, Sequence[str]],
) -> list[ModulePattern]:
    by_ending = defaultdict[str, list[str]](list)
    for module in modules:
        by_ending[places[module].ending].append(module)
    found: list[ModulePattern] = []
    for ending, own in by_ending.items():
        expression = f"{_BEGINNING}{ending}$"
        if owners[ending] == {number} and not _matches_any(expression, own, others):
            found.append(ModulePattern(expression, True))
        else:
            found += _by_layer(ending, own, places, others)
    return found


def _by_layer(
    ending: str, modules: Sequence[str], places: Mapping[str, _Place], others: Mapping[str, Sequence[str]]
) -> list[ModulePattern]:
    """Targets of modules whose ending others have too: those of some layers, or the modules one by one."""
    by_head = defaultdict[str, list[str]](list)
    for module in modules:
        by_head[places[module].head].append(module)
    found: list[ModulePattern] = []
    for head, own in by_head.items():
        numbers = "|".join(sorted({places[module].number for module in own}, key=int)) if head else ""
        components = head.split(".")
        # The list's own name says enough, but where a model has two of that name.
        tails = [".".join(components[-count:]) for count in range(1, len(components) + 1)] if head else []
        candidates = [rf"{_BEGINNING}{re.escape(tail)}\.(?:{numbers})\.{ending}$" for tail in tails]
        fitting = next((each for each in candidates if not _matches_any(each, own, others)), None)
        found += (
            [ModulePattern(module, False) for module in own]
            if fitting is None
            else [ModulePattern(fitting, True)]
        )
    return found


def _matches_any(expression: str, own: Sequence[str], others: Mapping[str, Sequence[str]]) -> bool:
    """Whether the expression of some modules matches one of `others`, which are by last component."""
    compiled = re.compile(expression)
    lasts = {_last(module) for module in own}
    candidates = others if any(last.isdigit() for last in lasts) else lasts & others.keys()
    return any(compiled.match(module) for last in candidates for module in others[last])


def _place(module: str) -> _Place:
    components = module.split(".")
    layer = next((at for at, each in enumerate(components[:-1]) if each.isdigit() and at), None)
    if layer is None:
        return _Place("", "", re.escape(module))
    ending = (_NUMBER if each.isdigit() else re.escape(each) for each in components[layer + 1 :])
    return _Place(".".join(components[:layer]), components[layer], r"\.".join(ending))


def _last(module: str) -> str:
    return module.rpartition(".")[2]
