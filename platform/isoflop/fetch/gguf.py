"""A GGUF file as a checkpoint in ``save_pretrained`` form.

Needs the package ``gguf``: ``pip install 'isoflop[gguf]'``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoflop.models.checkpoints.gguf import check_rows, read_gguf, read_gguf_tokenizer, unpaired
from isoflop.models.quiet import no_progress_bars

__all__ = ["check_rows", "convert", "unpaired"]


def convert(file: Path, folder: Path) -> Any:
    """Write a GGUF file's model, dequantised to float32, and its tokenizer into ``folder``; the module.

    Raises:
        UserError: the package ``gguf`` is missing, transformers cannot read the file, or reads rows in another order.
    """
    tokenizer, module = read_gguf_tokenizer(file), read_gguf(file)
    with no_progress_bars():
        module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return module.eval()
