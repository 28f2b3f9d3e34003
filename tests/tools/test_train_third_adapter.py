"""The third adapter's text: what of the lexicon is trained on, and what is held out."""

from __future__ import annotations

from tools.train_third_adapter import paragraphs, split


def test_lists_of_headwords_and_drawings_are_left_out_of_the_text() -> None:
    entry = (
        ":hack: /hak/, n.\n\n   1. Originally, a quick job that produces what is needed,\n   but not well."
    )
    lexicon = f"\n  A\n\n   abbrev\n\n   ABEND\n\n   hack\n\n{entry}\n\n   ____  |    |\n"
    found = list(paragraphs(f"before{lexicon}\nAppendix\xa0A. Hacker Folklore\nafter"))
    assert found[-1] == "1. Originally, a quick job that produces what is needed, but not well."
    assert "abbrev" not in found
    assert ":hack: /hak/, n." in found


def test_what_is_held_out_is_not_trained_on() -> None:
    entries = "".join(
        f"\n   Entry {number} has words\n   that no other entry has.\n" for number in range(3000)
    )
    training, held_out = split(f"\n  A\n{entries}\nAppendix A. Hacker Folklore\n")
    train, held = set(training.split("\n\n")), set(held_out.split("\n\n"))
    assert not {line.strip() for line in train} & {line.strip() for line in held}
    assert 0.06 < len(held) / (len(train) + len(held)) < 0.09
