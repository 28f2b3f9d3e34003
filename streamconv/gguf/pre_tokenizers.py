r"""Names that llama.cpp has for the rules by which text is cut before byte pairs are merged (`tokenizer.ggml.pre`).

llama.cpp has each rule built in (`llama-vocab.cpp`); its converter finds the name by a hash of what a tokenizer makes
of a text. Here it is found by the rule itself, which stands in tokenizer.json as `pre_tokenizer`: regular expressions
that cut, in the library tokenizers' own spelling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

# Regular expressions of Split, by llama.cpp's name.
_SPLITS: Mapping[str, str] = MappingProxyType(
    {
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": "llama-bpe",
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": "qwen2",
        rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": "gpt-4o",
        rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": "tekken",
    }
)


def pre_tokenizer(rule: object, *, ignores_merges: bool) -> str | None:
    """llama.cpp's name of a `pre_tokenizer` of tokenizer.json; None for one that it may not have.

    `ignores_merges`: a word that is a token is one, whatever its merges; llama.cpp knows that of its names.
    """
    steps = _steps(rule)
    kinds = [str(step.get("type")) for step in steps]
    cuts_words = bool(steps) and steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and cuts_words and not ignores_merges:
        return "gpt-2"
    if (
        kinds == ["Digits", "ByteLevel"]
        and cuts_words
        and steps[0].get("individual_digits")
        and not ignores_merges
    ):
        return "smollm"
    if kinds != ["Split", "ByteLevel"] or cuts_words:
        return None
    found = _split(steps[0])
    # One rule of cutting, two ways to go on: llama.cpp's llama-bpe takes whole words first.
    if found == "llama-bpe" and not ignores_merges:
        return "dbrx"
    return found if found in ("llama-bpe", "tekken") or not ignores_merges else None


def _split(step: Mapping[str, Any]) -> str | None:
    pattern = step.get("pattern")
    if step.get("invert") or step.get("behavior") != "Isolated" or not isinstance(pattern, Mapping):
        return None
    return _SPLITS.get(str(pattern.get("Regex")))


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """Sections of tokenizer.json that stand for a rule of llama.cpp's; `adds_begin`: it does, where nothing is said."""

    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignores_merges: bool = False
    adds_begin: bool = False


def built_in(name: str) -> BuiltIn | None:
    """Sections for a rule by llama.cpp's name; None where the rule is unknown, or its families' tokenizers differ.

    Those cut by gpt-4o and tekken do: some strip spaces beside added tokens, some take whole words first.
    """
    splits = {rule: pattern for pattern, rule in _SPLITS.items()}
    if name in ("llama-bpe", "llama-v3", "llama3"):
        return BuiltIn(_split_first(splits["llama-bpe"]), ignores_merges=True, adds_begin=True)
    if name in ("qwen2", "deepseek-r1-qwen"):  # all of which compose characters
        return BuiltIn(_split_first(splits["qwen2"]), {"type": "NFC"})
    if name in ("gpt-2", "smollm"):
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        return BuiltIn(level if name == "gpt-2" else {"type": "Sequence", "pretokenizers": [digits, level]})
    return None


def _split_first(pattern: str) -> Mapping[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def normalizes(rule: object) -> bool:
    """Whether a `normalizer` of tokenizer.json changes text in a way that llama.cpp does not.

    Composed characters (NFC) are what nearly all text has; llama.cpp composes none.
    """
    return rule is not None and json.dumps(rule) != '{"type": "NFC"}'


def _steps(rule: object) -> list[Mapping[str, Any]]:
    """Rules in their order; none where they are no such list."""
    if not isinstance(rule, Mapping):
        return []
    steps = rule.get("pretokenizers") if rule.get("type") == "Sequence" else [rule]
    return steps if isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps) else []
