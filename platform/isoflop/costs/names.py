"""Names of what parts of isoflop measure beside a task's errors and metrics: keys of ``footprint`` in rows.

Parts of others may report more. Which of these a row holds is up to its model, methods and task.
"""

from __future__ import annotations

import re

MEASURED: dict[str, str] = {
    # of an answer, by tasks
    "flops": "FLOPs of an answer, all of them",
    "flops_codec": "FLOPs of a codec's networks",
    "flops_dense": "FLOPs without reduction of tokens and without codec",
    "flops_llm": "FLOPs of the language model",
    "flops_method": "FLOPs of a method on text or tokens",
    "flops_per_byte": "FLOPs per scored byte",
    "flops_projector": "FLOPs between vision tower and language model",
    "flops_vision": "FLOPs of the vision tower",
    "visual_tokens": "tokens of images that enter the language model",
    "text_tokens": "tokens of text",
    "prompt_tokens": "tokens of the context",
    "tree_tokens": "tokens of all continuations of a text that were run",
    "tokens_left": "patches behind the last block",
    "tokens_mean": "patches that a block sees on average",
    "layers": "layers of the model",
    "width": "width of the model",
    "train_tokens": "tokens that the model was trained on",
    "seconds": "seconds of an answer",
    "eval_seconds": "seconds of all examples",
    "peak_bytes": "most bytes held at once while answering",
    "worker_peak_bytes": "most bytes of the worker since it started",
    "bytes": "bytes of weights and cache",
    "bytes_dense": "bytes of weights and cache without methods",
    "weight_bytes": "bytes of weights",
    "weight_bytes_dense": "bytes of weights without methods",
    "kv_bytes": "bytes of the cache",
    "kv_bytes_dense": "bytes of the cache without methods",
    "kv_read_bytes": "bytes of the cache that a step reads",
    "codec_weight_bytes": "bytes of a codec's weights",
    # by methods
    "ratio": "cost without the method over that with it",
    "bits": "bits per element",
    "method_params": "parameters that a method holds",
    "method_bytes": "bytes that a method holds",
    "training_seconds": "CPU seconds that training a method's own weights took",
    "activation_ratio": "share of neurons that are active",
    "calibration_ppl_ratio": "perplexity of the calibration's texts, over that without the method",
    "calibration_active": "share of neurons that are active, of the calibration's texts",
    "cett": "relative error of a block's output, as calibrated",
    "active_experts": "experts that run for a token in a layer",
    "active_params": "parameters of the layers that a token meets",
    "mlp_flops": "FLOPs of the feed-forward blocks per token",
    "mlp_flops_dense": "the same, of all neurons",
    "kv_prompt_bytes": "bytes of the prompt's cache",
    "kv_read_ratio": "bytes that a step would read of the whole cache, over those that it reads",
    "kv_scoring_tokens": "tokens read a second time to score the prompt's cache",
    "kv_store_ratio": "bytes of the prompt's whole cache over those kept",
    "layer_visual_tokens": "visual tokens, mean over layers",
    "scored_by_cls": "1 where a [CLS] token tells what to keep",
    "first_block_keeps": "share of patches behind the first block",
    "macs_share": "multiply-adds left",
    "scoring_macs": "multiply-adds of choosing tokens",
    "patches_removed": "patches removed in all blocks",
    "model_bits": "bits per parameter of the whole model",
    "model_ratio": "bytes of the whole model's weights without methods over those with them",
    "compressed_params": "parameters that were compressed",
    "online_flops": "FLOPs per token of turning activations while the model runs",
    "stored_params": "numbers that compressed matrices are stored as",
    "raw_bytes": "bytes of the image as it is",
    "codec_bytes": "bytes of the coded image",
    "codec_payload_bytes": "bytes of the coded image without its header",
    "codec_tokens": "tokens of the coded image",
    "bits_per_pixel": "bits of the coded image per pixel",
    "payload_bits_per_pixel": "the same without its header",
    "ratio_payload": "bytes of the image over those of the coded one without its header",
    "compressor_tokens": "tokens that the compressor of a prompt reads",
    "units_kept": "share of a prompt's units that are kept",
    "lm_calls_per_byte": "forward passes per scored byte",
    "tokens_per_byte": "tokens per scored byte",
    "tree_tokens_per_byte": "tokens of continuations per scored byte",
    "largest_cover": "most continuations at one place",
    "kept_documents": "documents that are kept",
    "kept_tokens": "tokens of documents that are kept",
    "pool_tokens": "tokens of all documents",
    "target_share": "share of kept tokens that are of the target's domain",
    "length_correlation": "correlation of being kept with a document's length",
    "wire_bytes": "bytes that a worker sends per step",
    "payload_bytes": "the same without headers",
    "payload_ratio": "bytes of dense gradients over those",
    "run_wire_bytes": "bytes that a worker sends in all",
    "run_wire_ratio": "bytes of dense gradients over those",
    "socket_bytes": "bytes through a worker's sockets per step",
    "workers": "processes of the training",
    "ms": "milliseconds of a step",
    "exchange_ms": "milliseconds of a step's exchange",
}
"""Name -> what it is. The families' own ``footprint`` and the tasks' ``measure`` say how each is counted."""

_SERIES = re.compile(r"(ratio|bits)_[a-z_]+|selection_[a-z_]+|modelled_ms_\d+gbit")


def is_measured(name: str) -> bool:
    """Whether a part of isoflop may report a cost of this name: one above, or of a series (``ratio_kv_cache`` …)."""
    return name in MEASURED or _SERIES.fullmatch(name) is not None
