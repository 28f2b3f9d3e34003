"""Selection of the weights that a 4- or 8-bit loader expects quantized, from names, shapes and config alone.

transformers replaces every nn.Linear that the config's skip list does not name, so that list and the file
must agree exactly: a module missing in either loads without complaint and fails in the forward pass
(`quantizers/quantizers_utils.py`, should_convert_module; `integrations/bitsandbytes.py`). Both are therefore
one decision, made by `select`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.config import language_levels
from streamconv.checkpoint.expressions import Expression
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape
from streamconv.errors import OptionError, UnsupportedError

# Names that mean themselves as regular expressions.
_PLAIN = re.compile(r"[\w.-]*")
# Output heads stay in 16 bit, as in bitsandbytes' own default. (`output` only at the root: BERT has others.)
DEFAULT_IGNORE = ("lm_head", "embed_out", "score", "re:output$")

# Last components of output heads.
HEAD_NAMES = frozenset({"lm_head", "embed_out", "output"})
_HEADS = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)|output")
# The last component of nn.Embedding modules. (`embed_out` of GPT-NeoX is a Linear; so is a matrix over patches.)
_EMBEDDING = re.compile(
    r"(?!patch_|decoder_embed$)"
    r"(?:embed_(?!out$)\w+|(?:\w+_)?(?:emb|embed|embeds|embedder|embedding|embeddings)(?:_\d+)?|\w+_table)"
    r"|wte|wpe|shared|relative_attention_bias|bias_values|audio_bos_eos_token"
)
# Families whose projections are transformers' Conv1D, stored [in, out].
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
# Subclasses of nn.Linear, which transformers leaves alone: family -> last components.
_SUBCLASSES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "deepseek_v4": re.compile(r"o_a_proj"),
        "falcon": re.compile(r"query_key_value|dense\w*"),
        "ibert": re.compile(r"query|key|value|dense"),
    }
)
# What the loader makes of these cannot be said by names and a skip list.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "nllb-moe": "its experts are modules of their own",
        "prophetnet": "a linear layer is named like an embedding",
        "switch_transformers": "its experts are modules of their own",
        "zamba": "its layers share weights",
        "zamba2": "its layers share weights",
    }
)
# Families whose head over the vocabulary is BERT's.
_PREDICTIONS = (
    "bert",
    "big_bird",
    "deberta",
    "deberta-v2",
    "ernie",
    "fnet",
    "layoutlm",
    "lxmert",
    "megatron-bert",
    "mobilebert",
    "mra",
    "nomic_bert",
    "nystromformer",
    "rembert",
    "roc_bert",
    "roformer",
    "squeezebert",
    "tapas",
    "visual_bert",
    "yoso",
)
# Heads under other names than `lm_head`. A tied head has no tensor in the file, but is a Linear once loaded.
HEAD_BY_FAMILY: Mapping[str, str] = MappingProxyType(
    {
        "albert": "predictions.decoder",
        "biogpt": "output_projection",
        "convbert": "generator_lm_head",
        "distilbert": "vocab_projector",
        "electra": "generator_lm_head",
        "flaubert": "pred_layer.proj",
        "gpt_neox": "embed_out",
        "gpt_neox_japanese": "embed_out",
        "modernbert": "decoder",
        "modernbert-decoder": "decoder",
        "trocr": "output_projection",
        "whisper": "proj_out",
        "xlm": "pred_layer.proj",
        "xlnet": "lm_loss",
    }
    | dict.fromkeys(_PREDICTIONS, "cls.predictions.decoder")
)


@dataclass(frozen=True, slots=True)
class Selection:
    """`quantized`: names of weights, in the order given; `skipped`: the skip list that goes with them."""

    quantized: tuple[str, ...]
    skipped: tuple[str, ...]


def select(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    ignore: Sequence[str],
    dense: Collection[str] = frozenset(),
    *,
    by_path: bool = False,
    has_experts: bool = False,
) -> Selection:
    """Decide which of the weights `shapes` are quantized, and what the config must say of the others.

    `shapes` are all weights of the model; `ignore` are patterns of modules, see `matches`, and `dense` are paths of
    modules: both stay in 16 bit. `by_path`: the config names them by whole paths, see `_skip_paths`. Quantized is what
    bitsandbytes would have replaced. Mixture-of-experts parameters are not: transformers 5 fuses experts into 3-D
    parameters, and its routers hold their weight themselves; but where it `has_experts`, those that are stored apart
    are, all or none. Nor is a head tied to the embedding.

    Raises UnsupportedError for a Conv1D weight that would be quantized, for a model that no skip list can describe,
    and where none can tell the two kinds apart; OptionError for a pattern that is no regular expression.
    """
    _check_patterns(ignore)
    _refuse_model(shapes, config)
    quantized = []
    left = []
    for name, shape in shapes.items():
        if not may_be_linear(name, shape, has_experts=has_experts):
            continue
        module = module_of(name)
        if module in dense or not _is_replaced(module, shapes, config) or matches(module, ignore):
            left.append(module)
        elif is_conv1d(module, config):
            raise UnsupportedError(
                f"{name} is a Conv1D, stored [in, out]; quantizing it is not supported yet:"
                " choose a 16-bit output"
            )
        else:
            quantized.append(name)
    head = next((head for family, head in HEAD_BY_FAMILY.items() if family in _families(config)), "lm_head")
    modules = [module_of(name) for name in quantized]
    if by_path:
        _check_experts(left)
        return Selection(tuple(quantized), _skip_paths(head, modules, left, shapes, config))
    if not has_experts:
        return Selection(tuple(quantized), _skip_list(head, modules, left))
    if any(is_expert(module) for module in left):
        quantized = [name for name in quantized if not is_expert(name)]
    rest = [module for module in left if not is_expert(module)]
    modules = [module_of(name) for name in quantized]
    skipped = _skip_list(head, modules, rest, inside=any(map(is_expert, shapes)))
    return Selection(tuple(quantized), (*skipped, *_places_of_experts(shapes, quantized)))


def is_expert(name: str) -> bool:
    """Whether it is a module of one expert, or a parameter of one or of all."""
    return "experts" in name.split(".")


def _places_of_experts(shapes: Mapping[str, Shape], quantized: Collection[str]) -> tuple[str, ...]:
    """Ends of the modules that hold experts left in 16 bit: vLLM asks for these, not for experts."""
    chosen = frozenset(quantized)
    left = (name.split(".") for name in shapes if is_expert(name) and name not in chosen)
    return tuple(
        dict.fromkeys(
            ".".join(path[max(0, path.index("experts") - 1) : path.index("experts") + 1]) for path in left
        )
    )


def module_of(name: str) -> str:
    """The module path of a parameter: `model.layers.0.mlp.up_proj` of `….up_proj.weight`."""
    return name.rpartition(".")[0]


def matches(module: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names the module path `module`.

    A plain pattern is a run of whole components anywhere in the path (`lm_head`, `mlp.gate`, `layers.0`); one
    after `re:` is a regular expression matched from the start. Raises OptionError for one that is none.
    """
    return any(
        _expression(pattern).fits(module) if pattern.startswith("re:") else f".{pattern}." in f".{module}."
        for pattern in patterns
    )


def may_be_linear(name: str, shape: Shape, *, has_experts: bool) -> bool:
    """Whether a weight may be an nn.Linear's: if it stays in 16 bit, the skip list had better name it.

    `has_experts`: those of experts that a file stores apart are such weights, too.
    """
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    components = module_of(name).split(".")
    last = components[-1]
    is_left_out = "experts" in components and not has_experts
    return not is_left_out and "norm" not in last and not _EMBEDDING.fullmatch(last)


def _is_replaced(module: str, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes would replace `module` if its skip list were empty."""
    parent, _, last = module.rpartition(".")
    if last == "gate" or "router" in module.split("."):
        return False
    if f"{parent}.in_proj_weight" in shapes:  # torch's own attention: out_proj is a subclass of Linear
        return False
    families = _families(config)
    if any(names.fullmatch(last) for family, names in _SUBCLASSES.items() if family in families):
        return False
    if _HEADS.fullmatch(module):
        return not any(level.get("tie_word_embeddings") for level in _levels(config))
    # An embedding under a name that is not known here still has the size of the vocabulary.
    return shapes[f"{module}.weight"][0] != language_levels(config)[-1].get("vocab_size")


def is_conv1d(module: str, config: Mapping[str, Any]) -> bool:
    """Whether `module` is GPT-2's Conv1D, whose weight is stored [in, out]."""
    return module.rpartition(".")[2] in _CONV1D and not _CONV1D_FAMILIES.isdisjoint(_families(config))


def _refuse_model(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError where the loader replaces modules that names in the file do not show."""
    families = _families(config)
    for family in sorted(families & _REFUSED.keys()):
        raise UnsupportedError(
            f"{family} models cannot be quantized yet, because {_REFUSED[family]}: choose a 16-bit output"
        )
    for name in map(str, config.get("architectures") or ()):
        is_known = families & HEAD_BY_FAMILY.keys() or any("lm_head" in weight for weight in shapes)
        if name.endswith("ForMaskedLM") and not is_known:
            raise UnsupportedError(
                f"{name} models cannot be quantized yet, because the name of their output head, which stays in 16 bit, "
                "is not known: choose a 16-bit output"
            )


def _levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config and its parts: models of text and more keep one for each (`text_config`, `decoder`)."""
    return [config, *(part for part in config.values() if isinstance(part, Mapping))]


def _families(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(str(level.get("model_type")) for level in _levels(config))


def _check_patterns(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            _expression(pattern)


def _expression(pattern: str) -> Expression:
    return Expression(pattern[3:], lambda why: OptionError(f"--ignore {pattern[:200]} {why}"))


def _skip_list(
    head: str, quantized: Collection[str], left: Sequence[str], *, inside: bool = False
) -> tuple[str, ...]:
    """Entries that every loader reads as naming `head`, unless it is quantized, all of `left`, and nothing else.

    Short where it can be: a last component (`lm_head`, `gate`) that means no quantized module, else the path. `inside`:
    a loader takes an entry for every module whose path has it in it, be it part of a component.
    """
    entries = {} if head in quantized else {head: None}
    _check_names(left)
    names = {module: module.rpartition(".")[2] for module in left}
    unclear = {
        last
        for last in set(names.values())
        if any(means(last, other) or (inside and last in other) for other in quantized)
    }
    entries |= {module if last in unclear else last: None for module, last in names.items()}
    if "embed_out" in entries:
        entries["lm_head"] = None  # GPT-NeoX: the name in files, and what transformers 5 calls it once loaded
    for entry in entries:
        for module in quantized:
            if means(entry, module):
                raise UnsupportedError(
                    f"{entry} must stay in 16 bit, but loaders would take that name for {module} too;"
                    f" quantize both or neither: --ignore {module}"
                )
    return tuple(entries)


def _check_names(modules: Sequence[str]) -> None:
    """Raise UnsupportedError for a module whose name loaders would take for another expression than itself."""
    unsafe = next((module for module in modules if not _PLAIN.fullmatch(module)), None)
    if unsafe is not None:
        raise UnsupportedError(
            f"{shown(unsafe)} would stay in 16 bit, and loaders read the names of such modules as regular expressions, "
            "which this one would not mean: choose a 16-bit output, or name the module in letters, digits, _ and -"
        )


def _check_experts(left: Sequence[str]) -> None:
    """Raise UnsupportedError if an expert that is stored apart stays in 16 bit.

    transformers fuses experts as it loads them, and of packed checkpoints it takes packed ones only
    (`integrations/compressed_tensors.py`, CompressedTensorsDequantize).
    """
    expert = next((module for module in left if is_expert(module)), None)
    if expert is not None:
        raise UnsupportedError(
            f"{expert} would stay in 16 bit, and loaders open such a checkpoint only if all experts are packed; choose "
            "a smaller --group-size if its rows are no whole groups, leave it out of --ignore, or choose another format"
        )


def _skip_paths(
    head: str,
    quantized: Collection[str],
    left: Sequence[str],
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
) -> tuple[str, ...]:
    """Entries that compressed-tensors and vLLM read as naming `head`, unless it is quantized, and all of `left`.

    A plain entry is a whole path, one after `re:` a regular expression from the start (`utils/match.py`). A model of
    more than text is loaded under other paths than its file has, with the same ends: there an end that means no
    quantized module stands for the path. Experts that the file has fused, which vLLM takes for modules, by one.
    """
    entries = {} if head in quantized else {head: None}
    ends = {module: module.rpartition(".")[2] for module in left}
    unclear = {end for end in ends.values() if any(other.rpartition(".")[2] == end for other in quantized)}
    is_renamed = any("model_type" in level for level in _levels(config)[1:])
    for module, end in ends.items():
        is_whole = not is_renamed or end in unclear
        entries[module if is_whole else rf"re:(?:.*\.)?{re.escape(end)}$"] = None
    packed = frozenset(quantized)
    if any(is_expert(name) and module_of(name) not in packed for name in shapes):
        entries[r"re:.*\.experts\..*"] = None
    if "embed_out" in entries:
        entries["lm_head"] = None
    return tuple(entries)


def means(entry: str, module: str) -> bool:
    """Whether transformers or vLLM takes `entry` of a skip list to mean `module`.

    transformers: a regular expression from the start to the end of a component, or a plain ending; vLLM: one
    component, or leading components.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return (
        re.match(rf"(?:{entry}){boundary}", module) is not None
        or module.endswith(entry)
        or entry in module.split(".")
        or module.startswith(f"{entry}.")
    )
