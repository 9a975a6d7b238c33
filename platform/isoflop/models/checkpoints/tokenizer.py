"""The tokenizer of a checkpoint, read where its files lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.errors import UserError
from isoflop.core.stage import StageContext
from isoflop.models.byte_trees.vocabulary import not_byte_level
from isoflop.models.checkpoints.gguf import read_gguf_tokenizer
from isoflop.models.checkpoints.source import Content, Options, brief, content_of, locate
from isoflop.models.checkpoints.stored import read_json
from isoflop.models.worlds.lm_text import PROCESSOR_TEMPLATES, TokenizerSource, has_tokenizer, read_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class CheckpointTokenizer(TokenizerSource):
    """The tokenizer of a checkpoint; nothing is computed, the files are read where they lie.

    Args:
        ref: ``hf:…``.
        revision: see ``Options``.
        files: what names the tokenizer's files.
    """

    kind: ClassVar[str] = "hf-tokenizer"

    ref: str
    revision: str
    files: Content

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Write down which checkpoint it is."""
        (folder / "source.json").write_text(json.dumps({"ref": self.ref, "revision": self.revision}) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Any:
        """The tokenizer, read from the checkpoint.

        Raises:
            UserError: a file of it is broken.
        """
        return self.ready()

    def ready(self) -> Any:
        """What ``load`` gives."""
        source = locate(self.ref, self.revision, weights=False)
        for name in (*TOKENIZER_FILES, *PROCESSOR_TEMPLATES):
            if (source / name).exists():
                read_json(source / name, dict)
        try:
            return read_tokenizer(source)
        except Exception as error:  # each tokenizer checks its files in a way of its own
            raise UserError(
                f"{source / 'tokenizer.json'}: transformers makes no tokenizer of it ({brief(error)})"
            ) from error

    def not_byte_level(self) -> str:
        """Read off ``tokenizer.json``."""
        stored = locate(self.ref, self.revision, weights=False) / "tokenizer.json"
        return not_byte_level(read_json(stored, dict))


@dataclass(frozen=True)
class GgufTokenizer(CheckpointTokenizer):
    """The tokenizer in a GGUF file.

    Args:
        gguf: see ``Options``.
    """

    kind: ClassVar[str] = "gguf-tokenizer"

    gguf: str

    def not_byte_level(self) -> str:
        """Read off the tokenizer that transformers makes of the file."""
        return not_byte_level(json.loads(self.ready().backend_tokenizer.to_str()))

    def ready(self) -> Any:
        """The tokenizer, read from the file."""
        return read_gguf_tokenizer(locate(self.ref, self.revision, weights=False, gguf=self.gguf) / self.gguf)


def tokenizer_in(ref: str, source: Path, options: Options) -> CheckpointTokenizer | None:
    """That of a checkpoint in a folder; None where it has no fast one."""
    if options.gguf:
        files = content_of(source, (options.gguf,), weights=False)
        return GgufTokenizer(ref, options.revision, files, options.gguf)
    if not has_tokenizer(source):
        return None
    return CheckpointTokenizer(ref, options.revision, content_of(source, TOKENIZER_FILES, weights=False))
