"""Calibration block by block: the statistics of whole passes, with those of one block in memory at a time and no head."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weight_cases import TOKENS, Bare, context, gpt2, llama, mixtral, seeded

from isoflop.methods.kv_cache.probe import untrained_decoder
from isoflop.methods.vit_tokens.probe import untrained_model as untrained_vit
from isoflop.methods.weights import statistics as collecting
from isoflop.methods.weights.blockwise import BlockPasses
from isoflop.methods.weights.gptq import Gptq
from isoflop.methods.weights.statistics import Statistics, collect
from isoflop.methods.weights.views import linear_views

SMALL: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def windowed() -> Bare:
    """Every other layer sees a window, and is called with another mask."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8, **TOKENS)
    return Bare(seeded(lambda: Gemma2ForCausalLM(config)))


def neox() -> Bare:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return Bare(seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48, **TOKENS))))


class Residual(nn.Module):
    """Adds something of its own between its blocks, or runs them twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(48, 16), nn.Linear(16, 48)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.kind = kind

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        states = self.embed(input_ids)
        for layer in [*self.layers] * (2 if self.kind == "twice" else 1):
            states = layer(states) + (states if self.kind == "between" else 0)
        return SimpleNamespace(logits=self.head(states))


def sharing() -> Bare:
    """Two blocks with one feed-forward module, whose statistics are of both."""
    model = llama()
    layers: Any = model.module.model.layers
    layers[1].mlp = layers[0].mlp
    return model


BLOCK_BY_BLOCK: dict[str, Callable[[], Any]] = {
    "llama": llama, "gpt2": gpt2, "mixtral": mixtral, "gemma2": windowed, "gpt-neox": neox, "vit": untrained_vit,
    "lm": untrained_decoder, "bare blocks": lambda: Bare(seeded(lambda: Residual(""))),
}  # fmt: skip
WHOLE: dict[str, Callable[[], Any]] = {
    "between its blocks": lambda: Bare(seeded(lambda: Residual("between"))),
    "blocks that run twice": lambda: Bare(seeded(lambda: Residual("twice"))),
    "a shared module": sharing,
}


@torch.no_grad()
def whole_passes(self: BlockPasses, watching: Any) -> None:
    """Hooks on everything, the model's own passes."""
    with watching(self._views) as ended:
        for batch in self._batches:
            self._model.supervised(batch)
            ended()


def everything(model: Any, monkeypatch: pytest.MonkeyPatch, run: Any = None) -> dict[str, Tensor]:
    """All statistics."""
    with monkeypatch.context() as patch:
        if run is not None:
            patch.setattr(BlockPasses, "run", run)
        found = collect(model, context(), 6, 5)
    return {
        f"{view.name} {part}": getattr(found.of(view), part)
        for view in linear_views(model)
        for part in ("hessian_II", "norms_I", "scales_I")
    }


def parts(model: Any) -> list[int]:
    """How many matrices were measured at a time."""
    sizes: list[int] = []
    collecting.collect_by_block(model, context(), 6, 5, lambda views, _: sizes.append(len(views)))
    return sizes


@pytest.mark.parametrize("name", [*BLOCK_BY_BLOCK, *WHOLE])
def test_statistics_are_those_of_whole_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever the architecture; and the model is what it was."""
    model = {**BLOCK_BY_BLOCK, **WHOLE}[name]()
    names = [path for path, _ in model.module.named_modules()]
    found, wanted = everything(model, monkeypatch), everything(model, monkeypatch, whole_passes)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    assert [path for path, _ in model.module.named_modules()] == names
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    blocks = len({view.layer for view in linear_views(model)})
    assert len(parts(model)) == (blocks if name in BLOCK_BY_BLOCK else 1)


def test_batches_keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other lengths and sizes, each with its own masks and positions."""
    model = windowed()
    (ids_BT,) = model.calibration(None, 6, 5)
    monkeypatch.setattr(model, "calibration", lambda *_: iter([ids_BT[:4], ids_BT[4:, :13]]))
    found, wanted = everything(model, monkeypatch), everything(model, monkeypatch, whole_passes)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert len(parts(model)) == 3


@pytest.mark.parametrize("name", ["llama", "mixtral", "vit"])
def test_hessians_of_one_block_are_alive_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever collects: the method on a loaded model, or the stage, which writes a block before the next one runs."""
    model = BLOCK_BY_BLOCK[name]()
    views = linear_views(model)
    inputs = collect(model, context(), 4, 0).owner.values()
    layer_of = {view.name: view.layer for view in views}
    largest = max(sum(layer_of[owner] == layer for owner in set(inputs)) for layer in set(layer_of.values()))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Counted(collecting._Sums):
        __hash__ = object.__hash__

        def __init__(self, *args: Any) -> None:
            nonlocal most
            super().__init__(*args)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(collecting, "_Sums", Counted)
    Gptq(bits=4, group=8, n_calib=4).calibrate(model, context(), 0)
    assert most == largest
    collecting.collect_by_block(model, context(), 4, 0, lambda _, found: found.save(tmp_path))
    assert most == largest
    assert set(Statistics.load(tmp_path).owner) == set(layer_of)


@pytest.mark.parametrize("name", [name for name in [*BLOCK_BY_BLOCK, *WHOLE] if name != "vit"])
def test_the_head_of_a_language_model_does_not_run(name: str) -> None:
    model = {**BLOCK_BY_BLOCK, **WHOLE}[name]()
    ran: list[nn.Module] = []
    model.module.get_output_embeddings().register_forward_hook(lambda part, *_: ran.append(part))
    model.supervised(next(iter(model.calibration(context(), 4, 0))))
    assert len(ran) == 1
    collect(model, context(), 4, 0)
    assert len(ran) == 1


def test_statistics_of_older_stores_are_read(tmp_path: Path) -> None:
    """One file for everything, which the index does not name."""
    from safetensors.torch import save_file

    model = llama()
    found = collect(model, context(), 2, 0)
    save_file(
        {name: t for name, t in found._tensors.items() if isinstance(t, Tensor)}, tmp_path / "statistics.safetensors"
    )
    (tmp_path / "statistics.json").write_text(json.dumps({"owner": found.owner, "tokens": found._tokens}))
    old = Statistics.load(tmp_path)
    for view in linear_views(model):
        assert torch.equal(old.of(view).hessian_II, found.of(view).hessian_II)
        assert torch.equal(old.scales(view), found.scales(view))
