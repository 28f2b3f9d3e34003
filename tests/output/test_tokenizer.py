"""Whose tokenizer an output has: the adapter's where training changed it and no id of the base's tokens moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import streamconv
from streamconv.calibration.passes import windows_of
from streamconv.errors import InputError, OptionError
from streamconv.output.tokenizer import TokenizerChoice, choose_tokenizer, follow_end_token
from streamconv.output.tokenizer_files import files_of
from streamconv.pipeline import build_job, prepare
from streamconv.storage import open_storage
from tests.tiny import VOCABULARY, llama_config, save_adapter, save_base

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
ROWS = VOCABULARY


def llama_like() -> PreTrainedTokenizerFast:
    """A BPE with pieces of sentencepiece and special tokens of its own."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "ab": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("a", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def gpt2_like() -> PreTrainedTokenizerFast:
    vocabulary = {"a": 0, "b": 1, "c": 2, "Ġ": 3, "Ġa": 4, "bc": 5, "<|endoftext|>": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def unigram() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece() -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "##b": 5}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


KINDS = [llama_like, gpt2_like, unigram, word_piece]
Make = Callable[[], PreTrainedTokenizerFast]
Change = Callable[[PreTrainedTokenizerFast], None]


def has_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE


def has_added_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["▁own"])


def ends_with_another(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})


def pads(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = "a"


def is_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    for change in (has_template, has_added_tokens, ends_with_another):
        change(tokenizer)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    return tmp_path / "base", tmp_path / "adapter"


def save(make: Make, folders: tuple[Path, Path], *changes: Change) -> PreTrainedTokenizerFast:
    """The base's tokenizer, and the adapter's with changes; returns the base's."""
    tokenizer = make()
    tokenizer.save_pretrained(folders[0])
    changed = make()
    for change in changes:
        change(changed)
    changed.save_pretrained(folders[1])
    return tokenizer


def choose(folders: tuple[Path, Path], wanted: str = "auto", rows: int | None = ROWS) -> TokenizerChoice:
    base, adapter = (open_storage(str(folder)) for folder in folders)
    return choose_tokenizer(wanted, base, adapter, False, rows)


def written_out(choice: TokenizerChoice, out: Path) -> PreTrainedTokenizerFast:
    out.mkdir()
    for name, storage in choice.files.items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copy(storage.file(name).path, out / name)
    for name, content in choice.written.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    found: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(out)
    return found


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def is_base(choice: TokenizerChoice, folders: tuple[Path, Path]) -> bool:
    ours = files_of(open_storage(str(folders[0])))
    return not choice.written and {name: at.location for name, at in choice.files.items()} == {
        name: at.location for name, at in ours.items()
    }


# -- taken -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (has_template, "has a chat template (the base's has none)"),
        (has_added_tokens, "adds 3 tokens, '<|im_start|>', '<|im_end|>', '▁own'"),
        (ends_with_another, "has the end token '<|im_end|>'"),
        (pads, "has the padding token 'a'"),
        (is_chatml, "chat template (the base's has none), has the end token '<|im_end|>'"),
    ],
)
def test_what_training_changed_is_taken_and_no_id_moves(
    make: Make, change: Change, says: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base = save(make, folders, change)
    choice = choose(folders)
    (note,) = choice.notes
    assert note.startswith("the tokenizer is the adapter's: it ")
    assert says in note
    assert "--tokenizer base" in note
    found, trained = (
        written_out(choice, tmp_path / "out"),
        PreTrainedTokenizerFast.from_pretrained(folders[1]),
    )
    for token, number in base.get_vocab().items():
        assert found.convert_tokens_to_ids(token) == number
    assert found.get_vocab() == trained.get_vocab()
    assert (found.chat_template, found.eos_token) == (trained.chat_template, trained.eos_token)
    for text in ("a ab b", "<|im_start|>a<|im_end|>"):
        assert found(text).input_ids == trained(text).input_ids
    assert choice.end_token == (trained.eos_token_id if change in (ends_with_another, is_chatml) else None)


def test_files_of_the_base_in_other_formats_stay_beside_it(folders: tuple[Path, Path]) -> None:
    """Converters of Gemma and others to GGUF read tokenizer.model, which transformers 5 does not save."""
    save(llama_like, folders, has_added_tokens)
    for name in ("tokenizer.model", "added_tokens.json"):
        (folders[0] / name).write_text("{}")
    found = choose(folders).files
    assert found["tokenizer.model"].location == str(folders[0])
    assert found["tokenizer.json"].location == str(folders[1])
    assert "added_tokens.json" not in found


def test_a_template_of_the_base_is_not_lost(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base = save(llama_like, folders, has_added_tokens)
    for inline in (True, False):
        if inline:
            edit(folders[0], "tokenizer_config.json", chat_template=TEMPLATE)
        else:
            base.chat_template = TEMPLATE
            base.save_pretrained(folders[0])
        found = written_out(choose(folders), tmp_path / str(inline))
        assert found.chat_template == TEMPLATE
        assert found.convert_tokens_to_ids("<|im_end|>") == 9


@pytest.mark.parametrize("inline_in_base", [True, False])
@pytest.mark.parametrize("inline", [True, False])
def test_a_template_without_a_vocabulary_is_put_on_the_base(
    inline: bool, inline_in_base: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base = llama_like()
    base.save_pretrained(folders[0])
    if inline_in_base:
        edit(folders[0], "tokenizer_config.json", chat_template="old")
    if inline:
        edit(folders[1], "tokenizer_config.json", chat_template=TEMPLATE)
    else:
        (folders[1] / "chat_template.jinja").write_text(TEMPLATE)
    for wanted in ("auto", "adapter"):
        choice = choose(folders, wanted)
        assert "chat template" in choice.notes[0]
        found = written_out(choice, tmp_path / f"out-{wanted}")
        assert found.chat_template == TEMPLATE
        assert found.get_vocab() == base.get_vocab()
        assert found.eos_token == "</s>"
        config = json.loads((tmp_path / f"out-{wanted}" / "tokenizer_config.json").read_text())
        assert config.get("chat_template") in (None, TEMPLATE)


def test_further_templates_go_along(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools"}

    save(llama_like, folders, change)
    assert written_out(choose(folders), tmp_path / "out").chat_template == {
        "default": TEMPLATE,
        "tool_use": "tools",
    }


def test_where_the_base_has_none_the_adapters_is_taken(folders: tuple[Path, Path]) -> None:
    llama_like().save_pretrained(folders[1])
    choice = choose(folders)
    assert choice.files.keys() == files_of(open_storage(str(folders[1]))).keys()
    assert "is the adapter's" in choice.notes[0]


# -- the base's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
def test_of_two_alike_the_base_is_taken_in_silence(make: Make, folders: tuple[Path, Path]) -> None:
    save(make, folders)
    assert is_base(choose(folders), folders)
    assert choose(folders).notes == ()


def test_what_training_writes_down_is_no_reason(folders: tuple[Path, Path]) -> None:
    save(llama_like, folders)
    padding = {"strategy": "BatchLongest", "direction": "Left", "pad_id": 0, "pad_token": "<unk>"}
    edit(folders[1], "tokenizer.json", padding=padding, truncation={"max_length": 512}, version="1.1")
    edit(
        folders[1],
        "tokenizer_config.json",
        model_max_length=512,
        padding_side="left",
        processor_class="P",
        transformers_version="4.40.0",
        tokenizer_class="LlamaTokenizerFast",
    )
    assert is_base(choose(folders), folders)
    assert choose(folders).notes == ()


def test_merges_are_compared_in_either_spelling(folders: tuple[Path, Path]) -> None:
    save(llama_like, folders)
    content = json.loads((folders[1] / "tokenizer.json").read_text())
    content["model"]["merges"] = [
        " ".join(rule) if isinstance(rule, list) else rule for rule in content["model"]["merges"]
    ]
    content["model"]["ignore_merges"] = False
    (folders[1] / "tokenizer.json").write_text(json.dumps(content))
    assert choose(folders).notes == ()


def renumbered(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def without_a_token(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["vocab"]["ab"]
    tokenizer["model"]["merges"].pop()


def renamed(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["<|im_end|>"] = tokenizer["model"]["vocab"].pop("▁")


def two_of_one_id(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["new"] = 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renumbered, "gives 2 tokens, 'a', 'b' of the base's another id ('a': 5, the base 4)"),
        (without_a_token, "lacks the token 'ab' of the base's"),
        (renamed, "lacks the token '▁' of the base's"),
        (two_of_one_id, "gives the token 'new' an id that a token of the base's has"),
    ],
)
def test_a_tokenizer_that_contradicts_the_base_is_named_and_not_taken(
    change: Callable[[dict[str, Any]], None], says: str, folders: tuple[Path, Path]
) -> None:
    save(llama_like, folders, has_template)
    content = json.loads((folders[1] / "tokenizer.json").read_text())
    change(content)
    (folders[1] / "tokenizer.json").write_text(json.dumps(content))
    choice = choose(folders)
    assert is_base(choice, folders)
    (note,) = choice.notes
    assert note.startswith("the tokenizer is the base's; the adapter's has a chat template")
    assert says in note
    assert note.endswith("--tokenizer adapter takes it")
    assert choose(folders, "base").notes == ()
    assert choose(folders, "adapter").files["tokenizer.json"].location == str(folders[1])


def test_more_tokens_than_rows_are_not_taken(folders: tuple[Path, Path]) -> None:
    base = save(llama_like, folders, is_chatml)
    assert is_base(choose(folders, rows=len(base) + 1), folders)
    (note,) = choose(folders, rows=len(base) + 1).notes
    assert "ids up to 10, and the output's embedding has 9 rows" in note
    assert not is_base(choose(folders, rows=len(base) + 3), folders)
    assert not is_base(choose(folders, rows=None), folders)


def test_another_way_to_cut_text_is_said(folders: tuple[Path, Path]) -> None:
    save(llama_like, folders)
    edit(folders[1], "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    edit(folders[0], "tokenizer_config.json", add_eos_token=False)
    edit(folders[1], "tokenizer_config.json", add_eos_token=True)
    choice = choose(folders)
    assert is_base(choice, folders)
    (note,) = choice.notes
    assert "cuts text in another way (pre_tokenizer, add_eos_token)" in note
    assert "--tokenizer adapter" in note


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"model": 3}',
        '{"model": {"vocab": {"a": "x"}}}',
        '{"model": {"vocab": [3]}}',
        '{"model": {"vocab": {}}, "added_tokens": [{}]}',
    ],
)
def test_files_that_cannot_be_compared_stop_nothing(content: str, folders: tuple[Path, Path]) -> None:
    save(llama_like, folders)
    (folders[1] / "tokenizer.json").write_text(content)
    choice = choose(folders)
    assert is_base(choice, folders)
    assert "could not be compared" in choice.notes[0]
    assert set(choose(folders, "adapter").files) == set(files_of(open_storage(str(folders[1]))))


def test_a_class_of_its_own_code_is_not_taken(folders: tuple[Path, Path]) -> None:
    save(llama_like, folders, has_template)
    edit(folders[1], "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    assert is_base(choose(folders), folders)
    assert "a class of its own code" in choose(folders).notes[0]


# -- other files -----------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def sentencepiece(pieces: list[str]) -> bytes:
    """A model file as sentencepiece writes it, as far as it tells of pieces: text, score, type."""
    found = b""
    for piece in pieces:
        text = piece.encode()
        entry = b"\x0a" + varint(len(text)) + text + b"\x15\x00\x00\x80\xbf" + b"\x18\x01"
        found += b"\x0a" + varint(len(entry)) + entry
    return found + b"\x12\x04\x08\x01\x10\x02"


@pytest.mark.parametrize("fits", [True, False])
def test_a_sentencepiece_base_is_compared_with_a_fast_tokenizer(
    fits: bool, folders: tuple[Path, Path]
) -> None:
    tokens = sorted(llama_like().get_vocab().items(), key=lambda token: token[1])
    pieces = [token for token, _ in (tokens if fits else tokens[::-1])]
    (folders[0] / "tokenizer.model").write_bytes(sentencepiece([*pieces[:-1], pieces[-1]]))
    edit(
        folders[0], "tokenizer_config.json", eos_token={"content": "</s>"}, bos_token="<s>", unk_token="<unk>"
    )
    tokenizer = llama_like()
    is_chatml(tokenizer)
    tokenizer.save_pretrained(folders[1])
    choice = choose(folders)
    assert is_base(choice, folders) == (not fits)
    assert ("another id" in choice.notes[0]) == (not fits)
    if fits:
        assert choice.files["tokenizer.model"].location == str(folders[0])


def test_slow_files_are_compared(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        edit(folder, "vocab.json", a=0, b=1)
        (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert choose(folders).notes == ()
    edit(folders[1], "added_tokens.json", **{"<|im_end|>": 2})
    edit(folders[1], "tokenizer_config.json", added_tokens_decoder={"3": {"content": "<x>"}})
    assert "adds 2 tokens, '<|im_end|>', '<x>'" in choose(folders).notes[0]
    for folder, text in zip(folders, ("a\nb\n", "a\nc\n"), strict=True):
        for path in folder.iterdir():
            path.unlink()
        (folder / "vocab.txt").write_text(text)
    assert "lacks the token 'b'" in choose(folders).notes[0]


@pytest.mark.parametrize(
    "name", ["qwen.tiktoken", "tiktoken.model", "tekken.json", "spm.model", "source.spm"]
)
def test_vocabularies_that_are_not_read_are_compared_whole(folders: tuple[Path, Path], name: str) -> None:
    for folder in folders:
        (folder / name).write_text("YQ== 0")
    (folders[1] / "chat_template.jinja").write_text(TEMPLATE)
    assert "is the adapter's" in choose(folders).notes[0]
    assert name in choose(folders).files
    (folders[1] / name).write_text("YQ== 1")
    assert is_base(choose(folders), folders)
    assert "cannot be compared" in choose(folders).notes[0]


def test_what_stands_beside_a_vocabulary_stays(folders: tuple[Path, Path]) -> None:
    """As Whisper's spelling, which trainers do not save again."""
    save(llama_like, folders, has_template)
    for name in ("normalizer.json", "tekken.json"):
        (folders[0] / name).write_text("{}")
    files = choose(folders).files
    assert files["normalizer.json"].location == files["tekken.json"].location == str(folders[0])
    assert files["tokenizer.json"].location == str(folders[1])


@pytest.mark.parametrize(
    ("wanted", "grown", "taken"),
    [
        ("auto", False, "base"),
        ("auto", True, "adapter"),
        ("base", False, "base"),
        ("base", True, "base"),
        ("adapter", False, "adapter"),
        ("adapter", True, "adapter"),
    ],
)
def test_whose_tokenizer_is_taken(folders: tuple[Path, Path], wanted: str, grown: bool, taken: str) -> None:
    for folder in folders:
        (folder / "tokenizer.json").write_text(f"of {folder.name}")
    base, adapter = (open_storage(str(folder)) for folder in folders)
    chosen = choose_tokenizer(wanted, base, adapter, grown)
    assert Path(chosen.files["tokenizer.json"].location).name == taken


def test_a_tokenizer_that_is_not_there(folders: tuple[Path, Path]) -> None:
    stores = open_storage(str(folders[0])), open_storage(str(folders[1]))
    with pytest.raises(InputError, match=r"changed the vocabulary but .*adapter .*--tokenizer base"):
        choose_tokenizer("auto", *stores, True)
    with pytest.raises(InputError, match=r"--tokenizer adapter .*adapter holds no tokenizer files"):
        choose_tokenizer("adapter", *stores, False)
    with pytest.raises(OptionError, match="--tokenizer mine is not known; use one of auto, base, adapter"):
        choose_tokenizer("mine", *stores, False)
    with pytest.raises(OptionError, match="--tokenizer adapter was asked for, but there is no adapter"):
        choose_tokenizer("adapter", stores[0], None, False)


# -- the end of a text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "expected"), [(2, [7, 2]), ([2, 3], [7, 2, 3]), (None, [7]), ([2, 7], None), (7, None)]
)
def test_generation_stops_at_the_new_end_token(
    stated: object, expected: list[int] | None, folders: tuple[Path, Path]
) -> None:
    edit(folders[0], "generation_config.json", do_sample=True, eos_token_id=stated, top_p=0.9)
    choice = TokenizerChoice({}, end_token=7)
    found = follow_end_token(choice, open_storage(str(folders[0])), {"eos_token_id": 2})
    if expected is None:
        assert (found.written, found.notes, found.end_token) == ({}, (), None)
        return
    content = json.loads(found.written["generation_config.json"])
    assert list(content.items()) == [("do_sample", True), ("eos_token_id", expected), ("top_p", 0.9)]
    assert "generation_config.json" in found.notes[0]
    assert found.end_token == 7


def test_settings_that_are_no_json_are_left_alone(folders: tuple[Path, Path]) -> None:
    (folders[0] / "generation_config.json").write_text("{")
    choice = TokenizerChoice({}, end_token=7)
    assert follow_end_token(choice, open_storage(str(folders[0])), {}) == choice


# -- end to end ------------------------------------------------------------------------------------------------------


def test_it_is_said_and_done_in_a_merge(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config())
    adapter = save_adapter(tmp_path / "adapter", base, LoraConfig(target_modules=["q_proj"])).path
    save(llama_like, (base, adapter), is_chatml)
    edit(base, "generation_config.json", eos_token_id=2)
    edit(base, "config.json", eos_token_id=2)
    prepared = prepare(build_job(base, adapter))
    assert len(prepared.plan.notes) == 2
    report = streamconv.merge(base, adapter, tmp_path / "out")
    assert report.notes == prepared.plan.notes
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.chat_template, found.eos_token) == (TEMPLATE, "<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        ends = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        assert ends == [found.eos_token_id, 2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"has the end token '&lt;\|im_end\|>' in place of '&lt;/s>'" in card
    assert streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter).exact
    again = streamconv.merge(base, adapter, tmp_path / "out")
    assert (again.seconds, again.notes) == (0.0, report.notes)
    streamconv.merge(base, adapter, tmp_path / "out", tokenizer="base", overwrite=True)
    assert not AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_messages_are_read_with_the_template_of_the_output(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config())
    adapter = save_adapter(tmp_path / "adapter", base, LoraConfig(target_modules=["q_proj"])).path
    save(llama_like, (base, adapter), is_chatml)
    line = json.dumps({"messages": [{"role": "user", "content": "a ab b ab a"}]})
    (tmp_path / "text.jsonl").write_text(f"{line}\n" * 60)
    options: dict[str, Any] = {"data": tmp_path / "text.jsonl", "tokens": 64, "sequence_length": 16}
    streamconv.merge(base, adapter, tmp_path / "out", dtype="float32")
    merged = streamconv.evaluate(tmp_path / "out", **options)
    apart = streamconv.evaluate(base=base, adapter=adapter, **options)
    assert merged.perplexity == pytest.approx(apart.perplexity, rel=1e-5)
    with pytest.raises(InputError, match="chat template"):
        streamconv.evaluate(base, **options)
    text: dict[str, Any] = {"calibration_tokens": 144, "calibration_sequence_length": 16}
    job = build_job(base, adapter, quant="nf4", calibration=tmp_path / "text.jsonl", **text)
    windows = windows_of(prepare(job).subject)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=False)
    assert windows.flatten().tolist() == (ids * 144)[:144]


def test_special_tokens_of_the_vocabulary_are_none_that_are_added(folders: tuple[Path, Path]) -> None:
    """A token of the base that the adapter's file lists among the added ones, as fast tokenizers do."""

    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_tokens([AddedToken("ab", special=True)])

    save(llama_like, folders, change)
    assert choose(folders).notes == ()
