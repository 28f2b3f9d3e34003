"""The page and the tables: everything in them, nothing from elsewhere."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from streamconv.comparison.page import page
from streamconv.comparison.result import Compared, Speed
from streamconv.comparison.wording import markdown, text_table
from tests.comparison.found import compared, failed, full, left_out, numbers, row


def parse(text: str) -> ET.Element:
    """The page is XML but for its first line, so every element is closed and every text escaped."""
    first, _, rest = text.partition("\n")
    assert first == "<!doctype html>"
    return ET.fromstring(rest)


@pytest.fixture(scope="module")
def found() -> Compared:
    return full()


def test_it_is_well_formed_and_has_every_row(found: Compared) -> None:
    root = parse(page(found))
    rows = ["".join(row.itertext()) for row in root.iter("tr")]
    assert len(rows) == 1 + len(found.rows)
    for each in found.rows:
        assert any(each.name in text for text in rows), each.name
    assert any("failed at merging: ResourceError: the disk <is> full" in text for text in rows)
    assert any("left out: it needs --calibration" in text for text in rows)
    assert root.find("head/title") is not None
    assert "Llama & <co> + my-qlora" in "".join(root.itertext())


def test_nothing_is_loaded_from_elsewhere(found: Compared) -> None:
    text = page(found)
    root = parse(text)
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert not {element.tag for element in root.iter()} & {"script", "link", "img", "iframe"}
    assert not any(name in element.attrib for element in root.iter() for name in ("src", "href", "srcset"))


EVIL = (
    """</script><script>a()</script>"' onload='b()' [x](javascript:c()) `|\x1b]0;d\x07\u202e\n# <img src=e>"""
)


def hostile() -> Compared:
    """Such text wherever a name from a file or a message may stand."""
    numbered = row("nf4", numbers(0.1))
    assert numbered.numbers is not None
    speed = replace(numbered.numbers.speed or Speed(1, None, 2.0, 1.0, 1, "cpu", None), problem=EVIL)
    rows = [
        replace(
            row("none", numbers(0.2)), label=EVIL, command=shlex.join(["streamconv", "merge", "--base", EVIL])
        ),
        replace(
            numbered, command=shlex.join(["x", f"-{EVIL}"]), numbers=replace(numbered.numbers, speed=speed)
        ),
        failed("broken", EVIL),
        failed("silent", ""),
        replace(left_out("no-text"), reason=EVIL),
    ]
    found = compared(rows)
    return replace(
        found,
        base=f"org/{EVIL}",
        adapter=EVIL,
        text=replace(found.text, name=EVIL),
        calibration={**(found.calibration or {}), "name": EVIL},
        machine={**found.machine, "processor": EVIL, "device": EVIL},
        out=EVIL,
    )


class Reader(HTMLParser):
    """Elements, attributes and text as browsers find them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_from_files_stay_text(found: Compared) -> None:
    usual, evil = Reader(), Reader()
    usual.feed(page(found))
    text = page(hostile())
    evil.feed(text)
    parse(text)
    assert evil.elements <= usual.elements
    assert evil.attributes <= usual.attributes
    assert "".join(evil.texts).count("</script><script>a()</script>") >= 8
    assert all(char.isprintable() or char == "\n" for char in text)
    assert all(char.isprintable() or char == "\n" for char in text_table(hostile()))


def test_names_from_files_stay_text_in_markdown() -> None:
    text = markdown(hostile())
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "<" not in text
    assert "](javascript" not in text.replace(r"\](", "")
    assert not [line for line in text.splitlines() if line.startswith("#")]


def test_plots_have_a_mark_for_every_row_with_numbers(found: Compared) -> None:
    root = parse(page(found))
    plots = [svg for svg in root.iter("svg") if svg.get("role") == "img"]
    assert len(plots) == 2
    done = [row.name for row in found.rows if row.numbers is not None]
    for plot in plots:
        assert [title.text.split(":")[0] for title in plot.iter("title") if title.text] == done
        labels = [text.text for text in plot.iter("text") if "label" in (text.get("class") or "")]
        assert sorted(map(str, labels)) == sorted(done)
        numbers_in = [
            float(value) for element in plot.iter() for value in re.findall(r"-?[\d.]+", _place(element))
        ]
        assert all(-1 <= number <= 800 for number in numbers_in)


def _place(element: ET.Element) -> str:
    return " ".join(
        element.get(name, "") for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "points")
    )


def test_labels_do_not_cover_each_other(found: Compared) -> None:
    plot = next(svg for svg in parse(page(found)).iter("svg") if svg.get("role") == "img")
    boxes = []
    for text in plot.iter("text"):
        kind = (text.get("class") or "").split()
        if "label" in kind:
            x, y, length = float(text.get("x", 0)), float(text.get("y", 0)), 6.0 * len(text.text or "")
            left = x - length if "end" in kind else x
            boxes.append((left, left + length, y))
    for place, (left, right, y) in enumerate(boxes):
        for other_left, other_right, other_y in boxes[place + 1 :]:
            assert right <= other_left or other_right <= left or abs(y - other_y) >= 7


def test_light_and_dark_give_every_colour() -> None:
    text = page(compared([row("one", numbers(0.01))]))
    light, _, dark = text.partition("prefers-color-scheme: dark")
    names = set(re.findall(r"var\((--\w+)\)", text))
    for half in (light, dark):
        assert names <= set(re.findall(r"(--\w+):", half))


def test_recommendations_are_marked(found: Compared) -> None:
    root = parse(page(found))
    taken = ["".join(tr.itertext()) for tr in root.iter("tr") if tr.get("class") == "taken"]
    names = [advice.name for advice in found.advice]
    assert len(taken) == len(names) == 4
    text = "".join(root.itertext())
    for advice in found.advice:
        assert advice.need in text
        assert str(found.row(str(advice.name)).command) in text


def test_there_may_be_hardly_anything() -> None:
    nothing = compared([failed("broken"), left_out("other")])
    assert len([*parse(page(nothing)).iter("tr")]) == 3
    assert "broken: failed at merging" in text_table(nothing)
    only = compared([row("reference", numbers(0.0), quant=None)])
    assert parse(page(only)) is not None


def test_tables_have_every_row(found: Compared) -> None:
    text = text_table(found).splitlines()
    done = [each for each in found.rows if each.numbers is not None]
    assert len({len(line) for line in text[1 : 1 + len(done)]}) == 1
    assert [line.split()[0] for line in text[1 : 1 + len(done)]] == [each.name for each in done]
    lines = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(done)


def test_columns_without_a_number_are_left_out() -> None:
    bare = numbers(0.01)
    rows = [row("one", bare)]
    assert "tokens/s" in text_table(compared(rows))
    quiet = compared([row("one", replace(bare, speed=None, greedy_identical=None))])
    head = text_table(quiet).splitlines()[0]
    assert "tokens/s" not in head
    assert "load memory" not in head
    assert "greedy" not in head
