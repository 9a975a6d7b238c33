"""Vision stages: a trained tower, its features of a set of scenes, and what a checkpoint's tower looks like.

Shape suffixes: N scenes, B batch, P patches, D vision width, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.stage import Stage, StageContext
from isoflop.models.checkpoints.preprocessor import normalisation_of, read_preprocessor
from isoflop.models.taps import Tap
from isoflop.models.taps import attention_in as attention_in_layer
from isoflop.models.worlds.digit_world import VOCABULARY, SceneSet

LayerKey = int | str
"""What is read of a tower: a hidden state by its number, or attention by ``attention_in(layer)``."""
_ATTENTION = "attention-"
PREFIX_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "internvl_vision": 1}
"""Tokens before the patches by the type of the tower: a class token, or none."""

HALF = (0.5, 0.5, 0.5)
"""Mean and deviation of a tower that comes without a processor, as towers trained here are."""


def attention_in(layer: int) -> str:
    """The key of the attention that patches get in a layer of the tower, counted from 0; see ``Vision.read``."""
    return f"{_ATTENTION}{layer}"


@dataclass(frozen=True)
class Vision:
    """A frozen vision tower with its preprocessing.

    Attributes:
        tower: a module that takes pixel values (B, C, H, W) and returns hidden states.
        image_size: side of the images it wants, in pixels.
        mean, std: normalisation of pixel values in [0, 1], one number per channel.
        prefix: tokens before the patches (1 when there is a CLS token).
        normed: the last hidden state is taken behind the tower's last norm.
    """

    tower: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prefix: int
    normed: bool = False

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] as the tower's pixel values: resized when the side differs, then normalised."""
        if images_BCHW.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images_BCHW = F.interpolate(images_BCHW, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        mean = images_BCHW.new_tensor(self.mean)[:, None, None]
        std = images_BCHW.new_tensor(self.std)[:, None, None]
        return (images_BCHW - mean) / std

    def hidden_states(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Patch features after the embedding (index 0) and after every layer, each (B, P, D), prefix tokens removed."""
        return self._states(self.preprocess(images_BCHW))

    def read(self, images_BCHW: Tensor, keys: Iterable[LayerKey]) -> dict[LayerKey, Tensor]:
        """``read_pixels`` of images in [0, 1]."""
        return self.read_pixels(self.preprocess(images_BCHW), keys)

    def read_pixels(self, pixels_BCHW: Tensor, keys: Iterable[LayerKey]) -> dict[LayerKey, Tensor]:
        """What ``keys`` name: patch features (B, P, D), and attention (B, P) in float32, by key.

        Attention is the class token's softmax row, averaged over the heads, without its own column. A tower that has no
        class token gives the mean over all patches' rows instead: the attention that each patch receives.
        """
        keys = list(keys)
        layers = {key: int(key.removeprefix(_ATTENTION)) for key in keys if isinstance(key, str)}
        with ExitStack() as stack:
            taps = {key: stack.enter_context(Tap(self._attention(n)).listening()) for key, n in layers.items()}
            states = self._states(pixels_BCHW)
            found: dict[LayerKey, Tensor] = {key: states[key] for key in keys if isinstance(key, int)}
            for key, tap in taps.items():
                rows = slice(0, 1) if self.prefix else slice(None)
                found[key] = tap.vision_rows(rows).mean((1, 2))[:, self.prefix :]
        return found

    def _states(self, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        pixels_BCHW = pixels_BCHW.to(next(self.tower.parameters()).dtype)
        outputs = self.tower(pixels_BCHW, output_hidden_states=True)
        states = list(outputs.hidden_states)
        if self.normed:
            states[-1] = outputs.last_hidden_state
        return tuple(h[:, self.prefix :] for h in states)

    def _attention(self, layer: int) -> nn.Module:
        body: Any = getattr(self.tower, "vision_model", self.tower)
        layers = body.encoder.layers if hasattr(body.encoder, "layers") else body.encoder.layer
        return attention_in_layer(layers[layer])


def vision_of(tower: nn.Module, folder: Path | None) -> Vision:
    """Wrap a tower; ``folder`` may hold a ``preprocessor_config.json`` with its normalisation and image size."""
    stored = read_preprocessor(folder)
    config: Any = tower.config
    mean, std = normalisation_of(stored, HALF, HALF)
    return Vision(tower, config.image_size, mean, std, PREFIX_TOKENS[config.model_type])


class TowerSource(Stage):
    """A stage whose value is a ``Vision``: a tower trained here, or the tower of a checkpoint."""


class FeatureTable(Stage):
    """Features of some images from one layer of a tower: ``features.npy``, float32 (N, P, D), memory-mapped.

    ``layer`` may also name the attention in a layer, (N, P). Subclasses have ``tower``, ``layer`` and ``count``, the number of
    images, among their fields.
    """

    tower: TowerSource
    layer: LayerKey
    count: int

    def images(self) -> Iterator[np.ndarray]:
        """The images, a batch after the other, float32 (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Run the tower over the images, batch by batch."""
        vision: Vision = ctx.get(self.tower)
        device = next(vision.tower.parameters()).device
        table: np.memmap | None = None
        done = 0
        for images_BCHW in self.images():
            read = vision.read(torch.from_numpy(images_BCHW).to(device), [self.layer])[self.layer]
            x_BPD = read.float().cpu().numpy()
            if table is None:
                shape = (self.count, *x_BPD.shape[1:])
                table = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float32, shape=shape)
            table[done : done + len(x_BPD)] = x_BPD
            done += len(x_BPD)
        if table is not None:
            table.flush()

    def load(self, ctx: StageContext, folder: Path) -> np.ndarray:
        """The table, read-only."""
        return np.load(folder / "features.npy", mmap_mode="r")


@dataclass(frozen=True)
class FeaturesStage(FeatureTable):
    """Features of a scene set of the digit world."""

    kind: ClassVar[str] = "features"

    tower: TowerSource
    layer: LayerKey
    split: str
    count: int
    mix: tuple[float, ...]
    seed: int
    digits: int = 0
    world: str = VOCABULARY

    @property
    def scenes(self) -> SceneSet:
        """The scenes these features belong to."""
        return SceneSet(self.split, self.count, self.mix, self.seed, self.digits)

    def images(self) -> Iterator[np.ndarray]:
        """The drawn scenes, 256 at a time."""
        return self.scenes.images()


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``count`` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
