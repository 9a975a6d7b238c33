"""Vision-language models: what is known of one, and the loaded model.

Tiny models trained here and Hugging Face checkpoints of every class run through this one class; what differs between them is
their visual side (``isoflop.models.visual_side``).

Shape suffixes: B batch, N views of an image, P patches of a view, V visual tokens that enter the language model, Q question
tokens, T prompt tokens (one image placeholder among them), L tokens after the placeholder is expanded, D vision width, d
language width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.decoder_model import DecoderModel
from isoflop.models.features import LayerKey, Vision
from isoflop.models.heads import head_logits
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS, PromptLayout
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS, CompressedTokens, VisualInput
from isoflop.models.prefix import (
    KINDS,
    SegmentedPrompt,
    expand_placeholders,
    media_end,
    places_kept,
    replace_question,
)
from isoflop.models.prompt_runs import decoded, generated, run, states, stepwise
from isoflop.models.visual_side import PLAIN, Layout, VisualSide
from isoflop.models.vlm_info import VlmBatch, VlmInfo
from isoflop.models.worlds.lessons import Lesson, table_rows

CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class _Tokens:
    """Prompts whose image placeholder is expanded.

    Attributes:
        ids_BL: token ids.
        mask_BL, positions_BL: None where they are plain.
        axes_BL3: see ``SegmentedPrompt``.
        image_BL: True at visual tokens.
        picture_BL: the same, and at the separators between them.
    """

    ids_BL: Tensor
    mask_BL: Tensor | None
    positions_BL: Tensor | None
    image_BL: Tensor
    picture_BL: Tensor
    axes_BL3: Tensor | None


class VlmModel(DecoderModel):
    """A loaded vision-language model.

    Attributes:
        info: its description.
        module: the Hugging Face model, in evaluation mode.
        side: its visual side.
    """

    info: VlmInfo

    def __init__(
        self,
        info: VlmInfo,
        module: nn.Module,
        vision: Vision,
        tokenizer: Callable[[], Any] | None = None,
        side: VisualSide | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self.info = info
        self.module: Any = module
        self.side = side or VisualSide(module, vision, info.geometry, info.resizing)

    @property
    def vision(self) -> Vision:
        """The tower with the preprocessing."""
        return self.side.vision

    @property
    def vision_encoder(self) -> nn.Module:
        """The tower, whose blocks methods may act in."""
        return self.vision.tower

    @property
    def live_vision(self) -> bool:
        """Whether something acts in the tower, so that features must be computed anew instead of read from a stage."""
        return self.occupant(VISION_BLOCKS) is not None

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.side.decoder

    @property
    def dtype(self) -> torch.dtype:
        """Type of the projector's and the language model's weights."""
        return self.module.lm_head.weight.dtype

    @property
    def layers_needed(self) -> tuple[LayerKey, ...]:
        """What the model, as it is now, reads of the tower."""
        compression = self.occupant(VISUAL_TOKENS)
        extra = compression.layers if compression is not None else ()
        return tuple(sorted({self.info.feature_layer, *extra}, key=str))

    def look(self, pixels: Tensor, ids_B: Tensor | None = None, layout: Layout = PLAIN) -> dict[LayerKey, Tensor]:
        """Run the tower on what ``VisualSide.pixels`` makes of images; what is needed of it, by key.

        Args:
            pixels: images in [0, 1], (B, C, H, W), where the side is LLaVA-1.5's.
            ids_B: example numbers, for reductions in the tower that draw at random.
        """
        reduction = self.occupant(VISION_BLOCKS)
        if reduction is not None:
            reduction.ids_B = None if ids_B is None else _per_view(ids_B.to(self.device), layout.views)
        return self.side.read(pixels.to(self.device), self.layers_needed, layout)

    def compress(self, batch: VlmBatch) -> CompressedTokens:
        """What enters the projector, of every view: the compressor's output, or every patch."""
        compression = self.occupant(VISUAL_TOKENS)
        if compression is None:
            deep = tuple(x.to(self.dtype) for x in self.side.deep(batch.hidden))
            return CompressedTokens(batch.hidden[self.info.feature_layer].to(self.dtype), deep=deep)
        wanted = {key: batch.hidden[key] for key in compression.layers}  # a batch may hold more
        question_BQ, mask_BQ, views = batch.question_BQ, batch.question_mask_BQ, batch.layout.views
        view = VisualInput(
            x_BPD=batch.hidden[self.info.feature_layer].to(self.dtype),
            hidden={key: h if isinstance(key, str) else h.to(self.dtype) for key, h in wanted.items()},
            grid=self.info.geometry["grid"] if self.info.square else math.isqrt(self.side.tokens(batch.layout)),
            question_BQ=None if question_BQ is None else question_BQ.repeat_interleave(views, 0),
            question_mask_BQ=None if mask_BQ is None else mask_BQ.repeat_interleave(views, 0),
            ids_B=_per_view(batch.ids_B, views),
            encode_text=self.encode_text,
            embed_text=self.embed_text,
            square=self.info.square,
        )
        found = compression(view)
        if not self.side.keeps_places and (found.places_BV is not None or found.question_BQd is not None):
            raise Infeasible(
                f"model {self.info.ref}: {type(self.module).__name__} puts the views of an image together in a way of its own, which leaves "
                "no places for what is kept of them, and no question to one of them; allowed: places in a row"
            )
        return replace(found, deep=self._deep(batch, found))

    def _deep(self, batch: VlmBatch, found: CompressedTokens) -> tuple[Tensor, ...]:
        """What is added to the compressed tokens behind the decoder's first layers."""
        deep = tuple(x.to(self.dtype) for x in self.side.deep(batch.hidden))
        if not deep or found.tokens_BVD.shape[1] == deep[0].shape[1]:
            return deep
        kept_BV = found.kept_BV
        if kept_BV is None:
            raise Infeasible(
                f"model {self.info.ref}: {type(self.module).__name__} adds to visual tokens between its layers, and nothing is known of "
                "what to add to mixtures of them; allowed: methods that keep some as they are"
            )
        return tuple(x.gather(1, kept_BV[..., None].expand(-1, -1, x.shape[2])) for x in deep)

    def project(self, tokens_BVD: Tensor, layout: Layout = PLAIN) -> Tensor:
        """The visual tokens of every image in the language model's width, (B, V, d), of those of its views."""
        compression = self.occupant(VISUAL_TOKENS)
        own = compression.projector if compression is not None else None
        return self.side.arranged((own if own is not None else self.side.projector)(tokens_BVD), layout)

    def prefill(
        self,
        visual_BVd: Tensor,
        batch: VlmBatch,
        places_BV: Tensor | None = None,
        use_cache: bool = False,
        question_BQd: Tensor | None = None,
        deep: tuple[Tensor, ...] = (),
    ) -> Any:
        """The language model on the whole prompt; Hugging Face's output with logits (B, 1, vocabulary).

        ``places_BV``, ``question_BQd`` and ``deep``: see ``CompressedTokens``.

        A method on the KV cache compresses everything up to the last visual token, before the question is seen: the
        image is encoded once and asked many questions.

        Raises:
            Infeasible: what sits in the hooks cannot work together, or Hugging Face's cache cannot follow it.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        tokens = self._laid_out(visual_BVd, batch, places_BV)
        prompt = self._segmented(tokens, visual_BVd, batch, question_BQd, deep)
        policy, dropping = self.occupant(ATTENTION), self.occupant(DECODER_LAYERS)
        if policy is not None and policy.spans_layers:
            if use_cache:
                raise Infeasible(
                    f"model {self.info.ref}: a cache that spans layers is not Hugging Face's; stepwise() works"
                )
            hidden_BLd, _ = states(self, prompt)
            return CausalLMOutputWithPast(logits=self.head(hidden_BLd[:, -1:]))
        prefix = 0 if policy is None else media_end(tokens.image_BL)
        with ExitStack() as stack:
            stack.enter_context(self.compressing_prefix(prefix, batch.ids_B))
            if dropping is not None:
                mask_BL = tokens.mask_BL
                layout = PromptLayout(tokens.image_BL, batch.ids_B, None if mask_BL is None else mask_BL.bool())
                stack.enter_context(dropping.prompt(layout))
            plain = tokens.positions_BL is None and tokens.axes_BL3 is None
            positions = None if plain else prompt.position_ids
            output = decoded(self, prompt.embeds_BLd, positions, tokens.mask_BL, prompt.deep, use_cache)
        left_BK = None if dropping is None else dropping.left_BK
        if use_cache and left_BK is not None and bool((left_BK < 0).any()):
            raise Infeasible(
                f"model {self.info.ref}: rows that keep different numbers of tokens cannot go on in Hugging Face's cache; "
                "stepwise() and batches of one work"
            )
        return CausalLMOutputWithPast(
            logits=self.head(output.last_hidden_state[:, -1:]), past_key_values=output.past_key_values
        )

    def prompt_of(self, batch: VlmBatch) -> SegmentedPrompt:
        """The prompts of a batch as segments, their images compressed by whatever is applied."""
        found = self.compress(batch)
        visual_BVd = self.project(found.tokens_BVD, batch.layout)
        tokens = self._laid_out(visual_BVd, batch, found.places_BV)
        return self._segmented(tokens, visual_BVd, batch, found.question_BQd, found.deep)

    def run(self, prompt: SegmentedPrompt, asked_BL: Tensor | None = None) -> Tensor:
        """Logits behind every row, or behind asked tokens; see ``isoflop.models.prompt_runs``."""
        return run(self, prompt, asked_BL)

    def stepwise(self, prompt: SegmentedPrompt, ids_BS: Tensor) -> Tensor:
        """The same step by step, over a given answer; see ``isoflop.models.prompt_runs``."""
        return stepwise(self, prompt, ids_BS)

    def generated(self, prompt: SegmentedPrompt, most: int) -> Iterator[Tensor]:
        """The most likely tokens behind every prompt, (B,) each; see ``isoflop.models.prompt_runs``."""
        return generated(self, prompt, most)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) of the decoder's last hidden states (…, d), with what the class does to them behind its matrix."""
        from transformers.modeling_outputs import MoeModelOutputWithPast  # has what any class reads

        logits_SW = head_logits(self.module, self.decoder, MoeModelOutputWithPast(), hidden.flatten(0, -2))
        return logits_SW.unflatten(0, hidden.shape[:-1])

    def _laid_out(self, visual_BVd: Tensor, batch: VlmBatch, places_BV: Tensor | None) -> _Tokens:
        image = self.side.image_token
        ids_M = self.side.ids(batch.layout, visual_BVd.shape[1])
        ids_BL, mask_BL, picture_BL = expand_placeholders(batch.prompt_BT, batch.prompt_mask_BT, image, ids_M)
        positions_BL = None if mask_BL is None else (mask_BL.cumsum(-1) - 1).clamp(min=0)
        image_BL = ids_BL == image
        row_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand(ids_BL.shape)
        in_row_BL = row_BL if positions_BL is None else positions_BL
        if self.side.first_position:
            positions_BL = in_row_BL = in_row_BL + self.side.first_position
        axes_BL3 = self.side.axes(batch.layout, image_BL, in_row_BL, places_BV)
        if places_BV is not None and axes_BL3 is None:
            positions_BL = places_kept(positions_BL, image_BL, places_BV, self.info.geometry["visual_tokens"])
            # without a mask, Hugging Face takes a gap in the positions for the start of another sequence
            mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
        return _Tokens(ids_BL, mask_BL, positions_BL, image_BL, picture_BL, axes_BL3)

    def _embedded(self, tokens: _Tokens, visual_BVd: Tensor, batch: VlmBatch, question_BQd: Tensor | None) -> Tensor:
        """Inputs of the decoder, (B, L, d)."""
        ids_BL = tokens.ids_BL.masked_fill(tokens.image_BL, 0)  # the image token may lie behind the vocabulary
        embeds_BLd = self.module.get_input_embeddings()(ids_BL)
        embeds_BLd = embeds_BLd.masked_scatter(tokens.image_BL[..., None], visual_BVd.to(embeds_BLd.dtype))
        if question_BQd is None:
            return embeds_BLd
        if batch.question_BQ is None:
            raise ValueError("the batch holds no question whose embeddings could be replaced")
        return replace_question(
            embeds_BLd, tokens.ids_BL, tokens.picture_BL, batch.question_BQ, batch.question_mask_BQ, question_BQd
        )

    def _segmented(
        self,
        tokens: _Tokens,
        visual_BVd: Tensor,
        batch: VlmBatch,
        question_BQd: Tensor | None,
        deep: tuple[Tensor, ...] = (),
    ) -> SegmentedPrompt:
        image_BL, picture_BL = tokens.image_BL, tokens.picture_BL
        behind_BL = (picture_BL.cumsum(1) > 0) & ~picture_BL
        kinds_BL = torch.where(image_BL, KINDS.index("image"), torch.where(behind_BL, KINDS.index("question"), 0))
        parts_BL = _runs(picture_BL.long() + image_BL)
        if tokens.mask_BL is not None:
            kinds_BL, parts_BL = (x.masked_fill(tokens.mask_BL == 0, -1) for x in (kinds_BL, parts_BL))
        positions_BL = tokens.positions_BL
        if positions_BL is None:
            positions_BL = torch.arange(image_BL.shape[1], device=image_BL.device).expand(image_BL.shape)
        embeds_BLd = self._embedded(tokens, visual_BVd, batch, question_BQd)
        last_BL = positions_BL if tokens.axes_BL3 is None else tokens.axes_BL3.amax(-1)
        return SegmentedPrompt(
            embeds_BLd,
            positions_BL,
            kinds_BL,
            parts_BL,
            batch.ids_B,
            last_BL.masked_fill(kinds_BL < 0, -1).amax(1) + 1,
            axes_BL3=tokens.axes_BL3,
            deep=tuple(torch.zeros_like(embeds_BLd).masked_scatter(image_BL[..., None], x) for x in deep),
        )

    @torch.no_grad()
    def answer_logits(self, batch: VlmBatch) -> Tensor:
        """Logits of the token after the prompt, (B, vocabulary). Padding, if any, must be on the left."""
        return self._answer(batch)

    def supervised(self, batch: VlmBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, vocabulary) of the token after each prompt, and the answers (B,)."""
        if batch.answers_B is None:
            raise ValueError("the batch holds no answers")
        return self._answer(batch), batch.answers_B

    def calibration(self, ctx: StageContext, examples: int, seed: int) -> Iterator[VlmBatch]:
        """Training scenes and questions with their answers, ``examples`` in all, through the model's cached features."""
        self.info.check_calibration()
        lessons = self.info.known_lessons
        assert lessons is not None
        tables = {layer: lessons.tables(self.info.tower, layer) for layer in self.layers_needed}
        count = -(-examples // CALIBRATION_BATCH)
        left = examples
        for step in lessons.steps(count, CALIBRATION_BATCH, derive_seed("calibration", seed)):
            # the last batch is cut from both ends, so that every kind of question keeps its share
            chosen = torch.linspace(0, CALIBRATION_BATCH - 1, min(left, CALIBRATION_BATCH)).round().long()
            left -= len(chosen)
            yield self.lesson(step.chosen(chosen), table_rows(ctx, tables, step.rows_B[chosen]))

    def _answer(self, batch: VlmBatch) -> Tensor:
        found = self.compress(batch)
        visual_BVd = self.project(found.tokens_BVD, batch.layout)
        output = self.prefill(visual_BVd, batch, found.places_BV, question_BQd=found.question_BQd, deep=found.deep)
        answer_BW: Tensor = output.logits[:, -1]
        return answer_BW

    def lesson(self, step: Lesson, hidden: Mapping[LayerKey, Tensor]) -> VlmBatch:
        """The prompts of training examples with the given features, on the model's device."""
        image_B1 = torch.full((len(step.rows_B), 1), self.info.geometry["image_token"])
        return VlmBatch(
            {layer: h.to(self.device) for layer, h in hidden.items()},
            torch.cat((image_B1, step.questions_BQ), dim=1).to(self.device),
            step.questions_BQ.to(self.device),
            step.rows_B.to(self.device),
            answers_B=step.answers_B.to(self.device),
        )

    @torch.no_grad()
    def encode_text(self, ids_BQ: Tensor, mask_BQ: Tensor | None = None) -> Tensor:
        """The language model's last hidden states on text alone, (B, Q, d); touches no cache."""
        positions_BQ = None if mask_BQ is None else (mask_BQ.cumsum(-1) - 1).clamp(min=0)
        return self.decoder(
            input_ids=ids_BQ, attention_mask=mask_BQ, position_ids=positions_BQ, use_cache=False
        ).last_hidden_state

    @torch.no_grad()
    def embed_text(self, ids_BQ: Tensor) -> Tensor:
        """Token embeddings of text, (B, Q, d)."""
        return self.module.get_input_embeddings()(ids_BQ)


def _per_view(ids_B: Tensor, views: int) -> Tensor:
    """Numbers of the views of examples, (B·N,), those of the examples where each has one."""
    if views == 1:
        return ids_B
    return (ids_B[:, None] + (torch.arange(views, device=ids_B.device) << 40)).flatten()


def _runs(kinds_BL: Tensor) -> Tensor:
    """Numbers of the runs of equal kinds, (B, L), the first of kind 0 being number 0 though it may be empty."""
    start_B1 = torch.zeros_like(kinds_BL[:, :1])
    before_BL = torch.cat((start_B1, kinds_BL[:, :-1]), dim=1)
    return (kinds_BL != before_BL).cumsum(1)
