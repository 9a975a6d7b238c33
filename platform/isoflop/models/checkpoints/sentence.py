"""What a folder of sentence-transformers says of embeddings: ``modules.json`` and what it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from isoflop.core.errors import Infeasible, UserError
from isoflop.models.checkpoints.stored import read_json, value_of
from isoflop.models.sentence import POOLS, SIMILARITIES, Sentence

MODULES = "modules.json"
FILES = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
LEAST = 3
"""Tokens that a text may be cut to: one, and the special ones around it."""
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
        for _, path in _modules(source):
            inside = source / path
            if path and inside.is_dir():
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
        UserError: a file that is missing, broken, or holds a value of another type.
    """
    if not (source / MODULES).exists():
        return None
    kinds, pools, dense, excludes = [], tuple[str, ...](), list[str](), False
    for full, path in _modules(source):
        kind = full.rsplit(".", 1)[-1]
        if kind not in KINDS:
            raise Infeasible(f"model {ref}: its {MODULES} has a {full}; allowed: {', '.join(KINDS)}")
        kinds.append(kind)
        if kind == "Transformer" and path:
            raise Infeasible(f"model {ref}: its encoder lies in the subfolder {path}; allowed: in the folder itself")
        if kind == "Pooling":
            file = source / path / "config.json"
            pooling = read_json(file, dict)
            pools, excludes = _pools(ref, pooling), not value_of(pooling, "include_prompt", bool, True, file)
        if kind == "Dense":
            dense.append(path)
            _activation(ref, source, path)
            _widths(source, path)
    if kinds not in (order := _orders(len(dense))):
        raise Infeasible(f"model {ref}: its {MODULES} lists {', '.join(kinds)}; allowed: {', '.join(order[1])}")
    file, options = _settings(source, FILES[2])
    given = value_of(options, "prompts", dict, {}, file)
    prompts = {name: value_of(given, name, str, "", file) for name in given}
    usual = prompts.get(value_of(options, "default_prompt_name", str, "", file), "")
    similarity = value_of(options, "similarity_fn_name", str, "cosine", file)
    if similarity not in SIMILARITIES:
        raise Infeasible(
            f"model {ref}: {FILES[2]} has similarity_fn_name = {similarity!r}; allowed: {', '.join(SIMILARITIES)}"
        )
    if excludes and any(prompts.values()):
        raise Infeasible(
            f"model {ref}: its pooling leaves out the tokens of prompts (include_prompt = false); allowed: pooling over all tokens"
        )
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), usual)
    file, limits = _settings(source, FILES[1])
    tokens = value_of(limits, "max_seq_length", int, 0, file)
    if tokens < LEAST and limits.get("max_seq_length") is not None:
        raise UserError(f"{file}: max_seq_length = {tokens}; allowed: a whole number from {LEAST}")
    return Stored(
        Sentence(
            pools,
            "Normalize" in kinds,
            similarity,
            prompts.get("query", usual),
            document,
            value_of(limits, "do_lower_case", bool, False, file),
        ),
        tokens or None,
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
        inputs, outputs = _widths(source, path)
        weights = source / path / "model.safetensors"
        if not weights.exists():
            raise Infeasible(f"model folder {source}: {path} has no model.safetensors; pickled weights are not loaded")
        state = {name.removeprefix("linear."): tensor for name, tensor in load_file(weights).items()}
        linear = nn.Linear(inputs, outputs, bias="bias" in state)
        linear.load_state_dict(state)
        layers += [linear, _activation(str(source), source, path)]
    return nn.Sequential(*layers)


def _activation(ref: str, source: Path, path: str) -> nn.Module:
    file = source / path / "config.json"
    name = value_of(read_json(file, dict), "activation_function", str, "torch.nn.modules.activation.Tanh", file)
    kind = ACTIVATIONS.get(name.rsplit(".", 1)[-1])
    if kind is None:
        raise Infeasible(f"model {ref}: {path} has the activation {name}; allowed: {', '.join(ACTIVATIONS)}")
    return kind()


def _pools(ref: str, config: dict[str, Any]) -> tuple[str, ...]:
    given = config.get("pooling_mode")
    given = given if isinstance(given, list) or not given else [given]
    found = tuple(map(str, given)) if given else tuple(name for name, key in _KEYS.items() if config.get(key))
    unknown = [name for name in found if name not in POOLS]
    if unknown or not found:
        raise Infeasible(f"model {ref}: its pooling is {', '.join(unknown) or 'none'}; allowed: {', '.join(POOLS)}")
    return tuple(name for name in POOLS if name in found)


def _orders(dense: int) -> list[list[str]]:
    plain = ["Transformer", "Pooling", *["Dense"] * dense]
    return [plain, [*plain, "Normalize"]]


def _modules(source: Path) -> list[tuple[str, str]]:
    """Types and folders of the modules that a folder lists."""
    file, found = source / MODULES, []
    for module in read_json(file, list):
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise UserError(f"{file}: {module!r} in its list; allowed: objects with a type and a path")
        found.append((str(module["type"]), value_of(module, "path", str, "", file)))
    return found


def _settings(source: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """A file that need not be there, and what it holds."""
    file = source / name
    return file, read_json(file, dict) if file.exists() else {}


def _widths(source: Path, path: str) -> tuple[int, int]:
    """Of a layer behind the pooling, what goes in and comes out."""
    file = source / path / "config.json"
    config = read_json(file, dict)
    inputs, outputs = (value_of(config, key, int, 0, file) for key in ("in_features", "out_features"))
    if min(inputs, outputs) < 1:
        raise UserError(f"{file}: in_features = {inputs}, out_features = {outputs}; allowed: whole numbers from 1")
    return inputs, outputs
