"""Text of strangers where it must stay text: on a line of a terminal, in Markdown, in HTML, in Python.

Names come from files that anyone may have written. None may break a line, steer a terminal, or become a heading, a
link, HTML or code.
"""

from __future__ import annotations

import re
from html import escape

# Within words `_` means itself, and what GitHub and the Hub make links of needs no brackets.
_MARKDOWN = re.compile(
    r"[\\`*\[\]<&|~$@]|(?<![A-Za-z0-9_])_+|_+(?![A-Za-z0-9_])"
    r"|(?<=http):|(?<=https):|(?<=ftp):|(?<=mailto):|(?<=xmpp):|(?<=www)\.",
    re.IGNORECASE,
)
_ENTITIES = {"<": "&lt;", "&": "&amp;", ":": "&#58;", ".": "&#46;", "@": "&#64;"}
_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{0,99}")


def one_line(text: str) -> str:
    """`text` with all spelt out that is no visible character: line breaks, controls, marks that turn the direction."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def markdown_text(text: str) -> str:
    """`text` within a line of Markdown or a cell of a table, where it shows what it is and does nothing."""
    return _MARKDOWN.sub(_escaped, one_line(text))


def html_text(text: str) -> str:
    """`text` within an element or a quoted attribute of HTML."""
    return escape(one_line(text))


def is_class_name(text: object) -> bool:
    """Whether `text` may stand in Python where a class is named."""
    return isinstance(text, str) and _CLASS.fullmatch(text) is not None


def _escaped(found: re.Match[str]) -> str:
    return "".join(_ENTITIES.get(char, f"\\{char}") for char in found[0])
