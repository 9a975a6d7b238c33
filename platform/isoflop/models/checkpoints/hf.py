"""The family ``hf``: checkpoints from a local folder or the Hugging Face hub, offline first.

Options may stand in a reference, ``hf:<path>?dtype=bfloat16``. ``hf:<path>`` names a folder in ``save_pretrained`` form, ``hf:<owner>/<repo>`` a repository on the hub. A repository is
looked for in the local cache; it is downloaded only when it is not there and the hub can be reached. Weights are read
from safetensors files only; code in a repository runs only when the sweep sets ``trust_remote_code`` for that model.

The architecture that ``config.json`` names decides what kind of model it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import content_hash
from isoflop.core.knobs import check_knobs
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.checkpoints import encoder as hf_encoder
from isoflop.models.checkpoints import lm as hf_lm
from isoflop.models.checkpoints import vit as vit_hf
from isoflop.models.checkpoints.gguf import file_in
from isoflop.models.checkpoints.source import (
    AUTO,
    FAMILY,
    Content,
    Options,
    architecture_of,
    content_of,
    locate,
    own_dtype,
    read_config,
    version_with,
)
from isoflop.models.checkpoints.tokenizer import TOKENIZER_FILES, tokenizer_in
from isoflop.models.checkpoints.vision_language import checkpoint as vision_language
from isoflop.models.checkpoints.vision_towers import TOWERS
from isoflop.models.checkpoints.vision_towers import handles as handles_image
from isoflop.models.family import FAMILIES, ModelFamily, all_options, split_ref, without_defaults
from isoflop.models.lm import tokenizer_of
from isoflop.models.reading import TextInfo
from isoflop.models.vit import VitInfo


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint.

    Attributes:
        what: what it is called in messages.
        handles: whether an architecture is of this kind.
        describe: from (ref, options, source folder, version).
        load: from (description, source folder, options, context).
    """

    what: str
    handles: Callable[[str], bool]
    describe: Callable[[str, tuple[tuple[str, Any], ...], Path, str], ModelInfo]
    load: Callable[[Any, Path, Options, StageContext], Model]


def _describe_vit(ref: str, options: tuple[tuple[str, Any], ...], source: Path, version: str) -> VitInfo:
    chosen = Options(**dict(options))
    config = read_config(source, chosen)
    tower = TOWERS.get((config.architectures or ["unknown"])[0])
    tokenizer = tokenizer_in(ref, source, chosen) if tower is not None and tower.names else None
    if tokenizer is not None:
        version = version_with(version, source, TOKENIZER_FILES)
    return vit_hf.describe(ref, config, FAMILY, version, options, source, chosen.bits, tokenizer)


def _load_vit(info: ModelInfo, source: Path, options: Options, ctx: StageContext) -> Model:
    if not isinstance(info, VitInfo):
        raise TypeError(f"{info.ref} was not described as a vision transformer")
    return vit_hf.load(info, source, ctx.device, options.torch_dtype, tokenizer_of(info, ctx))


KINDS = (
    Kind(", ".join(vision_language.KINDS), vision_language.handles, vision_language.describe, vision_language.load),
    Kind(", ".join(TOWERS), handles_image, _describe_vit, _load_vit),
    Kind(hf_encoder.WHAT, hf_encoder.handles, hf_encoder.describe, hf_encoder.load),
    Kind("causal language models (…ForCausalLM)", hf_lm.handles, hf_lm.describe, hf_lm.load),
)


class HuggingFace(ModelFamily):
    """Checkpoints in ``save_pretrained`` form: vision-language models, image classifiers, text encoders, causal language models."""

    name: ClassVar[str] = FAMILY

    def members(self) -> list[str]:
        """Nothing: any ``hf:<repo or path>`` may be named."""
        return []

    def info(self, ref: str, options: Mapping[str, Any]) -> ModelInfo:
        """Describe a checkpoint from its config, without loading weights."""
        checked, source = _checked(ref, options)
        files = content_of(source, (checked["gguf"],), weights=False) if checked["gguf"] else content_of(source)
        if not checked["gguf"]:
            del checked["gguf"]  # stages of checkpoints that lie otherwise keep their keys
        return _describe(ref, tuple(sorted(checked.items())), source, files, _stamps(source))

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``Options`` that differ from its defaults, without those that the reference names.

        The type is the one that is computed in: what a default does is known to the id of a job, and float32, the default of
        older stores, stands in no id of a checkpoint in float32.
        """
        given = all_options(ref, options)
        found = without_defaults(Options, given, f"model {ref}")
        checked, source = _checked(ref, options)
        found["dtype"] = checked["dtype"]
        if checked["dtype"] == "float32" and (checked["gguf"] or own_dtype(source) == "float32"):
            del found["dtype"]
        named = split_ref(ref)[1]
        return {name: value for name, value in found.items() if name not in named}

    def trained_with(self, info: ModelInfo, methods: tuple[Any, ...]) -> tuple[Any, ...]:
        """None: a checkpoint is trained already."""
        return ()

    def calibration_stages(self, info: ModelInfo, methods: tuple[Any, ...]) -> tuple[Stage, ...]:
        """The tokenised training text of a language model with a tokenizer."""
        text = info.text if isinstance(info, TextInfo) else None
        return text.stages() if text is not None else ()

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The checkpoint on the worker's device in evaluation mode."""
        options = Options(**dict(info.options))
        source = locate(info.ref, options.revision, weights=True, gguf=options.gguf)
        return _kind(info.ref, _architecture(info.ref, source, options)).load(info, source, options, ctx)


def _checked(ref: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """All options of a model, the type as it is computed in; and the folder with its files."""
    checked: dict[str, Any] = dict(check_knobs(Options, all_options(ref, options), f"model {ref}"))
    source = locate(ref, checked["revision"], weights=False, gguf=checked["gguf"])
    if checked["gguf"]:
        file_in(ref, source, checked["gguf"])
        if checked["dtype"] == AUTO:  # what its packed matrices become
            checked["dtype"] = "float32"
    if checked["dtype"] == AUTO:
        architecture_of(ref, source)  # there is a config, and it can be read
        checked["dtype"] = own_dtype(source)
    return checked, source


@lru_cache(maxsize=256)
def _describe(
    ref: str, options: tuple[tuple[str, Any], ...], source: Path, content: Content, stamps: tuple[Any, ...]
) -> ModelInfo:
    # The content is an argument, so that a folder whose files changed in this process is described anew; so are the stamps of the
    # files that have a part in some kinds only.
    kind = _kind(ref, _architecture(ref, source, Options(**dict(options))))
    version = content_hash({"files": [list(pair) for pair in content], "dtype": dict(options)["dtype"]}, 16)
    return kind.describe(ref, options, source, version)


def _stamps(source: Path) -> tuple[Any, ...]:
    """Sizes and times of change of a folder's files that describe something, and of those in its subfolders."""
    found = sorted([*source.glob("*.json"), *source.glob("*/*.json")])
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found)


def _architecture(ref: str, source: Path, options: Options) -> str:
    return str(read_config(source, options).architectures[0]) if options.gguf else architecture_of(ref, source)


def _kind(ref: str, architecture: str) -> Kind:
    for kind in KINDS:
        if kind.handles(architecture):
            return kind
    allowed = "; ".join(kind.what for kind in KINDS)
    raise Infeasible(f"model {ref}: architecture {architecture} is not supported; allowed: {allowed}")


FAMILIES.register(FAMILY)(HuggingFace())
