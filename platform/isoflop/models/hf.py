"""The family ``hf``: LLaVA-style checkpoints from a local folder or the Hugging Face hub, offline first.

``hf:<path>`` names a folder in ``save_pretrained`` form, ``hf:<owner>/<repo>`` a repository on the hub. A repository is
looked for in the local cache; it is downloaded only when it is not there and the hub can be reached. Weights are read
from safetensors files only; code in a repository runs only when the sweep sets ``trust_remote_code`` for that model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hashing import content_hash
from isoflop.core.knobs import Knob, check_knobs
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import FAMILIES, Model, ModelFamily, ModelInfo, without_defaults
from isoflop.models.features import TowerSource, Vision, vision_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.vlm import VlmInfo, VlmModel

ARCHITECTURES = ("LlavaForConditionalGeneration",)
CONFIG_FILES = ("config.json", "preprocessor_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Options of an ``hf:`` model in a sweep."""

    revision: Annotated[str, Knob(doc="branch, tag or commit on the hub; ignored for a folder")] = "main"
    dtype: Annotated[str, Knob(choices=tuple(DTYPES), doc="type of the weights in memory")] = "float32"
    trust_remote_code: Annotated[bool, Knob(doc="run Python code from the repository")] = False


@dataclass(frozen=True)
class CheckpointTower(TowerSource):
    """The vision tower of a checkpoint; nothing is computed, the files are read where they lie.

    Args:
        ref: ``hf:…``.
        version: of the checkpoint, so that features of other weights are other stages.
        options: as in ``VlmInfo``.
    """

    kind: ClassVar[str] = "hf-tower"

    ref: str
    checkpoint: str
    options: tuple[tuple[str, Any], ...]

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Write down which checkpoint it is."""
        (folder / "source.json").write_text(json.dumps({"ref": self.ref, "version": self.checkpoint}) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Vision:
        """The tower, read from the checkpoint."""
        options = Options(**dict(self.options))
        source = locate(self.ref, options.revision, weights=True)
        module = _read(source, options).model.vision_tower
        return vision_of(module.to(ctx.device).eval().requires_grad_(False), source)


class HuggingFace(ModelFamily):
    """LLaVA-style checkpoints in ``save_pretrained`` form (``LlavaForConditionalGeneration``)."""

    name: ClassVar[str] = "hf"

    def members(self) -> list[str]:
        """Nothing: any ``hf:<repo or path>`` may be named."""
        return []

    def info(self, ref: str, options: Mapping[str, Any]) -> VlmInfo:
        """Describe a checkpoint from its config, without loading weights."""
        checked = check_knobs(Options, options, f"model {ref}")
        source = locate(ref, Options(**checked).revision, weights=False)  # type: ignore[arg-type]
        return _describe(ref, tuple(sorted(checked.items())), source, _content(source))

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``Options`` that differ from its defaults."""
        return without_defaults(Options, options, f"model {ref}")

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The checkpoint on the worker's device in evaluation mode."""
        if not isinstance(info, VlmInfo):
            raise TypeError(f"{info.ref} was not described by this family")
        options = Options(**dict(info.options))
        source = locate(info.ref, options.revision, weights=True)
        module = _read(source, options).to(ctx.device).eval().requires_grad_(False)
        return VlmModel(info, module, vision_of(module.model.vision_tower, source))


def locate(ref: str, revision: str, weights: bool) -> Path:
    """The local folder with a checkpoint's files.

    Args:
        weights: False when the config is enough.

    Raises:
        UserError: no such folder, and neither the local cache nor the hub has such a repository.
    """
    name = ref.removeprefix("hf:")
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if not name or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model {ref}: no such folder; allowed: hf:<folder> or hf:<owner>/<repository>")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        if (found / "config.json").exists() and (not weights or any(found.glob("*.safetensors"))):
            return found
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {ref}: not a folder, not in the local cache, and the hub gives no revision {revision!r} of it ({reason})"
        ) from error


@lru_cache(maxsize=256)
def _describe(
    ref: str, options: tuple[tuple[str, Any], ...], source: Path, content: tuple[tuple[str, str], ...]
) -> VlmInfo:
    # The content is an argument, so that a folder whose files changed in this process is described anew.
    chosen = Options(**dict(options))
    config = _config(ref, source, chosen)
    version = content_hash({"files": [list(pair) for pair in content], "dtype": chosen.dtype}, 16)
    text, vision = config.text_config, config.vision_config
    layers = int(vision.num_hidden_layers)
    if not isinstance(config.vision_feature_layer, int):
        raise Infeasible(
            f"model {ref}: its projector reads several vision layers ({config.vision_feature_layer}); allowed: one layer"
        )
    if config.vision_feature_select_strategy != "default":
        raise Infeasible(
            f"model {ref}: vision_feature_select_strategy = {config.vision_feature_select_strategy!r} keeps the CLS token; allowed: 'default'"
        )
    grid = int(vision.image_size) // int(vision.patch_size)
    vocabulary = (getattr(config, "isoflop", None) or {}).get("vocabulary")
    hooks = {"visual-tokens", "kv-cache", "attention", "weights"}
    return VlmInfo(
        ref=ref,
        family=HuggingFace.name,
        version=version,
        n_params=count_decoder(config),
        hooks=frozenset(hooks | ({f"vocabulary:{vocabulary}"} if vocabulary else {"tokenizer"})),
        geometry={
            "grid": grid,
            "visual_tokens": grid * grid,
            "vision_width": int(vision.hidden_size),
            "vision_layers": layers,
            "width": int(text.hidden_size),
            "layers": int(text.num_hidden_layers),
            "heads": int(text.num_attention_heads),
            "kv_heads": int(text.num_key_value_heads),
            "vocab_size": int(text.vocab_size),
            "image_token": int(config.image_token_id),
        },
        tower=CheckpointTower(ref, version, options),
        feature_layer=config.vision_feature_layer % (layers + 1),
        vocabulary=vocabulary,
        options=options,
    )


def count_decoder(config: Any) -> int:
    """N: parameters of the decoder layers of a LLaVA config (no embeddings, final norm or head), without memory for them."""
    from transformers import AutoModel

    with torch.device("meta"):
        decoder = AutoModel.from_config(config.text_config)
    return sum(p.numel() for p in decoder.layers.parameters())


def _config(ref: str, source: Path, options: Options) -> Any:
    from transformers import AutoConfig

    path = source / "config.json"
    if not path.exists():
        raise UserError(f"model {ref}: {source} holds no config.json; allowed: a folder in save_pretrained form")
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"model {ref}: {path} is no valid JSON ({error})") from error
    named = stored.get("architectures") or []
    if not set(named) & set(ARCHITECTURES):
        raise Infeasible(
            f"model {ref}: architecture {', '.join(named) or 'unknown'} is not supported; allowed: {', '.join(ARCHITECTURES)}"
        )
    return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=options.trust_remote_code)


def _read(source: Path, options: Options) -> Any:
    from transformers import LlavaForConditionalGeneration

    if not any(source.glob("*.safetensors")):
        raise UserError(f"model folder {source}: no *.safetensors file; pickled weights are not loaded")
    with no_progress_bars():
        return LlavaForConditionalGeneration.from_pretrained(
            source,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            dtype=DTYPES[options.dtype],
        )


def _content(source: Path) -> tuple[tuple[str, str], ...]:
    """What names the files: the commit for a hub snapshot, else hashes of config and weights."""
    if source.parent.name == "snapshots":
        return (("commit", source.name),)
    files = [source / name for name in CONFIG_FILES if (source / name).exists()] + sorted(source.glob("*.safetensors"))
    return tuple((f.name, _file_hash(f, f.stat().st_size, f.stat().st_mtime_ns)) for f in files)


@lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FAMILIES.register(HuggingFace.name)(HuggingFace())
