"""The model card: what was merged into what, how, and how to load it; metadata by huggingface_hub.

Nothing local goes into it: no path, no time, no user name. What the base's own card says of licence and language
is inherited, since that is what readers look for first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamconv.plan import Plan
from streamconv.report.result import Kept
from streamconv.sizes import format_size
from streamconv.storage.base import Origin, Storage

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_MAX_CARD_BYTES = 2 * 10**6
_MAX_HEAD_BYTES = 64 * 2**10
_MAX_NAMES = 1000


def model_card(plan: Plan, base: Storage, adapter: Storage | None, kept: Kept | None) -> bytes:
    """README.md of the output."""
    origins = [storage.origin for storage in (base, adapter) if storage is not None]
    base_models = [origin.repo for origin in origins if origin is not None]
    tags = ["streamconv", *(["merge", "lora"] if adapter else [])]
    if plan.quant:
        tags += ["4-bit", "bitsandbytes"]
    data = ModelCardData(
        base_model=base_models or None,
        library_name="transformers",
        tags=tags,
        base_model_relation=("quantized" if plan.quant else "finetune") if base_models else None,
        **_inherited(base),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(plan, base.origin, adapter, kept)}"
    return str(ModelCard(text, ignore_metadata_errors=True)).encode()


def _inherited(base: Storage) -> Mapping[str, Any]:
    """Metadata of the base's card, where there is one that can be read."""
    if "README.md" not in base.names():
        return {}
    text = base.read_bytes("README.md", _MAX_CARD_BYTES).decode(errors="replace")
    if not text.startswith("---") or "\n---" not in text[3:_MAX_HEAD_BYTES]:
        return {}
    try:
        found = dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())  # type: ignore[no-untyped-call]
    except Exception:  # a stranger's README may hold anything, and the YAML parser has errors of its own
        return {}
    return {key: found[key] for key in _INHERITED if _is_plain(found.get(key))}


def _is_plain(value: object) -> bool:
    """A name or a list of names, as the Hub has them; what else YAML allows can grow without limit when written."""
    items = value if isinstance(value, list) else [value]
    return len(items) <= _MAX_NAMES and all(isinstance(item, str) and item for item in items)


def _body(plan: Plan, base: Origin | None, adapter: Storage | None, kept: Kept | None) -> str:
    merged = adapter is not None
    title = "Merged model" if merged else "Converted model"
    lines = [f"# {title}", ""]
    if merged:
        adapted = sum(plan.adapted.values())
        lines.append(
            f"A LoRA adapter on {adapted} modules ({', '.join(sorted(plan.adapted))}) was merged into its base model."
        )
    lines += [
        f"Made with streamconv {plan.fingerprint['streamconv']}; `streamconv verify` checks it against its manifest.",
        "",
        "| | |",
        "|---|---|",
        f"| weights | {plan.quant or plan.dtype or 'dtype of the base'}, {format_size(plan.size)} |",
    ]
    for role, origin in (("base", base), ("adapter", adapter.origin if adapter else None)):
        if origin is not None:
            lines.append(f"| {role} | {origin.repo} at commit {origin.commit} |")
    if merged:
        lines.append(f"| target | {plan.target.reason} |")
    if plan.rounding:
        lines.append(f"| rounding | {plan.rounding.name}: {plan.rounding.reason} |")
    if plan.skipped:
        lines.append(f"| left in 16 bit | {_some(plan.skipped)} |")
    if kept:
        lines.append(f"| share of the update kept by quantization | {kept.total:.3f} |")
    if plan.untied:
        lines.append("| embeddings | input and output embeddings differ and are stored apart |")
    return "\n".join([*lines, "", "## Load it", "", *_snippet(plan), ""])


def _snippet(plan: Plan) -> list[str]:
    needs = "transformers, accelerate and bitsandbytes" if plan.quant else "transformers"
    return [
        f"Needs {needs}. With this folder as the working directory:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]


def _some(names: tuple[str, ...]) -> str:
    rest = len(names) - 6
    return ", ".join(names[:6]) + (f" and {rest} more" if rest > 0 else "")
