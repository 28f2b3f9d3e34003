"""Adapters in forms that are not read, and the program that makes PEFT's of them.

They are told by names of files; a file of an image model's adapter, which has no config, by the names of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.header import read_header
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.storage.base import Storage

_PEFT = "adapter_model"
# Folders in which these programs put the shards of a checkpoint, beside files that tell less.
_FOLDERS = ("weights", "model_weights", "pytorch_model_fsdp_0")


@dataclass(frozen=True, slots=True)
class Foreign:
    """A form of adapters: `what` it is, told by a file whose name matches `file`, and the way out of it."""

    what: str
    file: re.Pattern[str]
    way: str


# The first that matches is named, so those with the most telling names come first.
FOREIGN: Sequence[Foreign] = (
    Foreign(
        "a checkpoint of NeMo 2",
        re.compile(r"weights/(.*\.distcp|metadata\.json)"),
        'export the adapter with llm.export_ckpt(path=..., target="hf-peft", output_path=...) of nemo.collections',
    ),
    Foreign(
        "an archive of NeMo",
        re.compile(r".+\.nemo|model_weights\.ckpt|model_weights/.+"),
        "merge it with NeMo's scripts/nlp_language_modeling/merge_lora_weights/merge.py and convert the model with its"
        " scripts/checkpoint_converters",
    ),
    Foreign(
        "a checkpoint of Megatron",
        re.compile(r"latest_checkpointed_iteration\.txt|latest_train_state\.pt|run_config\.yaml|common\.pt"),
        "export the adapter in PEFT's form: with examples/conversion/adapter/export_adapter.py of Megatron Bridge, or"
        " of ms-swift with megatron export --to_hf true --merge_lora false",
    ),
    Foreign(
        "a checkpoint of DeepSpeed ZeRO, whose ranks hold parts of each tensor",
        re.compile(r"zero_to_fp32\.py|.*zero_pp_rank_.*|bf16_zero_.*"),
        "put them together with python zero_to_fp32.py . OUT in that folder, load OUT's tensors into the PEFT model of"
        " the training script, and save it with save_pretrained",
    ),
    Foreign(
        "a sharded checkpoint of PyTorch (FSDP), whose ranks hold parts of each tensor",
        re.compile(r"(pytorch_model_fsdp_0/)?__\d+_\d+\.distcp|pytorch_model_fsdp_0/.*"),
        "put them together with accelerate merge-weights SHARDS OUT, load OUT's tensors into the PEFT model of the"
        " training script, and save it with save_pretrained; the trainer saves it whole with FULL_STATE_DICT",
    ),
    Foreign(
        "a checkpoint of torchtune",
        re.compile(r"adapter_\d+\.pt|adapter\.pt"),
        "torchtune writes PEFT's adapter_config.json and adapter_model.safetensors beside it for the models that it can"
        " convert: give their folder (epoch_N); or convert the tensors with tune_to_peft_adapter_weights of"
        " torchtune.models.convert_weights",
    ),
    Foreign(
        "a LoRA of LitGPT",
        re.compile(r"lit_model\.pth\.lora"),
        "merge it with litgpt merge_lora, and convert the model with litgpt convert_from_litgpt",
    ),
    Foreign(
        "a checkpoint of PyTorch Lightning",
        re.compile(r".+\.ckpt"),
        "load it with the load_from_checkpoint of its class, and save the PEFT model in it with save_pretrained",
    ),
    Foreign(
        "an adapter of an image model (diffusers)",
        re.compile(r"pytorch_lora_weights\.(safetensors|bin)"),
        "fuse it with load_lora_weights and fuse_lora of its diffusers pipeline",
    ),
)

_IMAGE_KEYS = re.compile(r"(lora_(unet|te\d?)_|lycoris_|(unet|transformer|text_encoder)\.).+")


def refuse_unread(storage: Storage) -> None:
    """Raise UnsupportedError if there is no adapter of PEFT, but one in a form that is not read."""
    names = storage.names()
    if any(name.startswith(_PEFT) for name in names):
        return
    files = (*names, *(name for folder in _FOLDERS for name in storage.names(folder)))
    for foreign in FOREIGN:
        found = next((name for name in files if foreign.file.fullmatch(name)), None)
        if found is not None:
            raise UnsupportedError(
                f"{storage.location} is {foreign.what}, as {found} shows, which is not read: {foreign.way}"
            )
    _refuse_image_model(storage, names)


def _refuse_image_model(storage: Storage, names: Iterable[str]) -> None:
    """Raise UnsupportedError where the one safetensors file is an adapter of kohya's scripts or of LyCORIS."""
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) != 1:
        return
    try:
        tensors = read_header(storage.file(files[0]), storage.read_start).tensors
    except CheckpointError:
        return  # what is wrong with it is not what is said here
    if tensors and _IMAGE_KEYS.match(tensors[0].name):
        raise UnsupportedError(
            f"{storage.location}: {files[0]} is an adapter of an image model (kohya's scripts, LyCORIS or diffusers),"
            f" as its tensor {tensors[0].name} shows; streamconv merges into models of transformers: fuse it with"
            " load_lora_weights and fuse_lora of its diffusers pipeline"
        )
