"""Inputs that do harm, each with the command that meets it, and the exit code and words it must end with."""

from __future__ import annotations

import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.checkpoint.files import raw_shard
from tests.checkpoint.pickles import called, hash_bomb, state, tensor, write_archive
from tests.hostile.commands import Commands, Outcome
from tests.hostile.stranger import ADAPTER_CONFIG, CHANGED, CONFIG, INDEX, SHARD, nested
from tests.tiny import edit_json, edit_tensors

PICKLE = "pytorch_model.bin"
ADAPTER = "adapter_model.safetensors"
PLAN = ("plan", "--base", "{base}", "--adapter", "{adapter}")
QUANTIZED = (*PLAN, "--quant", "nf4-dq")
DECODED = (*PLAN, "--quant", "none")
PICKLED = (*PLAN, "--allow-pickle")
MERGE = ("merge", *PLAN[1:], "-o", "{folder}/out")
INSPECT = ("inspect", "{base}")
INSPECT_ADAPTER = ("inspect", "{adapter}")
EVAL = ("eval", "{base}", "--data", "{folder}/text.txt", "--tokens", "64", "--sequence-length", "16")
LINES = (*EVAL[:3], "{folder}/lines.jsonl", *EVAL[4:])
EXTRACT = (
    "extract",
    "--base",
    "{folder}/other",
    "--finetuned",
    "{base}",
    "--rank",
    "4",
    "-o",
    "{folder}/out",
)
CALIBRATED = (*QUANTIZED, "--calibration", "{folder}/text.txt", "--calibration-tokens", "512")
HANGS_S = 60.0
Edit = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Row:
    """`edit` is given a folder with `base`, `adapter` and `text.txt`, all good; `base` names the kind of the first."""

    name: str
    made: str
    edit: Edit
    command: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    base: str = "llama"

    @property
    def runs_model(self) -> bool:
        """Whether libraries that run models are needed, or what torch imports to open a pickle."""
        return self.command[0] == "eval" or not {"--calibration", "--allow-pickle"}.isdisjoint(self.command)


# -- edits -------------------------------------------------------------------------------------------------------------


def fields(path: str, **changes: Any) -> Edit:
    return lambda folder: edit_json(folder / path, **changes)


def inside(path: str, section: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        content[section] = {**(content.get(section) or {}), **changes}
        (folder / path).write_text(json.dumps(content))

    return edit


def text(path: str, content: str | bytes) -> Edit:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / path).write_bytes(raw)


def instead(path: str, make: Callable[[Path], object]) -> Edit:
    """A thing of another kind in a file's place."""

    def edit(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        make(folder / path)

    return edit


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 * 10**12)


def listens(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


THINGS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "named pipe": (os.mkfifo, "named pipe"),
    "socket": (listens, "a socket"),
    "link to /dev/zero": (lambda path: path.symlink_to("/dev/zero"), "leads outside the folder"),
    "link to a secret": (lambda path: path.symlink_to("/etc/passwd"), "leads outside the folder"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), "a link to a file that is not there"),
    "link to itself": (
        lambda path: path.symlink_to(path.name),
        "cannot be read: Too many levels of symbolic links",
    ),
}


def with_pickle(pickled: bytes, entries: Mapping[str, bytes] | None = None) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "base" / SHARD).unlink()
        write_archive(folder / "base" / PICKLE, pickled, entries)

    return edit


def saved(content: Any) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "base" / SHARD).unlink()
        torch.save(content, folder / "base" / PICKLE)

    return edit


def deflated(folder: Path) -> None:
    (folder / "base" / SHARD).unlink()
    with zipfile.ZipFile(folder / "base" / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(30_000_000))


def cut(folder: Path) -> None:
    saved({"a": torch.ones(1000)})(folder)
    os.truncate(folder / "base" / PICKLE, 3000)


def header(entries: Mapping[str, Any] | str, data_bytes: int = 0) -> Edit:
    content = entries if isinstance(entries, str) else json.dumps(entries)
    return text(f"base/{SHARD}", raw_shard(content, data_bytes))


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def renamed(path: str, old: str, new: str) -> Edit:
    return lambda folder: edit_tensors(folder / path, rename={old: new})


def remapped(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "base" / INDEX).read_text())
        change(index["weight_map"])
        (folder / "base" / INDEX).write_text(json.dumps(index))

    return edit


def all_to(shard: str) -> Edit:
    return remapped(lambda names: names.update(dict.fromkeys(names, shard)))


def saved_adapter(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter" / ADAPTER)
        found = next(each for each in tensors if name in each)
        edit_tensors(folder / "adapter" / ADAPTER, put={found: make(tensors[found])})

    return edit


# -- rows --------------------------------------------------------------------------------------------------------------


def rows() -> Iterator[Row]:
    yield from _config_types()
    yield from _config_text()
    yield from _quantization()
    yield from _indexes()
    yield from _headers()
    yield from _adapters()
    yield from _pickles()
    yield from _things()
    yield from _recipes()
    yield from _texts()


MUST = {
    "architectures": "a list of names",
    "auto_map": "an object",
    "dtype": "text",
    "id2label": "an object",
    "model_type": "text",
    "quantization_config": "an object",
    "text_config": "an object",
    "tie_word_embeddings": "true or false",
    "torch_dtype": "text",
    "vocab_size": "a whole number",
}
ODD: Mapping[str, Any] = {
    "true": True,
    "a number": 7,
    "a text": "x",
    "a list": [[1]],
    "an object": {"x": [1]},
}
FITS: Mapping[str, tuple[str, ...]] = {
    "text": ("a text",),
    "an object": ("an object",),
    "true or false": ("true",),
    "a whole number": ("a number",),
}


def _config_types() -> Iterator[Row]:
    for number, (name, must) in enumerate(MUST.items()):
        odd = [kind for kind in ODD if kind not in FITS.get(must, ())]
        for place, kind in enumerate(odd):
            command = (PLAN, QUANTIZED, INSPECT, MERGE)[(number + place) % 4]
            made = f"{name} of config.json is {kind}"
            says = (f"config.json: {name} must be {must}", "download the file again")
            yield Row(made, made, fields(f"base/{CONFIG}", **{name: ODD[kind]}), command, 3, says)
    for name, value in (("dtype", []), ("tie_word_embeddings", 1), ("vocab_size", "x" * 10**5)):
        made = f"{name} of text_config is {type(value).__name__}"
        edit = inside(f"base/{CONFIG}", "text_config", **{name: value})
        yield Row(made, made, edit, QUANTIZED, 3, (f"config.json: text_config.{name} must be {MUST[name]}",))
    yield Row(
        "ties of a part are text",
        "tie_word_embeddings of decoder is 'no'",
        inside(f"base/{CONFIG}", "decoder", tie_word_embeddings="no"),
        QUANTIZED,
        3,
        ("config.json: decoder.tie_word_embeddings must be true or false",),
    )
    for name in ("architectures", "text_config", "dtype", "quantization_config", "auto_map", "vocab_size"):
        made = f"{name} of config.json is null"
        yield Row(made, made, fields(f"base/{CONFIG}", **{name: None}), QUANTIZED, 0, ())
    others: Mapping[str, tuple[str, ...]] = {
        "architectures": EXTRACT,
        "text_config": ("analyze", *PLAN[1:]),
        "dtype": EVAL,
    }
    for name, other in others.items():
        made = f"{name} of config.json is a number, for {other[0]}"
        says = (f"config.json: {name} must be {MUST[name]}, found 7", "download the file again")
        yield Row(made, made, fields(f"base/{CONFIG}", **{name: 7}), other, 3, says)


def _config_text() -> Iterator[Row]:
    path = f"base/{CONFIG}"
    contents: Mapping[str, tuple[str | bytes, str]] = {
        "empty": ("", "config.json is not valid JSON"),
        "a list": ("[]", "config.json must hold a JSON object, found []"),
        "a number": ("7", "config.json must hold a JSON object, found 7"),
        "null": ("null", "config.json must hold a JSON object, found None"),
        "a text": ('"x"', "config.json must hold a JSON object, found 'x'"),
        "nested 500 deep": (json.dumps({"x": nested(500)}), "nested too deeply"),
        "nested 300,000 deep": ("[" * 300_000, "nested too deeply"),
        "objects 400 deep": ('{"a":' * 400 + "1" + "}" * 400, "nested too deeply"),
        "a key twice": ('{"model_type": "llama", "model_type": "gpt2"}', "'model_type' stands twice"),
        "a number of 5,000 digits": (f'{{"vocab_size": {"9" * 5000}}}', "config.json is not valid JSON"),
        "half a character": ('{"model_type": "\\ud800"}', "config.json is not valid JSON"),
        "no UTF-8": (b'{"model_type": "\xff"}', "config.json is not valid JSON"),
        "UTF-16": ('{"model_type": "llama"}'.encode("utf-16"), "config.json is not valid JSON"),
        "a byte order mark": (b'\xef\xbb\xbf{"model_type": "llama"}', "byte order mark"),
        "a web page": ("<!DOCTYPE html><html></html>", "config.json must be JSON, found a web page"),
        "a pointer of git": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n",
            "git lfs pull",
        ),
        "cut short": ('{"model_type": "lla', "config.json is not valid JSON"),
    }
    for made, (content, says) in contents.items():
        yield Row(f"config.json is {made}", f"its text is {made}", text(path, content), PLAN, 3, (says,))
    yield Row(
        "config.json has 8 TB",
        "a file with a hole",
        instead(path, hole),
        PLAN,
        3,
        ("more than the 32000000",),
    )
    for name, field in (("layers", "num_hidden_layers"), ("experts", "num_experts")):
        made = f"{field} of config.json is 10^7"
        words = (f"{field} is 10000000", "tensors; correct it")
        for command in (EVAL, CALIBRATED):
            title = f"ten million {name}, {command[0]}"
            yield Row(title, made, fields(path, **{field: 10**7}), command, 3, words)
    for name, content in (("tokenizer.json", "[" * 2000), ("tokenizer_config.json", "7")):
        made = f"{name} is no object, for eval"
        yield Row(made, made, text(f"base/{name}", content), EVAL, 3, (name.removesuffix(".json"),))


def _quantization() -> Iterator[Row]:
    section = "quantization_config"
    changes: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("nf4-dq", {"quant_method": ["bitsandbytes"]}, "quantization_config.quant_method must be text"),
        ("nf4-dq", {"quant_method": {}}, "quantization_config.quant_method must be text"),
        ("nf4-dq", {"bnb_4bit_compute_dtype": ["x"]}, "bnb_4bit_compute_dtype must be text"),
        ("nf4-dq", {"load_in_4bit": "yes"}, "load_in_4bit must be true or false"),
        ("nf4-dq", {"quant_method": "exl3"}, "exl3, which is not supported yet"),
        ("w4a16", {"sparsity_config": "x"}, "sparsity_config must be an object"),
        ("w4a16", {"format": ["pack-quantized"]}, "quantization_config.format must be text"),
        ("w4a16", {"config_groups": 7}, "config_groups is missing"),
        ("w4a16", {"config_groups": {"group_0": nested(50)}}, "group_0 is [[["),
        ("w4a16", {"config_groups": {"x" * 10**5: 3}}, "is 3, which is not read yet"),
        ("w4a16", {"config_groups": {"g": {"weights": {"num_bits": [4]}}}}, "weights of [4] bits"),
        ("w4a16", {"config_groups": {"g": {"weights": {"num_bits": 10**400}}}}, "weights of 1000"),
        ("gptq", {"bits": {"x": 1}}, "gptq of {'x': 1} bits"),
        ("gptq", {"checkpoint_format": "marlin" * 10**4}, "gptq in the layout marlin"),
        ("awq", {"bits": "4"}, "awq of 4 bits"),
        ("fp8", {"fmt": ["e4m3"]}, "quantization_config.fmt must be text"),
        ("fp8", {"quant_method": "fp6"}, "fp6, which is not supported yet"),
        ("modelopt", {"quant_algo": {"x": 1}}, "quantization_config.quant_algo must be text"),
        ("nvfp4", {"format": {"x": 1}, "config_groups": None}, "quantization_config.format must be text"),
    )
    for base, change, says in changes:
        name = next(iter(change))
        made = f"{name} of {base} is {json.dumps(change[name])[:40]}"
        command = DECODED if base in ("fp8", "modelopt", "nvfp4") else PLAN
        yield Row(made, made, inside(f"base/{CONFIG}", section, **change), command, 3, (says,), base)
    for bits in ("4", -4, 3, [4], 10**30):
        made = f"bits of MLX are {json.dumps(bits)}"
        module = CHANGED.removesuffix(".weight")
        change = {"bits": bits, module: {"group_size": 64, "bits": bits}}
        yield Row(
            made, made, inside(f"base/{CONFIG}", "quantization", **change), DECODED, 3, ("up_proj",), "mlx"
        )


def _indexes() -> Iterator[Row]:
    path = f"base/{INDEX}"

    def row(made: str, edit: Edit, *says: str) -> Row:
        return Row(f"index: {made}", made, edit, PLAN, 3, says, "sharded")

    odd: Mapping[str, Any] = {"null": None, "a list": [], "a text": "x", "empty": {}, "a number": 3}
    for made, value in odd.items():
        yield row(
            f"weight_map is {made}", fields(path, weight_map=value), "must have a weight_map with tensors"
        )
    for shard in ("../x.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "\x00", ".", "a\\b", "", "x/"):
        yield row(
            f"names {json.dumps(shard)}", all_to(shard), "is not a file name inside the folder; refused"
        )
    yield row("names a folder below", all_to("sub/x.safetensors"), "sub/x.safetensors is missing")
    yield row("names itself", all_to(INDEX), "")
    yield row("a name of 100,000 letters", all_to("x" * 100_000), "shards cannot be used")
    yield row("a name of 300 letters", all_to("x" * 300), "File name too long")
    yield row(
        "a shard is a number", remapped(lambda names: names.update(x=3)), "'x' must name its shard, found 3"
    )
    yield row(
        "a tensor nobody has", remapped(lambda names: names.update(x=min(names.values()))), "in no shard"
    )
    yield row("a tensor is not there", remapped(lambda names: names.popitem()), "is not listed in the index")
    yield row("nested 500 deep", text(path, json.dumps({"weight_map": nested(500)})), "nested too deeply")
    yield row("8 TB", instead(path, hole), "more than the 256000000")


def _headers() -> Iterator[Row]:
    def row(made: str, edit: Edit, *says: str, command: tuple[str, ...] = PLAN) -> Row:
        return Row(f"shard: {made}", made, edit, command, 3, says)

    yield row("empty", text(f"base/{SHARD}", b""), "is empty")
    yield row("8 TB of nothing", instead(f"base/{SHARD}", hole), SHARD)
    yield row(
        "a header of 2^63 bytes", text(f"base/{SHARD}", b"\xff" * 8 + b"{}"), "must be a safetensors file"
    )
    yield row("shapes that wrap around 64 bits", header({"t": entry(0, 0, [2**32, 2**32, 4])}), "overflows")
    yield row("a negative side", header({"t": entry(0, 4, [-1])}, 4), "'t': the shape")
    yield row("bytes that overlap", header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12), "overlaps")
    yield row("more than it has", header({"a": entry(0, 8, [4])}, 8), "takes 16 bytes")
    yield row("a type nobody knows", header({"a": entry(0, 8, [2], "Q4")}, 8), "dtype must be one of")
    yield row("an entry of null", header('{"t":null}'), "'t' must have dtype, shape and data_offsets")
    yield row("a tensor twice", header(f'{{"t":{json.dumps(entry(0, 4, [1]))},"t":{{}}}}', 4), "stands twice")
    yield row("a name of 100,000 letters", header({"x" * 100_000: entry(0, 9, [2])}, 9), "takes 8 bytes")
    yield row("a name that steers a terminal", header({"\x1b[2J": entry(0, 9, [2])}, 9), "\\x1b[2J")
    yield row("no tensors", header({}), "holds no tensors")
    yield row("a hundred thousand brackets", header('{"t":' + "[" * 100_000), "nested too deeply")
    lone = {"x.qweight": entry(0, 4, [1], "I32")}
    yield row("half of a weight", header(lone, 4), "incomplete", command=INSPECT)


def _adapters() -> Iterator[Row]:
    path = f"adapter/{ADAPTER_CONFIG}"
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"peft_type": 7}, "peft_type must be a name"),
        ({"peft_type": ["LORA"]}, "peft_type must be a name"),
        ({"peft_type": "x" * 10**5}, "supported are"),
        ({"r": True}, "r must be a positive whole number"),
        ({"r": 10**400}, "r"),
        ({"r": -4}, "r must be a positive whole number"),
        ({"r": [4]}, "r must be a positive whole number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"target_modules": 7}, "target_modules must be"),
        ({"target_modules": [["q_proj"]]}, "target_modules must be"),
        ({"target_modules": {"q_proj": 1}}, "target_modules must be"),
        ({"rank_pattern": ["x"]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern must be an object"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"bias": {"x": 1}}, "bias"),
        ({"layer_replication": [[0, 10**12]]}, "layer_replication"),
        ({"layer_replication": "x"}, "layer_replication"),
        ({"target_parameters": 7}, "target_parameters must be a list of names"),
        ({"trainable_token_indices": {"x": "y"}}, "trainable_token_indices"),
        ({"nobody_knows": nested(60)}, "'nobody_knows'"),
        ({"nobody_knows": "x" * 10**6}, "'nobody_knows'"),
        ({"x" * 10**6: 1}, "is not known here"),
    )
    for change, says in changes:
        name = next(iter(change))[:40]
        made = f"{name} is {json.dumps(next(iter(change.values())))[:40]}"
        yield Row(f"adapter: {made}", made, fields(path, **change), PLAN, 3, (says,))
    for made, content in {"a list": "[]", "deep": "[" * 9999, "NaN": '{"r": NaN}', "cut": '{"peft'}.items():
        yield Row(
            f"adapter config is {made}", made, text(path, content), INSPECT_ADAPTER, 3, (ADAPTER_CONFIG,)
        )
    integers = saved_adapter("q_proj.lora_A", lambda factor: factor.to(torch.int8))
    yield Row("adapter of integers", "lora_A in int8", integers, PLAN, 3, ("stored as I8",))
    thin = saved_adapter("q_proj.lora_A", lambda factor: factor[:, :5].contiguous())
    yield Row("adapter of another base", "lora_A with 5 columns", thin, PLAN, 3, ("trained on this base",))
    poisoned = saved_adapter("q_proj.lora_A", lambda factor: factor * torch.nan)
    yield Row("adapter of NaN", "lora_A is NaN", poisoned, MERGE, 3, ("holds NaN",))


def _pickles() -> Iterator[Row]:
    def row(made: str, edit: Edit, *says: str) -> Row:
        return Row(f"pickle: {made}", made, edit, PICKLED, 3, says)

    eye, entries = torch.eye(3), {"data/1": bytes(400)}
    yield row("a sparse tensor", saved({"a": eye.to_sparse()}), "holds a sparse tensor")
    yield row("a tensor without values", saved({"a": torch.empty(3, device="meta")}), "without values")
    yield row(
        "a quantized tensor", with_pickle(state(called("torch._utils", "_rebuild_qtensor", 1))), "a quantized"
    )
    yield row("a transposed tensor", saved({"a": torch.ones(3, 4).t()}), "do not lie together")
    yield row("a tensor that is one number", saved({"a": torch.ones(1).expand(9, 9)}), "do not lie together")
    yield row(
        "rows that overlap", saved({"a": torch.ones(9).as_strided((4, 4), (1, 1))}), "do not lie together"
    )
    yield row("a conjugate", saved({"a": torch.ones(2, dtype=torch.complex64).conj()}), "do not lie together")
    yield row("a list", saved([eye]), "must hold tensors by name, found list")
    yield row("nothing", saved({}), "holds no tensors")
    yield row("numbers for names", saved({1: eye}), "found 1 as a name")
    yield row("a value that is text", saved({"a": "x" * 10**5}), "a must be a tensor of numbers, found str")
    yield row("cut short", cut, "was cut short")
    yield row("a zip bomb", deflated, "is compressed, which torch.save does not do")
    yield row(
        "code", with_pickle(state(called("os", "system", 1))), "names 'os.system'", "none of it is loaded"
    )
    yield row(
        "memory for the asking", with_pickle(state(called("builtins", "bytearray", 2**33))), "bytearray"
    )
    yield row("a hash without end", with_pickle(hash_bomb()), "in more steps than")
    yield row("a wide hash without end", with_pickle(hash_bomb(4, 1000)), "in more steps than")
    yield row(
        "a million objects", with_pickle(b"\x80\x02](" + b"}" * 1_000_000 + b"e."), "in more steps than"
    )
    yield row(
        "a storage of 2^60 numbers", with_pickle(state(tensor(numel=2**60))), "its place in the file has 64"
    )
    beyond = state(tensor(shape=(8, 4), numel=32))
    yield row("another tensor's bytes", with_pickle(beyond, entries), "its place in the file has 64")
    yield row("strides of 2^50", with_pickle(state(tensor(stride=(2**50, 1)))), "do not lie together")
    yield row("an offset of 2^62", with_pickle(state(tensor(offset=2**62))), "ends beyond its place")
    wraps = state(tensor(shape=(2**32, 2**32), stride=(2**32, 1)))
    yield row("a shape that wraps around 64 bits", with_pickle(wraps), "overflow")
    yield row(
        "a storage outside", with_pickle(state(tensor(key=b"../../etc/passwd"))), "failed locating file"
    )
    yield row("steps that are none", with_pickle(b"\xff\xfe"), "cannot be read as a file of tensors")


def _things() -> Iterator[Row]:
    for number, (kind, (make, says)) in enumerate(THINGS.items()):
        for name in (f"base/{CONFIG}", f"base/{SHARD}", f"adapter/{ADAPTER_CONFIG}", f"adapter/{ADAPTER}"):
            yield Row(f"{name} is a {kind}", kind, instead(name, make), PLAN, 3, (says,))
        for name in ("LICENSE", "tokenizer.json", "generation_config.json")[number % 2 : number % 2 + 2]:
            yield Row(f"base/{name} is a {kind}", kind, instead(f"base/{name}", make), PLAN, 3, (says,))
    for name in ("LICENSE", "NOTICE.txt", "tokenizer.model"):
        words = (f"{name} has 8 TB", "is larger than 1 GB")
        yield Row(f"{name} has 8 TB", "a file with a hole", instead(f"base/{name}", hole), PLAN, 3, words)
    asked = (*MERGE, "--copy-extra", "notes.txt")
    words = ("/out needs 8 TB", "are missing; free some")
    yield Row(
        "a copy of 8 TB that was asked for",
        "a file with a hole",
        instead("base/notes.txt", hole),
        asked,
        5,
        words,
    )
    folder = instead(f"base/{SHARD}", Path.mkdir)
    yield Row(f"{SHARD} is a folder", "a folder", folder, PLAN, 3, ("no weights found",))


def _recipes() -> Iterator[Row]:
    def row(made: str, content: str | bytes, *says: str, suffix: str = "yaml") -> Row:
        path = f"recipe.{suffix}"
        command = (*PLAN, "--recipe", f"{{folder}}/{path}")
        return Row(f"recipe: {made}", made, text(path, content), command, 2, says)

    laughs = 'a: &a ["x","x"]\n' + "".join(
        f"{new}: &{new} [*{old},*{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=False)
    )
    yield row("a billion laughs", laughs, "line 1: anchors (&name) are not read")
    yield row("an alias", "quant: *x", "aliases")
    yield row(
        "a tag that runs code", "quant: !!python/object/apply:os.system ['id']", "tags (!name) are not read"
    )
    yield row("a key twice", "quant: none\nquant: nf4", "'quant' stands twice")
    yield row("brackets without end", "quant: " + "[" * 200_000, "'quant' must be text, a number")
    yield row("maps without end", "".join(" " * depth + "a:\n" for depth in range(300)), "'a' must be text")
    yield row("a list of lists", "ignore: [[x]]", "'ignore' must be text, a number")
    yield row("two documents", "quant: none\n---\nquant: nf4", "a second document begins")
    yield row("no mapping", "- quant", "must hold option names with their values")
    yield row("no UTF-8", b"quant: \xff", "is not UTF-8 text")
    yield row("a number of 5,000 digits", f"seed: {'9' * 5000}", "seed")
    yield row("JSON nested 500 deep", json.dumps({"quant": nested(500)}), "nested too deeply", suffix="json")
    yield row(
        "JSON with a key twice", '{"quant": "none", "quant": "nf4"}', "'quant' stands twice", suffix="json"
    )
    yield row("JSON with a huge number", f'{{"group-size": {10**400}}}', "group", suffix="json")
    yield row("300 kB", "#" + "x" * 300_000, "is larger than 256 KiB")
    yield row("an option of 100,000 letters", "x" * 900 + ": 1", "is no option of plan")
    pipe = (*PLAN, "--recipe", "{folder}/recipe.yaml")
    yield Row(
        "recipe: a named pipe", "a pipe", lambda at: os.mkfifo(at / "recipe.yaml"), pipe, 2, ("a named pipe",)
    )


def _texts() -> Iterator[Row]:
    def row(made: str, content: str | bytes, *says: str) -> Row:
        return Row(f"text: {made}", made, text("lines.jsonl", content), LINES, 3, says)

    yield row("a line that is no object", "[1, 2]\n", "line 1 must be an object with text")
    yield row("a line whose text is a number", '{"text": 7}\n', "line 1 must be an object with text")
    yield row("a line of brackets", "[" * 100_000 + "\n", "line 1 is not JSON: nested too deeply")
    yield row("binary", bytes(range(128, 256)), "is not UTF-8")
    yield row("messages that are numbers", '{"messages": [1, 2]}\n', "the chat template of the tokenizer")
    yield row("half a character", '{"text": "\\ud800"}\n' * 99, "lines.jsonl")
    yield row("nothing", "", "has 0 tokens")
    pipe = instead("lines.jsonl", os.mkfifo)
    yield Row("text: a named pipe", "a pipe", pipe, LINES, 3, ("lines.jsonl",))
    gone = instead("text.txt", lambda _: None)
    yield Row("text: missing", "no file", gone, CALIBRATED, 3, ("text.txt is no file",))


def place(inputs: Path, row: Row, folder: Path) -> tuple[str, ...]:
    """Copies of good inputs in `folder`, spoilt as the row says; its command."""
    shutil.copytree(inputs / row.base, folder / "base")
    shutil.copytree(inputs / "adapter", folder / "adapter")
    shutil.copy(inputs / "text.txt", folder / "text.txt")
    if "{folder}/other" in row.command:
        shutil.copytree(inputs / "llama", folder / "other")
        edit_tensors(folder / "other" / SHARD, put={CHANGED: torch.ones(128, 128, dtype=torch.bfloat16)})
    row.edit(folder)
    names = {"base": folder / "base", "adapter": folder / "adapter", "folder": folder}
    return tuple(each.format(**names) for each in row.command)


def run(row: Row, inputs: Path, folder: Path, servers: Mapping[bool, Commands]) -> Outcome:
    """The row's command on inputs spoilt in `folder`; `servers` are by `Row.runs_model`."""
    folder.mkdir()
    return servers[row.runs_model].run(*place(inputs, row, folder), kill_after_s=HANGS_S)
