"""`verify`: what it finds, and what it lets people change."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.checkpoint.header import read_header
from streamconv.output.manifest import sealed
from streamconv.storage import open_storage
from tests.cli.calls import Inputs, run, sha256, succeed
from tests.tiny import edit_json, edit_tensors, read_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def merged(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    options = ["--quant", "nf4-dq", "--merge-base", "nf4-dq", "--max-shard-size", "20KB"]
    succeed("merge", *inputs.options, *options, "-o", out, "-q")
    return out


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "copy"))


def first(out: Path) -> Path:
    return min(out.glob("model-*.safetensors"))


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def forge(out: Path, offset: int) -> None:
    """Change a byte and make the manifest agree."""
    flip(first(out), offset)
    manifest = json.loads((out / "streamconv.json").read_text())
    manifest["shards"][first(out).name]["sha256"] = sha256(first(out))
    (out / "streamconv.json").write_bytes(sealed(manifest))


def edit_manifest(out: Path, **fields: Any) -> None:
    """Set fields of the manifest, and seal it as if it had been written so."""
    content = json.loads((out / "streamconv.json").read_text()) | fields
    (out / "streamconv.json").write_bytes(sealed(content))


def test_a_good_output_is_verified(merged: Path) -> None:
    text = succeed("verify", merged).stdout
    assert text.startswith(f"{merged}: ")
    assert text.endswith("sizes, hashes and layout are right\n")
    found = json.loads(succeed("verify", merged, "--json").stdout)
    assert found["exact"] is False
    assert found["shards"] == len(list(merged.glob("*.safetensors")))
    assert found["bytes"] == sum(file.stat().st_size for file in merged.glob("*.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of a tensor": (lambda out: flip(first(out), -1), "model-00001-of"),
    "a byte of a header": (lambda out: flip(first(out), 30), "model-00001-of"),
    "a byte of padding": (lambda out: flip(first(out), 4095), "model-00001-of"),
    "a shard cut short": (lambda out: os.truncate(first(out), 5000), "has 5000 bytes"),
    "a shard that grew": (
        lambda out: first(out).write_bytes(first(out).read_bytes() + b"\0"),
        "model-00001-of",
    ),
    "a shard missing": (lambda out: first(out).unlink(), "model-00001-of"),
    "the index missing": (lambda out: (out / INDEX).unlink(), INDEX),
    "the index of another model": (lambda out: edit_json(out / INDEX, weight_map={"a": "b"}), "index"),
    "the config edited": (
        lambda out: edit_json(out / "config.json", rope_theta=7),
        "config.json was changed",
    ),
    "the config missing": (lambda out: (out / "config.json").unlink(), "config.json"),
    "the recipe edited": (
        lambda out: edit_json(out / "streamconv-recipe.json", seed=7),
        "streamconv-recipe.json was changed",
    ),
    "the recipe missing": (
        lambda out: (out / "streamconv-recipe.json").unlink(),
        "streamconv-recipe.json was removed",
    ),
    "a manifest of no shards": (lambda out: edit_manifest(out, shards={}), "shards cannot be {}"),
    "a manifest that is odd": (lambda out: edit_manifest(out, shards={"a": 5}), "must have a size in bytes"),
    "an edited manifest": (lambda out: edit_json(out / "streamconv.json", shards={}), "streamconv.json"),
    "the tokenizer edited": (
        lambda out: (out / "tokenizer.json").write_text("{}"),
        "tokenizer.json was changed since; restore it",
    ),
    "the tokenizer missing": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json was removed"),
    "settings that are no JSON any more": (
        lambda out: (out / "generation_config.json").write_text("edited"),
        "generation_config.json was damaged since: it is not valid JSON",
    ),
    "a card that is no text any more": (
        lambda out: (out / "README.md").write_bytes(b"caf\xe9"),
        "README.md was damaged since: it is not UTF-8",
    ),
    "a card of zeros, as crashes leave them": (
        lambda out: (out / "README.md").write_bytes(bytes(2000)),
        "README.md was damaged since: it has a NUL in it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_notices(copy: Path, damage: str) -> None:
    spoil, says = DAMAGE[damage]
    spoil(copy)
    result = run("verify", copy)
    assert result.exit_code == 7, result.output
    assert says in result.stderr.splitlines()[-1]


def test_what_people_may_edit_is_told_when_they_did(copy: Path) -> None:
    (copy / "README.md").write_text("edited")
    (copy / "processor_config.json").write_text("{}")
    edit_json(copy / "generation_config.json", do_sample=True)
    lines = succeed("verify", copy).stdout.splitlines()[1:]
    assert lines == [
        f"{copy}: changed since it was written, as people may: README.md, generation_config.json",
        f"{copy}: added since it was written, as people may: processor_config.json",
    ]
    (copy / "generation_config.json").unlink()
    assert (
        "removed since it was written, as people may: generation_config.json"
        in succeed("verify", copy).stdout
    )
    found = json.loads(succeed("verify", copy, "--json").stdout)
    told = {
        "edited": ["README.md"],
        "removed": ["generation_config.json"],
        "added": ["processor_config.json"],
    }
    assert {name: found[name] for name in told} == told


def test_what_is_no_output_cannot_be_verified(inputs: Inputs) -> None:
    result = run("verify", inputs.base)
    assert result.exit_code == 3
    assert "no streamconv.json" in result.stderr


def test_further_outputs_are_verified_by_their_own_names(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("merge", *inputs.options, "--also", "nf4", "-o", out, "-q")
    flip(first(out).parent / "nf4" / "model.safetensors", -1)
    shown = succeed("verify", out).stdout
    assert f"{out / 'nf4'} is an output of its own and was not looked at" in shown
    assert "not looked at" not in succeed("verify", out, "--full", *inputs.options, "-q").stdout
    assert run("verify", out / "nf4").exit_code == 7


def test_full_verification_computes_the_result_again(inputs: Inputs, merged: Path) -> None:
    found = json.loads(succeed("verify", merged, "--full", *inputs.options, "--json").stdout)
    assert found["exact"] is True
    assert succeed("verify", merged, "--full", *inputs.options).stdout.endswith("equal byte for byte\n")


def test_only_full_verification_finds_a_consistent_forgery(inputs: Inputs, copy: Path) -> None:
    forge(copy, -1)
    succeed("verify", copy)
    result = run("verify", copy, "--full", *inputs.options)
    last = read_header(open_storage(str(copy)).file(first(copy).name)).tensors[-1]
    assert result.exit_code == 7
    assert f"tensor {last.name} differs" in result.stderr
    assert "may round differently" not in result.stderr


def test_a_difference_is_not_blamed_on_the_output_where_versions_differ(inputs: Inputs, copy: Path) -> None:
    forge(copy, -1)
    manifest = json.loads((copy / "streamconv.json").read_text())
    edit_manifest(copy, fingerprint=manifest["fingerprint"] | {"torch": "1.0"})
    result = run("verify", copy, "--full", *inputs.options)
    assert result.exit_code == 7
    assert "made with torch 1.0, now 2" in result.stderr


def test_full_verification_needs_the_inputs_it_was_made_from(
    inputs: Inputs, merged: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(inputs.adapter, tmp_path / "other"))
    name, tensor = next(iter(read_tensors(other / "adapter_model.safetensors").items()))
    edit_tensors(other / "adapter_model.safetensors", put={name: tensor * 2})
    cases: list[tuple[int, str, list[str | Path]]] = [
        (2, "add --full", ["--base", inputs.base]),
        (2, "give the --base", ["--full"]),
        (2, "give it with --adapter", ["--full", "--base", inputs.base]),
        (3, "is not the one", ["--full", "--base", inputs.base, "--adapter", other]),
        (3, "not the model", ["--full", *inputs.options, "--base", merged_base(inputs, tmp_path)]),
    ]
    for code, says, options in cases:
        result = run("verify", merged, *options)
        assert (result.exit_code, says in result.stderr) == (code, True), result.stderr


def merged_base(inputs: Inputs, folder: Path) -> Path:
    """The same weights in one file."""
    streamconv.convert(inputs.base, folder / "resharded", max_shard_size="1GB")
    return folder / "resharded"


ODD: dict[str, Callable[[Path], None]] = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link that leads outside": lambda path: path.symlink_to("/etc/hostname"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("full", [False, True])
def test_what_takes_the_place_of_any_file_ends_in_a_sentence(
    inputs: Inputs, copy: Path, odd: str, full: bool
) -> None:
    """And nothing is waited for."""
    for path in sorted(copy.iterdir()):
        path.rename(copy.parent / path.name)
        ODD[odd](path)
        result = run("verify", copy, *(["--full", *inputs.options] if full else []))
        assert result.exit_code in (3, 7), (path.name, result.output)
        assert path.name in result.stderr, result.stderr
        path.rmdir() if odd == "a folder" else path.unlink()
        (copy.parent / path.name).rename(path)


def test_an_error_of_the_disk_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any file."""
    for path in sorted(copy.iterdir()):
        with monkeypatch.context() as patches:
            patches.setattr(os, "open", failing(os.open, path))
            result = run("verify", copy)
        assert result.exit_code in (3, 7), (path.name, result.output)
        assert f"{path.name} cannot be " in result.stderr.replace("opened", "read")
        assert "Input/output error" in result.stderr


def failing(opening: Callable[..., int], broken: Path) -> Callable[..., int]:
    def fail(path: Any, *given: Any, **named: Any) -> int:
        if str(path) == str(broken):
            raise OSError(errno.EIO, "Input/output error")
        return opening(path, *given, **named)

    return fail


def test_files_beside_an_output_are_named_and_those_that_loaders_take_refused(copy: Path) -> None:
    (copy / "pytorch_model.bin").touch()
    (copy / "notes.txt").touch()
    assert succeed("verify", copy).stdout.splitlines()[1:] == [
        f"{copy}: not of this output, and not looked at: pytorch_model.bin"
    ]
    assert json.loads(succeed("verify", copy, "--json").stdout)["others"] == ["pytorch_model.bin"]
    for name in ("adapter_config.json", "model.safetensors", "tokenizer.model"):
        (copy / name).touch()
        result = run("verify", copy)
        assert (result.exit_code, name in result.stderr) == (7, True), result.output
        (copy / name).unlink()


def test_names_beside_an_output_cannot_steer_the_terminal(copy: Path) -> None:
    (copy / "\x1b]0;gone\x07.bin").touch()
    (copy / os.fsdecode(b"\xff.bin")).touch()
    text = succeed("verify", copy).stdout
    assert r"\x1b]0;gone\x07.bin, \udcff.bin" in text
    assert text.replace("\n", "").isprintable()


def test_an_output_of_before_is_verified_as_before(copy: Path) -> None:
    """By what its manifest lists: no tokenizer, no index, no card."""
    path = copy / "streamconv.json"
    content = json.loads(path.read_text()) | {"manifest_version": 1}
    del content["sidecars"], content["manifest_sha256"]
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    (copy / "tokenizer.json").write_text("edited")
    (copy / "adapter_config.json").touch()
    succeed("verify", copy)
    (copy / "config.json").write_text("{}")
    assert run("verify", copy).exit_code == 7


@pytest.mark.parametrize("odd", [None, -1, "x", [[]]], ids=repr)
def test_a_fingerprint_of_anything_ends_in_a_sentence(inputs: Inputs, copy: Path, odd: object) -> None:
    """A full verification takes the options from there."""
    whole = json.loads((copy / "streamconv.json").read_text())["fingerprint"]
    places = [(key,) for key in whole] + [("options", key) for key in whole["options"]]
    for place in places:
        fingerprint = json.loads(json.dumps(whole))
        (fingerprint["options"] if len(place) > 1 else fingerprint)[place[-1]] = odd
        edit_manifest(copy, fingerprint=fingerprint)
        result = run("verify", copy, "--full", *inputs.options)
        assert result.exit_code in (0, 2, 3, 7), (place, result.exception)
        assert result.exit_code == 0 or len(result.stderr) < 2000


def test_an_odd_name_of_a_published_file_is_verified(inputs: Inputs, tmp_path: Path) -> None:
    base = Path(shutil.copytree(inputs.base, tmp_path / "base"))
    (base / os.fsdecode(b"LICENSE-\xff")).write_text("Do as you like.")
    succeed("convert", "--base", base, "-o", tmp_path / "out", "-q")
    (tmp_path / "out" / os.fsdecode(b"LICENSE-\xff")).write_text("Do nothing.")
    assert r"as people may: LICENSE-\udcff" in succeed("verify", tmp_path / "out").stdout
