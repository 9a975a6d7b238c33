"""What the family ``hf`` makes of an architecture: exact, or refused in one line; anything else is a fault.

Every architecture is built small with weights that attend unevenly, saved, and read back as a user's checkpoint is. What it computes then
is compared with transformers' own module, which sees each text alone, without padding and in one pass. ``CHECKS`` names
what is compared; a new promise (a hook, say) is one more function there.

Shape suffixes: B rows, T tokens, W vocabulary, H query heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.checkpoints.source import brief
from isoflop.models.decoder_model import decoder_of, layers_of
from isoflop.models.family import family_of
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT, Before, PromptPolicy
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.models.quiet import no_progress_bars
from isoflop.models.taps import ActivationTap, Tap, attention_in
from isoflop.testing.architectures.small import RESERVED, WORDS, Architecture, NotSmall, small_config

LENGTH, PADS, PROMPT, STEPS, LEARNED = 13, 3, 7, 3, 2
TOLERANCE = 1e-4
"""Largest difference, relative to the largest number compared; float32 rounds to 1e-6 or so in two layers."""
EXACT = "exact"
Check = Callable[[Any], None]


class Wrong(AssertionError):
    """A result that is neither right nor refused; the text says what and by how much."""


@dataclass(frozen=True)
class Finding:
    """What became of one check on one architecture.

    Attributes:
        verdict: ``exact``, ``refused``, ``wrong``, or ``not built`` where no small model can be made.
        why: the line that refuses, what is wrong, or what stands in the way.
    """

    verdict: str
    why: str = ""

    @property
    def fine(self) -> bool:
        """Whether nobody can be misled."""
        return self.verdict != "wrong"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.why}" if self.why else self.verdict


Findings = Mapping[str, Finding]
"""By the name of the check."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A small checkpoint as a user would name it.

    Attributes:
        folder: in ``save_pretrained`` form.
        stock: transformers' own module of it.
        model: ours.
    """

    folder: Path
    stock: Any
    model: LmModel

    @cached_property
    def batch(self) -> LmBatch:
        """Two texts, the second shorter and padded on the left."""
        ids_BT = torch.randint(RESERVED, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        valid_BT = torch.arange(LENGTH)[None] >= torch.tensor([[0], [PADS]])
        return LmBatch(ids_BT * valid_BT, torch.zeros_like(ids_BT), PROMPT, valid_BT)

    @cached_property
    def alone(self) -> list[Tensor]:
        """Stock logits (T, W) of each text by itself."""
        ids_BT, valid_BT = self.batch.ids_BT, self.batch.valid_BT
        assert valid_BT is not None
        return [
            self.stock(input_ids=row[real][None], use_cache=False).logits[0]
            for row, real in zip(ids_BT, valid_BT, strict=True)
        ]

    def compare(self, what: str, logits_BTW: Tensor) -> None:
        """Raise Wrong unless logits of the batch are the stock ones."""
        for number, expected_TW in enumerate(self.alone):
            same(what, logits_BTW[number, -len(expected_TW) :], expected_TW)


def same(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise Wrong unless two tensors agree."""
    if found.shape != expected.shape:
        raise Wrong(f"{what} has the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE:  # NaN is wrong, too
        raise Wrong(f"{what} is off by {off:.2g} of the largest")


def one_pass(subject: Subject) -> None:
    """Stock logits: as it comes, with the attention occupied, with a prompt in it, with and without padding."""
    batch, model = subject.batch, subject.model
    bare = LmBatch(batch.ids_BT[:1], batch.targets_BT[:1], PROMPT)
    plain = LmBatch(batch.ids_BT, batch.targets_BT, 0, batch.valid_BT)
    subject.compare("the model as it comes", model.logits(plain))
    with build("full-cache", {}).apply(model, None):
        subject.compare("a pass without a prompt", model.logits(plain))
        subject.compare("one pass", model.logits(batch))
        same("one pass over one text", model.logits(bare)[0], subject.alone[0])
    subject.compare("the model as it was", model.logits(plain))
    for every in (1, 3):
        targets_1T = torch.full_like(bare.ids_BT, NOT_SCORED)
        targets_1T[:, ::every] = 1
        asked = replace(bare, targets_BT=targets_1T, prefix=0)
        found_SW = torch.cat([logits_SW for logits_SW, _ in model.scored_logits(asked, most=5 * WORDS)])
        same(f"the head on one position of {every}", found_SW, subject.alone[0][::every])


def step_by_step(subject: Subject) -> None:
    """The same, a token at a time; and in the loop that serves, whose cache counts tokens."""
    model, batch = subject.model, subject.batch
    with build("full-cache", {}).apply(model, None):
        subject.compare("step by step", model.stepwise_logits(batch))
        prompt_BT = batch.ids_BT[:1, :PROMPT]
        found_BT = torch.cat((prompt_BT, model.greedy(prompt_BT, STEPS)), dim=1)
    logits_TW = subject.stock(input_ids=found_BT, use_cache=False).logits[0, PROMPT - 1 : -1]
    chosen_T = logits_TW.gather(1, found_BT[0, PROMPT:, None])[:, 0]  # a near-tie may fall either way
    same("the most likely token while serving", chosen_T, logits_TW.amax(-1))


def tap(subject: Subject) -> None:
    """Attention of the last token in each layer, read off the running model, is what eager attention gives."""
    model, batch = subject.model, subject.batch
    assert batch.valid_BT is not None
    for number, layer in enumerate(model.decoder_layers):
        with Tap(attention_in(layer)).listening() as tapped, entering(layer) as kwargs:
            model.logits(LmBatch(batch.ids_BT, batch.targets_BT, 0, batch.valid_BT))
            found_BHT = tapped.last_row(kwargs.get("position_embeddings"), batch.valid_BT)
        for row, real_T in enumerate(batch.valid_BT):
            expected_HT = eager_rows(subject.stock, number, batch.ids_BT[row][real_T])
            same(f"the tapped attention of layer {number}", found_BHT[row][:, real_T], expected_HT)


class _Embeddings(PromptPolicy):
    """Given ones, of each row its own."""

    def __init__(self, embeds_BNd: Tensor) -> None:
        self.embeds_BNd, self.tokens = embeds_BNd, embeds_BNd.shape[1]

    def begin(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Before:
        """Of as many rows as the pass has."""
        return Before(self.embeds_BNd[: len(ids_BT)])


def learned_prompt(subject: Subject) -> None:
    """Embeddings of the tokens that a text begins with, put before the rest of it, are those tokens."""
    model, batch = subject.model, subject.batch
    assert batch.valid_BT is not None
    if SOFT_PROMPT not in model.info.hooks:
        raise Infeasible(f"it does not offer {SOFT_PROMPT.name}{model.info.why_not([SOFT_PROMPT.name])}")
    starts = torch.tensor([0, PADS])
    taken_BN = starts[:, None] + torch.arange(LEARNED)
    embeds_BNd = model.decoder.get_input_embeddings()(batch.ids_BT.gather(1, taken_BN))
    kept_BT = torch.ones_like(batch.valid_BT).scatter(1, taken_BN, False)
    ids_BT, valid_BT = (x_BT[kept_BT].reshape(2, -1) for x_BT in (batch.ids_BT, batch.valid_BT))
    rest = LmBatch(ids_BT, torch.zeros_like(ids_BT), PROMPT - LEARNED, valid_BT)
    expected = [logits_TW[LEARNED:] for logits_TW in subject.alone]

    def compare(what: str, logits_BTW: Tensor) -> None:
        for row, expected_TW in enumerate(expected):
            same(what, logits_BTW[row, -len(expected_TW) :], expected_TW)

    with model.occupy(SOFT_PROMPT, _Embeddings(embeds_BNd)):
        compare("one pass behind embeddings", model.logits(replace(rest, prefix=0)))
        served_BT = model.greedy(ids_BT[:1, :PROMPT], STEPS)
        with build("full-cache", {}).apply(model, None):
            compare("one pass behind embeddings, with a prompt", model.logits(rest))
            compare("step by step behind embeddings", model.stepwise_logits(rest))
    found_BT = torch.cat((batch.ids_BT[:1, : PROMPT + LEARNED], served_BT), dim=1)
    logits_TW = subject.stock(input_ids=found_BT, use_cache=False).logits[0, PROMPT + LEARNED - 1 : -1]
    chosen_T = logits_TW.gather(1, served_BT[0, :, None])[:, 0]  # a near-tie may fall either way
    same("the most likely token while serving behind embeddings", chosen_T, logits_TW.amax(-1))


CHECKS: dict[str, Check] = {
    "one pass": one_pass,
    "step by step": step_by_step,
    "tap": tap,
    "learned prompt": learned_prompt,
}


@contextmanager
def entering(layer: Any) -> Iterator[dict[str, Any]]:
    """What a layer's last pass inside the block was called with."""
    seen: dict[str, Any] = {}
    handle = layer.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def eager_rows(
    stock: Any, layer: int, ids_T: Tensor, decoder: Callable[[Any], Any] = decoder_of, **inputs: Any
) -> Tensor:
    """Attention (H, T) of a text's last token in a layer, by transformers' own eager attention: what multiplies the values.

    Args:
        decoder: finds it in ``stock``.
        inputs: besides the text.

    Raises:
        Wrong: it does not give its weights.
    """
    given: list[Any] = []
    inner = decoder(stock)
    before, attention = inner.config._attn_implementation, attention_in(layers_of(inner)[layer])
    handle = attention.register_forward_hook(lambda m, args, output: given.append(output))
    sinks = getattr(attention, "sinks", None)
    with ExitStack() as taps:
        taps.callback(handle.remove)
        taps.callback(inner.set_attn_implementation, before)
        ends: list[Any] = []
        if sinks is not None:
            ends = [
                ActivationTap(attention.get_submodule("v_proj"), "output"),
                ActivationTap(attention.get_submodule("o_proj")),
            ]
        around = [taps.enter_context(tap.read()) for tap in ends]
        inner.set_attn_implementation("eager")
        stock(input_ids=ids_T[None], use_cache=False, output_attentions=True, **inputs)
    weights = given[-1][1] if isinstance(given[-1], tuple) and len(given[-1]) > 1 else None
    if weights is None or weights.dim() != 4:
        raise Wrong("the tap answers, and eager attention gives no weights to compare with")
    rows_HT: Tensor = weights[0, :, -1]
    return rows_HT * _share(rows_HT, *(seen[-1][0] for seen in around)) if around else rows_HT


def _share(rows_HT: Tensor, values_TF: Tensor, out_TF: Tensor) -> Tensor:
    """What of the weights is left to the values beside a sink, (H, 1): Granite says them before the sink has taken its share."""
    heads = rows_HT.shape[0]
    out_HD = out_TF[-1].unflatten(-1, (heads, -1))
    values_GTD = values_TF.unflatten(-1, (-1, out_HD.shape[-1])).transpose(0, 1)
    whole_HD = (rows_HT[:, None] @ values_GTD.repeat_interleave(heads // len(values_GTD), dim=0))[:, 0]
    return (out_HD * whole_HD).sum(-1, keepdim=True) / (whole_HD * whole_HD).sum(-1, keepdim=True)


def examine(
    architecture: Architecture, folder: Path, checks: Mapping[str, Check] | None = None, **changes: Any
) -> Findings:
    """Build an architecture small in an empty folder, and try every check on it.

    Args:
        changes: fields of its config that shall have other values.
    """
    checks = CHECKS if checks is None else checks
    source = folder / "model"
    try:
        config = small_config(architecture.model_type, **changes)
        stock = _stock(config)
    except NotSmall as error:
        return _unbuilt(architecture, source, checks, error)
    with no_progress_bars():
        stock.save_pretrained(source)
    return examined(f"hf:{source}", checks, lambda: _subject(source, stock, folder))


def _unbuilt(architecture: Architecture, source: Path, checks: Mapping[str, Check], error: NotSmall) -> Findings:
    """What is refused by its config alone is refused, though there is no module of it."""
    from transformers import CONFIG_MAPPING

    not_built = dict.fromkeys(checks, Finding("not built", str(error)))
    try:
        config = CONFIG_MAPPING[architecture.model_type]()
        config.architectures = [architecture.module]
        config.save_pretrained(source)
    except Exception:  # transformers' own: a config that wants what no default gives
        return not_built
    try:
        family_of("hf:").info(f"hf:{source}", {})
    except UserError as refused:
        return dict.fromkeys(checks, _refused(f"hf:{source}", refused))
    except Exception as fault:  # ours: a config that cannot be described has to be refused in a line
        return dict.fromkeys(checks, Finding("wrong", f"raises {type(fault).__name__}: {fault}"))
    return not_built


def _stock(config: Any) -> Any:
    """Transformers' module of a config, with weights large enough to attend unevenly."""
    from transformers import AutoModelForCausalLM

    try:
        return redrawn(AutoModelForCausalLM.from_config(config))
    except Exception as error:
        raise NotSmall(f"transformers builds no module of its small config ({brief(error)})") from error


def redrawn(module: Any) -> Any:
    """A module in evaluation mode with weights large enough to attend unevenly, the same ones every time."""
    rng = torch.Generator().manual_seed(0)
    module = module.eval().requires_grad_(False)
    for weight in module.parameters():
        noise = torch.randn(weight.shape, generator=rng, dtype=torch.float32).to(weight.dtype)
        weight.copy_(0.2 * noise if weight.dim() > 1 else weight + 0.1 * noise)
    return module


def _subject(source: Path, stock: Any, folder: Path) -> Subject:
    ref = f"hf:{source}"
    family = family_of(ref)
    model = family.load(family.info(ref, {}), None, FolderContext(folder / "stages"))
    if not isinstance(model, LmModel):
        raise TypeError(f"{type(model).__name__} is no language model")
    return Subject(source, stock, model)


@torch.no_grad()
def examined(ref: str, checks: Mapping[str, Check], make: Callable[[], Any]) -> Findings:
    """Try every check on what ``make`` gives; one that fails leaves the others their chance."""
    found = {}
    try:
        subject = make()
    except NotSmall as error:
        return dict.fromkeys(checks, Finding("not built", str(error)))
    except Exception as error:
        return dict.fromkeys(checks, _fault(ref, error))
    for name, check in checks.items():
        try:
            check(subject)
            found[name] = Finding(EXACT)
        except Exception as error:
            found[name] = _fault(ref, error)
    return found


def _fault(ref: str, error: Exception) -> Finding:
    if isinstance(error, Wrong):
        return Finding("wrong", str(error))
    if isinstance(error, UserError):
        return _refused(ref, error)
    return Finding("wrong", f"raises {brief(error)}")


def _refused(ref: str, error: UserError) -> Finding:
    line = str(error)
    if "\n" in line:
        return Finding("wrong", f"refused in several lines: {' '.join(line.split())[:160]}")
    return Finding("refused", re.sub(rf"^model {re.escape(ref)}(\?\S*)?: ", "", line).split("; allowed:")[0])
