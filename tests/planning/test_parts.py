"""How the files of an output are shared between workers, and the parts that K/N names."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from streamconv.errors import OptionError
from streamconv.planning.parts import Part, check_parts, parse_part, share, shares


@dataclass(frozen=True)
class File:
    name: str
    size: int


def files(*sizes: int) -> list[File]:
    return [File(f"{number}", size) for number, size in enumerate(sizes)]


def test_the_largest_files_go_first_each_to_the_part_with_the_fewest_bytes() -> None:
    a, b, c, d, e = made = files(3, 10, 5, 4, 5)
    assert shares(made, 2) == [[b, d], [a, c, e]]
    assert share(made, Part(2, 2)) == [a, c, e]
    assert share(made, None) == made


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_each_file_is_in_one_part_and_no_part_has_more_than_the_mean_and_a_file(count: int) -> None:
    chance = random.Random(count)
    made = files(*(chance.randint(1, 1000) for _ in range(191)))
    parts = shares(made, count)
    assert sorted(file.name for part in parts for file in part) == sorted(file.name for file in made)
    mean = sum(file.size for file in made) / count
    assert max(sum(file.size for file in part) for part in parts) <= mean + 1000
    assert parts == shares(list(made), count)
    for (
        part
    ) in parts:  # in the order of the files, so that neighbours in the base are read one after the other
        assert [int(file.name) for file in part] == sorted(int(file.name) for file in part)


def test_more_parts_than_files_leave_some_without() -> None:
    assert [len(part) for part in shares(files(5, 5, 5), 5)] == [1, 1, 1, 0, 0]


def test_a_part_is_named_by_its_number_from_1_and_the_count() -> None:
    assert parse_part("2/4") == Part(2, 4)
    assert (str(Part(2, 4)), Part(2, 4).folder) == ("part 2 of 4", "part-2-of-4")


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "-1/4", "1/0", "a/b", "1/4/2", "1.0/4", "/4", "1/"])
def test_what_names_no_part_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--part .* is none; give K/N"):
        parse_part(text)


def test_one_file_has_no_parts() -> None:
    check_parts(None, files(5))
    check_parts(Part(1, 2), files(5, 5))
    with pytest.raises(
        OptionError, match="the output is one file, and part 2 of 2 would be all of it or nothing"
    ):
        check_parts(Part(2, 2), files(5))
