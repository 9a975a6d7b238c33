"""The contract of a model family as code: ``check_model("tiny-vit")`` reports every promise that is broken.

For authors of families, inside this project or outside::

    from isoflop.testing import ModelProbe, check_model

    def test_my_family():
        check_model("my-family", ModelProbe((("my-family/small", {}),), load=untrained, outputs=logits))

A built-in family needs no probe. Each check is a plain function of the family and the probe; ``model_checks`` gives them one
by one, for a test id each. Nothing is trained; the hooks of a trained model are tried with ``load=`` of your own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from isoflop.core.errors import Infeasible, UserError, nearest
from isoflop.core.hook import Hook
from isoflop.models.base import Model, ModelInfo
from isoflop.models.family import FAMILIES, ModelFamily
from isoflop.models.hooks.occupant import Occupant
from isoflop.testing.model_probes import ModelProbe, model_probe
from isoflop.testing.neutral import neutral
from isoflop.testing.refusals import refused
from isoflop.testing.snapshot import Snapshot
from isoflop.testing.suites import Case, Shared, cases_of, run_all

TOLERANCE = 1e-5
"""What an occupant that changes nothing may change, relative to the largest output: sums in another order."""

Check = Callable[[ModelFamily, ModelProbe], None]


def check_model(
    family: str | ModelFamily, probe: ModelProbe | None = None, expected_failures: Mapping[str, str] | None = None
) -> None:
    """Run every check on a model family.

    Args:
        family: name, or the family itself.
        probe: its kinds of model and how to get one; by default what is known of built-in families.
        expected_failures: reasons by the name of checks that are known to fail.

    Raises:
        AssertionError: promises are broken; a line for each names family, check and finding.
        UserError: there is no such family, no probe for it, or no such check.
    """
    run_all(f"model family {_family(family).name}", model_checks(family, probe, expected_failures))


def model_checks(
    family: str | ModelFamily,
    probe: ModelProbe | Shared[ModelProbe] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[Case]:
    """The checks of a family, as pairs of an id and a call that raises; nothing is run or loaded before a call."""
    found = _family(family)
    made = Shared(lambda: model_probe(found.name)) if probe is None else probe
    shared = made if isinstance(made, Shared) else Shared.of(made)
    return cases_of(CHECKS, lambda: (found, shared.get()), expected_failures, shared.renew)


def check_declaration(family: ModelFamily, probe: ModelProbe) -> None:
    """A name, a docstring, and hooks with which it can train."""
    assert family.name, "it has no name"
    assert FAMILIES.get(family.name) is family, f"another family is registered as {family.name}"
    assert (type(family).__doc__ or "").strip(), "it has no docstring"
    odd = [hook for hook in family.trainable if not isinstance(hook, Hook)]
    assert not odd, f"trainable holds {odd[0]!r}, which is no Hook"


def check_members(family: ModelFamily, probe: ModelProbe) -> None:
    """Every member that is listed can be described, without weights, as one of this family."""
    members = family.members()
    assert len(set(members)) == len(members), "members are listed twice"
    for ref, options in [*((member, {}) for member in members), *probe.kinds]:
        info = family.info(ref, options)
        assert info.ref == ref, f"{ref} is described as {info.ref}"
        assert info.family == family.name, f"{ref} is of family {info.family}"
        assert info.n_params > 0, f"{ref} has N = {info.n_params}"
        assert info.dense_bits > 0, f"{ref} has elements of {info.dense_bits} bits"
        odd = [hook for hook in info.hooks if not isinstance(hook, Hook)]
        assert not odd, f"{ref} offers {odd[0]!r} among its hooks, which is no Hook"
        words = [word for word in info.offers if not isinstance(word, str) or not word]
        assert not words, f"{ref} offers {words[0]!r}, which is no word"


def check_versions(family: ModelFamily, probe: ModelProbe) -> None:
    """A description is the same every time, also in another process; its version is a word, and other options change it."""
    for ref, options in probe.kinds:
        info = family.info(ref, options)
        assert isinstance(info.version, str), f"{ref} has version {info.version!r}"
        assert info.version.strip(), f"{ref} has no version"
        assert family.info(ref, options) == info, f"{ref} is described otherwise the second time"
        assert pickle.loads(pickle.dumps(info)) == info, f"the description of {ref} does not survive a pickle"
        if options:
            assert family.info(ref, {}).version != info.version, f"{ref} has version {info.version} with any options"


def check_refusals(family: ModelFamily, probe: ModelProbe) -> None:
    """An unknown member and an unknown option are refused in one line that names the nearest right one."""
    for member in family.members():
        wrong = f"{member}-x"
        word = repr(nearest(wrong, family.members()))
        refused(partial(family.info, wrong, {}), UserError, word, f"the unknown member {wrong}")
    for ref, _ in probe.kinds:
        for option in dict(family.info(ref, {}).options):
            refused(
                partial(family.info, ref, {f"{option}x": 1}), UserError, repr(option), f"the unknown option {option}x"
            )
        refused(partial(family.info, ref, {"no-such-option": 1}), UserError, "no-such-option", "an unknown option")


def check_canonical_options(family: ModelFamily, probe: ModelProbe) -> None:
    """Writing a default down changes neither the canonical options nor the version; what differs from it is kept."""
    for ref, options in probe.kinds:
        plain = family.info(ref, {})
        written = family.canonical_options(ref, dict(plain.options))
        assert written == family.canonical_options(ref, {}) == {}, f"{ref}: defaults are options: {written}"
        assert family.info(ref, dict(plain.options)).version == plain.version, (
            f"{ref}: a written default changes the version"
        )
        kept = family.canonical_options(ref, options)
        assert kept == dict(options), f"{ref}: options {dict(options)} become {kept}"
        assert family.canonical_options(ref, kept) == kept, (
            f"{ref}: canonical options change when they are written down"
        )


def check_weights(family: ModelFamily, probe: ModelProbe) -> None:
    """The stage of the weights has the same key every time, another one with another seed; or lies on disk already."""
    for ref, options in probe.kinds:
        info = family.info(ref, options)
        stage, again, other = (family.weights(info, (), seed) for seed in (0, 0, 1))
        if stage is None:
            assert other is None, f"{ref} is trained with seed 1 only"
            continue
        assert again is not None, f"{ref} is trained only sometimes"
        assert stage.key == again.key, f"{ref}: the stage of the weights has another key each time"
        assert other is not None, f"{ref} is trained with seed 0 only"
        assert stage.key != other.key, f"{ref}: the seed does not name the weights"
        series = family.series(info, stage)
        assert series, f"{ref} belongs to a series of no checkpoint"
        assert series[-1][0].family == family.name, f"{ref} is of a series of family {series[-1][0].family}"


def check_trainable(family: ModelFamily, probe: ModelProbe) -> None:
    """A method that takes part in training at a hook the family cannot train with is refused in a line that names the hook."""
    for ref, options in probe.kinds:
        info = family.info(ref, options)
        if family.weights(info, (), 0) is None:
            continue
        for hook in info.hooks - family.trainable:
            method: Any = SimpleNamespace(
                name="suite", version="1", hooks=(hook,), trains_model=True, idle=lambda info: False
            )
            refused(
                partial(family.trained_with, info, (method,)),
                Infeasible,
                hook.name,
                f"{ref}: training with {hook.name}",
            )


def check_loaded(family: ModelFamily, probe: ModelProbe) -> None:
    """A loaded model is in evaluation mode, without gradients, and as large as its description says or larger."""
    for info, model in _models(family, probe):
        assert model.info == info, f"{info.ref} is loaded with another description"
        assert not any(part.training for part in model.module.modules()), f"{info.ref} is loaded in training mode"
        assert not any(p.requires_grad for p in model.module.parameters()), f"{info.ref} is loaded with gradients"
        count = sum(p.numel() for p in model.module.parameters())
        assert count >= info.n_params, f"{info.ref} has {count} parameters, N = {info.n_params}"
        assert not model.occupied, f"{info.ref} is loaded with {', '.join(map(str, model.occupied))} taken"


def check_hooks(family: ModelFamily, probe: ModelProbe) -> None:
    """Every hook can be occupied: by what changes nothing the outputs stay, and behind it the model is what it was."""
    for info, model in _models(family, probe):
        outputs = probe.outputs(model)
        before = Snapshot(model)
        for hook in sorted(model.info.hooks, key=str):
            with model.occupy(hook, _neutral(hook, model, probe)):
                difference = float((probe.outputs(model) - outputs).abs().max() / outputs.abs().max())
            assert difference <= TOLERANCE, (
                f"{info.ref}: an occupant of {hook} that changes nothing changes the outputs by {difference:.1e}"
            )
            before.compare(model)
        assert torch.equal(probe.outputs(model), outputs), f"{info.ref}: its outputs differ behind its occupants"


def check_hooks_behind_errors(family: ModelFamily, probe: ModelProbe) -> None:
    """A hook is free again behind an error, refused while it is taken, and refused where it is not offered."""
    for info, model in _models(family, probe):
        probe.outputs(model)  # Hugging Face installs hooks of its own on a model's first pass
        before = Snapshot(model)
        for hook in sorted(model.info.hooks, key=str):
            with suppress(_Interruption), model.occupy(hook, _neutral(hook, model, probe)):
                twice = partial(_enter, model, hook, _neutral(hook, model, probe))
                refused(twice, Infeasible, hook.name, f"{info.ref}: a second occupant of {hook}")
                raise _Interruption
            before.compare(model)
        stranger: Hook[Any] = Hook("no-such-hook", 0, "of no model")
        refused(
            partial(_enter, model, stranger, Occupant()), Infeasible, "no-such-hook", f"{info.ref}: a hook it has not"
        )


CHECKS: tuple[Check, ...] = (
    check_declaration,
    check_members,
    check_versions,
    check_refusals,
    check_canonical_options,
    check_weights,
    check_trainable,
    check_loaded,
    check_hooks,
    check_hooks_behind_errors,
)


class _Interruption(Exception):
    pass


def _family(family: str | ModelFamily) -> ModelFamily:
    return FAMILIES.get(family) if isinstance(family, str) else family


def _models(family: ModelFamily, probe: ModelProbe) -> Iterator[tuple[ModelInfo, Model]]:
    for ref, options in probe.kinds:
        info = family.info(ref, options)
        yield info, probe.load(info)


def _neutral(hook: Hook[Any], model: Model, probe: ModelProbe) -> Any:
    make = probe.neutral.get(hook)
    found = make(model) if make is not None else neutral(hook, model)
    assert found is not None, f"the suite knows no neutral occupant of {hook}: give one in ModelProbe.neutral"
    return found


def _enter(model: Model, hook: Hook[Any], occupant: Any) -> None:
    with model.occupy(hook, occupant):
        pass
