"""A LLaVA-type model with grouped queries, prompts of segments, and plain references for what runs through it.

Shape suffixes: B rows, L columns, T tokens of a row, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isoflop.methods.visual_tokens.probe import untrained_model
from isoflop.models.prefix import Part, SegmentedPrompt
from isoflop.models.vlm import VlmModel

LAYERS, GROUPS, WORDS = 4, 2, 50
Change = Callable[[int, Tensor, Tensor], Tensor]
"""From a layer, hidden states (T, d) of one row and True at its visual tokens to True at those that stay, (T,)."""


def grouped_model(tower: str = "dense", decoder: str = "Llama") -> VlmModel:
    """An untrained tiny LLaVA with a decoder of four layers whose query heads share two key-value heads."""
    import transformers

    plain = untrained_model("d128", tower=tower)
    text = plain.module.config.text_config
    config = plain.module.config
    config.text_config = getattr(transformers, f"{decoder}Config")(
        vocab_size=text.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=GROUPS, head_dim=16, max_position_embeddings=256, initializer_range=0.15, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
        for p in module.model.language_model.parameters():
            if p.dim() > 1:  # large enough to attend unevenly
                p.data.normal_(0, 0.15)
    module.model.vision_tower.load_state_dict(plain.module.model.vision_tower.state_dict())
    shape = {"width": 64, "layers": LAYERS, "heads": 4, "kv_heads": GROUPS, "head_width": 16}
    info = dataclasses.replace(plain.info, geometry={**plain.info.geometry, **shape})
    return VlmModel(info, module, dataclasses.replace(plain.vision, tower=module.model.vision_tower))


def rows_of_parts(seed: int = 0) -> list[list[Part]]:
    """Three prompts: one image; two crops and a system text; an image of which some patches are gone. Questions of two."""
    rng = torch.Generator().manual_seed(seed)

    def image(kind: str, tokens: int, **kwargs: Any) -> Part:
        return Part(kind, embeds_Td=torch.randn(tokens, 64, generator=rng), **kwargs)

    def text(kind: str, tokens: int) -> Part:
        return Part(kind, ids_T=torch.randint(0, WORDS, (tokens,), generator=rng))

    return [
        [image("image", 9), text("question", 2)],
        [text("system", 3), image("crop", 4), image("crop", 5), text("question", 2)],
        [text("system", 1), image("image", 5, room=9, places_T=torch.tensor([0, 2, 3, 7, 8])), text("question", 2)],
    ]


@torch.no_grad()
def by_hand(model: VlmModel, prompt: SegmentedPrompt, row: int, change: Change | None = None) -> Tensor:
    """One row alone, layer by layer, without padding, masks or hooks: hidden states (T', d) behind the final norm."""
    decoder, real = model.decoder, prompt.valid_BL[row]
    x, positions = prompt.embeds_BLd[row][real][None], prompt.positions_BL[row][real][None]
    image = prompt.layout().image_BL[row][real]
    for number, block in enumerate(decoder.layers):
        if change is not None:
            stays = change(number, x[0], image)
            x, positions, image = x[:, stays], positions[:, stays], image[stays]
        x = block(x, attention_mask=None, position_embeddings=decoder.rotary_emb(x, positions), position_ids=positions)
    return decoder.norm(x)[0]


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to rounding."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (found - expected).abs().max()
