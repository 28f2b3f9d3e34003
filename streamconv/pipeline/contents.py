"""The small files of an output that are made, not copied: index, model card, recipe, manifest, config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv.adapters.base import TaskHead
from streamconv.checkpoint.config import edit_config, language_levels
from streamconv.checkpoint.container import CONFIG
from streamconv.dtypes import BF16, DENSE, Dtype
from streamconv.formats import format_named, format_of, with_groups
from streamconv.formats.base import Json
from streamconv.formats.mixed import mixed_quantization
from streamconv.formats.mlx import config_keys
from streamconv.output.card import model_card
from streamconv.output.manifest import MANIFEST, KeptShares, manifest
from streamconv.output.publish import INDEX
from streamconv.output.published import describe, describe_file
from streamconv.output.recipe import RECIPE, write_recipe
from streamconv.output.sidecars import QUANTIZATION_COPIES, RESIDUAL_CONFIG, RESIDUAL_TENSORS
from streamconv.pipeline.passes import Passed
from streamconv.pipeline.preparation import Prepared
from streamconv.pipeline.residual import ResidualAdapter
from streamconv.planning.keeping import kept_quantization
from streamconv.planning.options import CALIBRATION_KEYWORDS, CONVERT_DEFAULTS, MERGE_DEFAULTS, keywords_of
from streamconv.planning.plan import Plan


def generated_files(
    prepared: Prepared,
    hashes: Mapping[str, str],
    kept: KeptShares | None,
    passed: Passed,
    residual: ResidualAdapter | None,
    copies: Mapping[str, Mapping[str, Any]],
) -> Mapping[str, bytes]:
    """The small files of the output, in the order they appear; `copies` describes the files that are copied."""
    plan, base = prepared.plan, prepared.base
    quantization = _quantization(prepared)
    loaded = {**prepared.written, RECIPE: _recipe(prepared)}
    if plan.container.has_config:
        loaded[CONFIG] = _config(prepared, quantization)
    if plan.quant in QUANTIZATION_COPIES:
        loaded[QUANTIZATION_COPIES[plan.quant]] = _as_json(quantization)
    told = residual.as_json() if residual else None
    if residual is not None:
        loaded[RESIDUAL_CONFIG] = residual.config
    contents = {INDEX: _index(plan), **loaded}
    if prepared.job.card:
        contents["README.md"] = model_card(
            plan, base.index, prepared.adapter_storages, prepared.small_names, kept, told
        )
    described: dict[str, Mapping[str, Any]] = {
        name: describe(name, contents[name]) for name in prepared.generated if name != MANIFEST
    }
    files = {name: entry for name, entry in described.items() if name in loaded}
    if residual is not None:
        files[RESIDUAL_TENSORS] = residual.entry
    sidecars = {name: entry for name, entry in described.items() if name not in loaded}
    sidecars |= copies
    contents[MANIFEST] = manifest(plan, hashes, kept, passed.notes, told, files, sidecars)
    return {name: contents[name] for name in prepared.generated}


def check_contents(prepared: Prepared) -> None:
    """Make the small files of all outputs once, without what the run will add, and keep none.

    They depend on fields of strangers' files, and are written when all weights are done: what cannot be made is to be
    known before the first weight is read. A card that is still on the Hub is not fetched for it. Raises what
    `generated_files` does.
    """
    storage = prepared.base.index.storage
    has_card = prepared.job.card and not storage.missing(prepared.small_files())
    for planned in (prepared, *prepared.also):
        each = replace(planned, job=replace(planned.job, card=has_card))
        rank = each.plan.residual_rank
        residual = ResidualAdapter(Path(), "", 0, b"", rank, 0, None) if rank else None
        hashes = {shard.name: "" for shard in each.plan.shards}
        # Files that are copied may still be on the Hub.
        generated_files(each, hashes, None, Passed(each.plan), residual, copies={})


def described_copies(prepared: Prepared) -> Mapping[str, Mapping[str, Any]]:
    """Entries of the manifest for files that are copied, which are read for it."""
    return {file.name: describe_file(file) for file in prepared.copied}


def _index(plan: Plan) -> bytes:
    weight_map = {
        spec.name: shard.name for shard in plan.shards for placed in shard.steps for spec in placed.step.specs
    }
    total = sum(placed.nbytes for shard in plan.shards for placed in shard.steps)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


# Options in every recipe, in its order. One that is not here follows where it is not the default: recipes of outputs
# made before there was such an option stay what they are.
_ORDER = (
    "base",
    "adapter",
    "adapter_subfolder",
    "merge_base",
    "min_kept",
    "tokenizer",
    "moe_layout",
    "quant",
    "group_size",
    "dtype",
    "rounding",
    "calibration",
    "calibration_tokens",
    "calibration_sequence_length",
    "calibration_gradient_tokens",
    "preserve_delta",
    "residual_rank",
    "rescale",
    "seed",
    "ignore",
    "max_shard_size",
    "card",
    "copy_extra",
)
# How a run goes about it shapes no output; Hub ids stand there with their commit; what else is made is made beside it;
# and permission to open pickles is for whoever runs it to give.
_NOT_IN_RECIPES = {
    *("device", "max_ram", "max_vram", "overwrite", "resume", "verify"),
    *("base_revision", "adapter_revision", "also", "allow_pickle", "part"),
}


def _recipe(prepared: Prepared) -> bytes:
    """The options that shape the output, for `--recipe`. Inputs stand in it by Hub id and commit alone.

    A folder's name would tell of this machine, and make the same model differ from folder to folder.
    """
    given = keywords_of(prepared.job)
    later = [
        name
        for name, usual in MERGE_DEFAULTS.items()
        if name not in _ORDER and name not in _NOT_IN_RECIPES and given[name] != usual
    ]
    values = {**given, **_resolved(prepared)}
    names = [
        name
        for name in (*_ORDER, *later)
        if prepared.adapter or name in CONVERT_DEFAULTS or name not in MERGE_DEFAULTS
    ]
    return (
        write_recipe({name.replace("_", "-"): values[name] for name in names if values[name] is not None})
        + "\n"
    ).encode()


def _resolved(prepared: Prepared) -> Mapping[str, Any]:
    """Options that stand in a recipe as what they came to, by keyword."""
    plan = prepared.plan
    origins, text = plan.fingerprint["from"], plan.calibration
    found = {**{name: origins[name] for name in ("base", "adapter")}, "gguf_donor": None}
    # Folders have no place in it; and of several adapters a part would be taken for all.
    commits = origins["adapter"] if isinstance(origins["adapter"], list) else [origins["adapter"]]
    if None in commits:
        found["adapter"] = found["adapter_subfolder"] = None
    if text is None:
        return {**found, **dict.fromkeys(CALIBRATION_KEYWORDS)}
    feedback = text.options
    return {
        **found,
        "min_kept": plan.min_kept,
        # By name: without the text, auto would come to another, and say nothing.
        **({"rounding": plan.rounding.name} if plan.rounding else {}),
        # The card and the manifest tell the SHA-256 of a file.
        "calibration": text.data if text.is_data_set else None,
        "calibration_tokens": text.tokens,
        "calibration_sequence_length": text.sequence_length,
        "calibration_gradient_tokens": text.gradient_tokens,
        "preserve_delta": f"{feedback.preserve_delta}" if plan.adapted and feedback else None,
        "residual_rank": plan.residual_rank or None,
        "rescale": text.equalization.name if text.equalization else None,
    }


def _config(prepared: Prepared, quantization: Json | None) -> bytes:
    plan, head = prepared.plan, prepared.plan.head
    return _as_json(
        edit_config(
            prepared.base.index.config,
            dtype=plan.dtype,
            quantization=quantization,
            untie=plan.untied,
            vocab_size=_vocabulary(head, prepared.base.index.config) or plan.vocab_size,
            end_token=prepared.end_token,
            architecture=head.architecture if head else None,
            labels=head.labels if head and not head.are_tokens else None,
            keeps_quantization=plan.keeps_quantization or _kept_quantization(prepared) is not None,
            quantization_keys=config_keys(quantization),
        )
    )


def _vocabulary(head: TaskHead | None, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Numbers of tokens before and after, where a new head's labels are tokens."""
    before = config.get("vocab_size")
    return (before, head.labels) if head and head.are_tokens and isinstance(before, int) else None


def _quantization(prepared: Prepared) -> Json | None:
    """The output's `quantization_config`; None where it is dense, the base's own stays, or files say it themselves."""
    plan = prepared.plan
    if plan.quant is None or plan.keeps_quantization or not plan.container.has_config:
        return None
    kept = _kept_quantization(prepared)
    if kept is not None:
        return kept
    dtype = _compute_dtype(prepared)
    if plan.formats:
        by_name = {key: found for key in plan.formats if (found := format_of(key)) is not None}
        formats = {name: by_name[key] for key, names in plan.formats.items() for name in names}
        return mixed_quantization(dtype, formats, plan.skipped)
    storage_format = with_groups(format_named(plan.quant), plan.group_size)
    return storage_format.quantization_config(dtype, plan.quantized, plan.skipped)


def _kept_quantization(prepared: Prepared) -> Json | None:
    """The base's `quantization_config`, where quantized weights are stored as they are there."""
    return kept_quantization(prepared.base, prepared.plan.replaced, prepared.plan.options)


def _as_json(content: Json | None) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _compute_dtype(prepared: Prepared) -> Dtype:
    """Dtype that a quantized model computes in: as the base's quantization says, else the weights' own."""
    config = prepared.base.index.config
    text = language_levels(config)[-1]
    quantization = config.get("quantization_config") or {}
    names = (
        prepared.plan.dtype,
        quantization.get("bnb_4bit_compute_dtype") if quantization.get("load_in_4bit") else None,
        config.get("dtype"),
        config.get("torch_dtype"),
        text.get("dtype"),
        text.get("torch_dtype"),
    )
    return next((DENSE[name] for name in names if name is not None and name in DENSE), BF16)
