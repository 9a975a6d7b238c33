"""Weights, config and tokenizer in one GGUF file (llama.cpp's format), read by transformers: data only, no code.

Packed matrices become float32. Needs the package ``gguf``: ``pip install 'isoflop[gguf]'``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from functools import lru_cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from isoflop.core.errors import UserError, nearest
from isoflop.models.quiet import no_progress_bars

LAYER = "model.layers.{}.self_attn.{}_proj.weight"
PAIRED = ("llama", "mistral")
"""Types of configs whose queries and keys have rows in an order of their own in GGUF, see ``unpaired``."""


def file_in(ref: str, source: Path, name: str) -> Path:
    """A GGUF file of a checkpoint's folder.

    Raises:
        UserError: there is none of this name.
    """
    held = sorted(path.name for path in source.glob("*.gguf"))
    if name not in held:
        near = nearest(name, held)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise UserError(
            f"model {ref}: {source} holds no GGUF file {name!r}{hint}; allowed: {', '.join(held) or 'folders with *.gguf files'}"
        )
    return source / name


def read_gguf_config(file: Path) -> Any:
    """The Hugging Face config, with the class of causal language models that reads it.

    Raises:
        UserError: the package ``gguf`` is missing, or transformers cannot read the file.
    """
    stat = file.stat()
    return deepcopy(_config(file, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=16)
def _config(file: Path, size: int, changed_ns: int) -> Any:
    """Kept for as long as the file's size and time of change stay: transformers takes seconds to read a vocabulary."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    with _alone(file) as folder:
        config = AutoConfig.from_pretrained(folder, gguf_file=file.name, local_files_only=True)
    config.architectures = [str(CLASSES.get(config.model_type, "unknown"))]
    return config


def read_gguf_tokenizer(file: Path) -> Any:
    """The fast tokenizer.

    Raises:
        UserError: see ``read_gguf_config``.
    """
    from transformers import AutoTokenizer

    with _alone(file) as folder:
        return AutoTokenizer.from_pretrained(folder, gguf_file=file.name, local_files_only=True)


def read_gguf(file: Path) -> Any:
    """The module in float32, its queries and keys compared with an own reading of the file.

    Raises:
        UserError: see ``read_gguf_config`` and ``check_rows``.
    """
    from transformers import AutoModelForCausalLM

    with _alone(file) as folder:
        module = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, local_files_only=True, dtype="float32"
        )
    # the weights are dense now; transformers refuses to save, or to move, what it takes for quantised ones
    module.hf_quantizer = None
    for holder, names in ((module, ("is_quantized", "quantization_method")), (module.config, ("quantization_config",))):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)
    check_rows(file, module)
    return module


def check_rows(file: Path, module: Any) -> None:
    """Compare queries and keys of the first and the last layer with an own reading of the file.

    Raises:
        UserError: a matrix differs.
    """
    with _alone(file):
        from gguf import GGUFReader
        from gguf.quants import dequantize

        stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    config, values = module.config, module.state_dict()
    for layer in (0, config.num_hidden_layers - 1):
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            tensor, ours = stored.get(f"blk.{layer}.attn_{part}.weight"), values.get(LAYER.format(layer, part))
            if tensor is None or ours is None:  # queries, keys and values in one matrix
                continue
            rows_OI = dequantize(tensor.data, tensor.tensor_type)
            wanted_OI = unpaired(rows_OI, heads) if config.model_type in PAIRED else rows_OI
            found_OI = ours.float().numpy()
            if found_OI.shape != wanted_OI.shape or not np.allclose(found_OI, wanted_OI, rtol=0, atol=1e-6):
                raise UserError(
                    f"{file.name}: rows of {LAYER.format(layer, part)} are not those of the file; is this version of "
                    "transformers known to read GGUF?"
                )


def unpaired(rows_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotated matrix in Hugging Face's order, from GGUF's.

    GGUF keeps the rows of a Llama's queries and keys in another order: of a head of width d, rows 2i and 2i + 1 are what a
    Hugging Face module has as rows i and i + d/2, which its rotation takes together.
    """
    out, inside = rows_OI.shape
    return rows_OI.reshape(heads, out // heads // 2, 2, inside).swapaxes(1, 2).reshape(out, inside)


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder with nothing but a link to a GGUF file, in which transformers reads it without a word.

    In its own folder transformers would mix what lies beside into it: a config, a tokenizer, a generation's settings.

    Raises:
        UserError: the package ``gguf`` is missing, or it cannot read the file.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("reading GGUF needs the package gguf: pip install 'isoflop[gguf]'") from None
    try:
        with TemporaryDirectory(prefix="isoflop-gguf-") as name, no_progress_bars(), redirect_stderr(StringIO()):
            (Path(name) / file.name).symlink_to(file.absolute())
            yield Path(name)
    except Exception as error:  # each architecture fails in a way of its own
        said = str(error).strip().splitlines()
        reason = said[0][:160] if said else type(error).__name__
        raise UserError(f"{file.name}: transformers cannot read it ({reason})") from error
