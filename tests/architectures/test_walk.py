"""Every causal language model of the installed transformers is exact or refused in one line, alone and inside LLaVA."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from isoflop.core.errors import Infeasible
from isoflop.testing.architectures import (
    CHECKS,
    Architecture,
    Wrong,
    architectures,
    examine,
    examine_llava,
    full_attention,
    page,
    rows,
    small_config,
    some_windows,
    vision_language_rows,
)
from isoflop.testing.architectures.page import PAGE
from isoflop.testing.architectures.walk import examined

KNOWN = {architecture.model_type: architecture for architecture in architectures()}
EXACT = ["exact"] * 4
UNTAPPED = ["exact", "exact", "refused: the attention that tokens get cannot be read off {}", "exact"]
Expected = list[str] | str
SOME = "windows"
LMS: dict[str, tuple[bool | str, Expected]] = {
    "llama": (False, EXACT),
    "qwen3_moe": (False, EXACT),
    "mistral": (True, EXACT),
    "gemma3_text": (True, EXACT),
    "modernbert-decoder": (True, EXACT),
    "gemma3_text with windows": (SOME, UNTAPPED),
    "olmo3 with windows": (SOME, UNTAPPED),
    "gemma2": (True, EXACT),
    "gemma2 with windows": (SOME, UNTAPPED),
    "gpt_oss": (True, EXACT),
    "gpt_oss with windows": (SOME, UNTAPPED),
    "granite_swa": (True, EXACT),
    "gpt2": (False, UNTAPPED),
    "opt": (False, UNTAPPED),
    "hunyuan_v1_dense": (False, UNTAPPED),
    "smollm3": (False, UNTAPPED),
    "fuyu": (False, [*UNTAPPED[:3], "refused: a learned prompt stands before token ids"]),
    "gemma3n_text": (True, [*UNTAPPED[:3], "refused: it does not offer soft_prompt: its layers look token ids up"]),
    "modernbert-decoder as it comes": (False, UNTAPPED),
    "moshi": (
        False,
        "refused: MoshiForCausalLM attends within windows (sliding_window = 4), and hands none to its attention",
    ),
    "mistral as it comes": (
        False,
        "refused: MistralForCausalLM attends within windows (sliding_window = 4) in every layer",
    ),
    "doge": (False, "refused: DogeForCausalLM: attention with a mask of the architecture's own"),
    "diffllama": (False, "refused: DiffLlamaForCausalLM calls its attention 2 times"),
    "llama4_text": (True, "refused: Llama4ForCausalLM scales queries by how much transformers' own cache holds"),
    "lfm2_moe": (False, "refused: Lfm2MoeForCausalLM has layers that do not attend to all tokens before (conv)"),
    "musicgen": (False, "refused: transformers builds no causal language model"),
    "bert": (False, "refused: BertLMHeadModel keeps its layers elsewhere"),
}
"""By the type of a config: whether without windows, or with some, and what is found. What no walk found until there was one is among them."""
LLAVAS: dict[str, tuple[bool, Expected]] = {
    "llama": (False, EXACT),
    "gemma2": (True, EXACT),
    "gpt_oss": (True, EXACT),
    "phi": (False, UNTAPPED),
    "phi3": (False, UNTAPPED),
    "olmo2": (False, UNTAPPED),
    "hunyuan_v1_dense": (False, UNTAPPED),
    "gpt_neox": (False, UNTAPPED),
    "gemma3n_text": (True, UNTAPPED),
    "bert": (False, "refused: BertModel keeps its layers elsewhere"),
    "diffllama": (False, "refused: DiffLlamaModel calls its attention 2 times"),
    "gpt2": (False, "not built: transformers' own LLaVA does not run with it"),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def changes_of(name: str, how: bool | str) -> dict[str, Any]:
    if how == SOME:
        return some_windows(small_config(name))
    return full_attention(small_config(name)) if how else {}


def compare(found: Any, expected: Expected) -> None:
    texts = [str(finding) for finding in found.values()]
    assert texts, "nothing was looked at"
    wanted = [expected] * len(texts) if isinstance(expected, str) else expected
    for text, beginning in zip(texts, wanted, strict=True):
        assert text.startswith(beginning.removesuffix("{}")), texts


@pytest.mark.parametrize("name", LMS)
def test_a_language_model_is_exact_or_refused(name: str, tmp_path: Path) -> None:
    (full, expected), kind = LMS[name], name.split()[0]
    compare(examine(KNOWN[kind], tmp_path, **changes_of(kind, full)), expected)


FOUR = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}


def test_layers_that_share_keys_are_refused(tmp_path: Path) -> None:
    """As most checkpoints of Gemma 3n have them; found nowhere but in the config, and bytes would count twice."""
    shared = {**FOUR, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4}
    compare(examine(KNOWN["gemma3n_text"], tmp_path, **shared), "refused: Gemma3nForCausalLM takes keys and values of")


def test_a_layer_that_rotates_nothing_is_compared_by_itself(tmp_path: Path) -> None:
    """SmolLM3: the tap is right in three of four layers."""
    found = examine(KNOWN["smollm3"], tmp_path, **FOUR, no_rope_layers=[1, 1, 0, 1])
    assert found["tap"].verdict == "refused"


@pytest.mark.parametrize("name", LLAVAS)
def test_a_vision_language_model_is_exact_or_refused(name: str, tmp_path: Path) -> None:
    full, expected = LLAVAS[name]
    if not isinstance(expected, str):  # a learned prompt is tried on decoders alone
        expected = expected[:-1]
    compare(examine_llava(KNOWN[name], tmp_path, **changes_of(name, full)), expected)


@pytest.mark.slow
def test_every_architecture_is_exact_or_refused_and_on_the_page() -> None:
    lms, llavas, classes = rows(examine), rows(examine_llava), vision_language_rows()
    assert {row.architecture.model_type for row in lms} == set(KNOWN)
    assert [f"{row.name}: {row.findings}" for row in (*lms, *llavas) if not row.fine] == []
    if f"transformers {transformers.__version__} knows" in PAGE.read_text().replace("\n", " "):
        assert PAGE.read_text().startswith(page(lms, llavas, classes))


def test_the_walk_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted over padding move learned ones."""
    lm = importlib.import_module("isoflop.models.lm")
    monkeypatch.setattr(lm, "positions_of", lambda batch: torch.arange(batch.ids_BT.shape[1])[None])
    found = examine(KNOWN["gpt2"], tmp_path)
    for name in ("one pass", "step by step"):
        assert found[name].verdict == "wrong"
        assert "is off by" in found[name].why


def test_what_neither_refuses_in_one_line_nor_agrees_is_wrong() -> None:
    def raising(error: Exception) -> Any:
        def check(subject: object) -> None:
            raise error

        return check

    errors = {
        "refused": Infeasible("model hf:x: no; allowed: others"),
        "lines": Infeasible("first\nsecond"),
        "off": Wrong("off by 1"),
        "traceback": KeyError("position_embeddings"),
    }
    checks = {name: raising(error) for name, error in errors.items()} | {"right": lambda subject: None}
    found = {name: str(finding) for name, finding in examined("hf:x", checks, lambda: None).items()}
    assert found == {
        "refused": "refused: no",
        "lines": "wrong: refused in several lines: first second",
        "off": "wrong: off by 1",
        "traceback": "wrong: raises KeyError: 'position_embeddings'",
        "right": "exact",
    }


def test_small_configs_of_all_but_a_few_can_be_made() -> None:
    """So that the walk does not become empty with a new version of transformers."""
    made = 0
    for name in KNOWN:
        try:
            made += bool(small_config(name))
        except Exception:
            continue
    assert made >= 0.9 * len(KNOWN)
    assert len(CHECKS) == 4
    assert Architecture("llama", "LlamaForCausalLM") in KNOWN.values()
