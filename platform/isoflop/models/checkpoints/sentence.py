"""What a folder of sentence-transformers says of embeddings: ``modules.json`` and what it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.models.sentence import POOLS, SIMILARITIES, Sentence

MODULES = "modules.json"
FILES = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "Sigmoid": nn.Sigmoid}
_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""By pool, its key in ``1_Pooling/config.json``."""


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Attributes:
        sentence: how texts are embedded.
        tokens: to which they are cut; None for the encoder's own room.
        dense: folders of layers between pooling and normalisation, in order.
    """

    sentence: Sentence
    tokens: int | None = None
    dense: tuple[str, ...] = ()


def named_files(source: Path) -> list[str]:
    """Files of the folder that have a part in embeddings, by their paths inside."""
    found = [name for name in FILES if (source / name).exists()]
    if MODULES in found:
        for module in _read(source / MODULES):
            inside = source / str(module.get("path", ""))
            if module.get("path") and inside.is_dir():
                found += [
                    str(p.relative_to(source))
                    for p in sorted(inside.iterdir())
                    if p.suffix in (".json", ".safetensors")
                ]
    return found


def stored_in(ref: str, source: Path) -> Stored | None:
    """None for a folder that sentence-transformers did not write.

    Raises:
        Infeasible: modules, pools or similarities that are not known here, or modules in another order.
    """
    if not (source / MODULES).exists():
        return None
    kinds, pools, dense, excludes = [], tuple[str, ...](), list[str](), False
    for module in _read(source / MODULES):
        kind, path = str(module["type"]).rsplit(".", 1)[-1], str(module.get("path", ""))
        if kind not in KINDS:
            raise Infeasible(f"model {ref}: its {MODULES} has a {module['type']}; allowed: {', '.join(KINDS)}")
        kinds.append(kind)
        if kind == "Transformer" and path:
            raise Infeasible(f"model {ref}: its encoder lies in the subfolder {path}; allowed: in the folder itself")
        if kind == "Pooling":
            pooling = _read(source / path / "config.json")
            pools, excludes = _pools(ref, pooling), not pooling.get("include_prompt", True)
        if kind == "Dense":
            dense.append(path)
            _activation(ref, source, path)
    if kinds not in (order := _orders(len(dense))):
        raise Infeasible(f"model {ref}: its {MODULES} lists {', '.join(kinds)}; allowed: {', '.join(order[1])}")
    options = _read(source / FILES[2]) if (source / FILES[2]).exists() else {}
    prompts: dict[str, str] = options.get("prompts") or {}
    usual = prompts.get(options.get("default_prompt_name") or "", "")
    similarity = options.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise Infeasible(
            f"model {ref}: {FILES[2]} has similarity_fn_name = {similarity!r}; allowed: {', '.join(SIMILARITIES)}"
        )
    if excludes and any(prompts.values()):
        raise Infeasible(
            f"model {ref}: its pooling leaves out the tokens of prompts (include_prompt = false); allowed: pooling over all tokens"
        )
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), usual)
    limits = _read(source / FILES[1]) if (source / FILES[1]).exists() else {}
    return Stored(
        Sentence(
            pools,
            "Normalize" in kinds,
            similarity,
            prompts.get("query", usual),
            document,
            bool(limits.get("do_lower_case")),
        ),
        limits.get("max_seq_length"),
        tuple(dense),
    )


def dense_layers(source: Path, paths: tuple[str, ...]) -> nn.Sequential:
    """The layers behind the pooling, with their weights.

    Raises:
        Infeasible: they are pickled.
    """
    from safetensors.torch import load_file

    layers: list[nn.Module] = []
    for path in paths:
        config = _read(source / path / "config.json")
        weights = source / path / "model.safetensors"
        if not weights.exists():
            raise Infeasible(f"model folder {source}: {path} has no model.safetensors; pickled weights are not loaded")
        state = {name.removeprefix("linear."): tensor for name, tensor in load_file(weights).items()}
        linear = nn.Linear(config["in_features"], config["out_features"], bias="bias" in state)
        linear.load_state_dict(state)
        layers += [linear, _activation(str(source), source, path)]
    return nn.Sequential(*layers)


def _activation(ref: str, source: Path, path: str) -> nn.Module:
    name = str(_read(source / path / "config.json").get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = ACTIVATIONS.get(name.rsplit(".", 1)[-1])
    if kind is None:
        raise Infeasible(f"model {ref}: {path} has the activation {name}; allowed: {', '.join(ACTIVATIONS)}")
    return kind()


def _pools(ref: str, config: dict[str, Any]) -> tuple[str, ...]:
    given = config.get("pooling_mode")
    given = [given] if isinstance(given, str) else given
    found = tuple(given) if given else tuple(name for name, key in _KEYS.items() if config.get(key))
    unknown = [name for name in found if name not in POOLS]
    if unknown or not found:
        raise Infeasible(f"model {ref}: its pooling is {', '.join(unknown) or 'none'}; allowed: {', '.join(POOLS)}")
    return tuple(name for name in POOLS if name in found)


def _orders(dense: int) -> list[list[str]]:
    plain = ["Transformer", "Pooling", *["Dense"] * dense]
    return [plain, [*plain, "Normalize"]]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
