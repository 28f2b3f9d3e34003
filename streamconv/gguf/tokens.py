"""A tokenizer as pairs of a GGUF header: tokens, types, merges or scores, special ids, chat template.

Of byte pairs (`tokenizer.ggml.model` gpt2) llama.cpp needs the merges and the name of the rule that cuts text; of
sentencepiece (llama) scores, which it merges by. Facts: `conversion/base.py` and `SpecialVocab` of gguf-py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.gguf_header import GgufValue, Pairs, f32s, flag, i32s, text, texts, u32
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.gguf.pre_tokenizers import normalizes, pre_tokenizer
from streamconv.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_pieces

_SPACE = "\u2581"
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
# Tokens that some models do not mark as special, though text never has them.
_CONTROLS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_ROLES: Mapping[str, str] = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # so spelled in every file
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Files of a tokenizer, parsed: `fast` is tokenizer.json, `model` a sentencepiece model, None where there is none.

    `config` is tokenizer_config.json, `added` added_tokens.json, `ids` all tokens; `roles` are tokens by role. `stated`
    are config.json's ids by role. `template` is the chat template.
    """

    where: str
    fast: Mapping[str, Any] | None
    model: bytes | None
    config: Mapping[str, Any]
    added: Mapping[str, int]
    ids: Mapping[str, int]
    roles: Mapping[str, str]
    stated: Mapping[str, int]
    template: str | None


@dataclass(frozen=True, slots=True)
class _Added:
    text: str
    is_special: bool
    is_normalized: bool


@dataclass(slots=True)
class _Table:
    """Tokens by id, up to the rows of the embedding: those that no token has are unused."""

    texts: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def of_size(cls, rows: int) -> _Table:
        names = [f"[PAD{number}]" for number in range(rows)]
        return cls(names, [UNUSED] * rows, [_UNUSED_SCORE] * rows)

    def put(self, number: int, token: str, kind: int, score: float) -> None:
        self.texts[number], self.types[number], self.scores[number] = token, kind, score


def tokenizer_pairs(source: TokenizerSource, rows: int) -> Pairs:
    """Pairs of the tokenizer of a model whose embedding has so many rows.

    Raises UnsupportedError for a tokenizer that llama.cpp may not have, CheckpointError for files that contradict each
    other or the embedding.
    """
    _check_ids(source, rows)
    if source.model is not None:
        pairs = _of_pieces(source, source.model, rows)
    elif source.fast is None:
        raise _refusal(source, "neither tokenizer.json nor tokenizer.model is there")
    else:
        pairs = _of_fast(source, source.fast, rows)
    found = {**pairs, **_special(source)}
    try:
        for value in found.values():
            str(value.value if isinstance(value.value, str) else "").encode()
            "".join(map(str, value.value if isinstance(value.value, list) else ())).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{source.where}: a token is half a character (a lone surrogate)") from error
    return found


def _check_ids(source: TokenizerSource, rows: int) -> None:
    above = [(number, token) for token, number in source.ids.items() if not 0 <= number < rows]
    if above:
        number, token = max(above)
        raise _beyond(source, token, number, rows)


def _beyond(source: TokenizerSource, token: str, number: int, rows: int) -> CheckpointError:
    return CheckpointError(
        f"{source.where}: the token {shown(token)} has the id {number}, and the embedding {rows} rows, so llama.cpp"
        " would not open the file; give the tokenizer that belongs to the weights, with --tokenizer base or adapter"
    )


def _refusal(source: TokenizerSource, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{source.where}: its tokenizer cannot be written into a GGUF file: {why}; put the tokenizer.json or the"
        " tokenizer.model of the model there, or write it in 16 bit (--quant none) and use llama.cpp's"
        " convert_hf_to_gguf.py, which may know it"
    )


# -- byte pairs, and what tokenizer.json has of sentencepiece ------------------------------------------------------


def _of_fast(source: TokenizerSource, fast: Mapping[str, Any], rows: int) -> dict[str, GgufValue]:
    model = fast.get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    if (
        not isinstance(model, Mapping)
        or kind not in ("BPE", None)
        or not isinstance(model.get("vocab"), Mapping)
    ):
        raise _refusal(source, f"its model is {shown(kind)}, expected BPE or a sentencepiece model")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise _refusal(source, f"it has {field} {shown(model[field])}, which llama.cpp does not have")
    merges = _merges(source, model)
    if model.get("byte_fallback"):
        return _of_merged_pieces(source, fast, merges, rows)
    name = pre_tokenizer(fast.get("pre_tokenizer"), ignores_merges=bool(model.get("ignore_merges")))
    if name is None or normalizes(fast.get("normalizer")):
        raise _refusal(source, "the rule by which it cuts text is none that is known of llama.cpp's")
    table = _table(source, fast, rows, is_pieces=False)
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(name),
        "tokenizer.ggml.tokens": texts(table.texts),
        "tokenizer.ggml.token_type": i32s(table.types),
        "tokenizer.ggml.merges": texts([f"{left} {right}" for left, right in merges]),
    }


def _merges(source: TokenizerSource, model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of tokens in the order they are merged; in a file, texts with a space between or lists of two.

    llama.cpp takes them apart at the first space that is not the first character.
    """
    found = []
    for rule in model.get("merges") or ():
        pair = (
            tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) if isinstance(rule, list) else ()
        )
        if len(pair) != 2 or not all(isinstance(each, str) and each for each in pair):
            raise CheckpointError(
                f"{source.where}: tokenizer.json has the merge {shown(rule)}, expected two tokens"
            )
        found.append((str(pair[0]), str(pair[1])))
    return found


def _table(source: TokenizerSource, fast: Mapping[str, Any], rows: int, *, is_pieces: bool) -> _Table:
    """Tokens of tokenizer.json; those of sentencepiece begin with the unknown one and have one for each byte."""
    table = _Table.of_size(rows)
    vocabulary: Mapping[str, int] = fast["model"]["vocab"]
    unknown = fast["model"].get("unk_token")
    for token, number in vocabulary.items():
        kind = NORMAL
        if is_pieces and _is_byte(token):
            kind = BYTE
        elif is_pieces and token == unknown:
            kind = UNKNOWN
        table.put(number, token, kind, 0.0)
    _put_added(source, fast, table, is_pieces=is_pieces, unknown=unknown if is_pieces else None)
    return table


def _put_added(
    source: TokenizerSource,
    fast: Mapping[str, Any] | None,
    table: _Table,
    *,
    is_pieces: bool,
    unknown: object = None,
) -> None:
    for number, each in _added(source, fast).items():
        if table.types[number] == BYTE or each.text == unknown:
            continue
        is_control = each.is_special or _looks_special(each.text)
        # The tokenizer of llama.cpp looks for such tokens in text as it is.
        token = each.text if is_control else each.text.replace(_SPACE, " ")
        table.put(number, token, CONTROL if is_control else USER_DEFINED, _ADDED_SCORE if is_pieces else 0.0)


def _added(source: TokenizerSource, fast: Mapping[str, Any] | None) -> dict[int, _Added]:
    """Added tokens by id, as all files state them; tokenizer.json, which transformers reads, counts most."""
    found = {number: _Added(token, False, False) for token, number in source.added.items()}
    decoder = source.config.get("added_tokens_decoder")
    stated = [(number, each) for number, each in decoder.items()] if isinstance(decoder, Mapping) else []
    stated += [
        (each.get("id"), each) for each in (fast or {}).get("added_tokens") or () if isinstance(each, Mapping)
    ]
    for number, each in stated:
        token = each.get("content") if isinstance(each, Mapping) else None
        if not isinstance(token, str) or not str(number).isdecimal():
            raise CheckpointError(
                f"{source.where}: {shown(each)} is no added token; download the tokenizer again"
            )
        found[int(number)] = _Added(token, bool(each.get("special")), bool(each.get("normalized")))
    return found


def _looks_special(token: str) -> bool:
    marks = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return token in _CONTROLS or any(token.startswith(start) and token.endswith(end) for start, end in marks)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


# -- sentencepiece -------------------------------------------------------------------------------------------------


def _of_merged_pieces(
    source: TokenizerSource, fast: Mapping[str, Any], merges: Sequence[tuple[str, str]], rows: int
) -> dict[str, GgufValue]:
    """Pieces of a sentencepiece model whose scores tokenizer.json has as the order of merges."""
    table = _table(source, fast, rows, is_pieces=True)
    ids: Mapping[str, int] = fast["model"]["vocab"]
    for rank, (left, right) in reversed(list(enumerate(merges))):
        number = ids.get(left + right)
        if number is None:
            raise CheckpointError(
                f"{source.where}: tokenizer.json merges {shown(left)} and {shown(right)}, and what they make is no"
                " token; download it again"
            )
        if table.types[number] == NORMAL:
            table.scores[number] = -float(rank)
    return _pieces_pairs(table, adds_space=_adds_space(fast))


def _adds_space(fast: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, by either way in which tokenizer.json says so."""
    rules = [rule for name in ("normalizer", "pre_tokenizer") for rule in _flat(fast.get(name))]
    for rule in rules:
        if rule.get("type") == "Prepend":
            return True
        if rule.get("type") == "Metaspace":
            return (
                rule.get("prepend_scheme", "always") != "never"
                and rule.get("add_prefix_space", True) is not False
            )
    return False


def _flat(rule: object) -> list[Mapping[str, Any]]:
    if not isinstance(rule, Mapping):
        return []
    inner = rule.get("normalizers") or rule.get("pretokenizers")
    return [each for each in inner if isinstance(each, Mapping)] if isinstance(inner, list) else [rule]


def _of_pieces(source: TokenizerSource, raw: bytes, rows: int) -> dict[str, GgufValue]:
    pieces = read_pieces(raw, f"{source.where}: tokenizer.model")
    if not pieces.is_bpe:
        raise _refusal(source, "its tokenizer.model is no BPE model of sentencepiece")
    if len(pieces.texts) > rows:
        raise _beyond(source, pieces.texts[-1], len(pieces.texts) - 1, rows)
    table = _Table.of_size(rows)
    for number, (token, score, kind) in enumerate(
        zip(pieces.texts, pieces.scores, pieces.types, strict=True)
    ):
        table.put(number, token, kind, score)
    unknown = next(
        (token for token, kind in zip(pieces.texts, pieces.types, strict=True) if kind == UNKNOWN), None
    )
    _put_added(source, source.fast, table, is_pieces=True, unknown=unknown)
    adds_space = source.config.get("add_prefix_space")
    return _pieces_pairs(table, adds_space=pieces.adds_space if adds_space is None else bool(adds_space))


def _pieces_pairs(table: _Table, *, adds_space: bool) -> dict[str, GgufValue]:
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": texts(table.texts),
        "tokenizer.ggml.scores": f32s(table.scores),
        "tokenizer.ggml.token_type": i32s(table.types),
        "tokenizer.ggml.add_space_prefix": flag(adds_space),
    }


# -- special tokens ------------------------------------------------------------------------------------------------


def _special(source: TokenizerSource) -> dict[str, GgufValue]:
    """Ids of tokens with a role, whether begin and end are added, and the chat template."""
    pairs: dict[str, GgufValue] = {}
    for role, name in _ROLES.items():
        token = source.roles.get(role)
        number = source.ids.get(token) if token is not None else source.stated.get(role)
        if number is not None:
            pairs[f"tokenizer.ggml.{name}_token_id"] = u32(number)
    for side, role in (("bos", "bos_token"), ("eos", "eos_token")):
        adds = source.config.get(f"add_{side}_token")
        if not isinstance(adds, bool):
            adds = _adds(source, role)
        if adds is not None:
            pairs[f"tokenizer.ggml.add_{side}_token"] = flag(adds)
    if source.template is not None:
        pairs["tokenizer.chat_template"] = text(source.template)
    return pairs


def _adds(source: TokenizerSource, role: str) -> bool | None:
    """Whether the post-processor of tokenizer.json puts the token of that role before, or after, a text."""
    if source.fast is None:
        return None
    token = source.roles.get(role)
    place = 0 if role == "bos_token" else -1
    for rule in _processors(source.fast.get("post_processor")):
        single = rule.get("single")
        if rule.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            special = single[place].get("SpecialToken") if isinstance(single[place], Mapping) else None
            return isinstance(special, Mapping) and special.get("id") == token
    return False


def _processors(rule: object) -> list[Mapping[str, Any]]:
    if not isinstance(rule, Mapping):
        return []
    inner = rule.get("processors")
    return [each for each in inner if isinstance(each, Mapping)] if isinstance(inner, list) else [rule]
