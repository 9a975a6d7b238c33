"""Where a checkpoint's files lie and what names them: offline first, safetensors only.

Shared by the kinds of checkpoints that the family ``hf`` loads.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from isoflop.core.errors import UserError, nearest
from isoflop.core.hashing import content_hash, file_hash
from isoflop.core.knobs import Knob
from isoflop.core.public import local_path, looked_at
from isoflop.models.checkpoints.gguf import read_gguf_config
from isoflop.models.checkpoints.stored import read_json, value_of
from isoflop.models.family import split_ref
from isoflop.models.quiet import no_advice, no_progress_bars

FAMILY = "hf"
CONFIG_FILES = ("config.json", "preprocessor_config.json")
PROCESSOR_FILE = "processor_config.json"
"""Holds what ``preprocessor_config.json`` says where newer versions of transformers saved a processor whole."""
AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Content = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Options:
    """Options of an ``hf:`` model in a sweep."""

    revision: Annotated[str, Knob(doc="branch, tag or commit on the hub; ignored for a folder")] = "main"
    dtype: Annotated[
        str,
        Knob(
            choices=(AUTO, *DTYPES),
            doc="type that weights have in memory and the model computes in; auto: the checkpoint's own, by its config",
        ),
    ] = AUTO
    served: Annotated[
        str,
        Knob(
            choices=("", *DTYPES),
            doc="what weights and caches count where the model computes in float32, which it goes on to do; empty for 32 bits",
        ),
    ] = ""
    gguf: Annotated[
        str, Knob(doc="a GGUF file of the folder or repository, which is read in place of everything else")
    ] = ""
    trust_remote_code: Annotated[bool, Knob(doc="run Python code from the repository")] = False

    def __post_init__(self) -> None:
        if self.dtype == AUTO:
            raise ValueError("the type of a checkpoint is its own until its config has been read")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return DTYPES[self.dtype]

    @property
    def bits(self) -> int:
        """What an element counts where nothing compresses it: as it would be served, or as it is in memory."""
        return DTYPES[self.served if self.served and self.dtype == "float32" else self.dtype].itemsize * 8


def locate(ref: str, revision: str, weights: bool, gguf: str = "") -> Path:
    """The local folder with a checkpoint's files.

    Args:
        weights: False when the config is enough.
        gguf: the one file that is wanted, see ``Options``.

    Raises:
        UserError: no such folder, and neither the local cache nor the hub has such a repository.
    """
    name = split_ref(ref)[0].removeprefix("hf:")
    path = local_path(name, f"model {ref}")
    if path.is_dir():
        return path.resolve()
    if not name or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model {ref}: no such folder{_instead(name)}; allowed: hf:<folder> or hf:<owner>/<repository>")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    patterns = [gguf] if gguf else patterns
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        there = (found / "config.json").exists() and (not weights or any(found.glob("*.safetensors")))
        if (found / gguf).is_file() if gguf else there:
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


def _instead(name: str) -> str:
    """The nearest folder to one that does not exist."""
    parents = [path.absolute().parent for path in looked_at(name)]
    there = [p.name for parent in parents if parent.is_dir() for p in parent.iterdir() if p.is_dir()]
    near = nearest(Path(name).name, there)
    return f" (did you mean {str(Path(name).parent / near)!r}?)" if near else ""


def architecture_of(ref: str, source: Path) -> str:
    """The first architecture that ``config.json`` names; "unknown" where it names none.

    Raises:
        UserError: there is no such file, it is no JSON, or names no list.
    """
    path = source / "config.json"
    if not path.exists():
        raise UserError(f"model {ref}: {source} holds no config.json; allowed: a folder in save_pretrained form")
    named = value_of(read_json(path, dict, f"model {ref}: "), "architectures", list, [], path)
    return str(named[0]) if named else "unknown"


def own_dtype(source: Path) -> str:
    """The type that a checkpoint's config names, which is that of its weights; float32 where it names none of ``DTYPES``."""
    path = source / "config.json"
    stored = read_json(path, dict)
    inner = value_of(stored, "text_config", dict, {}, path)
    named = [holder.get(key) for holder in (stored, inner) for key in ("dtype", "torch_dtype")]
    found = next((str(name).removeprefix("torch.") for name in named if name), "")
    return found if found in DTYPES else "float32"


def read_config(source: Path, options: Options) -> Any:
    """The Hugging Face config in a folder, or in its GGUF file.

    Raises:
        UserError: transformers knows no such config, or refuses its values.
    """
    from transformers import AutoConfig

    if options.gguf:
        return read_gguf_config(source / options.gguf)
    try:
        with no_advice():
            return AutoConfig.from_pretrained(
                source, local_files_only=True, trust_remote_code=options.trust_remote_code
            )
    except Exception as error:  # each config checks its values in a way of its own
        raise UserError(f"{source / 'config.json'}: transformers cannot read it ({brief(error)})") from error


def brief(error: Exception) -> str:
    """An error's kind and the first sentence of its text, on one line."""
    sentence = re.split(r"(?<=[a-z)'`][.!?]) ", " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {sentence[:160]}" if sentence else type(error).__name__


def require_safetensors(source: Path) -> None:
    """Raise UserError when a folder's weights are missing or pickled."""
    if not any(source.glob("*.safetensors")):
        raise UserError(f"model folder {source}: no *.safetensors file; pickled weights are not loaded")


def read_whole(kind: Any, source: Path, dtype: torch.dtype, unused: str = "", **options: Any) -> Any:
    """A Hugging Face module of a class, with the weights of a folder, all of them.

    Args:
        unused: part of the names of weights that may be missing, since nothing asks for what they give.
        options: of ``from_pretrained``.

    Raises:
        UserError: weights that the class needs are not there, which transformers would draw at random; or there are none at all.
    """
    require_safetensors(source)
    with no_progress_bars(), no_advice():
        module, found = kind.from_pretrained(
            source, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True, **options
        )
    missing = sorted(name for name in found["missing_keys"] if not unused or unused not in name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model folder {source}: {kind.__name__} needs {missing[0]}{more}, which its safetensors do not hold"
        )
    return module


def content_of(source: Path, names: Collection[str] = CONFIG_FILES, weights: bool = True) -> Content:
    """What names the files: the commit for a hub snapshot, else hashes of the named files and of the weights."""
    if source.parent.name == "snapshots":
        return (("commit", source.name),)
    files = [source / name for name in names if (source / name).exists()]
    if CONFIG_FILES[1] in names and source / CONFIG_FILES[1] not in files and (source / PROCESSOR_FILE).exists():
        files.append(source / PROCESSOR_FILE)
    files += sorted(source.glob("*.safetensors")) if weights else []
    return tuple((f.name, file_hash(f)) for f in files)


def version_with(version: str, source: Path, names: Collection[str]) -> str:
    """A version that further files of a folder have a part in; the same where it holds none of them, or is a hub snapshot."""
    found = content_of(source, names, weights=False)
    if not found or found[0][0] == "commit":
        return version
    return content_hash({"version": version, "files": [list(pair) for pair in found]}, 16)
