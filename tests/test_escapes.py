"""Text of strangers stays text."""

from __future__ import annotations

import pytest

from streamconv.escapes import html_text, is_class_name, markdown_text, one_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0", "model.layers.0"),
        ("Grüße 模型", "Grüße 模型"),
        ("a\x1b]0;x\x07b", r"a\x1b]0;x\x07b"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("a\nError: b\r\u2028", r"a\nError: b\r\u2028"),
        ("\u202egpj.exe\u2066\ufeff\u200b", r"\u202egpj.exe\u2066\ufeff\u200b"),
        ("\ud800\U000e0041", r"\ud800\U000e0041"),
    ],
)
def test_one_line_holds_visible_characters_alone(text: str, expected: str) -> None:
    assert one_line(text) == expected
    assert one_line(text).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0.q_proj (2.5 GB), 1 - 2", "model.layers.0.q_proj (2.5 GB), 1 - 2"),
        ("a\n# b | c", r"a\n# b \| c".replace(r"\n", "\\\\n")),
        ("`x` *y* ~z~ $q$", r"\`x\` \*y\* \~z\~ \$q\$"),
        ("__init__ _x_ a_b", r"\_\_init\_\_ \_x\_ a_b"),
        ("[x](javascript:y) ![z](w)", r"\[x\](javascript:y) !\[z\](w)"),
        ("<b>&lt;|im_end|>", r"&lt;b>&amp;lt;\|im_end\|>"),
        ("http://x HTTPS://y www.z me@x", "http&#58;//x HTTPS&#58;//y www&#46;z me&#64;x"),
    ],
)
def test_markdown_shows_the_text(text: str, expected: str) -> None:
    assert markdown_text(text) == expected


def test_html_shows_the_text() -> None:
    assert html_text("</script>\"'&\n\x1b\u202e") == r"&lt;/script&gt;&quot;&#x27;&amp;\n\x1b\u202e"


@pytest.mark.parametrize("text", ["LlamaForCausalLM", "T5Model", "A_1"])
def test_names_of_classes(text: str) -> None:
    assert is_class_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model",
        "A b",
        "A\n",
        "A.b",
        "A()",
        "Ä",
        "x import y\nimport os  # ForX",
        "A" * 101,
        3,
        None,
        ["A"],
    ],
)
def test_what_names_no_class(text: object) -> None:
    assert not is_class_name(text)
