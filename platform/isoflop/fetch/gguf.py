"""A GGUF file as a checkpoint in ``save_pretrained`` form, and a look at whether every row came out where it belongs.

Needs the package ``gguf``: ``pip install 'isoflop[gguf]'``.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from isoflop.core.errors import UserError
from isoflop.models.quiet import no_progress_bars

LAYER = "model.layers.{}.self_attn.{}_proj.weight"


def convert(file: Path, folder: Path) -> Any:
    """Write a GGUF file's model, dequantised to float32, and its tokenizer into ``folder``; the module.

    Raises:
        UserError: the package ``gguf`` is missing, or transformers cannot read the file.
    """
    _require()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with no_progress_bars(), redirect_stderr(StringIO()):  # bars of its own
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
            module = AutoModelForCausalLM.from_pretrained(file.parent, **place, dtype="float32")
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise UserError(f"{file.name}: transformers cannot read it ({str(error).splitlines()[0][:160]})") from error
    # the weights are dense now; transformers refuses to save what it takes for quantised ones
    module.hf_quantizer = None
    for holder, names in ((module, ("is_quantized", "quantization_method")), (module.config, ("quantization_config",))):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)
    with no_progress_bars():
        module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return module.eval()


def check_rows(file: Path, module: Any) -> None:
    """Compare queries and keys of the first and the last layer with an own reading of the file.

    GGUF keeps the rows of a Llama's queries and keys in another order: of a head of width d, rows 2i and 2i + 1 are what a
    Hugging Face module has as rows i and i + d/2, which its rotation takes together.

    Raises:
        UserError: a matrix differs.
    """
    _require()
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config = module.config
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    values = module.state_dict()
    for layer in (0, config.num_hidden_layers - 1):
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            tensor = stored[f"blk.{layer}.attn_{part}.weight"]
            rows_OI = dequantize(tensor.data, tensor.tensor_type)
            wanted_OI = unpaired(rows_OI, heads)
            found_OI = values[LAYER.format(layer, part)].float().numpy()
            if not np.allclose(found_OI, wanted_OI, rtol=0, atol=1e-6):
                raise UserError(
                    f"{file.name}: rows of {LAYER.format(layer, part)} are not those of the file; is this version of "
                    "transformers known to read GGUF?"
                )


def unpaired(rows_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotated matrix in Hugging Face's order, from GGUF's."""
    out, inside = rows_OI.shape
    return rows_OI.reshape(heads, out // heads // 2, 2, inside).swapaxes(1, 2).reshape(out, inside)


def _require() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("reading GGUF needs the package gguf: pip install 'isoflop[gguf]'") from None
