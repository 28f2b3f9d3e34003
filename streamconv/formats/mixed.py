"""Checkpoints whose weights have several formats, as far as loaders can be told which weight has which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from streamconv.dtypes import Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats import stored_as
from streamconv.formats.base import Format, Json, Mixable
from streamconv.formats.linear import module_of
from streamconv.formats.targets import fused_layer


def _names(formats: Iterable[Format]) -> dict[int, str]:
    """Names by the identity of a format: of a hundred thousand weights few have one of their own."""
    return {number: stored_as(each) for number, each in {id(each): each for each in formats}.items()}


def weights_by_format(formats: Mapping[str, Format]) -> list[tuple[Format, list[str]]]:
    """Each format with the names of its weights, that of most of them first; of `formats` by name of the weight."""
    names = _names(formats.values())
    found: dict[str, tuple[Format, list[str]]] = {}
    for name, storage_format in sorted(formats.items()):
        found.setdefault(names[id(storage_format)], (storage_format, []))[1].append(name)
    return [found[key] for key in sorted(found, key=lambda key: (-len(found[key][1]), key))]


def mixed_quantization(dtype: Dtype, formats: Mapping[str, Format], skipped: Sequence[str]) -> Json | None:
    """The `quantization_config` of weights with these `formats` by name; `dtype` and `skipped` as in Format.

    Raises UnsupportedError where no loader can be told of them.
    """
    groups = weights_by_format(formats)
    if len(groups) == 1:
        ((only, names),) = groups
        return only.quantization_config(dtype, names, skipped)
    mixable = [(each, names) for each, names in groups if isinstance(each, Mixable)]
    if len(mixable) < len(groups) or len({each.family for each, _ in mixable}) > 1:
        raise _no_mixture([each for each, _ in groups])
    return mixable[0][0].mixed_config(dtype, mixable, skipped)


def can_mix(one: Format, other: Format) -> bool:
    """Whether a checkpoint can have weights of both formats."""
    return isinstance(one, Mixable) and isinstance(other, Mixable) and one.family == other.family


def check_partners(formats: Mapping[str, Format]) -> None:
    """Raise UnsupportedError where modules that vLLM makes one layer of are stored in several formats."""
    distinct = {id(each): each for each in formats.values()}.values()
    names = _names(each for each in distinct if isinstance(each, Mixable) and each.has_partners)
    layers = defaultdict[str, dict[str, str]](dict)
    for name, storage_format in formats.items():
        layer = fused_layer(module_of(name))
        if layer is not None and id(storage_format) in names:
            layers[layer].setdefault(names[id(storage_format)], module_of(name))
    for layer, found in layers.items():
        if len(found) > 1:
            (one, module), (other, partner) = list(found.items())[:2]
            raise UnsupportedError(
                f"{module} would be stored in {one} and {partner} in {other}, and vLLM makes one "
                f"layer of them ({layer}), whose parts must share a format: let --quant-for name all parts or none"
            )


def _no_mixture(formats: Sequence[Format]) -> UnsupportedError:
    one, other = next(pair for pair in combinations(formats, 2) if not can_mix(*pair))
    names = (one.name, other.name) if one.name != other.name else (stored_as(one), stored_as(other))
    told = "can be told of one format beside the modules left in 16 bit"
    return UnsupportedError(
        f"{' and '.join(names)} cannot be in one checkpoint: {one.loaders}, which open {one.name}, "
        f"{told}; give --quant-for none, or formats of one family, such as w4a16 and w8a16"
    )
