"""``calibration:`` of a sweep: what it changes, whose ids it enters, and what plan refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import isoflop
from isoflop.core.errors import UserError
from isoflop.core.stage import walk
from isoflop.jobs.job import Job, ResolvedJob
from isoflop.methods.base import METHODS
from isoflop.methods.calibration import OnModel
from isoflop.models.family import family_of
from isoflop.models.worlds.lm_text import Tokens
from isoflop.models.worlds.own_text import OwnText
from isoflop.sweep.resolve import resolve

TEXTS = ["The first line of a text.", "", "A second one, which goes on for a little longer.", "Third."]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, in ``save_pretrained`` form."""
    from isoflop.testing.task_probes import reader_of_text

    folder = tmp_path_factory.mktemp("calibrated") / "reader"
    model, _ = reader_of_text()
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    (tmp_path / "b.txt").write_text("Words of another kind: 1 2 3, 4 5 6. " * 20)
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "numbers.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    (tmp_path / "tiny.txt").write_text("hi there")
    (tmp_path / "test.txt").write_text("What is measured is another text again. " * 12)
    return tmp_path


class Held:
    """A context whose stages are their values."""

    @staticmethod
    def tokens(tokens: Tokens, end: int | None) -> Any:
        return SimpleNamespace(value=tokens, tokenizer=SimpleNamespace(value=SimpleNamespace(eos_token_id=end)))

    def get(self, stage: Any) -> Any:
        return stage.value


KNOBS: dict[str, dict[str, Any]] = {"double-sparsity": {"group_factor": 2, "dense_layers": 0}}
"""For a small model."""
A = {"data": "a.jsonl", "field": "body", "length": 16}


def written(folder: Path, checkpoint: Path | str, **more: object) -> Path:
    sweep = {
        "name": "own",
        "models": [f"hf:{checkpoint}" if isinstance(checkpoint, Path) else checkpoint],
        "methods": [
            "none",
            {"gptq": {"bits": 3, "group": 8, "n_calib": 6}},
            {"wanda": {"sparsity": 0.5, "n_calib": 6}},
        ],
        "tasks": [{"text": {"data": "test.txt", "tokens": 64, "prefix": 0}}],
        **more,
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(sweep))
    return path


def jobs(path: Path) -> dict[str, Job]:
    sweep = resolve(path)
    return {job.methods[0].name: job for config in sweep.space.grid() for job in sweep.jobs_of(config)}


def test_it_enters_the_ids_of_jobs_that_calibrate_and_of_no_others(folder: Path, checkpoint: Path) -> None:
    plain, own = jobs(written(folder, checkpoint)), jobs(written(folder, checkpoint, calibration=A))
    assert plain["none"] == own["none"]
    assert {name for name in plain if plain[name].id != own[name].id} == {"gptq", "wanda"}
    assert plain["gptq"].trial_id != own["gptq"].trial_id
    assert Job.from_dict(json.loads(json.dumps(own["gptq"].to_dict()))) == own["gptq"]
    other = [
        jobs(written(folder, checkpoint, calibration={**A, **change}))["gptq"].id
        for change in ({"length": 8}, {"data": "b.txt", "field": "text"})
    ]
    assert len({plain["gptq"].id, own["gptq"].id, *other}) == 4


def test_places_and_orders_of_the_data_enter_neither_ids_nor_stages(
    folder: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = jobs(written(folder, checkpoint, calibration=A))["gptq"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    (elsewhere / "other.jsonl").write_text("".join(lines[::-1]))
    (elsewhere / "test.txt").write_text((folder / "test.txt").read_text())
    second = jobs(written(elsewhere, checkpoint, calibration={**A, "data": "other.jsonl"}))["gptq"]
    assert first.id == second.id
    keys = [[stage.key for stage in ResolvedJob.of(job).stages()] for job in (first, second)]
    assert keys[0] == keys[1]


def test_windows_go_through_all_documents_with_ends_in_between() -> None:
    """Against plain slices of what is written out by hand."""
    ids = np.arange(10, 33)
    tokens = Tokens(ids, ids, np.array([0, 5, 5, 16, 23]))
    text = OwnText(Held.tokens(tokens, end=2), 4)
    whole = [*range(10, 15), 2, *range(15, 26), 2, *range(26, 33)]
    rows = torch.cat(list(text.batches(Held(), 6, 0))).tolist()
    assert sorted(rows) == [whole[start : start + 4] for start in range(0, 24, 4)]
    exact = OwnText(Held.tokens(Tokens(ids[:12], ids[:12], np.array([0, 12])), end=2), 4)
    assert sorted(torch.cat(list(exact.batches(Held(), 3, 0))).tolist()) == ids[:12].reshape(3, 4).tolist()
    with pytest.raises(UserError, match="the data hold 25 tokens, and an example has 26; allowed: more text"):
        next(OwnText(Held.tokens(tokens, end=2), 26).batches(Held(), 1, 0))


def test_methods_calibrate_on_it(folder: Path, checkpoint: Path) -> None:
    """Two texts give two results, and the same text the one of before; what does not calibrate runs once."""
    options: dict = {
        "executor": "local",
        "tracking_uri": "none",
        "cache_dir": folder / "cache",
        "store": str(folder / "store"),
    }
    found = []
    for chosen in ({"data": "b.txt", "length": 32}, A, {"data": "b.txt", "length": 32}):
        rows = isoflop.run(written(folder, checkpoint, calibration=chosen), **options).results().to_pylist()
        assert [row["status"] for row in rows] == ["ok"] * 3
        found.append({row["method"]: row["error"] for row in rows})
    assert found[0] == found[2]
    assert found[0]["none"] == found[1]["none"]
    assert all(found[0][name] != found[1][name] for name in ("gptq", "wanda"))


SEVERAL: dict[str, Any] = {
    "calibration": [
        {"data": "default", "samples": 3},
        {**A, "samples": 4},
        {"data": "b.txt", "length": 32, "samples": 6},
    ],
    "methods": ["none", {"gptq": {"bits": [2, 3], "group": 8}}, {"wanda": {"sparsity": 0.5}}],
}
"""Three texts, of which the first is what a model calibrates on by itself."""


def test_several_texts_are_a_choice_of_the_sweep(folder: Path, checkpoint: Path) -> None:
    """Each with the methods that calibrate and once without; a job is that of a sweep with this text alone, and finds its way back."""
    sweep = resolve(written(folder, checkpoint, **SEVERAL))
    points = list(sweep.space.grid())
    assert len(points) == 1 + 3 * 2 + 3
    found = [job for config in points for job in sweep.jobs_of(config)]
    assert len({job.id for job in found}) == len({job.trial_id for job in found}) == len(points)
    for config, job in zip(points, found, strict=True):
        assert sweep.config_of(job) == config
        now = sweep.job_now(job)
        assert now is not None
        assert now.id == job.id
    wanted = {"default": ({}, 3), "a.jsonl": (A, 4), "b.txt": ({"data": "b.txt", "length": 32}, 6)}
    for config, job in zip(points, found, strict=True):
        if "calibration" not in config:
            continue
        choice, samples = wanted[str(config["calibration"])]
        knobs = {k.split(".")[1]: v for k, v in config.items() if "." in k and k.split(".")[0] in ("gptq", "wanda")}
        more = {"calibration": choice} if choice else {}
        method = {job.method_label: {**knobs, "n_calib": samples}}
        alone = jobs(written(folder, checkpoint, methods=[method], **more))
        assert alone[job.method_label].id == job.id
        assert dict(job.methods[0].knobs)["n_calib"] == samples
    fewer = resolve(written(folder, checkpoint, **SEVERAL, exclude={"calibration": "b.txt", "gptq.bits": 2}))
    assert len(list(fewer.space.grid())) == len(points) - 1


def test_settings_of_a_method_share_the_statistics_of_a_text(folder: Path, checkpoint: Path) -> None:
    """One stage of statistics per text, whatever methods and settings ask for it."""
    sweep = resolve(written(folder, checkpoint, **SEVERAL))
    keys: dict[str, set[str]] = {}
    for config in sweep.space.grid():
        for job in sweep.jobs_of(config):
            for stage in ResolvedJob.of(job).stages():
                if stage.kind == "weight-calibration":
                    keys.setdefault(str(config["calibration"]), set()).add(stage.key)
    assert {text: len(found) for text, found in keys.items()} == {"default": 1, "a.jsonl": 1, "b.txt": 1}
    assert len(set.union(*keys.values())) == 3


def test_the_tokens_of_a_text_are_counted_up_to_what_is_asked(folder: Path, checkpoint: Path) -> None:
    """The largest number of windows that is allowed is the one that the text has, separators included."""
    from isoflop.models.lm import calibrated_on

    info = family_of("hf:").info(f"hf:{checkpoint}", {})
    chosen = {"data": str(folder / "a.jsonl"), "field": "body", "length": 8}
    tokenizer = info.tokenizer.ready()
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    most = (sum(lengths) + sum(n > 0 for n in lengths) - 1) // 8
    calibrated_on(info, {**chosen, "samples": most})
    with pytest.raises(UserError, match=f"allowed: samples up to {most}, "):
        calibrated_on(info, {**chosen, "samples": most + 1})


def test_every_method_says_whether_it_calibrates(checkpoint: Path) -> None:
    """A stage that asks for calibration examples belongs to a method that says so; else its jobs would not know the text."""
    info = family_of("hf:").info(f"hf:{checkpoint}", {})
    wrong, right = [], []
    for name in METHODS.names():
        cls = METHODS.get(name)
        try:
            stage = cls(**KNOBS.get(name, {})).prepare(info, None, 0)
        except (UserError, TypeError):  # another kind of model, or a knob without a default
            continue
        asks = stage is not None and any(isinstance(one, OnModel) and one.examples for one in walk((stage,)))
        (right if asks and cls.calibrates else [] if not asks else wrong).append(name)
    assert wrong == []
    assert {"gptq", "wanda", "sparsegpt", "bitstack", "evopress", "double-sparsity", "sparsing-law"} <= set(right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": {"data": "c.jsonl"}}, r"calibration: data .*c.jsonl: no file or folder 'c.jsonl'.*did you mean 'a.jsonl'"),
        ({"calibration": "a.jsonl"}, r"calibration: field: unknown field of .*a.jsonl 'text'; allowed: body"),
        ({"calibration": {"dat": "a.jsonl"}}, r"calibration.*dat.*did you mean 'data'"),
        ({"calibration": {"data": "tiny.txt"}}, r"calibration: data .*tiny.txt: hold 8 bytes, and an example has 128 tokens; allowed: more text, or"),
        ({"calibration": {**A, "length": 1}}, r"calibration.length.*1"),
        ({"calibration": {**A, "length": 100000}}, r"calibration: length = 100000 is more than the \d+ tokens that a text of model"),
        ({"calibration": {**A, "samples": 99}, "methods": ["wanda"]}, r"calibration: data .*a.jsonl: samples = 99 of 16 tokens are 1584 tokens, and the text has \d+; allowed: samples up to \d+"),
        ({"calibration": {**A, "samples": 2}}, r"calibration: samples sets n_calib, which gptq says itself; keep one of the two"),
        ({"calibration": {**A, "samples": 2}, "methods": [{"double-sparsity": KNOBS["double-sparsity"]}]}, r"calibration: samples is the knob n_calib of methods; those that have it: .*gptq"),
        ({"calibration": {**A, "samples": 0}}, r"calibration.samples: 0"),
        ({"calibration": {"data": "broken.jsonl"}}, r"calibration: data .*broken.jsonl:2: is no JSON"),
        ({"calibration": {"data": "numbers.jsonl"}}, r"calibration: field 'text' of row 2 of .*numbers.jsonl holds no text but '3'"),
        ({"calibration": {"data": "public:nothing/a.jsonl"}}, r"calibration: data public:nothing"),
        ({"calibration": [A, {**A, "data": "c.jsonl"}]}, r"calibration\[1\]: data .*c.jsonl: no file or folder"),
        ({"calibration": [A, {**A, "length": 8}]}, r"calibration\[1\]: a text of the name 'a.jsonl' stands there already; give one of them a name"),
        ({"calibration": [A, {**A, "name": "b"}]}, r"calibration\[1\]: b is the same text as a.jsonl, cut the same way; keep one"),
        ({"calibration": ["default", {"data": "default", "length": 8}]}, r"calibration\[1\]: length is of a text that is named"),
        ({"calibration": []}, r"calibration: is empty"),
        ({"calibration": [A, "b.txt"], "exclude": {"calibration": "c.txt"}}, r"exclude.*calibration never takes the value 'c.txt'"),
        ({"calibration": [A, "b.txt"], "zip": {"calibration": ["a.jsonl", "b.tx"], "wanda.sparsity": [0.5, 0.6]}, "methods": ["wanda"]}, r"zip.*'b.tx'.*did you mean 'b.txt'"),
        ({"calibration": A, "methods": ["none", {"snapkv": {"keep": 0.5}}]}, r"calibration: no method of the sweep calibrates; those that do: .*gptq"),
        ({"calibration": A, "models": ["tiny-lm/recall-d64"], "tasks": ["kv-recall"], "methods": ["gptq"]}, r"calibration: model tiny-lm/recall-d64 has no tokenizer"),
    ],
)  # fmt: skip
def test_plan_refuses_in_one_line(folder: Path, checkpoint: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(written(folder, checkpoint, **change))
    assert "\n" not in str(caught.value)
    assert "sweep.yaml:" in str(caught.value)
