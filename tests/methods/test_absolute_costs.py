"""What each family costs as a number worked out by hand: a meter that counts everything twice, or half of it, is found out.

The ratio of two readings of such a meter is right all the same, as the first test shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from isoflop.methods.base import METHODS
from isoflop.methods.probe import Probe
from isoflop.testing.methods import check_absolute_cost, check_footprint

Patch = tuple[str, Callable[[Any, float], Any]]


def scaled(call: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """A function that returns a number."""
    return lambda *args, **kwargs: factor * call(*args, **kwargs)


def scaled_first(call: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """One that returns a number and something else."""

    def scale(*args: Any, **kwargs: Any) -> Any:
        number, rest = call(*args, **kwargs)
        return factor * number, rest

    return scale


def scaled_property(prop: property, factor: float) -> property:
    assert prop.fget is not None
    return property(scaled(prop.fget, factor))


def scaled_fields(*names: str) -> Callable[[Any, float], Any]:
    """One that returns a dataclass with numbers, or lists of them."""

    def of(call: Callable[..., Any], factor: float) -> Callable[..., Any]:
        def scale(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            values = {name: getattr(found, name) for name in names}
            return dataclasses.replace(
                found, **{n: [factor * x for x in v] if isinstance(v, list) else factor * v for n, v in values.items()}
            )

        return scale

    return of


def scaled_each(call: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """One that returns a tuple of numbers, or nothing."""
    return lambda *args: None if (found := call(*args)) is None else tuple(factor * number for number in found)


CACHE: list[Patch] = [
    ("isoflop.methods.kv_cache.base.stored_bytes", scaled),
    ("isoflop.methods.kv_cache.compressed_cache.stored_bytes", scaled),
    ("isoflop.methods.kv_cache.compressed_cache.tensor_bytes", scaled),
]
METERS: dict[str, list[Patch]] = {
    "full-cache": CACHE,
    "double-sparsity": [*CACHE, ("isoflop.methods.sparse_attention.base.stored_bytes", scaled)],
    "avgpool": [("isoflop.methods.visual_tokens.probe.flops_of", scaled_first)],
    "fastv": [("isoflop.methods.visual_tokens.probe.flops_of", scaled_first)],
    "tome": [("isoflop.methods.vit_tokens.base.flops_of", scaled_first)],
    "rtn": [("isoflop.methods.weights.payloads.Payload.nbytes", scaled)],
    "downsample": [("isoflop.models.hooks.signals.CodecRun.bytes", scaled_fields("coded", "header", "raw"))],
    "full-context": [("isoflop.models.prompting.Prompt.tokens", scaled_property)],
    "mlp-topk": [("isoflop.methods.activation_sparsity.base.Sparsity.active_share", scaled)],
    "dense-gradients": [("isoflop.methods.gradients.probe.simulate", scaled_fields("wire_bytes", "payload_bytes"))],
    "data-random": [("isoflop.methods.data_selection.probe.selection_of", scaled_fields("kept_tokens", "pool_tokens"))],
    "byte-greedy": [("isoflop.methods.tokenization.probe.flops_of", scaled_first)],
    "odp": [("isoflop.methods.experts.pruning.Pruning.active_experts", scaled)],
    "compress-then-prompt": [("isoflop.methods.repair.base.tensor_bytes", scaled)],
}


def test_every_family_is_looked_at() -> None:
    built_in = {METHODS.get(name).family for name in METHODS.own()}
    assert {METHODS.get(name).family for name in METERS} == built_in


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("name", METERS)
def test_a_meter_that_counts_twice_or_half_is_found_out(
    name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = METHODS.get(name)
    check_absolute_cost(cls, cls.probe())
    for target, change in METERS[name]:
        monkeypatch.setattr(target, change(_value(target), factor))
    with pytest.raises(AssertionError, match=r"by hand it is"):
        check_absolute_cost(cls, cls.probe())


@pytest.mark.parametrize("factor", [2, 0.5])
def test_layers_that_are_counted_twice_are_found_out(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The visual tokens of the decoder's layers, which no FLOP counter sees."""
    from isoflop.models import metering
    from isoflop.models.hooks.decoder_layers import DECODER_LAYERS

    dial = metering._DIALS[DECODER_LAYERS]
    monkeypatch.setitem(metering._DIALS, DECODER_LAYERS, dial._replace(read=scaled_each(dial.read, factor)))
    cls = METHODS.get("fastv")
    with pytest.raises(AssertionError, match=r"cost is .*, by hand it is 24"):
        check_absolute_cost(cls, cls.probe())


def test_a_ratio_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for target, change in CACHE:
        monkeypatch.setattr(target, change(_value(target), 2.0))
    cls = METHODS.get("kv-random")
    check_footprint(cls, cls.probe())


def test_a_family_without_a_number_is_told() -> None:
    class Bare(type(METHODS.get("none").probe())):  # type: ignore[misc]
        absolute = Probe.absolute

    with pytest.raises(AssertionError, match=r"family visual-tokens gives no absolute cost: override Probe\.absolute"):
        check_absolute_cost(METHODS.get("none"), Bare())


def _value(target: str) -> Any:
    """What a dotted path names."""
    from pkgutil import resolve_name

    module, _, attribute = target.rpartition(".")
    return vars(resolve_name(module))[attribute]
