"""Writes streamconv/adapters/conversions.json from the conversion tables of the installed transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import conversion_mapping

from streamconv.adapters.conversions import EXTRACT, read_line, write_line

TARGET = Path(__file__).resolve().parent.parent / "streamconv" / "adapters" / EXTRACT


def extract() -> Mapping[str, Any]:
    """All tables, by model type or class; those that are the same as an earlier one by its key."""
    build = conversion_mapping._build_checkpoint_conversion_mapping  # keys have no public name
    lines = {key: [write_line(read_line(line)) for line in table] for key, table in build().items()}
    first: dict[str, str] = {}
    same = {}
    for key in sorted(lines):
        text = json.dumps(lines[key], sort_keys=True)
        if first.setdefault(text, key) != key:
            same[key] = first[text]
    tables = {key: lines[key] for key in sorted(lines) if key not in same}
    return {"transformers": transformers.__version__, "same": same, "tables": tables}


def written(extracted: Mapping[str, Any]) -> str:
    """JSON with a line of a table on each line, so that changes between versions can be read."""
    head = {key: extracted[key] for key in ("transformers", "same")}
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    tables = [
        f"  {json.dumps(key)}: [\n" + ",\n".join(f"   {json.dumps(line)}" for line in lines) + "\n  ]"
        for key, lines in extracted["tables"].items()
    ]
    parts.append(' "tables": {\n' + ",\n".join(tables) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    TARGET.write_text(written(extract()), encoding="utf-8")
