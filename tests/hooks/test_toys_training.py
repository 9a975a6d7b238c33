"""Methods that take part in trainings: inside decoders and vision transformers, by stages, with several budgets a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from toys import HalfTheSamples, Nested, SkipsLayers, Slims, Stages

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import METHODS, Method, build
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.residual import RESIDUAL, ResidualPolicy
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.models.hooks.visual_tokens import AllTokens
from isoflop.models.hooks.waveform import WAVEFORM
from isoflop.models.lm import LmModel
from isoflop.models.training.loop import Keeper, Unclipped, fit
from isoflop.models.training.taught import Teacher
from isoflop.models.training.taught_stage import TaughtStage
from isoflop.models.training.teaching import followed
from isoflop.models.vit import VitModel
from isoflop.models.worlds import recall_world
from isoflop.testing.model_probes import untrained
from isoflop.testing.snapshot import Snapshot

LM = ("tiny-lm/recall-d64", {"steps": 12, "batch": 4, "length": 24})
VIT = ("tiny-vit/c48", {"steps": 6, "batch": 8})
LLAVA = ("tiny-llava/d24", {"steps": 9, "tower_steps": 4, "reading_scenes": 32, "coarse_scenes": 32})


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    return FolderContext(tmp_path_factory.mktemp("toys"))


def trained(ctx: FolderContext, member: tuple[str, dict[str, Any]], *methods: Method) -> tuple[Model, list[Any]]:
    """A member trained with methods in place, and what each of them is applied with."""
    ref, options = member
    family = family_of(ref)
    info = family.info(ref, options)
    weights = family.weights(info, methods, 0)
    assert weights is not None
    taking = family.trained_with(info, methods)
    stages = [method.prepare(info, weights, 0, taking) for method in methods]
    return family.load(info, weights, ctx), [None if stage is None else ctx.get(stage) for stage in stages]


def differing(a: nn.Module, b: nn.Module) -> int:
    """Parameters that are not the same."""
    return sum(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@torch.no_grad()
def lm_logits(model: LmModel) -> Tensor:
    import numpy as np

    return model.supervised(recall_world.copying(np.random.default_rng(3), 4, 12, 2, 0))[0]


def test_a_method_that_trains_with_a_decoder_and_skips_layers_for_some_tokens(ctx: FolderContext) -> None:
    method = SkipsLayers(0.5)
    model, (prepared,) = trained(ctx, LM, method)
    plain, _ = trained(ctx, LM)
    assert isinstance(model, LmModel)
    assert isinstance(prepared, Checkpoint)
    assert differing(model.module, plain.module) > 10
    learned, initial = prepared.state("toy-skip"), method.untrained(model.info, 0)
    assert learned is not None
    assert initial is not None
    assert any(not torch.equal(learned[name], t) for name, t in initial.state_dict().items())
    before = lm_logits(model)
    snapshot = Snapshot(model)
    with method.apply(model, prepared):
        inside = lm_logits(model)
        assert (
            model.served_bytes() == model.weight_bytes() + 2 * 2 * 65
        )  # two routers of 64 weights and a bias, 16 bits
    snapshot.compare(model)
    assert torch.equal(lm_logits(model), before)
    assert not torch.allclose(inside, before, atol=1e-3)
    with SkipsLayers(0.0).apply(model, prepared):  # nobody skips, and the gates still count
        assert not torch.allclose(lm_logits(model), inside, atol=1e-3)


def test_training_a_vision_transformer_with_a_method_that_trains_inside_it(ctx: FolderContext) -> None:
    """On earlier versions the method was ignored: the same weights came out."""
    method = Slims(8)
    model, (prepared,) = trained(ctx, VIT, method)
    plain, _ = trained(ctx, VIT)
    assert isinstance(model, VitModel)
    assert differing(model.module, plain.module) > 10
    with method.apply(model, prepared):
        model.logits(torch.rand(2, 3, 32, 32))
        run = model.occupant(VISION_BLOCKS)
        assert run is not None
        assert run.state is not None
        assert run.state.patches == 8


def test_its_teacher_is_the_model_trained_without_it() -> None:
    family = family_of(VIT[0])
    info = family.info(*VIT)
    stage = family.weights(info, (Slims(8),), 0)
    assert isinstance(stage, TaughtStage)
    assert stage.teacher == family.weights(info, (), 0)
    assert stage.teacher in stage.deps()


def test_what_a_family_cannot_train_with_is_refused_at_plan() -> None:
    for ref, method, named in (
        ("tiny-vit/c48", SkipsLayers(), "method toy-skip takes part in training at residual"),
        (
            "tiny-vit/c48",
            build("avgpool", {}),
            "visual_tokens, and models of the family tiny-vit are trained with methods at: vision_blocks",
        ),
    ):
        family = family_of(ref)
        with pytest.raises(Infeasible, match=named):
            family.weights(family.info(ref, {}), (method,), 0)


def test_compression_that_changes_over_the_steps_of_a_training(ctx: FolderContext) -> None:
    seen = [method.tokens for step in range(9) for _, method in Stages().budgets(step, 9, 0)]
    assert seen == [4, 4, 4, 9, 9, 9, 36, 36, 36]
    stages, _ = trained(ctx, LLAVA, Stages(4))
    whole, _ = trained(ctx, LLAVA, build("none", {}))
    assert differing(stages.module, whole.module) > 10
    family = family_of(LLAVA[0])
    info = family.info(*LLAVA)
    assert family.weights(info, (Stages(4),), 0) == family.weights(info, (Stages(36),), 0)


def test_nested_budgets_have_the_mean_of_their_losses(ctx: FolderContext) -> None:
    """One step: the loss is the mean of the three, each of which is what training at that budget alone begins with."""
    one = (LLAVA[0], {**LLAVA[1], "steps": 1})
    nested, each = first_loss(ctx, one, Nested()), [first_loss(ctx, one, Only(tokens)) for tokens in (4, 9, 36)]
    assert nested == pytest.approx(sum(each) / 3, rel=1e-5)


class Only(Stages):
    """One budget in every step."""

    def budgets(self, step: int, steps: int, seed: int) -> Any:
        return ((1.0, self),)

    def as_trained(self) -> Only:
        return self


def first_loss(ctx: FolderContext, member: tuple[str, dict[str, Any]], method: Method) -> float:
    family = family_of(member[0])
    info = family.info(*member)
    stage = family.weights(info, (method,), 0)
    assert stage is not None
    return float(ctx.get(stage).log["final_loss"])


class SoundModel(Model):
    """Hears the mean loudness."""

    def __init__(self) -> None:
        self.info = ModelInfo("toy/sound", "toy", "1", 1, frozenset({WAVEFORM}))
        self.module = nn.Identity()

    def hear(self, sound_BCT: Tensor, ids_B: Tensor) -> Tensor:
        codec = self.occupant(WAVEFORM)
        return (sound_BCT if codec is None else codec.through(sound_BCT, ids_B)).square().mean((1, 2))


class Followed(Only):
    """Follows the model as it is with all tokens, and nothing else."""

    name = "toy-followed"

    @property
    def teacher(self) -> Teacher:
        return Teacher("dense", weight=1.0)


class Charged(Only):
    """Every step costs 7 more."""

    name = "toy-charged"

    def extra_loss(self, model: Model, occupants: Any) -> Tensor:
        return torch.tensor(7.0)


class Frozen(Only):
    """The language model does not learn."""

    name = "toy-frozen"

    def trains(self, parameter: str) -> bool:
        return "language_model" not in parameter


def test_what_a_visual_token_method_asks_of_its_training_is_done(ctx: FolderContext) -> None:
    """Its family has a faster loop for plain ones, which knows no teachers, no extra losses and no frozen parameters."""
    one = (LLAVA[0], {**LLAVA[1], "steps": 1})
    plain = first_loss(ctx, one, Only(9))
    assert first_loss(ctx, one, Charged(9)) == pytest.approx(plain + 7, rel=1e-5)
    assert first_loss(ctx, one, Followed(36)) == pytest.approx(0, abs=1e-5)
    frozen, untouched = (
        trained(ctx, LLAVA, Frozen(9))[0],
        trained(ctx, (LLAVA[0], {**LLAVA[1], "steps": 1}), Frozen(9))[0],
    )
    language = [n for n, _ in frozen.module.named_parameters() if "language_model" in n]
    assert language
    now, begun = dict(frozen.module.named_parameters()), dict(untouched.module.named_parameters())
    assert all(torch.equal(now[n], begun[n]) for n in language)
    assert any(not torch.equal(now[n], begun[n]) for n in now if n not in language)


def test_what_follows_a_teacher_is_the_mean_of_loss_and_divergence() -> None:
    """(1 - w) loss + w T² KL(teacher || student) at temperature T."""
    student_SW, told_SW = (
        torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]),
        torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
    )
    p, q = (told_SW / 2).softmax(-1), (student_SW / 2).softmax(-1)
    wanted = 0.7 * 5.0 + 0.3 * 4 * float((p * (p / q).log()).sum(-1).mean())
    found = followed(torch.tensor(5.0), student_SW, told_SW, Teacher("dense", weight=0.3, temperature=2.0))
    assert float(found) == pytest.approx(wanted)


class Noisy(SkipsLayers):
    """Draws in every step, and is stopped at one."""

    name = "toy-noisy"
    stop: ClassVar[int | None] = None
    steps: ClassVar[list[int]] = []

    @property
    def learning_rate(self) -> float:
        return 0.05

    def budgets(self, step: int, steps: int, seed: int) -> Any:
        if step == Noisy.stop:
            raise KeyboardInterrupt
        Noisy.steps.append(step)
        return ((1.0, self),)

    def extra_loss(self, model: Model, occupants: Any) -> Tensor:
        return torch.stack([(p * torch.randn(p.shape)).sum() for p in occupants[RESIDUAL].tensors()]).sum()


def test_a_stage_that_is_stopped_goes_on_bit_for_bit_whatever_was_drawn_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(LM[0])
    info = family.info(*LM)
    stage = family.weights(info, (Noisy(),), 0)
    assert stage is not None
    torch.manual_seed(1)
    whole = FolderContext(tmp_path / "whole").get(stage)
    monkeypatch.setattr(Keeper.__init__, "__defaults__", (0.0,))
    monkeypatch.setattr(Noisy, "stop", 3)
    with pytest.raises(KeyboardInterrupt):
        FolderContext(tmp_path / "parts").get(stage)
    monkeypatch.setattr(Noisy, "stop", None)
    Noisy.steps.clear()
    torch.manual_seed(2)
    parts = FolderContext(tmp_path / "parts").get(stage)
    assert Noisy.steps[0] == 3
    for name in ("model", Noisy.name):
        one, other = whole.state(name), parts.state(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    begun = Noisy().untrained(info, 0)
    own = Noisy().module_of(family.load(info, stage, FolderContext(tmp_path / "whole")), whole)
    assert begun is not None
    assert own is not None
    kept = whole.state(Noisy.name)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in own.state_dict().items())
    assert differing(own, begun) == len(kept)


def test_the_order_of_methods_does_not_matter_and_none_is_nobody() -> None:
    family = family_of(LLAVA[0])
    info, skip, pool = family.info(*LLAVA), SkipsLayers(), build("avgpool", {"tokens": 4})
    assert family.weights(info, (skip, pool), 0) == family.weights(info, (pool, skip), 0)
    assert family.weights(info, (skip, build("none", {})), 0) == family.weights(info, (skip,), 0)


def test_a_training_in_which_nothing_learns_is_refused(ctx: FolderContext) -> None:
    class Nothing(Only):
        name = "toy-nothing"

        def trains(self, parameter: str) -> bool:
            return False

    with pytest.raises(Infeasible, match="nothing learns: toy-nothing let no parameter"):
        trained(ctx, (LLAVA[0], {**LLAVA[1], "steps": 1}), Nothing(9))


class Stores(Occupant):
    """Holds the head in a form of its own."""

    @property
    def stored(self) -> dict[str, float]:
        return {"lm_head.weight": 1.0}


class StoresToo(ResidualPolicy, Stores):
    """The same, elsewhere."""

    def update(self, layer: int, before_BTd: Tensor, after_BTd: Tensor) -> Tensor:
        return after_BTd


def test_a_parameter_is_compressed_once_and_what_occupants_hold_is_resident() -> None:
    model = untrained("tiny-lm/recall-d64")
    bare = model.resident_bytes()
    with (
        model.occupy(MATRICES, Stores()),
        pytest.raises(
            Infeasible, match=r"lm_head.weight is compressed twice: by what sits in matrices and in residual"
        ),
        model.occupy(RESIDUAL, StoresToo()),
    ):
        pass
    assert model.occupied == ()
    method = SkipsLayers()
    routers = method.untrained(model.info, 0)
    assert routers is not None
    with method.apply(model, routers):
        assert model.resident_bytes() == bare + 4 * sum(p.numel() for p in routers.parameters())


def test_an_occupant_in_a_hook_that_is_not_named_is_refused(ctx: FolderContext) -> None:
    class Elsewhere(SkipsLayers):
        hooks = (ATTENTION,)

    model = untrained("tiny-lm/recall-d64")
    method = Elsewhere()
    with (
        pytest.raises(UserError, match="an occupant for residual, and names attention"),
        method.apply(model, method.untrained(model.info, 0)),
    ):
        pass
    assert model.occupied == ()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"learning_rate": lambda self: 1.0}, "learning_rate is a function; write @property above it"),
        ({"occupants": Method.occupants}, "does not say what sits in its hooks"),
        (None, "is no dataclass; write @dataclass"),
    ],
)
def test_classes_that_would_go_wrong_later_are_refused_when_they_are_built(
    broken: dict[str, Any] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    METHODS.names()
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    cls = type("Broken", (SkipsLayers,), {"__annotations__": {}, **(broken or {})})
    METHODS.register("broken")(cls if broken is None else dataclass(frozen=True)(cls))
    with pytest.raises(UserError, match=f"method broken: .*{message}"):
        build("broken", {})


def test_a_codec_on_waveforms() -> None:
    model = SoundModel()
    sound_BCT = torch.sin(torch.arange(2 * 300).view(2, 1, 300) / 7.0) * 0.7
    bare = model.hear(sound_BCT, torch.arange(2))
    with HalfTheSamples().apply(model, None):
        coded = model.hear(sound_BCT, torch.arange(2))
        run = model.occupant(WAVEFORM)
        assert run is not None
        found = run.bytes()
        assert (run.through(sound_BCT) - sound_BCT).abs().max() <= 129 / 32767
    assert (found.examples, found.coded, found.header, found.raw, found.elements) == (2, 301, 1, 600, 300)
    assert not torch.equal(coded, bare)
    assert torch.allclose(coded, bare, atol=0.01)
    assert model.occupied == ()


def test_a_training_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Bit for bit the weights of one that was not, curriculum included."""
    recipe = Unclipped(8)

    def run(stop: int | None, keeper: Keeper | None) -> tuple[Tensor, list[float], list[float]]:
        weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        told: list[float] = []

        def batches() -> Any:
            for step in range(8):
                if step == stop:
                    raise KeyboardInterrupt
                yield torch.tensor([step + 1.0, 2.0, float(len(told))])

        losses = fit(
            [weight],
            recipe,
            batches(),
            lambda x: (weight * x).square().sum(),
            lr=0.1,
            learned=told.append,
            keeper=keeper,
        )
        return weight.detach(), losses, told

    whole, losses, told = run(None, None)
    with pytest.raises(KeyboardInterrupt):
        run(5, Keeper(tmp_path, every=0.0))
    again, losses_again, told_again = run(None, Keeper(tmp_path, every=0.0))
    assert torch.equal(again, whole)
    assert losses_again == losses
    assert told_again == told


def test_buffers_that_change_in_training_go_on_where_they_were(tmp_path: Path) -> None:
    def run(stop: int | None, keeper: Keeper | None) -> Tensor:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(3).train()
        batches = torch.randn(8, 4, 3)[:stop]
        if keeper is not None:
            keeper.modules = [norm]
        fit(norm.parameters(), Unclipped(8), batches, lambda x: norm(x).square().sum(), lr=0.1, keeper=keeper)
        return torch.cat([norm.running_mean, norm.running_var, norm.weight.detach()])  # type: ignore[list-item]

    whole = run(None, None)
    assert not torch.equal(run(5, Keeper(tmp_path, every=0.0)), whole)
    assert torch.equal(run(None, Keeper(tmp_path, every=0.0)), whole)


@pytest.mark.parametrize("damage", ["torn", "empty", "of another training"])
def test_a_damaged_state_of_a_training_is_left_and_the_training_begins_anew(damage: str, tmp_path: Path) -> None:
    def run(width: int) -> list[float]:
        weight = nn.Parameter(torch.ones(width))
        steps = torch.arange(4.0)
        return fit(
            [weight], Unclipped(4), steps, lambda x: (weight * x).sum(), lr=0.1, keeper=Keeper(tmp_path, every=0.0)
        )

    whole = run(3)
    (state,) = tmp_path.iterdir()
    if damage == "of another training":
        assert run(5) != whole
    else:
        state.write_bytes(state.read_bytes()[:100] if damage == "torn" else b"")
    assert run(3) == whole


def test_what_trains_without_a_method_is_named_like_the_method_that_does_nothing() -> None:
    """So that a cell trained for `none` serves jobs without any method, and the other way round."""
    assert AllTokens().as_field() == build("none", {}).as_field()


def test_hooks_are_told_apart_by_name_and_taken_once(ctx: FolderContext) -> None:
    model, (prepared,) = trained(ctx, LM, SkipsLayers())
    with SkipsLayers().apply(model, prepared):
        assert model.occupied == (RESIDUAL,)
        with pytest.raises(Infeasible, match="residual is taken already"), SkipsLayers().apply(model, prepared):
            pass
        with build("h2o", {}).apply(model, None):
            assert model.occupied == (RESIDUAL, ATTENTION)
    assert model.occupied == ()
    with pytest.raises(Infeasible, match="needs waveform, which model"), HalfTheSamples().apply(model, None):
        pass
