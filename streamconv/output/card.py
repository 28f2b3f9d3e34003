"""The model card: what was merged into what, how, and how to load it; metadata by huggingface_hub.

Nothing local goes into it: no path, no time, no user name. What the base's own card says of licence and language
is inherited, since that is what readers look for first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.strict_json import some
from streamconv.escapes import is_class_name, markdown_text
from streamconv.formats import compressed, format_named
from streamconv.formats.base import Format
from streamconv.formats.linear import is_expert
from streamconv.output.manifest import POOR, KeptShares
from streamconv.output.recipe import RECIPE
from streamconv.output.sidecars import RESIDUAL
from streamconv.planning.experts import opens_in_transformers, servers_of
from streamconv.planning.plan import CalibrationPlan, Plan
from streamconv.sizes import format_size
from streamconv.storage.base import Origin, Storage

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_MAX_CARD_BYTES = 2 * 10**6
_MAX_HEAD_BYTES = 64 * 2**10
_MAX_NAMES = 1000
_MAX_NAME = 1000
_MLX_LM = "mlx-lm"
_ADAPTER, _MAX_CONFIG_BYTES = "adapter_config.json", 2**20
_OWNED_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
_CHAT = (
    "",
    'messages = [{"role": "user", "content": "Hello"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ").to(model.device)",
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
)
_HUB_ID = re.compile(r"([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+")
_AUTO = re.compile(r"AutoModel(For[A-Za-z0-9]+)?")


def model_card(
    plan: Plan,
    base: CheckpointIndex,
    adapters: Sequence[Storage],
    names: Sequence[str],
    kept: KeptShares | None,
    residual: Mapping[str, Any] | None,
) -> bytes:
    """README.md of the output; `names` are those of the files beside the weights, `residual` as in Report."""
    origins = {"base": base.storage.origin}
    for number, adapter in enumerate(adapters, 1):
        origins["adapter" if len(adapters) == 1 else f"adapter {number}"] = adapter.origin
    repos = [origin.repo for origin in origins.values() if origin is not None]
    # Of a cache's folder, it may be anything.
    base_models = [repo for repo in repos if _HUB_ID.fullmatch(repo)]
    if base.storage.origin is None and (named := _named_base(adapters)) is not None:
        base_models.insert(0, named)
    tags = ["streamconv", *(["merge", *_methods(plan)] if plan.method else [])]
    quant = format_named(plan.quant) if plan.quant else None
    library = _library(plan, quant, base.config) if quant is not None else None
    if quant is not None and library is not None:
        tags += ["4-bit" if quant.bits_per_weight < 8 else "8-bit", library]
    data = ModelCardData(
        base_model=base_models or None,
        library_name=_hub_library(plan, quant),
        tags=tags,
        base_model_relation=("quantized" if plan.quant else "finetune") if base_models else None,
        **_inherited(base.storage),
    )
    has_tokenizer = any(name.startswith("tokenizer") for name in names)
    has_chat = "chat_template.jinja" in names
    body = [
        f"# {_title(plan, base_models)}",
        "",
        *_body(plan, origins, kept, residual),
        "## Load it",
        "",
        *_snippet(plan, base.config, has_tokenizer, has_chat),
        "",
        *(_residual_snippet() if residual else ()),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body)
    return str(ModelCard(text, ignore_metadata_errors=True)).encode()


def _named_base(adapters: Sequence[Storage]) -> str | None:
    """Hub id of the base that the one adapter says it was trained on; None where it names none."""
    if len(adapters) != 1 or _ADAPTER not in adapters[0].names():
        return None
    try:
        found = json.loads(adapters[0].read_bytes(_ADAPTER, _MAX_CONFIG_BYTES))
        named = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None
    is_id = isinstance(named, str) and _OWNED_ID.fullmatch(named) is not None
    return named if is_id else None


def _title(plan: Plan, base_models: Sequence[str]) -> str:
    """Name of the base, where the Hub has it, and what was done."""
    if not base_models:
        return "Merged model" if plan.method else "Converted model"
    name = base_models[0].rpartition("/")[2]
    done = (
        f"with {_article(plan.method).lower()} {plan.method} adapter merged in"
        if plan.method
        else "converted"
    )
    return markdown_text(f"{name}, {done}" + (f", {plan.quant}" if plan.quant else ""))


def _inherited(base: Storage) -> Mapping[str, Any]:
    """Metadata of the base's card, where there is one that can be read."""
    if "README.md" not in base.names():
        return {}
    text = base.read_bytes("README.md", _MAX_CARD_BYTES).decode(errors="replace")
    if not text.startswith("---") or "\n---" not in text[3:_MAX_HEAD_BYTES]:
        return {}
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data
        found = dict(data.to_dict())  # type: ignore[no-untyped-call]  # huggingface_hub leaves it without types
    except MemoryError:
        raise
    except Exception:  # a stranger's README may hold anything, and the YAML parser has errors of its own
        return {}
    return {key: found[key] for key in _INHERITED if _is_plain(found.get(key))}


def _is_plain(value: object) -> bool:
    """A name or a list of names, as the Hub has them; what else YAML allows can grow without limit when written."""
    items = value if isinstance(value, list) else [value]
    return len(items) <= _MAX_NAMES and all(
        isinstance(item, str) and item.isprintable() and 0 < len(item) <= _MAX_NAME for item in items
    )


def _body(
    plan: Plan,
    origins: Mapping[str, Origin | None],
    kept: KeptShares | None,
    residual: Mapping[str, Any] | None,
) -> Iterator[str]:
    if len(plan.members) > 1:
        yield f"{len(plan.members)} adapters ({plan.method}) that {_changes(plan)} were merged into their base model."
    elif plan.method:
        yield f"{_article(plan.method)} {plan.method} adapter that {_changes(plan)} was merged into its base model."
    yield (
        f"Made with streamconv {plan.fingerprint['streamconv']} by the options in `{RECIPE}`; `streamconv verify` "
        "checks it against its manifest."
    )
    yield from ("", "| | |", "|---|---|")
    yield f"| weights | {plan.stored_as}, {format_size(plan.size)} |"
    for role, origin in origins.items():
        if origin is not None:
            yield f"| {role} | {markdown_text(origin.repo)} at commit {markdown_text(origin.commit)} |"
    if plan.method:
        yield f"| target | {markdown_text(plan.target.reason)} |"
    if plan.rounding:
        yield f"| rounding | {plan.rounding.name}: {markdown_text(plan.rounding.reason)} |"
    if plan.calibration:
        yield from _calibration(plan, plan.calibration)
    if plan.skipped:
        yield f"| left in 16 bit | {markdown_text(some(plan.skipped, 6))} |"
    if kept:
        yield f"| kept | {kept.total:.1%} of the fine-tune survived the rounding to {plan.quant}{_loss(kept)} |"
    if residual:
        yield (
            f"| residual adapter | rank {residual['rank']}, {format_size(residual['bytes'])} in `{RESIDUAL}`; it takes "
            f"away {residual['removed'] or 0:.1%} of the error of these codes, by the calibration text |"
        )
    yield from _differences(plan)
    yield ""


def _loss(kept: KeptShares) -> str:
    return "; **most of it is lost: do not use this model as the fine-tune**" if kept.total < POOR else ""


def _differences(plan: Plan) -> Iterator[str]:
    """Rows on where the output is not as the base, or the adapter not as trained."""
    if plan.depth:
        yield f"| depth | {plan.depth} |"
    for note in plan.notes:  # tokens such as <|im_end|> stand in it
        yield f"| note | {markdown_text(note)} |"
    if plan.untied:
        yield "| embeddings | input and output embeddings differ and are stored apart |"


def _calibration(plan: Plan, text: CalibrationPlan) -> Iterator[str]:
    if text.equalization:
        pairs = len(text.equalization.pairs)
        yield (
            f"| rescaling | {text.equalization.name}, {pairs} pairs of weights by the calibration text; no adapter of "
            "another model fits this one |"
        )
    what = f"{len(plan.calibrated)} weights" if text.options else "scales alone"
    yield (
        f"| calibration text | {markdown_text(text.name)} (SHA-256 {text.sha256}), {text.tokens} tokens in "
        f"sequences of {text.sequence_length}; {what} |"
    )


def _article(name: str) -> str:
    """Article before the name of a method, whose capitals are spelled: an IA3, an OFT, a LoRA."""
    return "An" if name[0] in "AEIO" else "A"


def _methods(plan: Plan) -> Sequence[str]:
    """Methods of the adapters as tags, each once."""
    return list(dict.fromkeys(each.label.lower() for each in plan.members)) or [str(plan.method).lower()]


def _changes(plan: Plan) -> str:
    changes, singular = [], "" if len(plan.members) > 1 else "s"
    if plan.adapted:
        modules = ", ".join(sorted(plan.adapted))
        changes.append(f"update{singular} {sum(plan.adapted.values())} modules ({modules})")
    if plan.replaced:
        changes.append(f"replace{singular} {some(plan.replaced, 6)}")
    return markdown_text(" and ".join(changes))


def _hub_library(plan: Plan, quant: Format | None) -> str:
    """Name by which the Hub shows how a model is loaded."""
    if not plan.container.has_config:
        return "gguf"
    return "mlx" if quant is not None and quant.loaders == _MLX_LM else "transformers"


def _kept_method(plan: Plan, config: Mapping[str, Any]) -> str | None:
    """`quant_method` of the base, where the output has its settings."""
    settings = config.get("quantization_config")
    return settings.get("quant_method") if plan.keeps_quantization and isinstance(settings, dict) else None


def _library(plan: Plan, quant: Format, config: Mapping[str, Any]) -> str | None:
    """The library that transformers loads it by; none for layouts of others that a format of compressed-tensors has."""
    is_of_others = quant.library == compressed.METHOD and _kept_method(plan, config) not in (
        None,
        quant.library,
    )
    return None if is_of_others else quant.library


def _snippet(plan: Plan, config: Mapping[str, Any], has_tokenizer: bool, has_chat: bool) -> Iterator[str]:
    """Lines that load the output with transformers, or llama.cpp where that opens it, run in its folder."""
    if not plan.container.has_config:
        yield from ("With llama.cpp, in this folder:", "", "```", f"llama-cli -m {plan.completes}", "```")
        return
    quant = format_named(plan.quant) if plan.quant else None
    if quant is not None and quant.loaders == _MLX_LM:
        yield from (
            "With mlx-lm, in this folder:",
            "",
            "```",
            'mlx_lm.generate --model . --prompt "Hello"',
            "```",
        )
        return
    if _kept_method(plan, config) == "modelopt":
        yield "Its weights are stored as its base's, by ModelOpt: for vLLM, SGLang and TensorRT-LLM."
        return
    loader = _loader(config) if plan.head is None else _class_name(plan.head.architecture)
    names = [loader, *(["AutoTokenizer"] if has_tokenizer else [])]
    trust = ", trust_remote_code=True" if config.get("auto_map") else ""
    has_experts = any(map(is_expert, plan.quantized))
    if quant is not None and has_experts and not opens_in_transformers(quant, config):
        yield f"Its experts are quantized, so that it is for {' and '.join(servers_of(quant))}; not for transformers."
        return
    library = _library(plan, quant, config) if quant else None
    needs = f"transformers, accelerate and {library}" if library else "transformers"
    yield f"Needs {needs}. With this folder as the working directory:"
    yield from ("", "```python", f"from transformers import {', '.join(sorted(names))}", "")
    yield f'model = {loader}.from_pretrained(".", dtype="auto"{trust})'
    if has_tokenizer:
        yield f'tokenizer = AutoTokenizer.from_pretrained("."{trust})'
    if has_tokenizer and has_chat and loader == "AutoModelForCausalLM":
        yield from _CHAT
    yield "```"
    if quant is not None and "vLLM" in quant.loaders:
        yield from ("", "Or with vLLM, in this folder: `vllm serve .`")


def _residual_snippet() -> Iterator[str]:
    """Lines that put the residual adapter on top."""
    yield "With the residual adapter, which repairs part of what rounding changed; needs peft, too:"
    yield from ("", "```python", "from peft import PeftModel", "")
    yield f'model = PeftModel.from_pretrained(model, "{RESIDUAL}")'
    yield from ("```", "")


def _loader(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads the model: of another class, its head would be new and random."""
    architectures, own = config.get("architectures"), config.get("auto_map")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    is_causal = isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel"))
    if not isinstance(own, dict) or not own:
        return "AutoModelForCausalLM" if is_causal else _class_name(name)
    if is_causal or "AutoModelForCausalLM" in own:
        return "AutoModelForCausalLM"
    return next(
        (auto for auto in own if _AUTO.fullmatch(auto)), "AutoModel"
    )  # transformers has no such class


def _class_name(name: object) -> str:
    """A class to import: whatever else stands in a config would be code that readers paste."""
    return str(name) if is_class_name(name) else "AutoModel"
