"""Finding thresholds on training text: the dense states of a model, what a set of rules does to it, and the stages for both.

Thresholds, tolerances and activation ratios are calibrated on the training split only; a test text never decides on a mask.

Shape suffixes: S tokens, F neurons, L layers.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.activation_sparsity.base import ActivationSparsityMethod, Rule, Sparsity, blocks_of
from isoflop.methods.activation_sparsity.cett import Contributions
from isoflop.methods.calibration import OnModel
from isoflop.models.base import Model, ModelInfo
from isoflop.models.decoder_model import DecoderModel, decoder_model
from isoflop.models.heads import run_to_head
from isoflop.models.lm import LmInfo, LmModel
from isoflop.models.taps import ActivationTap, real_tokens


@dataclass(frozen=True)
class Thresholds:
    """What a calibration found.

    Attributes:
        eps_L: threshold of each block; infinite where nothing stays.
        figures: how it was found, for people.
    """

    eps_L: Tensor
    figures: Mapping[str, float]

    def save(self, folder: Path) -> None:
        """Write both."""
        save_file({"eps": self.eps_L}, folder / "thresholds.safetensors")
        (folder / "figures.json").write_text(json.dumps(dict(self.figures)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Thresholds:
        """The inverse of :meth:`save`."""
        return cls(
            load_file(folder / "thresholds.safetensors")["eps"], json.loads((folder / "figures.json").read_text())
        )


class Calibration:
    """A model with its calibration text.

    Args:
        model: with the methods that it was trained with, and no other.
        examples: calibration sequences, about.
        seed: draws them.
        method: name for messages.
    """

    def __init__(self, model: Model, ctx: StageContext, examples: int, seed: int, method: str) -> None:
        self.model = decoder_model(model, method)
        self.mlps = blocks_of(self.model, method)
        self._batches = list(model.calibration(ctx, examples, seed))
        self._contributions: list[Contributions] | None = None
        self._folder: TemporaryDirectory[str] | None = None
        self._dense: float | None = None

    @property
    def contributions(self) -> list[Contributions]:
        """Those of every block, on the dense model; they lie in files, of which memory holds as much as there is room for."""
        if self._contributions is None:
            self._folder = TemporaryDirectory(prefix="isoflop-cett-")
            lay = partial(_in_file, Path(self._folder.name))
            files = self._tapped("input", Path(self._folder.name))
            self._contributions = [
                Contributions(a_SF, mlp.out_Fd(), lay) for a_SF, mlp in zip(files, self.mlps, strict=True)
            ]
        return self._contributions

    def scores(self, of: str) -> Tensor:
        """Magnitudes of all neurons on all tokens in all layers, sorted: of the ``gate``, or of the ``value``."""
        with TemporaryDirectory(prefix="isoflop-scores-") as folder:
            found = self._tapped("output" if of == "gate" else "input", Path(folder))
            return torch.cat([x_SF.abs().flatten().to(self.model.device) for x_SF in found]).sort().values

    def thresholds(self, cett: float) -> Tensor:
        """Each block's largest threshold with at most this CETT on the dense states, eps_L."""
        return torch.tensor([block.threshold(cett) for block in self.contributions], dtype=torch.float32)

    @torch.no_grad()
    def nll(self, rules: Sequence[Rule] | None = None) -> tuple[float, float]:
        """Mean negative log-likelihood per token in nats, and the share of active neurons, under ``rules`` or dense."""
        sparsity = None if rules is None else Sparsity(self.model, self.mlps, rules)
        total, tokens = 0.0, 0
        with nullcontext() if sparsity is None else sparsity.at_work(self.model):
            for batch in self._batches:
                for logits_SW, targets_S in _scored(self.model, batch):
                    total += float(F.cross_entropy(logits_SW.float(), targets_S, reduction="sum").double())
                    tokens += len(targets_S)
                if sparsity is not None:
                    sparsity.observed()
        return total / tokens, 1.0 if sparsity is None else sparsity.active_share()

    @property
    def dense_nll(self) -> float:
        """``nll`` of the dense model."""
        if self._dense is None:
            self._dense = self.nll()[0]
        return self._dense

    @torch.no_grad()
    def _tapped(self, side: str, folder: Path) -> list[Tensor]:
        """What enters the down projections, or leaves the activation functions, at the real tokens of the text, (S, F) each.

        Kept in files of ``folder``, batch behind batch.
        """
        paths = [folder / f"{side}-{mlp.layer}" for mlp in self.mlps]
        valid_BT: Tensor | None = None
        widths: dict[Path, int] = {}

        def keep(path: Path, x_BTF: Tensor) -> None:
            x_SF = real_tokens(x_BTF, valid_BT).cpu().contiguous()
            widths[path] = x_SF.shape[-1]
            with path.open("ab") as file:
                x_SF.numpy().tofile(file)

        with ExitStack() as stack:
            for mlp, path in zip(self.mlps, paths, strict=True):
                plain = side == "input" or mlp.act is None
                tap = ActivationTap(mlp.down) if plain or mlp.act is None else ActivationTap(mlp.act, "output")
                stack.enter_context(tap.through(partial(keep, path)))
            for batch in self._batches:
                valid_BT = getattr(batch, "valid_BT", None)
                run_to_head(self.model, batch)
        devices = [next(mlp.down.parameters()).device for mlp in self.mlps]
        return [_mapped(path).view(-1, widths[path]).to(device) for path, device in zip(paths, devices, strict=True)]


def _scored(model: DecoderModel, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets, few positions at a time where the model can."""
    if isinstance(model, LmModel):
        yield from model.scored_logits(batch.to(model.device))
    else:
        yield model.supervised(batch)


def _mapped(path: Path) -> Tensor:
    """A file's float32 numbers, not read before they are asked for; changes stay in memory."""
    return torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.float32)


def _in_file(folder: Path, tensor: Tensor) -> Tensor:
    """A float32 tensor of the processor in a new file; those of an accelerator stay where they are."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    path = folder / f"laid-{len(list(folder.iterdir()))}"
    tensor.detach().numpy().tofile(path)
    return _mapped(path).view(tensor.shape)


@dataclass(frozen=True)
class ThresholdMethod(ActivationSparsityMethod):
    """Base class of methods whose thresholds are found on training text."""

    calibrates: ClassVar[bool] = True

    n_calib: Annotated[
        int, Knob(low=1, high=100_000, log=True, unit="sequences", doc="training sequences to find thresholds on")
    ] = 16

    def check(self, info: ModelInfo) -> None:
        """Refuse models that nothing is known to calibrate on."""
        super().check(info)
        if isinstance(info, LmInfo) and info.text is None:
            raise Infeasible(
                f"method {self.name}: model {info.ref} has neither a tokenizer nor a known vocabulary to find thresholds "
                "with; allowed: models with one, or mlp-topk and mlp-exact-zero, which need no text"
            )

    @abstractmethod
    def find(self, calibration: Calibration, cett: float | None) -> Thresholds:
        """The thresholds of one model.

        Args:
            cett: what ``shared`` found for the model's whole series; None where the method shares nothing.
        """

    def shared(self, models: Sequence[Calibration]) -> Crossed | None:
        """What a series of checkpoints has in common, by default nothing."""
        return None

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Any, ...] = ()
    ) -> Stage | None:
        """The stage that finds the thresholds."""
        self.check(info)
        source = OnModel.source(info, weights, seed, trained_with)
        return ThresholdStage(**source, method=self, common=None)

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Thresholds:
        """What the stage computes, on a loaded model that is its own series."""
        calibration = self.calibration(model, ctx, seed)
        found = self.shared([calibration])
        return self.find(calibration, found.cett if found else None)

    def calibration(self, model: Model, ctx: StageContext, seed: int) -> Calibration:
        """A model with the text that ``seed`` draws."""
        return Calibration(model, ctx, self.n_calib, derive_seed("mlp thresholds", seed), self.name)


@dataclass(frozen=True)
class Crossed:
    """A CETT for a series of checkpoints.

    Attributes:
        ppl_ratio: mean over the checkpoints at that CETT, on the calibration text.
        dip: see ``Crossing``.
    """

    cett: float
    ppl_ratio: float
    evaluations: int
    dip: float


@dataclass(frozen=True)
class CettStage(Stage):
    """The CETT that several checkpoints of a training share.

    Attributes:
        models: the checkpoints; not computed themselves, they name what is loaded.
        method: that shares it.
    """

    kind: ClassVar[str] = "mlp-cett"

    models: tuple[OnModel, ...]
    method: ThresholdMethod

    def deps(self) -> tuple[Stage, ...]:
        """Those of all checkpoints."""
        return tuple(dict.fromkeys(stage for model in self.models for stage in model.deps()))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Load all of them at once and search."""
        method = self.method
        with ExitStack() as stack:
            loaded = [stack.enter_context(source.model(ctx)) for source in self.models]
            found = method.shared(
                [method.calibration(model, ctx, s.seed) for model, s in zip(loaded, self.models, strict=True)]
            )
        assert found is not None
        (folder / "cett.json").write_text(json.dumps(vars(found)) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Crossed:
        """What was found."""
        return Crossed(**json.loads((folder / "cett.json").read_text()))


@dataclass(frozen=True)
class ThresholdStage(OnModel):
    """The thresholds of one model."""

    kind: ClassVar[str] = "mlp-thresholds"

    method: ThresholdMethod
    common: CettStage | None

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and what it shares with others."""
        return (*super().deps(), *([self.common] if self.common is not None else []))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Find and save."""
        method = self.method
        common: Crossed | None = None if self.common is None else ctx.get(self.common)
        with self.model(ctx) as model:
            found = method.find(method.calibration(model, ctx, self.seed), None if common is None else common.cett)
        found.save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Thresholds:
        """What was found."""
        return Thresholds.read(folder)


def prepared_thresholds(method: str, prepared: Any) -> Tensor:
    """eps_L of the value of a ``prepare`` stage."""
    if not isinstance(prepared, Thresholds):
        raise ValueError(f"method {method} is calibrated: apply() needs the value of its prepare() stage")
    return prepared.eps_L
