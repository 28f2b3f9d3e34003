"""The outputs that are compared: formats, roundings, targets, adapters, and everything a run can be asked for.

To add one, write a `Case`. A test holds that every format, rounding, target, rescaling and adapter method has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

FAQ_TEXT = "kjv.calibration.txt"
Way = Literal["call", "command line", "killed", "without numba"]

# As in the registries of the project; written out, because they have to fit the tree of REV, too.
DENSE = ("float32", "float16", "bfloat16")
PACKED = (
    *("w4a16", "w8a16", "w8a8", "gptq", "gptq-v2", "gptq-asym", "awq", "awq-asym", "fp8", "fp8-block"),
    *("mlx4", "mlx8", "nvfp4a16", "mxfp4a16", "mxfp4"),
)
# Those that are written with a text alone.
MEASURED = ("nvfp4",)
QUANTIZED = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", *PACKED)
# In GGUF files: of those in one type all are rounded by the same code, each with that type's kernels.
GGUF = (
    *("gguf:f16", "gguf:bf16", "gguf:q8_0", "gguf:q4_0", "gguf:q4_1", "gguf:q5_0", "gguf:q5_1"),
    *("gguf:q4_k", "gguf:q5_k", "gguf:q6_k", "gguf:q4_k_s", "gguf:q4_k_m", "gguf:q5_k_s", "gguf:q5_k_m"),
)
ROUNDINGS = ("nearest", "stochastic", "search", "adaptive")
MERGE_BASES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
CALIBRATED = ("nf4", "nf4-dq", "fp4", "fp4-dq", *PACKED)


@dataclass(frozen=True, slots=True)
class Case:
    """One output: a merge, or without adapter a conversion, and how it is started.

    `method` is the `peft_type` of the adapter: a REV that has no such method yet is expected to say so. `refused` names
    the exception where both trees are expected to refuse. `base`, `adapter` and the options `calibration` are below the
    folder of inputs.
    """

    name: str
    base: str
    adapter: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    way: Way = "call"
    refused: str | None = None
    method: str = "LORA"

    def job(self) -> dict[str, Any]:
        """Plain data for the worker; paths are seen from the folder of outputs."""
        options = {"device": "cpu", **self.options}
        if "calibration" in options:
            options["calibration"] = f"../inputs/{options['calibration']}"
        return asdict(self) | {
            "base": f"../inputs/bases/{self.base}",
            "adapter": f"../inputs/adapters/{self.adapter}" if self.adapter else None,
            "options": options,
        }


def select(cases: Sequence[Case], only: Sequence[str], skip: Sequence[str]) -> list[Case]:
    """Cases whose name fits a pattern of `only`, if there are any, and none of `skip`."""
    return [
        case
        for case in cases
        if (not only or any(fnmatchcase(case.name, pattern) for pattern in only))
        and not any(fnmatchcase(case.name, pattern) for pattern in skip)
    ]


def quantized_bases() -> list[Case]:
    """Conversions with which the tree of REV makes the quantized bases, given to both trees."""
    plain = [Case(f"llama-{quant}", "llama", options={"quant": quant}) for quant in QUANTIZED]
    nearest = {"rounding": "nearest"} | _text()
    measured = [Case(f"llama-{quant}", "llama", options={"quant": quant} | nearest) for quant in MEASURED]
    file = Case("faq-9m-gguf:q4_k_m", "faq-9m", options={"quant": "gguf:q4_k_m"})
    return [*plain, *measured, file]


def _text(tokens: int = 512, gradients: int = 0, **options: Any) -> dict[str, Any]:
    return {
        "calibration": "text.txt",
        "calibration_tokens": tokens,
        "calibration_sequence_length": 64,
        "calibration_gradient_tokens": gradients,
        **options,
    }


def _formats() -> list[Case]:
    """Every format by every rounding, for an update of the original base."""
    cases = [Case(f"dense {quant}", "llama", "lora", {"quant": quant}) for quant in DENSE]
    cases += [Case(quant, "faq-9m", "faq-kjv-light", {"quant": quant}) for quant in GGUF]
    cases += [
        Case(
            f"{quant}, {rounding}",
            "faq-9m",
            "faq-kjv-light",
            {"quant": quant, "rounding": rounding, "seed": 3},
        )
        for quant in ("gguf:q8_0", "gguf:q4_k", "gguf:q6_k")
        for rounding in ROUNDINGS
    ]
    cases += [
        Case(f"{quant}, {rounding}", "llama", "lora", {"quant": quant, "rounding": rounding, "seed": 3})
        for quant in QUANTIZED
        for rounding in ROUNDINGS
    ]
    cases += [
        Case(f"{quant}, feedback", "llama", "lora", {"quant": quant, "rounding": "feedback"} | _text())
        for quant in (*CALIBRATED, *MEASURED)
    ]
    cases += [
        Case(f"{quant}, {rounding}", "llama", "lora", {"quant": quant, "rounding": rounding} | _text())
        for quant in MEASURED
        for rounding in ROUNDINGS
    ]
    return cases


def _targets() -> list[Case]:
    """Updates of a base rounded as in training, in its own format and in another; and of quantized bases."""
    pairs = [(quant, quant) for quant in MERGE_BASES]
    pairs += [("nf4-dq", "w4a16"), ("nf4", "nf4-dq"), ("int8", "nf4"), ("fp4", "int8"), ("nf4-dq", "none")]
    cases = [
        Case(f"T {merge_base} in {quant}", "llama", "lora", {"quant": quant, "merge_base": merge_base, "min_kept": 0})
        for merge_base, quant in pairs
    ]  # fmt: skip
    own = {"quant": "nf4-dq", "merge_base": "nf4-dq"}
    cases += [
        Case(f"T nf4-dq in nf4-dq, {rounding}", "llama", "lora", own | {"rounding": rounding})
        for rounding in ROUNDINGS
    ]
    cases += [
        Case(f"base {quant}, kept", f"llama-{quant}", "lora", {"quant": "keep", "min_kept": 0})
        for quant in (*QUANTIZED, *MEASURED)
    ]
    file = "faq-9m-gguf:q4_k_m"  # kept as a file, whatever types are in it
    cases += [
        Case(f"base {file}, kept, {rounding}", file, "faq-kjv-light", {"quant": "keep", "rounding": rounding})
        for rounding in ROUNDINGS
    ]
    cases += [
        Case("base nf4-dq, dense", "llama-nf4-dq", "lora", {"quant": "none"}),
        Case("base gptq in awq", "llama-gptq", "lora", {"quant": "awq"}),
        Case("base int8 in nf4", "llama-int8", "dora", {"quant": "nf4"}),
        Case("base w4a16, nearest", "llama-w4a16", "lora", {"rounding": "nearest"}),
        Case("base nf4-dq, embedding and head", "llama-nf4-dq", "embedding-and-head", {"min_kept": 0}),
    ]
    return cases


def _adapters() -> list[Case]:
    """Every kind of adapter, in 16 bit and where it differs in 4."""
    in_16_bit = [
        ("llama", ("dora", "rslora", "pissa", "olora", "kasa", "blocks", "embedding-and-head", "embedding-dora")),
        ("llama", ("trained-tokens", "resized", "resized-tokens", "saved", "replicated", "replicated-dora")),
        ("tied", ("tied-head", "tied-embedding", "tied-tokens", "tied-resized")),
        ("tied-float32", ("tied-as-one",)),
        ("llama-float32", ("lora-float32",)),
        ("llama-float16", ("lora-float16",)),
        ("qwen2", ("biases", "biases-dora")),
        ("phi3", ("fused-dora",)),
        ("gemma2", ("gemma2",)),
        ("gpt2", ("conv1d", "conv1d-dora")),
        ("convnext", ("conv", "conv-dora")),
        ("mixtral", ("experts",)),
        ("gpt-oss", ("fused-experts",)),
    ]  # fmt: skip
    cases = [Case(adapter, base, adapter) for base, adapters in in_16_bit for adapter in adapters]
    cases += [
        Case(f"{adapter} in {quant}", base, adapter, {"quant": quant, "min_kept": 0})
        for base, adapter, quant in (
            ("llama", "dora", "nf4-dq"),
            ("llama", "replicated", "int8"),
            ("llama", "saved", "w4a16"),
            ("llama", "resized", "nf4"),
            ("tied", "tied-head", "nf4-dq"),
            ("qwen2", "biases-dora", "int8"),
            ("mixtral", "experts", "nf4-dq"),
        )
    ]
    moe = [("last", "square-experts"), ("middle", "square-experts-middle")]
    cases += [
        Case(f"experts, {layout}", "square-moe", adapter, {"moe_layout": layout}) for layout, adapter in moe
    ]
    cases += [
        Case(f"experts, {layout}", "mixtral", "unsloth-experts", {"moe_layout": layout})
        for layout in ("rank-major", "expert-major")
    ]
    cases += [
        Case("experts, not told", "square-moe", "square-experts", refused="UnsupportedError"),
        Case("DoRA, seen by training", "llama", "dora", {"quant": "nf4", "merge_base": "nf4", "min_kept": 0}),
        Case("pickle", "llama", "pickled", {"allow_pickle": True}),
        Case("pickle, not allowed", "llama", "pickled", refused="UnsupportedError"),
        Case("subfolder", "llama", "checkpoints", {"adapter_subfolder": "checkpoint-12"}),
    ]
    return cases


def _other_methods() -> list[Case]:
    """Adapters of methods other than LoRA, in 16 bit, in 4 and 8, and where weights have another shape."""
    made = {
        "LOHA": [("llama", "loha"), ("convnext", "loha-conv")],
        "IA3": [("llama", "ia3"), ("gpt2", "ia3-conv1d")],
        "OFT": [("llama", "oft"), ("qwen2", "oft-shared")],
        "ADALORA": [("llama", "adalora")],
        "LOKR": [("llama", "lokr"), ("convnext", "lokr-conv")],
        "TRAINABLE_TOKENS": [("tied", "tokens-alone")],
        "BOFT": [("llama", "boft")],
        "MISS": [("llama", "miss"), ("llama", "miss-bat")],
        "BONE": [("llama", "bone")],
        "LN_TUNING": [("llama", "norms")],
        "C3A": [("llama", "c3a")],
        "SHIRA": [("llama", "shira")],
        "FOURIERFT": [("llama", "fourierft"), ("gpt2", "fourierft-conv1d")],
        "VBLORA": [("llama", "vblora"), ("gpt2", "vblora-chosen")],
        "RANDLORA": [("llama", "randlora")],
        "HIRA": [("llama", "hira"), ("convnext", "hira-conv")],
        "DELORA": [("llama", "delora")],
        "HRA": [("llama", "hra"), ("qwen2", "hra-orthogonal")],
        "VERA": [("llama", "vera"), ("gpt2", "vera-conv1d")],
    }
    cases = [
        Case(adapter, base, adapter, method=method)
        for method, pairs in made.items()
        for base, adapter in pairs
    ]
    cases += [
        Case(f"{adapter} in {quant}", "llama", adapter, {"quant": quant, "min_kept": 0}, method=method)
        for method, adapter, quant in (
            ("LOHA", "loha", "nf4-dq"),
            ("IA3", "ia3", "int8"),
            ("IA3", "ia3", "gptq"),
            ("OFT", "oft", "nf4-dq"),
            ("OFT", "oft", "w4a16"),
            ("HRA", "hra", "nf4-dq"),
            ("FOURIERFT", "fourierft", "int8"),
            ("SHIRA", "shira", "nf4-dq"),
            ("C3A", "c3a", "w4a16"),
        )
    ]  # fmt: skip
    feedback = {"quant": "nf4-dq", "min_kept": 0} | _text()
    return [*cases, Case("feedback of OFT", "llama", "oft", feedback, method="OFT")]


def _options() -> list[Case]:
    """Several outputs, budgets, shard sizes, groups, and what else a run can be asked for."""
    several = {"quant": "none", "also": ["nf4-dq", "int8", "w4a16", "gptq"]}
    ignored = {"quant": "nf4-dq", "ignore": ["down_proj", "re:.*layers.0.*v_proj$"]}
    sparse = {"card": False, "copy_extra": ["*.json"], "tokenizer": "base"}
    typed = {"quant": "nf4-dq", "seed": 5, "ignore": ["o_proj"]}
    merges = [
        ("also", several),
        ("also, calibrated", {"quant": "nf4", "also": ["none", "w8a16"]} | _text()),
        ("100 MiB", {"quant": "nf4-dq", "max_ram": "100MiB"}),
        ("120 MiB, also", {"max_ram": "120MiB", "also": ["int8"]}),
        ("shards of 150 KB", {"max_shard_size": "150KB"}),
        ("shards of 150 KB, nf4", {"quant": "nf4", "max_shard_size": "150KB"}),
        ("one shard", {"quant": "awq", "max_shard_size": "1GB"}),
        ("groups of 32, w4a16", {"quant": "w4a16", "group_size": 32}),
        ("groups of 64, gptq", {"quant": "gptq", "group_size": 64}),
        ("float32 norms, int8", {"quant": "int8", "dtype": "float32"}),
        ("float16, nf4-dq", {"quant": "nf4-dq", "dtype": "float16"}),
        ("ignored modules", ignored),
        ("no card, extra files", sparse),
    ]
    conversions = [
        ("converted to nf4", "llama", {"quant": "nf4"}),
        ("converted to float32", "llama", {"dtype": "float32"}),
        ("converted from nf4-dq", "llama-nf4-dq", {"quant": "none"}),
        ("converted from gptq to w4a16", "llama-gptq", {"quant": "w4a16"}),
        ("resharded awq", "llama-awq", {"max_shard_size": "100KB"}),
    ]
    return [
        *(Case(name, "llama", "lora", options) for name, options in merges),
        *(Case(name, base, None, options) for name, base, options in conversions),
        Case("by the command line", "llama", "dora", typed, "command line"),
        Case("without numba, also", "llama", "lora", several, "without numba"),
        Case(
            "without numba, search",
            "llama",
            "lora",
            {"quant": "w4a16", "rounding": "search"},
            "without numba",
        ),
    ]


def _calibrated() -> list[Case]:
    """Codes chosen by a text, with rescaling and residual adapters."""
    weighed = _text(gradients=64)
    spared = {"quant": "nf4-dq", "merge_base": "nf4-dq", "preserve_delta": 0.3}
    rescaled = {"rescale": "awq", "quant": "w4a16", "group_size": 32} | _text()
    scaled = ("llama-float32", "lora-float32")
    return [
        Case("feedback, with gradients", "llama", "lora", {"quant": "nf4-dq"} | weighed),
        Case("feedback, T, delta spared", "llama", "lora", spared | weighed),
        Case("feedback of DoRA in gptq", "llama", "dora", {"quant": "gptq"} | weighed),
        Case("feedback of gemma2", "gemma2", "gemma2", {"quant": "w4a16"} | _text()),
        Case("feedback of a quantized base", "llama-w4a16", "lora", {"min_kept": 0} | _text()),
        Case("feedback without adapter", "llama", None, {"quant": "fp4"} | _text()),
        Case("search by a text", "llama", "lora", {"quant": "nf4", "rounding": "search"} | _text()),
        Case("residual", "llama", "lora", {"quant": "nf4-dq", "residual_rank": 8} | weighed),
        Case("rescaled", *scaled, rescaled),
        *(
            Case(f"rescaled, {name}", *scaled, rescaled | {"rounding": name})
            for name in ("nearest", "search")
        ),
        Case("rescaled, residual", *scaled, rescaled | {"residual_rank": 4}),
        Case("rescaled gemma2", "gemma2", "gemma2", rescaled | {"rounding": "nearest"}),
        Case(
            "int8 has no use for a text", "llama", "lora", {"quant": "int8"} | _text(), refused="OptionError"
        ),
        Case("killed, calibrated", "llama", "lora", {"quant": "nf4-dq"} | weighed, "killed"),
    ]


def _faq() -> list[Case]:
    """The small real model, with either adapter; of six layers two are calibrated, which takes long."""
    text = _text(1536, 256) | {"calibration": FAQ_TEXT, "calibration_sequence_length": 256}
    two = {"ignore": ["re:.*layers[.][2-5][.].*"]}
    small = {"quant": "nf4-dq", "max_shard_size": "1MB", "max_ram": "120MiB"}
    light, heavy = "faq-kjv-light", "faq-kjv-heavy"
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("16 bit", heavy, {}),
        ("nf4-dq", light, {"quant": "nf4-dq", "merge_base": "nf4-dq"}),
        ("also", heavy, {"also": ["int8", "w4a16", "gptq", "awq"], "max_ram": "200MiB"}),
        ("search", heavy, {"quant": "nf4-dq", "rounding": "search"}),
        ("feedback", heavy, {"quant": "nf4-dq", "residual_rank": 16} | text | two),
        ("feedback in gguf:q4_k", heavy, {"quant": "gguf:q4_k", "rounding": "feedback"} | text | two),
        ("rescaled", heavy, {"quant": "w4a16", "rescale": "awq", "rounding": "nearest"} | text),
    ]
    return [
        *(Case(f"faq-9m, {name}", "faq-9m", adapter, options) for name, adapter, options in cases),
        Case("faq-9m, killed", "faq-9m", heavy, small, "killed"),
    ]


def all_cases() -> list[Case]:
    """All cases, in the order of the table."""
    rooms = (_formats, _targets, _adapters, _other_methods, _options, _calibrated, _faq)
    return [case for room in rooms for case in room()]
