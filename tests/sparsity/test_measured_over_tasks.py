"""What a row says of active neurons is the measure over the task's examples: not one pass, no padding, nothing else that ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.activation_sparsity.fat import MlpFat
from isoflop.methods.activation_sparsity.probe import ActivationProbe
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.hooks.feed_forward import FEED_FORWARD, mlps_of
from isoflop.models.lm import LmModel
from isoflop.models.prompting import answer_batch
from isoflop.sweep.resolve import resolve
from isoflop.tasks.base import TASKS
from isoflop.tasks.prompt_qa import PromptQa, ReaderGate, context_of, prompts_of


@torch.enable_grad()
def brief_reader(ctx: FolderContext, ref: str, **options: Any) -> LmModel:
    """A member of the tiny family after two steps of training."""
    family = family_of(ref)
    info = family.info(ref, {"steps": 2, "batch": 2, **options})
    model = family.load(info, family.weights(info, (), 0), ctx)
    assert isinstance(model, LmModel)
    return model


class Count:
    """Neurons that are not zero where they enter the down projections, counted by hooks of the test's own."""

    def __init__(self) -> None:
        self.shares: list[Tensor] = []

    @property
    def share(self) -> float:
        """Over the tokens and layers of all passes, each the same."""
        return float(torch.cat(self.shares).mean())

    @contextmanager
    def watching(self, model: LmModel) -> Iterator[None]:
        """Behind the masks of a method that is applied already."""

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.shares.append((args[0] != 0).double().mean(-1).flatten())

        with ExitStack() as stack:
            for mlp in mlps_of(model.decoder):
                stack.callback(mlp.down.register_forward_pre_hook(note).remove)
            yield


@torch.no_grad()
def test_prompt_qa_measures_every_prompt_and_no_other_pass(sparsity_ctx: FolderContext) -> None:
    reader = brief_reader(sparsity_ctx, "tiny-lm/facts-d64")
    task = PromptQa(examples=11, shard=4, gate=1.0, documents=2, facts=3, filler=4)
    method = MlpFat(active=0.3, score="value", n_calib=4)
    squeezer = build("prompt-random", {"rate": 0.5})  # prompts of different lengths, and a gate with whole documents
    with squeezer.apply(reader, None), method.apply(reader, method.calibrate(reader, sparsity_ctx, 0)):
        with pytest.MonkeyPatch.context() as patch:  # the gate runs, and is overruled: the reader guesses
            patch.setattr(PromptQa, "pass_gate", _gate_overruled)
            shards = list(task.evaluate(reader, sparsity_ctx, 0))
        task.measure(reader, sparsity_ctx)
        found = method.footprint(reader, sparsity_ctx)["activation_ratio"]
        questions = [task.question(number) for number in range(11)]
        prompts = prompts_of(reader, questions, [context_of(reader, question).text for question in questions])
        own, each = Count(), []
        for prompt in prompts:  # one by one, so that nothing is padded
            one = Count()
            with own.watching(reader), one.watching(reader):
                reader.logits(answer_batch([prompt]))
            each.append(one.share)
    assert len({prompt.length for prompt in prompts}) > 1
    assert found == pytest.approx(own.share, rel=1e-4)
    noted = np.concatenate([shard.metrics["activation_ratio"] for shard in shards])
    ids = np.concatenate([shard.ids for shard in shards])
    for last in (ids[-1], 0):  # the last prompt that is scored, and the one that is measured
        assert abs(found - each[last]) > 3e-3 * found
    assert noted == pytest.approx([each[i] for i in ids], rel=1e-3)


_GATE = PromptQa.pass_gate


def _gate_overruled(task: PromptQa, reader: LmModel) -> None:
    with suppress(ReaderGate):
        _GATE(task, reader)


@torch.no_grad()
def test_generation_measures_the_prompt_and_every_step(sparsity_ctx: FolderContext) -> None:
    model = brief_reader(sparsity_ctx, "tiny-lm/text-d32", act="relu", vocabulary=400, context=64, layers=2)
    task = TASKS.get("generation-latency")(prompt=12, new=6, batch=2, examples=2)
    method, own = build("mlp-exact-zero", {}), Count()
    with method.apply(model, None):
        list(task.evaluate(model, sparsity_ctx, 3))
        task.measure(model, sparsity_ctx)
        found = method.footprint(model, sparsity_ctx)["activation_ratio"]
        with own.watching(model):
            model.greedy(task._prompt(model, 3), 6)
    assert sum(len(share) for share in own.shares) == 2 * 2 * (12 + 5)  # layers, rows, tokens
    assert found == pytest.approx(own.share, rel=1e-9)
    assert found != pytest.approx(float(torch.cat(own.shares[-2:]).mean()), rel=1e-3)  # the last step's


@pytest.mark.parametrize("task", ["byte-completion", "byte-boundary"])
def test_tasks_whose_passes_hold_no_example_are_refused_in_one_line(task: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve({"name": "s", "models": ["tiny-lm/text-d64"], "methods": ["mlp-topk"], "tasks": [task]})
    assert f"task {task} does not ask for the feed_forward of a model, where method mlp-topk acts" in str(caught.value)
    assert "bits-per-byte" in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_what_nobody_observed_is_not_measured_and_nothing_counts_twice() -> None:
    probe = ActivationProbe()
    method = build("mlp-topk", {})
    with method.apply(probe.model, None):
        with pytest.raises(ValueError, match="method mlp-topk: no pass was observed"):
            method.footprint(probe.model, probe.ctx)
        probe.outputs([0])
        with pytest.raises(ValueError, match="no pass has been run since"):
            probe.model.occupant(FEED_FORWARD).observed()  # type: ignore[union-attr]
        assert method.footprint(probe.model, probe.ctx)["activation_ratio"] == pytest.approx(0.3, abs=0.02)
