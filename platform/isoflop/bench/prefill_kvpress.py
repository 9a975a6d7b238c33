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
}


def run(model: Any, ids: list[int], tail: list[int], name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """Read ``ids`` under a press, score ``tail`` behind them."""
    kept: list[Any] = []
    press = None
    if name != "none":
        press = PRESSES[name](1 - knobs["keep"], knobs)
        score = press.score

        def noted(module: Any, hidden: Any, keys: Any, *rest: Any) -> Any:
            scores = score(module, hidden, keys, *rest)
            left = int(keys.shape[2] * (1 - press.compression_ratio))
            kept.append(scores[0].topk(left, dim=-1).indices)
            return scores

        press.score = noted
    cache = DynamicCache()

    def prefill() -> torch.Tensor:
        given = {"input_ids": torch.tensor([ids]), "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if press is None:
            return model(**given).logits
        with press(model):
            return model(**given).logits

    def scoring() -> torch.Tensor:
        places = torch.arange(len(ids), len(ids) + len(tail) - 1)[None]
        behind = model(
            input_ids=torch.tensor([tail[:-1]]), past_key_values=cache, position_ids=places, use_cache=True
        ).logits[0]
        return torch.nn.functional.cross_entropy(torch.cat((first[0], behind)).float(), torch.tensor(tail))

    first, before = measured(prefill)
    nll, behind = measured(scoring)
    places = [index.sort(-1).values.tolist() for index in kept]
    return {"prefill": before, "scoring": behind, "nll": float(nll), "kept": places or None}


def main() -> None:
    """Answer what the bench asked."""
    given = asked()
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=torch.float32, attn_implementation="sdpa")
    rows = []
    with torch.no_grad():
        for tokens in given["tokens"]:
            ids, tail = given["ids"][:tokens], given["ids"][tokens : tokens + given["scored"]]
            run(model, ids[:64], tail, "none", {})
            for name, knobs in given["methods"]:
                if name == "none" or name in PRESSES:
                    rows.append({"method": name, "tokens": tokens, **run(model, ids, tail, name, knobs)})
    answer(rows)


if __name__ == "__main__":
    main()
