"""The small files of an output that are made, not copied: index, model card, recipe, manifest, config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping

from streamconv.checkpoint.config import edit_config
from streamconv.dtypes import BF16, DENSE, Dtype
from streamconv.formats import FORMATS, with_groups
from streamconv.formats.base import Json
from streamconv.output.card import model_card
from streamconv.output.manifest import MANIFEST, Kept, manifest
from streamconv.output.publish import CONFIG, INDEX
from streamconv.output.recipe import RECIPE, Scalar, write_recipe
from streamconv.output.sidecars import QUANTIZATION_COPIES, RESIDUAL_CONFIG, RESIDUAL_TENSORS
from streamconv.pipeline.passes import Passed, calibrate, equalize
from streamconv.pipeline.preparation import Prepared
from streamconv.pipeline.residual import ResidualAdapter
from streamconv.planning.plan import Plan
from streamconv.sizes import exact_size


def generated_files(
    prepared: Prepared,
    hashes: Mapping[str, str],
    kept: Kept | None,
    passed: Passed,
    residual: ResidualAdapter | None,
) -> Mapping[str, bytes]:
    """The small files of the output, in the order they appear."""
    plan, base = prepared.plan, prepared.base
    quantization = _quantization(prepared)
    loaded = {RECIPE: _recipe(prepared), CONFIG: _config(prepared, quantization)}
    if plan.quant in QUANTIZATION_COPIES:
        loaded[QUANTIZATION_COPIES[plan.quant]] = _as_json(quantization)
    told = None
    if residual is not None:
        loaded[RESIDUAL_CONFIG] = residual.config
        told = residual.as_json()
    large = {RESIDUAL_TENSORS: residual.entry} if residual else {}
    calibrated, rescaled = passed.notes(calibrate.NAME), passed.notes(equalize.NAME)
    written = manifest(plan, hashes, kept, calibrated, rescaled, told, loaded, large)
    contents = {INDEX: _index(plan), MANIFEST: written, **loaded}
    if prepared.job.card:
        contents["README.md"] = model_card(
            plan, base.index, prepared.adapter_storage, prepared.copied, kept, told
        )
    return {name: contents[name] for name in prepared.generated}


def _index(plan: Plan) -> bytes:
    weight_map = {
        spec.name: shard.name for shard in plan.shards for placed in shard.steps for spec in placed.step.specs
    }
    total = sum(placed.nbytes for shard in plan.shards for placed in shard.steps)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _recipe(prepared: Prepared) -> bytes:
    """The options that shape the output, for `--recipe`. Inputs stand in it by Hub id and commit alone.

    A folder's name would tell of this machine, and make the same model differ from folder to folder. Permission to
    open pickles is for whoever runs it to give.
    """
    job, options, plan = prepared.job, prepared.job.options, prepared.plan
    origins = plan.fingerprint["from"]
    is_calibrated = plan.calibration is not None
    of_merge = {
        "adapter": origins["adapter"],
        "adapter-subfolder": job.adapter_subfolder if origins["adapter"] else None,
        "merge-base": options.merge_base,
        "min-kept": plan.min_kept if is_calibrated else options.min_kept,
        "tokenizer": job.tokenizer,
        "moe-layout": options.moe_layout,
    }
    values = {
        "base": origins["base"],
        **(of_merge if prepared.adapter else {}),
        "quant": options.quant,
        "group-size": options.group_size,
        "dtype": options.dtype,
        # By name: without the text, auto would come to another, and say nothing.
        "rounding": plan.rounding.name if is_calibrated and plan.rounding else options.rounding,
        **_calibration(plan),
        "seed": options.seed,
        "ignore": list(options.ignore),
        "max-shard-size": exact_size(options.max_shard_bytes) if options.max_shard_bytes else None,
        "card": job.card,
        "copy-extra": list(job.copy_extra),
    }
    return (write_recipe({key: value for key, value in values.items() if value is not None}) + "\n").encode()


def _calibration(plan: Plan) -> Mapping[str, Scalar]:
    """The options of a calibration but its text, if that is a file: the card and the manifest tell its SHA-256."""
    text = plan.calibration
    if text is None:
        return {}
    feedback = text.options
    return {
        "calibration": text.data if text.is_data_set else None,
        "calibration-tokens": text.tokens,
        "calibration-sequence-length": text.sequence_length,
        "calibration-gradient-tokens": text.gradient_tokens,
        **({"preserve-delta": f"{feedback.preserve_delta}"} if plan.adapted and feedback else {}),
        "residual-rank": plan.residual_rank or None,
        "rescale": text.equalization.name if text.equalization else None,
    }


def _config(prepared: Prepared, quantization: Json | None) -> bytes:
    plan = prepared.plan
    return _as_json(
        edit_config(
            prepared.base.index.config,
            dtype=plan.dtype,
            quantization=quantization,
            untie=plan.untied,
            vocab_size=plan.vocab_size,
        )
    )


def _quantization(prepared: Prepared) -> Json | None:
    """The output's `quantization_config`; None where it is dense."""
    plan = prepared.plan
    if plan.quant is None:
        return None
    storage_format = with_groups(FORMATS[plan.quant], plan.group_size)
    return storage_format.quantization_config(_compute_dtype(prepared), plan.quantized, plan.skipped)


def _as_json(content: Json | None) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _compute_dtype(prepared: Prepared) -> Dtype:
    """What a quantized model computes in: as the base's quantization says, else the weights' own dtype."""
    config = prepared.base.index.config
    text = config.get("text_config") or {}
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
