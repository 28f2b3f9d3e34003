"""PEFT methods that can be merged, and the reading of an adapter so that nothing of it is left over."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.adapters.adalora import ADALORA
from streamconv.adapters.base import Adapter, Parameter, Replace, TaskHead, Tie, Update
from streamconv.adapters.beside import read_beside, with_beside
from streamconv.adapters.boft import BOFT
from streamconv.adapters.c3a import C3A
from streamconv.adapters.config import AdapterConfig, check_fields
from streamconv.adapters.delora import DELORA
from streamconv.adapters.dialects import find_dialect, read_config
from streamconv.adapters.fourierft import FOURIERFT
from streamconv.adapters.heads import find_head, notes_on_head
from streamconv.adapters.hira import HIRA
from streamconv.adapters.hra import HRA
from streamconv.adapters.ia3 import IA3
from streamconv.adapters.ln_tuning import LN_TUNING
from streamconv.adapters.loha import LOHA
from streamconv.adapters.lokr import LOKR
from streamconv.adapters.lora_reader import LORA
from streamconv.adapters.method import Method
from streamconv.adapters.miss import BONE, MISS
from streamconv.adapters.names import read_source, read_translated
from streamconv.adapters.oft import OFT
from streamconv.adapters.randlora import RANDLORA
from streamconv.adapters.replication import check_every_layer
from streamconv.adapters.saved import Saved, check_saved, read_saved
from streamconv.adapters.scan import Scan, scan_tensors
from streamconv.adapters.shira import SHIRA
from streamconv.adapters.slices import place_updates
from streamconv.adapters.source import BaseParameters, MoeLayout, Source
from streamconv.adapters.targets import Reached, check_targets
from streamconv.adapters.ties import Settled, refuse_unstored_head, settle_tie
from streamconv.adapters.trainable_tokens import TRAINABLE_TOKENS
from streamconv.adapters.vblora import VBLORA
from streamconv.adapters.vera import VERA
from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.pickled import read_pickled
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError, UnsupportedError
from streamconv.storage.base import Storage

_PICKLE = "adapter_model.bin"


def read_adapter(
    storage: Storage,
    parameters: Mapping[str, Parameter],
    base_config: Mapping[str, Any],
    tie: Tie | None,
    moe: MoeLayout = MoeLayout(),  # noqa: B008  a frozen value
    allow_pickle: bool = False,
    ignore_extra: Collection[str] = (),
    allow_missing: bool = False,
) -> Adapter:
    """The adapter in `storage`, checked against the base it is for; reads its tensors once, in chunks.

    `parameters` are the base's, its layers repeated as `layer_replication` has it (`depth.deepen`); `tie` says what
    its config ties, `moe` what is not left to find out of fused experts; `allow_pickle` lets adapter_model.bin and
    files of weights beside it be read, but for those in `ignore_extra`; `allow_missing` lets the base's weights stay
    where a target has no tensors. Raises AdapterError where adapter and base do not fit or something in the folder
    would not be used, UnsupportedError for methods and variants that are not built, CheckpointError where a file is
    broken.
    """
    config = read_config(storage)
    method = find_method(config)
    base = BaseParameters(parameters, base_config, tie)
    files = _read_files(storage, config, method, base, moe, allow_pickle, ignore_extra)
    source = files.source
    check_fields(config, method.fields)
    head = find_head(source, base)
    if head is not None:
        base = base.without(head.left_out)
    else:
        refuse_unstored_head(source, base)
    read = method.read(source, base)
    updates = place_updates(read, source, base, method.orients)
    scan = scan_tensors(config.raw, files.tensors)
    saved = _read_whole(source, base, method, updates, scan, head)
    notes = check_targets(source, base, _reached(read, updates, saved), allow_missing)
    check_every_layer(source, map(_module, parameters), _modules((*updates, *saved.replaces)))
    check_saved(source, base, saved.replaces)
    _check_effect(source, method, updates, saved, scan)

    settled = settle_tie(base, source, updates, saved, scan.digests)
    counts = Counter(module.rpartition(".")[2] for module in sorted(_modules(updates)))
    return Adapter(
        location=storage.location,
        origin=storage.origin,
        peft_type=config.peft_type,
        label=method.label,
        config=config.fields,
        updates=settled.updates,
        replaces=settled.replaces,
        untie=settled.untie,
        modules=MappingProxyType(dict(counts)),
        renamed=source.renaming.reason if source.renaming else None,
        sha256=scan.sha256,
        multiplies=method.multiplies,
        records=_records(saved, settled),
        notes=(*files.notes_before, *source.notes, *notes_on_head(head), *files.notes_after, *notes),
        head=head,
    )


@dataclass(frozen=True, slots=True)
class _Files:
    """All that the adapter's folder holds: `tensors` of every file, and the `source` that they make.

    `notes_before` say what was read, `notes_after` which files beside the adapter's own were, too.
    """

    source: Source
    tensors: Sequence[StoredTensor]
    notes_before: tuple[str, ...] = ()
    notes_after: tuple[str, ...] = ()


def _read_files(
    storage: Storage,
    config: AdapterConfig,
    method: Method,
    base: BaseParameters,
    moe: MoeLayout,
    allow_pickle: bool,
    ignore_extra: Collection[str],
) -> _Files:
    """The adapter as PEFT, or another program, has saved it, in the names of the base."""
    dialect = find_dialect(storage)
    if dialect is not None:
        keyed = dialect.read_tensors(storage, config, base)
        source = read_translated(storage.location, config, keyed, base, moe, method)
        by_name = {tensor.name: tensor for tensor in keyed.values()}
        return _Files(source, tuple(by_name.values()), notes_before=(dialect.note(config),))
    stored = read_stored(storage, allow_pickle)
    _check_gathered(storage, stored.values())
    source = read_source(storage.location, config, stored.values(), base, moe, method)
    own = {tensor.file for tensor in stored.values()}
    beside = read_beside(storage, source, base, own, allow_pickle, ignore_extra)
    tensors = (*stored.values(), *beside.tensors.values())
    return _Files(with_beside(source, beside), tensors, notes_after=beside.notes)


def _read_whole(
    source: Source,
    base: BaseParameters,
    method: Method,
    updates: Iterable[Update],
    scan: Scan,
    head: TaskHead | None,
) -> Saved:
    """Whole parameters among the tensors that no update has taken. Raises AdapterError if then one is left over."""
    updated = frozenset(update.parameter for update in updates)
    taken = {tensor.name for update in updates for tensor in update.parts.values()} | _unused(source, method)
    rest = [key for key, tensor in source.tensors.items() if tensor.name not in taken]
    saved = read_saved(source, base, rest, updated, scan.digests, head.parameters if head else ())
    _check_stored(source, base, saved)
    taken |= {replace.tensor.name for replace in saved.replaces}
    taken |= {source.tensors[key].name for key in saved.repeated}
    left = [key for key in rest if source.tensors[key].name not in taken]
    shared = [tensor.name for tensor in source.shared.values() if tensor.name not in taken]
    _check_leftovers(source, base, left, shared)
    return saved


def _reached(read: Iterable[Update], placed: Iterable[Update], saved: Saved) -> Reached:
    """Modules that the adapter reaches: by updates as they were `read` and as they are `placed`, and whole."""
    placed = tuple(placed)
    adapted, trained = _modules((*read, *placed)), _modules(saved.replaces)
    return Reached(
        adapted=adapted,
        parameters=frozenset(update.parameter for update in placed),
        modules=adapted | trained,
    )


def read_stored(storage: Storage, allow_pickle: bool) -> Mapping[str, StoredTensor]:
    """The adapter's tensors by name: safetensors where there are any, else a pickle if that is allowed."""
    names = storage.names()
    is_safe = any(fnmatch.fnmatchcase(name, "adapter_model*.safetensors*") for name in names)
    if _PICKLE not in names or is_safe:
        index = read_index(storage, stem="adapter_model", require_config=False)
        storage.fetch((shard.file for shard in index.shards), lambda _: None)
        return index.tensors
    if not allow_pickle:
        raise UnsupportedError(
            f"{storage.location}: adapter_model.safetensors is missing; the weights there are a pickle ({_PICKLE}),"
            " which may run code when loaded: allow it with --allow-pickle, which opens it so that it can hold nothing"
            " but tensors, or save the adapter as safetensors"
        )
    file = storage.file(_PICKLE)
    storage.fetch((file,), lambda _: None)
    return read_pickled(file)


def _check_gathered(storage: Storage, tensors: Iterable[StoredTensor]) -> None:
    """Raise AdapterError for tensors without elements, which a save of DeepSpeed's ZeRO-3 leaves."""
    empty = [tensor.name for tensor in tensors if not tensor.nbytes and tensor.shape == (0,)]
    if empty:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        raise AdapterError(
            f"{storage.location}: {len(empty)} tensors have shape [0] ({shown}): DeepSpeed ZeRO-3 keeps weights in"
            " parts, and this save did not gather them; save again with stage3_gather_16bit_weights_on_model_save, or"
            " gather the checkpoint with its zero_to_fp32.py"
        )


def find_method(config: AdapterConfig) -> Method:
    """The method of the config's `peft_type`. Raises UnsupportedError with the reason where there is none."""
    name = config.peft_type
    if name in ADAPTERS:
        return ADAPTERS[name]
    if name in NO_WEIGHTS:
        raise UnsupportedError(
            f"{config.name}: a {name} adapter cannot be merged: {NO_WEIGHTS[name]}, so no merged weights are"
            " equal to it; serve it unmerged, with PEFT"
        )
    if name in NOT_BUILT:
        convert = (
            "convert it with PEFT's convert_to_lora (save_as_lora writes it), which comes as near as the rank that you"
            " choose allows, and merge that, or "
        )
        raise UnsupportedError(
            f"{config.name}: {name} adapters are not supported yet{NOT_BUILT[name]};"
            f" {convert if name in CONVERTIBLE else ''}merge it with PEFT's merge_and_unload, which needs the whole"
            " model in memory"
        )
    raise UnsupportedError(
        f"{config.name}: the peft_type {name!r} is not known here; supported are {', '.join(ADAPTERS)}"
    )


def _records(saved: Saved, settled: Settled) -> frozenset[str]:
    """Parameters that are replaced by what was trained on, those of a tie's other side included."""
    tensors = {replace.tensor for replace in saved.replaces if replace.parameter in saved.records}
    return frozenset(replace.parameter for replace in settled.replaces if replace.tensor in tensors)


def _modules(changes: Iterable[Update | Replace]) -> frozenset[str]:
    return frozenset(_module(change.parameter) for change in changes)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _unused(source: Source, method: Method) -> set[str]:
    """Names of tensors that a variant in use keeps for training alone."""
    patterns = [
        pattern for field, pattern in method.unused.items() if source.config.fields.get(field) is not None
    ]
    return {
        tensor.name
        for key, tensor in source.tensors.items()
        if any(pattern.fullmatch(key) for pattern in patterns)
    }


def _check_stored(source: Source, base: BaseParameters, saved: Saved) -> None:
    """Raise UnsupportedError if a whole parameter in the file is but a part of one of the base."""
    for replace in saved.replaces:
        view = base.view(replace.parameter)
        if view is not None and replace.parameter not in base.parameters:
            raise UnsupportedError(
                f"{source.location}: {replace.tensor.name} replaces {replace.parameter}, and the base has"
                f" {view.pieces[0].stored.name} in another form, which cannot be replaced in part; save the base in the"
                " form that the adapter was trained on"
            )


def _check_leftovers(
    source: Source, base: BaseParameters, keys: Collection[str], shared: Collection[str]
) -> None:
    """Raise AdapterError if some tensors of the file would not be used: those of `keys`, or `shared` ones, by name."""
    names = [*(source.tensors[key].name for key in keys), *shared]
    if not names:
        return
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    reason = "their names are none that PEFT gives to tensors of this adapter"
    if any(base.find(key) is not None for key in keys):
        reason = (
            "they hold whole parameters, which modules_to_save does not list: add their modules to it to replace the"
            " base's"
        )
    raise AdapterError(f"{source.location}: {len(names)} tensors would not be used: {shown}; {reason}")


def _check_effect(
    source: Source, method: Method, updates: Iterable[Update], saved: Saved, scan: Scan
) -> None:
    """Raise AdapterError if the merge would change nothing: the adapter was saved before it was trained."""
    if len(saved.replaces) > len(saved.records) or not all(
        update.is_neutral(scan.constants) for update in updates
    ):
        return
    raise AdapterError(
        f"{source.location}: every update is {method.neutral}, so the merge would"
        " change nothing; this adapter was never trained, or its training was not saved"
    )


# In the order of use: what adapters on the Hub are, and what papers propose.
ADAPTERS: Mapping[str, Method] = MappingProxyType(
    {
        "LORA": LORA,
        "TRAINABLE_TOKENS": TRAINABLE_TOKENS,
        "ADALORA": ADALORA,
        "OFT": OFT,
        "IA3": IA3,
        "LOKR": LOKR,
        "LOHA": LOHA,
        "VERA": VERA,
        "LN_TUNING": LN_TUNING,
        "MISS": MISS,
        "BONE": BONE,
        "BOFT": BOFT,
        "HRA": HRA,
        "FOURIERFT": FOURIERFT,
        "RANDLORA": RANDLORA,
        "VBLORA": VBLORA,
        "SHIRA": SHIRA,
        "C3A": C3A,
        "HIRA": HIRA,
        "DELORA": DELORA,
    }
)

_FROM_BASE_SVD = ": its factors come from a decomposition of the base weight"
_FROM_SEED = ": its projections are drawn anew from a seed"

# Known to PEFT 0.21.2 or an earlier version, with a weight-space merge that is not built; the note says more.
NOT_BUILT: Mapping[str, str] = MappingProxyType(
    {
        "ADAMSS": _FROM_BASE_SVD,
        "BEFT": "",
        "DEFT": "",
        "FROD": _FROM_BASE_SVD,
        "GLORA": "",
        "GRALORA": "",
        "OSF": _FROM_BASE_SVD,
        "PEANUT": "",
        "PSOFT": _FROM_BASE_SVD,
        "PVERA": _FROM_SEED,
        "ROAD": "",
        "SUPERTUNING": "",
        "TINYLORA": _FROM_SEED,
        "UNILORA": _FROM_SEED,
        "WAVEFT": _FROM_SEED,
    }
)

# Those whose layers PEFT 0.21.2 approximates by LoRA (`supports_lora_conversion`).
CONVERTIBLE = frozenset({"GRALORA", "PSOFT", "TINYLORA", "UNILORA", "WAVEFT"})

_VIRTUAL_TOKENS = "it puts virtual tokens before the input"
_ROUTING = "it chooses among weights for each input"

NO_WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "ADAPTION_PROMPT": "it adds gated attention to prompts of its own",
        "ALORA": "it works only after its invocation tokens",
        "CARTRIDGE": "it puts learned keys and values before the input",
        "CPT": _VIRTUAL_TOKENS,
        "LILY": _ROUTING,
        "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
        "POLY": _ROUTING,
        "PREFIX_TUNING": "it puts learned keys and values before the input",
        "PROMPT_TUNING": _VIRTUAL_TOKENS,
        "P_TUNING": _VIRTUAL_TOKENS,
        "SHADOW": "it runs a second network beside the model",
        "XLORA": _ROUTING,
    }
)
