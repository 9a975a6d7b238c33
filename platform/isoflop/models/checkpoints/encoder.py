"""Checkpoints of text encoders for the family ``hf``: BERT's class, alone, with a head, or in a folder of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.checkpoints.decoder import without_weights
from isoflop.models.checkpoints.sentence import Stored, dense_layers, named_files, stored_in
from isoflop.models.checkpoints.source import FAMILY, Options, read_config, read_whole, version_with
from isoflop.models.checkpoints.tokenizer import TOKENIZER_FILES, tokenizer_in
from isoflop.models.encoder import (
    EMBEDDING,
    MASKED_LM,
    MULTIPLE_CHOICE,
    OFFERS,
    RERANKER,
    SPECIAL,
    EncoderInfo,
    EncoderModel,
)
from isoflop.models.hooks.matrices import BLOCK, MATRICES, matrix_shapes
from isoflop.models.lm import tokenizer_of
from isoflop.models.sentence import Sentence
from isoflop.models.worlds.english import EnglishStage
from isoflop.models.worlds.lm_text import EnglishText, TokensStage

HOOKS: frozenset[Hook[Any]] = frozenset({MATRICES})
CALIBRATION_LENGTH = 510
"""Of a window, to which special tokens are added."""
HEADS = {
    "Model": EMBEDDING,
    "ForMaskedLM": MASKED_LM,
    "ForMultipleChoice": MULTIPLE_CHOICE,
    "ForSequenceClassification": RERANKER,
}
"""By how an architecture's name ends."""
OTHER_HEADS = ("ForPreTraining", "ForNextSentencePrediction", "ForTokenClassification", "ForQuestionAnswering")
ENCODERS = (
    "Bert", "Camembert", "Data2VecText", "Deberta", "DebertaV2", "DistilBert", "Electra", "Ernie", "EuroBert", "Gte",
    "JinaEmbeddingsV3", "MPNet", "MegatronBert", "ModernBert", "NomicBert", "RemBert", "RoFormer", "Roberta", "RobertaPreLayerNorm",
    "Ultrabert", "XLMRoberta", "XLMRobertaXL",
)  # fmt: skip
"""How the names of their architectures begin."""
_PARTS = (
    "its attention is an approximation over parts of a text, and what a text becomes depends on the padding behind it"
)
_MORE = "it reads more than text (places on a page, entities, tables, images or sounds of characters)"
_UNNUMBERED = "its layers hold their matrices in no numbered blocks, so nothing could act on one of them"
REFUSED = {
    "Albert": "its layers share their matrices and are not numbered, so nothing could act on one of them",
    "Bart": "it is an encoder with a decoder",
    "BigBird": "it attends to blocks of a text, some of them drawn at random",
    "Canine": "it reads characters, of which several make a state",
    "ConvBert": "its convolutions reach into the padding behind a text",
    "Esm": "it reads proteins",
    "FNet": "it has no attention, and mixes the padding behind a text into it",
    "Flaubert": _UNNUMBERED,
    "Funnel": "it pools tokens between its blocks",
    "IBert": "its matrices are quantised while it computes",
    "LayoutLM": _MORE,
    "Longformer": "it attends within windows, and a task would have to name the tokens that see everything",
    "Luke": _MORE,
    "MBart": "it is an encoder with a decoder",
    "MobileBert": "its blocks narrow the states between them, which no walk has compared yet",
    "ModernVBert": _MORE,
    "Mra": _PARTS,
    "Mvp": "it is an encoder with a decoder",
    "NeoMME": _MORE,
    "Nystromformer": _PARTS,
    "Perceiver": "its latents attend to bytes",
    "Reformer": _PARTS,
    "RoCBert": _MORE,
    "SqueezeBert": "it computes with convolutions over channels in place of matrices",
    "Tapas": _MORE,
    "UltraVBert": _MORE,
    "XLM": _UNNUMBERED,
    "XLNet": "it was trained on permutations, and fills no masks",
    "Xmod": "it has layers for each language, and a task would have to name one",
    "Yoso": _PARTS,
}
"""Encoders that are not taken, by how their names begin."""
REFUSED_HEADS = {
    "RoFormerForMultipleChoice": "its head reads the last token of a row, which is padding where texts differ in length"
}
"""Architectures that are not taken, though their encoders are."""
FLOAT32_ONLY = ("Deberta",)
"""Encoders that transformers computes in 32 bits only."""
WHAT = f"text encoders ({', '.join(ENCODERS)} …{', …'.join(HEADS)}, also in folders of sentence-transformers)"


def handles(architecture: str) -> bool:
    """Whether an architecture is a text encoder by its name."""
    return _split(architecture) is not None


def describe(ref: str, options: tuple[tuple[str, Any], ...], source: Path, version: str) -> EncoderInfo:
    """What is known of a checkpoint from its config.

    Raises:
        Infeasible: an encoder or a head that is not taken, no fast tokenizer, a folder of sentence-transformers with modules that are
            not known.
    """
    chosen = Options(**dict(options))
    config = read_config(source, chosen)
    stored = stored_in(ref, source)
    head = head_of(ref, str(config.architectures[0]), config, stored)
    if chosen.dtype != "float32" and (_split(str(config.architectures[0])) or ("",))[0] in FLOAT32_ONLY:
        raise Infeasible(
            f"model {ref}: transformers computes {config.architectures[0]} in 32 bits only; allowed: dtype: float32"
        )
    tokenizer = tokenizer_in(ref, source, chosen)
    if tokenizer is None:
        raise Infeasible(
            f"model {ref}: the checkpoint has no fast tokenizer (tokenizer.json), so that it cannot be given text"
        )
    skeleton = without_weights(ref, config, "text encoder", lambda: _class(config, head)._from_config(config))
    positions = _positions(skeleton, config)
    wanted = stored.tokens if stored is not None and stored.tokens else positions
    longest = min(wanted, positions)
    return EncoderInfo(
        ref=ref,
        family=FAMILY,
        version=version_with(version, source, [*TOKENIZER_FILES, *named_files(source)]),
        n_params=count_blocks(skeleton),
        hooks=HOOKS,
        offers=OFFERS[head] | {"tokenizer"},
        geometry={
            "width": int(config.hidden_size),
            "layers": int(config.num_hidden_layers),
            "heads": int(config.num_attention_heads),
            "vocab_size": int(config.vocab_size),
            "positions": positions,
            "matrices": matrix_shapes(skeleton),
        },
        dense_bits=chosen.bits,
        options=options,
        text=EnglishText(
            TokensStage(EnglishStage.here(), tokenizer, "train"), min(CALIBRATION_LENGTH, longest - SPECIAL)
        ),
        tokenizer=tokenizer,
        head=head,
        sentence=Sentence() if stored is None else stored.sentence,
        tokens_at_most=longest,
    )


def load(info: ModelInfo, source: Path, options: Options, ctx: StageContext) -> EncoderModel:
    """The checkpoint on the worker's device in evaluation mode."""
    if not isinstance(info, EncoderInfo):
        raise TypeError(f"{info.ref} was not described as a text encoder")
    config = read_config(source, options)
    module = read_whole(_class(config, info.head), source, options.torch_dtype, unused="pooler", config=config)
    stored = stored_in(info.ref, source)
    if stored is not None and stored.dense:
        module.sentence_dense = dense_layers(source, stored.dense).to(options.torch_dtype)
    tokenizer = tokenizer_of(info, ctx)
    assert tokenizer is not None
    return EncoderModel(info, module.to(ctx.device).eval().requires_grad_(False), tokenizer)


def head_of(ref: str, architecture: str, config: Any, stored: Stored | None) -> str:
    """What a checkpoint's head does; sentence-transformers makes an embedding of any.

    Raises:
        Infeasible: an encoder or a head that is not taken.
    """
    found = _split(architecture)
    assert found is not None
    begins, ends = found
    if begins in REFUSED:
        raise Infeasible(f"model {ref}: {architecture} is not taken: {REFUSED[begins]}; allowed: {WHAT}")
    if stored is not None:
        return EMBEDDING
    if ends not in HEADS:
        raise Infeasible(f"model {ref}: {architecture} is not taken: no task asks for its head; allowed: {WHAT}")
    if architecture in REFUSED_HEADS:
        raise Infeasible(f"model {ref}: {architecture} is not taken: {REFUSED_HEADS[architecture]}; allowed: {WHAT}")
    if HEADS[ends] == RERANKER and config.num_labels != 1:
        raise Infeasible(
            f"model {ref}: {architecture} has {config.num_labels} labels; allowed: one, which ranks pairs of a query and a document"
        )
    return HEADS[ends]


def count_blocks(module: nn.Module) -> int:
    """N: parameters inside numbered blocks."""
    return sum(p.numel() for name, p in module.named_parameters() if BLOCK.search(name))


def _split(architecture: str) -> tuple[str, str] | None:
    """Where the name of an encoder ends and that of its head begins."""
    for begins in (*ENCODERS, *REFUSED):
        ends = architecture.removeprefix(begins)
        if ends != architecture and ends in (*HEADS, *OTHER_HEADS):
            return begins, ends
    return None


def _class(config: Any, head: str) -> Any:
    """The class of transformers; the encoder alone where it embeds."""
    import transformers

    begins, _ = _split(str(config.architectures[0])) or ("", "")
    return getattr(transformers, begins + next(ends for ends, own in HEADS.items() if own == head))


def _positions(skeleton: Any, config: Any) -> int:
    """Tokens that a text may have: learned positions of the RoBERTa kind start behind that of padding."""
    longest = int(config.max_position_embeddings)
    for name, part in skeleton.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return longest - part.padding_idx - 1
    return longest
