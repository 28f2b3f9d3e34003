"""The files that a comparison leaves: all of it as JSON, the table as Markdown, and a page to look at."""

from __future__ import annotations

import json
from pathlib import Path

from streamconv.checkpoint.writer import write_file
from streamconv.comparison.page import page
from streamconv.comparison.result import Compared
from streamconv.comparison.wording import markdown

JSON, MARKDOWN, PAGE = "comparison.json", "comparison.md", "comparison.html"


def write_files(found: Compared, folder: Path) -> None:
    """Each whole or not at all. Raises OutputError or ResourceError where that is not possible."""
    write_file(folder / JSON, (json.dumps(found.as_json(), indent=1) + "\n").encode())
    write_file(folder / MARKDOWN, markdown(found).encode())
    write_file(folder / PAGE, page(found).encode())
