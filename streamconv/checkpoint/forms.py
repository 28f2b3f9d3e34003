"""Forms in which a checkpoint lies in a folder: one file or shards with an index, safetensors or pickles, variants.

Names are transformers' (`transformers/utils/__init__.py`, `_add_variant`): `model.safetensors`, or shards that
`model.safetensors.index.json` lists; before safetensors, `pytorch_model.bin` and `pytorch_model.bin.index.json`; of a
variant `model.fp16.safetensors` and `model.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.strict_json import some
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.storage.base import Storage

_OTHER_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_WEIGHTS = (".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx")
_VARIANT = r"(?P<variant>[A-Za-z0-9_]+)"
_SHARD = r"[0-9]+-of-[0-9]+"


@dataclass(frozen=True, slots=True)
class Form:
    """Files of one checkpoint: `index` names the shards, or `single` holds all. `variant` is None for the usual names.

    `pickled`: written by `torch.save`.
    """

    index: str | None = None
    single: str | None = None
    variant: str | None = None
    pickled: bool = False


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of one stem and suffix: `model` and `.safetensors`, `pytorch_model` and `.bin`."""

    stem: str
    suffix: str

    @property
    def single(self) -> str:
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def shards(self, names: Iterable[str]) -> list[str]:
        """Names of shards of the usual form."""
        return self._match(names, rf"{re.escape(self.stem)}-{_SHARD}{re.escape(self.suffix)}")

    def variant_shards(self, names: Iterable[str]) -> list[str]:
        """Names of shards of variants: since transformers 4.45 `model.fp16-00001-of-00002`, before it at the end."""
        stem, suffix = re.escape(self.stem), re.escape(self.suffix)
        return self._match(names, rf"{stem}(\.\w+-{_SHARD}|-{_SHARD}\.\w+){suffix}")

    def _match(self, names: Iterable[str], pattern: str) -> list[str]:
        return sorted(name for name in names if re.fullmatch(pattern, name))

    def variants(self, names: Iterable[str]) -> dict[str, Form]:
        """Forms of variants by their name; an index counts before a single file."""
        stem, suffix = re.escape(self.stem), re.escape(self.suffix)
        index = re.compile(rf"{stem}{suffix}\.index\.{_VARIANT}\.json")
        single = re.compile(rf"{stem}\.{_VARIANT}{suffix}")
        pickled = self.suffix == ".bin"
        found: dict[str, Form] = {}
        for name in names:
            if match := index.fullmatch(name):
                found[match["variant"]] = Form(index=name, variant=match["variant"], pickled=pickled)
            elif match := single.fullmatch(name):
                found.setdefault(
                    match["variant"], Form(single=name, variant=match["variant"], pickled=pickled)
                )
        return found


_PICKLES = _Names("pytorch_model", ".bin")


def find_form(storage: Storage, names: Sequence[str], stem: str, allow_pickle: bool) -> Form:
    """Form in which the checkpoint `stem` lies in the folder; a model may be its only safetensors file.

    Safetensors come before pickles, and the usual names before variants. Raises CheckpointError where files are missing
    or it is not clear which is meant, UnsupportedError for weights that are not read.
    """
    usual, is_model = _Names(stem, ".safetensors"), stem == "model"
    if form := _usual(storage, names, usual):
        return form
    if is_model and "adapter_config.json" in names:
        raise is_adapter(storage)
    if not is_model:
        raise _no_weights(storage, names, usual, [])
    if form := _variant(storage, names, usual):
        return form
    candidates = [name for name in names if name.endswith(usual.suffix)]
    has_pickles = bool(_pickles(names))
    if len(candidates) == 1 and not (has_pickles and allow_pickle):
        return Form(single=candidates[0])
    if has_pickles and allow_pickle:
        return _pickled(storage, names)
    raise _no_weights(storage, names, usual, candidates)


def _usual(storage: Storage, names: Sequence[str], usual: _Names, pickled: bool = False) -> Form | None:
    if usual.index in names:
        return Form(index=usual.index, pickled=pickled)
    _check_index(storage, usual.shards(names), usual)
    return Form(single=usual.single, pickled=pickled) if usual.single in names else None


def _check_index(storage: Storage, numbered: Sequence[str], usual: _Names) -> None:
    """Raise CheckpointError if there are shards, and no index was found that lists them."""
    if numbered:
        raise CheckpointError(
            f"{storage.location}: {usual.index} is missing, and {numbered[0]} is a shard that needs it; download it as"
            " well"
        )


def _variant(storage: Storage, names: Sequence[str], usual: _Names) -> Form | None:
    variants = usual.variants(names)
    if not variants:
        _check_index(storage, usual.variant_shards(names), usual)
        return None
    if len(variants) == 1:
        return next(iter(variants.values()))
    shown = ", ".join(form.index or str(form.single) for form in variants.values())
    raise CheckpointError(
        f"{storage.location}: the weights are there in several variants ({shown}) and under no usual name, so it is not"
        f" clear which is meant; rename the one that is to {usual.index} or {usual.single}, or give a folder with one"
        " of them alone"
    )


def _pickled(storage: Storage, names: Sequence[str]) -> Form:
    form = _usual(storage, names, _PICKLES, pickled=True)
    form = form or _variant(storage, names, _PICKLES)
    assert form is not None, "no pickles are there"
    return form


def _pickles(names: Sequence[str]) -> list[str]:
    """Names of all files that may be a model's weights, whole or in part, as transformers pickled them."""
    shards = (*_PICKLES.shards(names), *_PICKLES.variant_shards(names))
    variants = [form.single or str(form.index) for form in _PICKLES.variants(names).values()]
    return [name for name in (_PICKLES.single, *shards, *variants) if name in names]


def _no_weights(
    storage: Storage, names: Sequence[str], usual: _Names, candidates: Sequence[str]
) -> Exception:
    missing = f"{storage.location}: {usual.single} is missing"
    readable = sorted(_pickles(names))
    if readable and usual.stem == "model":
        return UnsupportedError(
            f"{missing}; the weights there are pickles ({some(readable)}), which may run code when loaded: allow them"
            " with --allow-pickle, which opens them so that they can hold nothing but tensors, or convert them to"
            f" safetensors once: streamconv convert --base {storage.location} --allow-pickle -o NEW_FOLDER"
        )
    if candidates:
        return CheckpointError(
            f"{storage.location}: neither {usual.single} nor an index is there, and the model could be any of"
            f" {some(sorted(candidates))}; name the right one {usual.single}"
        )
    pickles = [name for name in sorted(names) if name.endswith(_OTHER_PICKLES)]
    others = [name for name in sorted(names) if name.endswith(_OTHER_WEIGHTS)]
    native = [name for name in pickles if name.startswith("consolidated.")]
    if native:
        return UnsupportedError(
            f"{missing}; {some(native)} {'is' if len(native) == 1 else 'are'} the model in its maker's own form (Meta,"
            " Mistral), whose names of tensors no adapter of PEFT has; give the checkpoint of transformers: the model's"
            " -hf repository on the Hub, or what transformers' convert_llama_weights_to_hf.py makes of it"
        )
    if pickles:
        return UnsupportedError(
            f"{missing}; the weights there are pickles ({some(pickles)}), which may run code when loaded and are not"
            " read; convert them to safetensors first"
        )
    if others:
        return UnsupportedError(
            f"{missing}; the weights there ({some(others)}) are in a format that is not read; give a safetensors"
            " checkpoint"
        )
    return CheckpointError(f"{storage.location}: no weights found, neither {usual.single} nor {usual.index}")


def is_adapter(storage: Storage) -> CheckpointError:
    """The error of an adapter's folder given as a base."""
    return CheckpointError(
        f"{storage.location} is an adapter (it has adapter_config.json), expected a base model;"
        " give it with --adapter, and with --base the model it was trained on"
    )
