"""What classifying an image costs, measured on the live model with whatever methods are applied to it."""

from __future__ import annotations

import numpy as np

from isoflop.models.counting import flops_of
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.metering import meter
from isoflop.models.vit import VitBatch, VitModel
from isoflop.tasks.footprint import peak_bytes_of, seconds_of


def costs_of_image(vit: VitModel, batch: VitBatch) -> dict[str, float]:
    """Footprint of classifying an image from its pixels, batch of one.

    ``flops`` is counted on the live model, scoring of the method and networks of a codec included; ``flops_codec`` are
    those of the latter; ``flops_dense`` is the model's without token reduction or codec. ``weight_bytes`` and
    ``peak_bytes`` include the weights that a codec must hold, ``codec_weight_bytes``; ``bytes_dense`` does not.
    ``tokens_left`` are the patches behind the last block, ``tokens_mean`` those that the blocks' attention sees on average.
    """
    with meter(vit) as reading:
        flops, _ = flops_of(lambda: vit.supervised(batch))
    patches = vit.info.geometry["patches"]
    left, seen, codec = float(patches), [patches], vit.occupant(PIXELS)
    if reading.block_tokens is not None:
        left = float(reading.block_tokens.left)
        seen = [tokens - vit.info.geometry["prefix"] for tokens, _ in reading.block_tokens.seen]
    with vit.unreduced():
        dense, _ = flops_of(lambda: vit.classify(batch.images_BCHW, batch.ids_B))
    coding, held = {}, vit.served_bytes()
    if codec is not None:
        coding["flops_codec"] = float(flops_of(lambda: vit.seen(batch.images_BCHW))[0])
        coding["codec_weight_bytes"] = float(codec.held_bytes(vit.info.dense_bits))
    return {
        "tokens_left": left,
        "tokens_mean": float(np.mean(seen)),
        "flops": float(flops),
        "flops_dense": float(dense),
        **coding,
        "weight_bytes": held,
        "weight_bytes_dense": vit.dense_weight_bytes(),
        "bytes": held,
        "bytes_dense": vit.dense_weight_bytes(),
        "seconds": seconds_of(lambda: vit.supervised(batch), vit.devices),
        "peak_bytes": float(vit.resident_bytes() + peak_bytes_of(lambda: vit.supervised(batch), vit.devices)),
    }
