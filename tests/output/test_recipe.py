"""Recipe files: what is read, what is refused with which words, and that what is written reads the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamconv.errors import OptionError
from streamconv.output.recipe import Value, read_recipe, write_recipe
from tests.strategies import texts


def stored(folder: Path, content: str | bytes, suffix: str = ".yaml") -> str:
    path = folder / f"recipe{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


READ: dict[str, dict[str, Value]] = {
    "quant: nf4-dq\nseed: 7 # lucky\nmin-kept: 0.5\n": {"quant": "nf4-dq", "seed": 7, "min-kept": 0.5},
    "---\nignore: [q_proj, 're:^a.*']\nverify: false\n...\n": {
        "ignore": ["q_proj", "re:^a.*"],
        "verify": False,
    },
    "ignore:\n  - q_proj\n  - 'off'\n": {"ignore": ["q_proj", "off"]},
    "commit-message: |\n  Two\n  lines\n": {"commit-message": "Two\nlines\n"},
    "base: org/model@main\nout: ./a b\n": {"base": "org/model@main", "out": "./a b"},
    "\ufeffseed: 1": {"seed": 1},
    "copy-extra: []": {"copy-extra": []},
    # Whatever YAML 1.1 makes of them: numbers with another base, dates, times.
    "a: 0777": {"a": "0777"},
    "a: 1_000": {"a": "1_000"},
    "a: 12:30": {"a": "12:30"},
    "a: 2024-01-01": {"a": "2024-01-01"},
    "a: 0x10": {"a": "0x10"},
    "a: .inf": {"a": ".inf"},
    # In YAML 1.1 text, in YAML 1.2 a number.
    "a: 1e-05": {"a": 1e-05},
    "a: -.5": {"a": -0.5},
    'a: "\\ud83d\\ude00"': {"a": "\U0001f600"},
    '{"a": ["b"], "c": true}': {"a": ["b"], "c": True},
}


@pytest.mark.parametrize("content", READ)
def test_yaml_is_read(tmp_path: Path, content: str) -> None:
    found = read_recipe(stored(tmp_path, content, ".yml"))
    assert found == READ[content]
    assert repr(found) == repr(READ[content])  # 1 is not True


REFUSED = {
    "quant: off": "line 1: 'quant': off is a word to some parsers of YAML",
    "a: 1\nverify: Yes": "line 2: 'verify': Yes is a word",
    "ignore: [n]": "'ignore': n is a word",
    "a: 1\nb: 2\na: 1": "line 3: the key 'a' stands twice",
    "a: &x b\nc: d": "line 1: anchors (&name) are not read",
    "a: *x": "line 1: aliases (*name) are not read",
    "a: &x [*x, *x]": "anchors (&name) are not read",
    "<<: {a: 1}": "'<<' must be text",
    "a: !!python/object/apply:os.system [x]": "line 1: tags (!name) are not read",
    "!a b: c": "line 1: tags (!name) are not read",
    "a: {b: c}": "line 1: 'a' must be text, a number, true, false, or a list of texts",
    "a: [[b]]": "'a' must be text",
    "a: [{b: c}]": "'a' must be text",
    "? [a]\n: b": "line 1: a key must be the name of an option",
    "a: 1\n---\nb: 2": "line 3: a second document begins",
    "a:\nb: 1": "'a' has no value",
    "a: ~": "'a' has no value",
    "a: [null]": "'a' has no value",
    "": "must hold option names with their values",
    "# nothing": "must hold option names with their values",
    "- a\n- b": "must hold option names with their values",
    "just text": "must hold option names with their values",
    "a: b: c": "line 1 is not valid YAML: mapping values are not allowed here",
    "a: 'b": "is not valid YAML",
    "a:\n\t- b": "line 2 is not valid YAML",
    "a: \x01": "is not valid YAML",
    'a: "\\udc80"': "is not UTF-8 text",
    "[" * 100_000: "must hold option names",
    "a: " + "[" * 100_000: "'a' must be text",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: content[:40])
def test_yaml_that_surprises_is_refused(tmp_path: Path, content: str) -> None:
    path = stored(tmp_path, content)
    with pytest.raises(OptionError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(path)
    assert REFUSED[content] in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": {"b": 1}}', "'a' must be text"),
        ('{"a": null}', "'a' has no value"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('["a"]', "must hold a JSON object"),
        ("{", "not valid JSON"),
        ("a: 1", "not valid JSON"),
        ('{"a": ' + "[" * 100_000, "not valid JSON"),
    ],
)
def test_json_that_is_wrong_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = stored(tmp_path, content, ".json")
    with pytest.raises(OptionError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("content", [b"a: \xff", b"\xff\xfea\x00"])
def test_what_is_not_utf8_is_refused(tmp_path: Path, content: bytes) -> None:
    for suffix in (".yaml", ".json"):
        with pytest.raises(OptionError, match="recipe"):
            read_recipe(stored(tmp_path, content, suffix))


def test_what_is_no_file_of_the_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for path, says in (
        (tmp_path / "recipe.toml", r"ends in \.json, \.yaml or \.yml"),
        (tmp_path / "nowhere.json", "cannot be read: No such file"),
        (tmp_path / "folder.json", "cannot be read: Is a directory"),
        (Path(stored(tmp_path, " " * 2**18 + "a: b")), "larger than 256 KiB"),
    ):
        with pytest.raises(OptionError, match=says) as caught:
            read_recipe(str(path))
        assert path.name in str(caught.value)


@pytest.mark.parametrize(
    "content", ["token: hf_secret: x", "token: 'hf_secret", "token: hf_secret\n\tx", "hf_secret"]
)
def test_a_broken_line_is_not_quoted(tmp_path: Path, content: str) -> None:
    """It may hold what nobody should see."""
    with pytest.raises(OptionError) as caught:
        read_recipe(stored(tmp_path, content))
    assert "hf_secret" not in str(caught.value)


values = st.one_of(
    texts,
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(texts, max_size=3),
)


@given(recipe=st.dictionaries(texts, values, max_size=4))
@example(recipe={"a": "\U0001f600\u2028\u0085\x7f\ufeff \n", "b": 1e-05, "c": "off", "d": -0.0, "e": 10**40})
def test_what_is_written_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Value]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = write_recipe(recipe)
    assert json.loads(text) == recipe
    for suffix in (".json", ".yaml"):
        found = read_recipe(stored(folder, text, suffix))
        assert repr(found) == repr(recipe)


def test_a_name_that_is_no_text_cannot_be_written() -> None:
    with pytest.raises(OptionError, match="not valid UTF-8"):
        write_recipe({"base": "model-\udcff"})
