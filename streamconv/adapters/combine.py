"""Several adapters as one, or one that counts more or less: what each changes, weighed, on the same base."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from streamconv.adapters.base import Adapter, Member, Replace, TaskHead, Update
from streamconv.adapters.combinations import COMBINATIONS
from streamconv.adapters.combined import DeltasUpdate, FactorsUpdate, Rule, factors_update, rank_of
from streamconv.adapters.overlaps import check_overlaps, common_replaces, distinct_rows
from streamconv.adapters.shares import Share, SharesUpdate, WholeSharesUpdate
from streamconv.adapters.source import BaseParameters
from streamconv.adapters.tokens import RowsUpdate
from streamconv.checkpoint.strict_json import some
from streamconv.checkpoint.types import Shape
from streamconv.errors import AdapterError, UnsupportedError
from streamconv.storage.local import real_path


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weights of adapters, one each, and the rule by which they are combined; without one they are added."""

    weights: tuple[float, ...]
    rule: Rule | None = None


def combine(adapters: Sequence[Adapter], mixture: Mixture, base: BaseParameters) -> Adapter:
    """The adapter that stands for all; one with a weight of 1 is itself.

    Raises AdapterError where two of them cannot be on one base together, or a weight cannot be meant,
    UnsupportedError for combinations that are not defined.
    """
    if len(adapters) == 1 and mixture.weights == (1.0,):
        return adapters[0]
    _check(adapters, mixture)
    above = _on_top(adapters)
    adapters = distinct_rows(adapters)
    check_overlaps(adapters, base)
    replaces = common_replaces(adapters)
    shares = _shares(adapters, mixture, above)
    made = {
        parameter: _made(parameter, found, mixture.rule, _shape(parameter, replaces, base))
        for parameter, found in shares.items()
    }
    updates = tuple(update for updates in made.values() for update in updates)
    return Adapter(
        location=", ".join(adapter.location for adapter in adapters),
        origin=adapters[0].origin if len(adapters) == 1 else None,
        peft_type=adapters[0].peft_type,
        label=" and ".join(dict.fromkeys(adapter.label for adapter in adapters)),
        config=adapters[0].config,
        updates=updates,
        replaces=tuple(replaces.values()),
        untie=any(adapter.untie for adapter in adapters),
        modules=_modules(adapters),
        sha256=_digest(adapters),
        renamed="; ".join(dict.fromkeys(each.renamed for each in adapters if each.renamed)) or None,
        notes=(*_notes(adapters, mixture, above, updates), *_own_notes(adapters)),
        multiplies=any(adapter.multiplies for adapter in adapters),
        records=frozenset(name for adapter in adapters for name in adapter.records),
        head=_head(adapters),
        members=tuple(
            Member(each.location, each.origin, each.label, weight, each.sha256)
            for each, weight in zip(adapters, mixture.weights, strict=True)
        ),
    )


# -- what is refused -----------------------------------------------------------------------------------------------


def _head(adapters: Sequence[Adapter]) -> TaskHead | None:
    """The head that one of them brings. Raises AdapterError where they bring several."""
    found = {adapter.head: adapter.location for adapter in adapters if adapter.head is not None}
    if len(found) > 1:
        raise AdapterError(
            f"{' and '.join(found.values())} were trained for different tasks or labels, and a model has one head;"
            " merge adapters of one task"
        )
    return next(iter(found), None)


def _check(adapters: Sequence[Adapter], mixture: Mixture) -> None:
    """Raise for weights that cannot be meant, and for a rule on what it is not defined for."""
    if not any(mixture.weights):
        raise AdapterError(
            "every --weight is 0, so the merge would change nothing; give another, or `convert`"
        )
    seen: dict[str, Adapter] = {}
    for adapter, weight in zip(adapters, mixture.weights, strict=True):
        if adapter.sha256 in seen:
            raise AdapterError(
                f"{seen[adapter.sha256].location} and {adapter.location} are the same adapter; give it once, and with"
                " --weight if it is to count more"
            )
        seen[adapter.sha256] = adapter
        _check_weight(adapter, weight)
    if mixture.rule is None:
        return
    for adapter in adapters:
        if adapter.multiplies and not COMBINATIONS[mixture.rule.name].adds:
            raise UnsupportedError(
                f"{adapter.location}: --combine {mixture.rule.name} is a rule for what adapters add to a weight, and"
                f" {adapter.label} multiplies it; leave --combine out"
            )


def _check_weight(adapter: Adapter, weight: float) -> None:
    """Raise UnsupportedError for a weight on tensors that take the place of the base's: there is no update to scale."""
    if weight == 1:
        return
    trained = [each.parameter for each in adapter.replaces if each.parameter not in adapter.records]
    rows = [update.parameter for update in adapter.updates if isinstance(update, RowsUpdate)]
    if trained or rows:
        what = f"whole tensors ({some(trained)})" if trained else f"rows of {some(rows)}"
        raise UnsupportedError(
            f"{adapter.location} holds {what} that take the place of the base's, which --weight {weight:g} cannot"
            " scale as it scales an update; give this adapter no --weight"
        )


def _on_top(adapters: Sequence[Adapter]) -> Mapping[int, int]:
    """Places of adapters that were trained on top of another of them, with the other's.

    Raises AdapterError where one stands before that.
    """
    found = {}
    for number, adapter in enumerate(adapters):
        for other, below in enumerate(adapters):
            if other == number or not _names(adapter, below):
                continue
            if other > number:
                raise AdapterError(
                    f"{adapter.location} was trained on top of {below.location}, as base_model_name_or_path in its"
                    " adapter_config.json says; give that adapter before it"
                )
            found[number] = other
    return MappingProxyType(found)


def _names(adapter: Adapter, below: Adapter) -> bool:
    """Whether its config says that `below` is the base it was trained on: by Hub id, or by the very folder."""
    name = adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return False
    if below.origin is not None:
        return name.removeprefix("hf://") == below.origin.repo
    try:
        return real_path(name) == real_path(below.location)
    except ValueError:  # a NUL in the name
        return False


# -- what each weight gets -----------------------------------------------------------------------------------------


def _shares(
    adapters: Sequence[Adapter], mixture: Mixture, above: Mapping[int, int]
) -> Mapping[str, Sequence[Share]]:
    """Shares of the adapters by parameter, in the order of the adapters; those with a weight of 0 have none."""
    found: dict[str, list[Share]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, mixture.weights, strict=True)):
        grouped: dict[str, list[Update]] = {}
        for update in adapter.updates if weight else ():
            grouped.setdefault(update.parameter, []).append(update)
        for parameter, updates in grouped.items():
            in_turn = adapter.multiplies or number in above
            share = Share(tuple(updates), weight, in_turn, adapter.sha256)
            found.setdefault(parameter, []).append(share)
    return found


def _made(parameter: str, shares: Sequence[Share], rule: Rule | None, shape: Shape) -> Sequence[Update]:
    """The updates of one weight that are all the shares together."""
    rows = any(isinstance(update, RowsUpdate) for share in shares for update in share.updates)
    if rule is None or COMBINATIONS[rule.name].adds or (rows and len(shares) == 1):
        return _added(parameter, shares, shape)
    if rows:
        raise UnsupportedError(
            f"{parameter}: one adapter holds trained rows, which are taken whole, and another changes the weight; what"
            f" --combine {rule.name} makes of the two is not defined: leave --combine out"
        )
    found = factors_update(shares, rule)
    if found is not None:
        return (found,)
    cuts = COMBINATIONS[rule.name].cuts
    if len(shape) > 1 and cuts and any(rank_of(share) is None for share in shares):
        raise UnsupportedError(
            f"{parameter}: --combine {rule.name} cuts the sum of what adapters add to the greatest of their ranks, and"
            " one of them changes this weight in a way that has no rank; leave --combine out, which adds all as it is"
        )
    if rule.name == "linear" or (cuts and len(shape) == 1):
        return _added(parameter, shares, shape)  # of whole updates, this is their sum
    return (DeltasUpdate(parameter, shape, tuple(shares), rule),)


def _added(parameter: str, shares: Sequence[Share], shape: Shape) -> Sequence[Update]:
    """Updates that add all shares, one after another where that is the same."""
    found = _one_after_another(shares)
    if found is not None:
        return found
    learns = [number for number, share in enumerate(shares) if not share.is_by_rows]
    if any(shares[number].in_turn and number != learns[0] for number in learns):
        return (WholeSharesUpdate(parameter, shape, tuple(shares)),)
    return (SharesUpdate(parameter, tuple(shares)),)


def _one_after_another(shares: Sequence[Share]) -> Sequence[Update] | None:
    """Updates each of the result of the one before, if these are the shares; None where the original is needed.

    Of those that depend on the weight, the first is applied to the original; what others add comes after.
    """
    first: tuple[Update, ...] = ()
    then: list[Update] = []
    multiplied = False
    for share in shares:
        weighed = share.weighed()
        if weighed is not None:
            then.extend(weighed)
        elif share.weight == 1 and share.in_turn and share.is_by_rows and (first or then):
            then.extend(share.updates)
            multiplied = True
        elif share.weight == 1 and not multiplied and _are_rows((*first, *share.updates)):
            first += share.updates  # of other rows, in which nothing has been changed yet
        elif share.weight == 1 and not first and not (multiplied or (share.in_turn and then)):
            first = share.updates
        else:
            return None
    return (*first, *then)


def _are_rows(updates: Iterable[Update]) -> bool:
    return all(isinstance(update, RowsUpdate) for update in updates)


def _shape(parameter: str, replaces: Mapping[str, Replace], base: BaseParameters) -> Shape:
    if parameter in replaces:
        return replaces[parameter].tensor.shape
    return base.get(parameter, parameter).shape


# -- what is said of it --------------------------------------------------------------------------------------------


def _modules(adapters: Iterable[Adapter]) -> Mapping[str, int]:
    """Adapted modules by their last name, those of several adapters counted once."""
    modules = {update.parameter.rpartition(".")[0] for adapter in adapters for update in adapter.updates}
    return MappingProxyType(dict(Counter(module.rpartition(".")[2] for module in sorted(modules))))


def _digest(adapters: Sequence[Adapter]) -> str:
    """SHA-256 of what they hold; of one it is its own, whatever its weight."""
    if len(adapters) == 1:
        return adapters[0].sha256
    return hashlib.sha256("\n".join(adapter.sha256 for adapter in adapters).encode()).hexdigest()


def _own_notes(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    if len(adapters) == 1:
        return adapters[0].notes
    return tuple(
        f"adapter {number}: {note}" for number, adapter in enumerate(adapters, 1) for note in adapter.notes
    )


def _notes(
    adapters: Sequence[Adapter], mixture: Mixture, above: Mapping[int, int], updates: Sequence[Update]
) -> Sequence[str]:
    """Sentences on how the adapters are taken together."""
    if len(adapters) == 1:
        return [f"the adapter's updates are taken {mixture.weights[0]:g} times"]
    told = ", ".join(
        f"{number}: {adapter.label} x {weight:g}"
        for number, (adapter, weight) in enumerate(zip(adapters, mixture.weights, strict=True), 1)
    )
    notes = [f"{len(adapters)} adapters are merged together ({told}); {_how(mixture.rule)}"]
    notes += [
        f"adapter {number + 1} was trained on top of adapter {below + 1}, as its config says: its updates are of what"
        " the adapters before it made"
        for number, below in above.items()
    ]
    notes += [
        f"adapter {number} multiplies weights ({adapter.label}), and so also what the adapters before it added"
        for number, adapter in enumerate(adapters, 1)
        if adapter.multiplies and number > 1
    ]
    apart = {each.parameter for each in updates if not isinstance(each, FactorsUpdate | RowsUpdate)}
    if apart and mixture.rule is not None and not COMBINATIONS[mixture.rule.name].adds:
        notes.append(
            f"the adapters have no two factors of one rank to combine for {some(sorted(apart))} (a bias, DoRA, another"
            f" method, or ranks that differ): there {mixture.rule.name} is of the whole of what each changes"
        )
    return notes


def _how(rule: Rule | None) -> str:
    if rule is None or COMBINATIONS[rule.name].adds:
        return "their updates, each made of the original weight, are added and rounded once"
    density = f" with density {rule.density:g}" if COMBINATIONS[rule.name].needs_density else ""
    if COMBINATIONS[rule.name].cuts:
        return "the sum of their updates is cut to the greatest of their ranks (svd)"
    return (
        f"their factors are combined by {rule.name}{density}, as PEFT's add_weighted_adapter does, which is not the"
        " same rule on their updates"
    )
