"""Partners: weights that loaders join to one, and that must therefore share the scale that each has as a whole.

vLLM makes one matrix of q, k and v, and one of gate and up, also of each expert's, and takes one global scale for all
of it (`vllm/model_executor/models`, packed_modules_mapping; `layers/fused_moe`, w13). Weights that files hold joined
already, such as Phi-3's qkv_proj, have no partners.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from streamconv.formats.linear import module_of
from streamconv.formats.targets import PARTNERS

_JOINED = (
    *PARTNERS.values(),
    ("w1", "w3"),  # Mixtral, InternLM 2, MiniMax
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
)
_FIRST: Mapping[str, str] = {name: names[0] for names in _JOINED for name in names}


def partners(names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """All that share the scale of a weight, itself among them, for each of `names`, in the order given."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group_of(name), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def _group_of(name: str) -> str:
    """Name of the group that a weight belongs to: the path of the first that it could have in it."""
    parent, dot, last = module_of(name).rpartition(".")
    return f"{parent}{dot}{_FIRST.get(last, last)}"
