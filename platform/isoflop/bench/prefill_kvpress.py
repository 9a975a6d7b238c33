"""The side of NVIDIA's kvpress in ``isoflop bench prefill``; runs where kvpress is installed, and needs nothing of isoflop.

kvpress runs the pass as transformers does and drops keys and values behind each layer; what follows reads what is left.
"""

from __future__ import annotations

from typing import Any

import kvpress
import torch
from prefill_measure import answer, asked, measured  # type: ignore[import-not-found]  # beside this file, where isoflop is not
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "snapkv": lambda ratio, knobs: kvpress.SnapKVPress(ratio, window_size=knobs["window"], kernel_size=knobs["kernel"]),
    "knorm": lambda ratio, knobs: kvpress.KnormPress(ratio),
    "streaming-llm": lambda ratio, knobs: kvpress.StreamingLLMPress(ratio, n_sink=knobs["sinks"]),
    "tova": lambda ratio, knobs: kvpress.TOVAPress(ratio),
    "pyramidkv": lambda ratio, knobs: kvpress.PyramidKVPress(
        ratio, window_size=knobs["window"], kernel_size=knobs["kernel"], beta=knobs["beta"]
    ),
    # masks what is evicted and keeps its bytes
    "ada-kv": lambda ratio, knobs: kvpress.AdaKVPress(
        kvpress.SnapKVPress(ratio, window_size=knobs["window"], kernel_size=knobs["kernel"]),
        alpha_safeguard=knobs["floor"],
    ),
    "expected-attention": lambda ratio, knobs: kvpress.ExpectedAttentionPress(
        ratio, n_future_positions=knobs["future"], n_sink=knobs["sinks"]
    ),
    # masks, too; asks by the checkpoint's chat template
    "kvzip": lambda ratio, knobs: kvpress.KVzipPress(ratio, n_sink=knobs["sinks"], chunk_size=knobs["chunk"]),
}


def kept_by(model: Any, ids: list[int], name: str, knobs: dict[str, Any]) -> list[Any]:
    """Positions that each head of each layer keeps, in a pass of its own, since watching takes time and memory."""
    press, kept = PRESSES[name](1 - knobs["keep"], knobs), []
    compress = press.compress

    def noted(module: Any, hidden: Any, keys: Any, values: Any, *rest: Any) -> Any:
        found = compress(module, hidden, keys, values, *rest)
        kept.append(_masked(module, keys) if name == "ada-kv" else _left(keys, found[0]))
        return found

    press.compress = noted
    cache = DynamicCache()
    with press(model):
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    if name == "kvzip":  # decides behind the pass
        kept = [_masked(layer.self_attn, cache.layers[n].keys) for n, layer in enumerate(model.model.layers)]
    return kept


def _left(before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
    """Which keys are left, by a random projection of each."""
    direction = torch.randn(before.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    every, index = ((before[0].double() * direction).sum(-1)).sort(-1)
    places = torch.searchsorted(every.contiguous(), (after[0].double() * direction).sum(-1).contiguous())
    return index.gather(-1, places.clamp(max=every.shape[-1] - 1)).sort(-1).values.tolist()


def _masked(module: Any, keys: torch.Tensor) -> list[list[int]]:
    """Which keys are not masked."""
    live = torch.ones(keys.shape[:3], dtype=torch.bool)
    live[module.masked_key_indices] = False
    return [head.nonzero()[:, 0].tolist() for head in live[0]]


def run(
    model: Any, ids: list[int], tail: list[int], name: str, knobs: dict[str, Any], positions: bool
) -> dict[str, Any]:
    """Read ``ids`` under a press, score ``tail`` behind them."""
    press = None if name == "none" else PRESSES[name](1 - knobs["keep"], knobs)
    cache = DynamicCache()

    def prefill() -> torch.Tensor:
        given = {"input_ids": torch.tensor([ids]), "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if press is None:
            return model(**given).logits
        with press(model):
            return model(**given).logits

    def scoring() -> torch.Tensor:
        places = torch.arange(len(ids), len(ids) + len(tail) - 1)
        # layers of different lengths have no common mask: there, one token at a time, which sees everything
        width = 1 if name == "pyramidkv" else len(places)
        parts = []
        for start in range(0, len(places), width):
            tokens = torch.tensor([tail[:-1][start : start + width]])
            here = places[None, start : start + width]
            parts.append(model(input_ids=tokens, past_key_values=cache, position_ids=here, use_cache=True).logits[0])
        behind = torch.cat(parts)
        return torch.nn.functional.cross_entropy(torch.cat((first[0], behind)).float(), torch.tensor(tail))

    first, before = measured(prefill)
    nll, behind = measured(scoring)
    kept = kept_by(model, ids, name, knobs) if positions and press is not None else None
    return {"prefill": before, "scoring": behind, "nll": float(nll), "kept": kept}


def main() -> None:
    """Answer what the bench asked."""
    given = asked()
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=torch.float32, attn_implementation="sdpa")
    rows = []
    with torch.no_grad():
        for tokens in given["tokens"]:
            ids, tail = given["ids"][:tokens], given["ids"][tokens : tokens + given["scored"]]
            run(model, ids[:64], tail, "none", {}, False)
            for name, knobs in given["methods"]:
                if name == "none" or name in PRESSES:
                    rows.append(
                        {"method": name, "tokens": tokens, **run(model, ids, tail, name, knobs, given["positions"])}
                    )
    answer(rows)


if __name__ == "__main__":
    main()
