"""`retrieval` and `choice` by text encoders, against transformers' own modules on one text at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isoflop.core.errors import UserError
from isoflop.core.rows import read
from isoflop.methods.base import build
from isoflop.models.counting import flops_of
from isoflop.models.encoder import EncoderModel
from isoflop.models.family import family_of
from isoflop.tasks.data.base import drawn
from isoflop.tasks.data.choice import Choice
from isoflop.tasks.data.retrieval import Retrieval
from isoflop.tasks.data.text import Text
from isoflop.testing.architectures.encoders import context, loaded, save_encoder, small_encoder

DOCUMENTS = ["four legs.", "a dog barks at night", "the cat", "what else: 12 cows", "no"]
QUERIES = ["which dog", "cats", "how many cows are there"]


@pytest.fixture(scope="module", autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("encoders"), {}
    for ends in ("Model", "ForMaskedLM", "ForMultipleChoice", "ForSequenceClassification"):
        found[ends] = root / ends
        save_encoder(small_encoder(f"Bert{ends}"), found[ends])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    rows = {
        "corpus": [{"id": f"d{n}", "text": text} for n, text in enumerate(DOCUMENTS)],
        "queries": [{"query": text, "relevant": f"d{n + 1}"} for n, text in enumerate(QUERIES)],
        "choice": [
            {"passage": "a cow and a cat.", "question": f"which {n}", "options": ["a cow", "cat", "dogs bark"], "answer": n % 3}
            for n in range(5)
        ],
    }  # fmt: skip
    for name, table in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return {name: str(root / f"{name}.jsonl") for name in rows}


def retrieval(data: dict[str, str], **options: Any) -> Retrieval:
    return Retrieval(corpus=data["corpus"], queries=data["queries"], shard=2, **options)


def found_by(task: Any, model: EncoderModel) -> dict[int, dict[str, float]]:
    task.check(model.info)
    found = {}
    for shard in task.evaluate(model, context(), 0):
        for n, number in enumerate(shard.ids.tolist()):
            found[number] = {"error": shard.errors[n], **{name: column[n] for name, column in shard.metrics.items()}}
    return found


def ranked_as(task: Retrieval, model: EncoderModel, scores_QD: np.ndarray) -> None:
    found, queries = found_by(task, model), read(task.queries)
    assert len(found) == len(QUERIES)
    for place, number in enumerate(queries.ids_N.tolist()):
        text = queries.rows[place]["query"]
        own_D = scores_QD[QUERIES.index(text)]
        relevant = QUERIES.index(text) + 1
        rank = 1 + int((np.delete(own_D, relevant) >= own_D[relevant]).sum())
        assert found[number]["rank"] == rank
        assert found[number]["mrr"] == pytest.approx(1 / rank)
        assert found[number]["error"] == float(rank > task.k)


def stock_states(model: EncoderModel, text: str) -> Tensor:
    """Of one text, (T, d)."""
    tokens = model.tokenizer(text, return_tensors="pt")
    found: Tensor = model.module.base_model(**tokens).last_hidden_state[0]
    return found


@pytest.mark.parametrize("ends", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("k", [1, 2])
def test_documents_are_ranked_by_the_cosine_of_mean_states(
    ends: str, k: int, checkpoints: dict[str, Path], data: dict[str, str]
) -> None:
    model = loaded(f"hf:{checkpoints[ends]}")
    means = {text: stock_states(model, text).mean(0) for text in (*QUERIES, *DOCUMENTS)}
    scores = [[float(torch.cosine_similarity(means[q], means[d], dim=0)) for d in DOCUMENTS] for q in QUERIES]
    ranked_as(retrieval(data, k=k), model, np.array(scores))


def test_a_reranker_ranks_pair_by_pair(checkpoints: dict[str, Path], data: dict[str, str]) -> None:
    model = loaded(f"hf:{checkpoints['ForSequenceClassification']}")
    scores = [
        [float(model.module(**model.tokenizer(q, d, return_tensors="pt")).logits[0, 0]) for d in DOCUMENTS]
        for q in QUERIES
    ]
    ranked_as(retrieval(data), model, np.array(scores))


POOLED = {
    "cls": lambda x_Td: x_Td[0],
    "max": lambda x_Td: x_Td.amax(0),
    "mean": lambda x_Td: x_Td.mean(0),
    "mean_sqrt_len_tokens": lambda x_Td: x_Td.sum(0) / len(x_Td) ** 0.5,
    "weightedmean": lambda x_Td: sum((n + 1) * x_d for n, x_d in enumerate(x_Td)) / sum(range(1, len(x_Td) + 1)),
    "lasttoken": lambda x_Td: x_Td[-1],
}


def sentence_folder(
    folder: Path, pools: tuple[str, ...], dense: bool = False, normalise: bool = True, **options: Any
) -> Path:
    """As sentence-transformers lays it out."""
    save_encoder(small_encoder("BertForMaskedLM"), folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Dense", "Dense")] if dense else [])]
    modules += [("3_Normalize", "Normalize")] if normalise else []
    listed = [{"idx": n, "name": str(n), "path": p, "type": f"sentence_transformers.models.{k}"} for n, (p, k) in enumerate(modules)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))
    keys = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, **{f"pooling_mode_{keys.get(name, name)}": name in pools for name in POOLED}})
    )  # fmt: skip
    if dense:
        from safetensors.torch import save_file

        (folder / "2_Dense").mkdir()
        config = {"in_features": 32 * len(pools), "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
        (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
        rng = torch.Generator().manual_seed(0)
        weights = {"linear.weight": torch.randn(8, 32 * len(pools), generator=rng), "linear.bias": torch.randn(8, generator=rng)}  # fmt: skip
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": True}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(options))
    return folder


@pytest.mark.parametrize(
    ("pools", "dense", "normalise", "similarity"),
    [
        (("mean",), False, True, "cosine"),
        (("cls",), False, False, "dot"),
        (("max",), False, False, "euclidean"),
        (("mean_sqrt_len_tokens",), False, True, "manhattan"),
        (("weightedmean",), False, False, "cosine"),
        (("lasttoken",), True, False, "dot"),
        (("cls", "mean"), True, True, "cosine"),
    ],
)
def test_a_folder_of_sentence_transformers_embeds_as_it_says(
    pools: tuple[str, ...],
    dense: bool,
    normalise: bool,
    similarity: str,
    data: dict[str, str],
    tmp_path: Path,
) -> None:
    """Its config names a head, which embeddings do not have; texts are cut, prompts put before them, letters made small."""
    options = {"similarity_fn_name": similarity, "prompts": {"query": "q: ", "document": "D"}}
    folder = sentence_folder(tmp_path / "m", pools, dense, normalise, **options)
    model = loaded(f"hf:{folder}")
    assert (model.info.head, model.info.tokens_at_most) == ("embedding", 12)

    def expected(text: str, before: str) -> Tensor:
        tokens = model.tokenizer((before + text).lower(), truncation=True, max_length=12, return_tensors="pt")
        x_Td = model.module.base_model(**tokens).last_hidden_state[0]
        found = torch.cat([POOLED[name](x_Td) for name in POOLED if name in pools])
        if dense:
            linear = nn.Linear(32 * len(pools), 8)
            rng = torch.Generator().manual_seed(0)
            linear.weight.copy_(torch.randn(8, 32 * len(pools), generator=rng))
            linear.bias.copy_(torch.randn(8, generator=rng))
            found = torch.tanh(linear(found))
        return found / found.norm() if normalise else found

    queries = torch.stack([expected(text, "q: ") for text in QUERIES])
    documents = torch.stack([expected(text, "D") for text in DOCUMENTS])
    torch.testing.assert_close(model.embed_all(QUERIES, query=True), queries, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.embed_all(DOCUMENTS, query=False), documents, atol=1e-5, rtol=1e-5)
    scores = {
        "cosine": lambda q, d: float(torch.cosine_similarity(q, d, dim=0)),
        "dot": lambda q, d: float(q @ d),
        "euclidean": lambda q, d: -float((q - d).norm()),
        "manhattan": lambda q, d: -float((q - d).abs().sum()),
    }[similarity]
    ranked_as(retrieval(data), model, np.array([[scores(q, d) for d in documents] for q in queries]))


def test_what_a_folder_says_is_part_of_the_model_and_what_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m", ("mean",))

    def info() -> Any:
        return family_of("hf:x").info(f"hf:{folder}", {})

    version = info().version
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace("mean_tokens\": true", "mean_tokens\": false").replace("cls_token\": false", "cls_token\": true"))  # fmt: skip
    assert info().sentence.pools == ("cls",)
    assert info().version != version
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "hamming"}')
    with pytest.raises(UserError, match="similarity_fn_name = 'hamming'; allowed: cosine, dot, euclidean, manhattan"):
        info()
    (folder / "config_sentence_transformers.json").write_text("{}")
    stored = pooling.read_text()
    pooling.write_text("{}")
    with pytest.raises(UserError, match="its pooling is none; allowed: cls, max, mean"):
        info()
    pooling.write_text(stored)
    modules = folder / "modules.json"
    modules.write_text(modules.read_text().replace("models.Normalize", "models.LSTM"))
    with pytest.raises(UserError, match=r"has a sentence_transformers\.models\.LSTM; allowed: Transformer, Pooling"):
        info()


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("modules.json", "{", "modules.json is no valid JSON"),
        ("modules.json", "{}", "modules.json holds a JSON value of the type dict; allowed: a list"),
        ("modules.json", '[{"path": ""}]', "modules.json: {'path': ''} in its list; allowed: objects with a type and a path"),
        ("1_Pooling/config.json", None, "config.json cannot be read (No such file or directory)"),
        ("1_Pooling/config.json", "{", "config.json is no valid JSON"),
        ("1_Pooling/config.json", '{"pooling_mode": 5}', "its pooling is 5; allowed: cls, max, mean"),
        ("1_Pooling/config.json", '{"pooling_mode": "cls", "include_prompt": false}', "(include_prompt = false); allowed: pooling over all"),
        ("2_Dense/config.json", None, "config.json cannot be read (No such file or directory)"),
        ("2_Dense/config.json", "{}", "config.json: in_features = 0, out_features = 0; allowed: whole numbers from 1"),
        ("2_Dense/config.json", '{"in_features": "a"}', "config.json: in_features = 'a'; allowed: a whole number"),
        ("sentence_bert_config.json", "{", "sentence_bert_config.json is no valid JSON"),
        ("sentence_bert_config.json", '{"max_seq_length": "16"}', "max_seq_length = '16'; allowed: a whole number"),
        ("sentence_bert_config.json", '{"max_seq_length": 0}', "max_seq_length = 0; allowed: a whole number from 3"),
        ("config_sentence_transformers.json", '{"prompts": ["q"]}', "prompts = ['q']; allowed: an object"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 5}}', "query = 5; allowed: text"),
        ("config.json", "[]", "config.json holds a JSON value of the type list; allowed: an object"),
        ("config.json", '{"architectures": "BertModel"}', "architectures = 'BertModel'; allowed: a list"),
    ],
)  # fmt: skip
def test_files_of_a_folder_that_are_missing_broken_or_of_other_types(
    file: str, content: str | None, told: str, tmp_path: Path
) -> None:
    folder = sentence_folder(tmp_path / "m", ("mean",), dense=True, prompts={"query": "q: "})
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(UserError) as refused:
        family_of("hf:x").info(f"hf:{folder}", {})
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_options_are_chosen_by_pseudo_log_likelihood(checkpoints: dict[str, Path], data: dict[str, str]) -> None:
    model, task = loaded(f"hf:{checkpoints['ForMaskedLM']}"), Choice(data=data["choice"], context="passage", shard=2)
    found = found_by(task, model)
    for example in task.examples():
        row = example.row
        prompt = f"{row['passage']}\n\nQuestion: {row['question']}\nAnswer:"
        before = len(model.tokenizer(prompt)["input_ids"]) - 1  # without what stands at the end
        nll = []
        for option in row["options"]:
            ids = model.tokenizer(f"{prompt} {option}", return_tensors="pt")["input_ids"]
            total = 0.0
            for place in range(before, ids.shape[1] - 1):
                masked = ids.clone()
                masked[0, place] = model.tokenizer.mask_token_id
                total -= float(model.module(input_ids=masked).logits[0, place].log_softmax(-1)[ids[0, place]])
            nll.append(total)
        right, own = row["answer"], found[example.id]
        others = [value for n, value in enumerate(nll) if n != right]
        assert own["nll"] == pytest.approx(nll[right], rel=1e-4)
        assert own["margin"] == pytest.approx(min(others) - nll[right], rel=1e-3, abs=1e-3)
        assert own["error"] == float(int(np.argmin(nll)) != right)
    by_bytes = found_by(Choice(data=data["choice"], context="passage", normalise="bytes"), model)
    assert {n: one["nll"] for n, one in by_bytes.items()} == pytest.approx({n: one["nll"] for n, one in found.items()})
    assert {n: one["margin"] for n, one in by_bytes.items()} != {n: one["margin"] for n, one in found.items()}


@pytest.mark.parametrize("options", [{"context": "passage"}, {}, {"prompt": "{passage} {question}"}])
def test_a_head_chooses_among_pairs(
    options: dict[str, str], checkpoints: dict[str, Path], data: dict[str, str]
) -> None:
    model, task = loaded(f"hf:{checkpoints['ForMultipleChoice']}"), Choice(data=data["choice"], **options)
    found = found_by(task, model)
    for example in task.examples():
        row = example.row
        first, second = row["question"], ""
        if "prompt" in options:
            first = f"{row['passage']} {row['question']}"
        elif options:
            first, second = row["passage"], f"{row['question']} "
        rows = [model.tokenizer(first, second + option, return_tensors="pt") for option in row["options"]]
        logits = torch.cat([model.module(**{n: t[None] for n, t in one.items()}).logits[0] for one in rows])
        assert found[example.id]["nll"] == pytest.approx(float(-logits.log_softmax(0)[row["answer"]]), rel=1e-4)
        assert found[example.id]["error"] == float(int(logits.argmax()) != row["answer"])


def test_costs_are_those_of_live_passes(checkpoints: dict[str, Path], data: dict[str, str]) -> None:
    model, task = loaded(f"hf:{checkpoints['Model']}"), retrieval(data)
    costs = task.measure(model, context())
    asked = drawn(read(data["queries"]), 0, 0)[0].row["query"]
    documents = [example.row["text"] for example in drawn(read(data["corpus"]), 0, 0)[:4]]
    flops = {text: flops_of(lambda text=text: stock_states(model, text))[0] for text in (asked, *documents)}
    assert costs["flops_query"] == flops[asked]
    assert costs["flops_document"] == np.mean([flops[text] for text in documents])
    assert costs["flops"] == costs["flops_llm"] == costs["flops_query"] + costs["flops_document"]
    tokens = [len(model.tokenizer(text)["input_ids"]) for text in documents]
    assert costs["text_tokens"] == np.mean(tokens) + len(model.tokenizer(asked)["input_ids"])
    assert costs["embedding_bytes"] == 32 * 4
    assert costs["bytes"] == costs["weight_bytes"] == costs["weight_bytes_dense"] == model.dense_weight_bytes()
    assert "kv_bytes" not in costs
    with build("rtn", {"bits": 4, "group": 8}).apply(model, None):
        assert task.measure(model, context())["bytes"] < costs["bytes"]
    for ends in ("ForMaskedLM", "ForMultipleChoice"):
        chooser = loaded(f"hf:{checkpoints[ends]}")
        found = Choice(data=data["choice"]).measure(chooser, context())
        assert found["passes"] == 3 if ends == "ForMultipleChoice" else found["passes"] > 10
        assert found["flops"] > 0


@pytest.mark.parametrize(
    ("ends", "task", "why"),
    [
        ("Model", "choice", "needs an encoder that fills masks or chooses among options"),
        ("ForSequenceClassification", "choice", "has neither head"),
        ("ForMultipleChoice", "retrieval", "needs embeddings, or one number for a query with a document"),
        ("ForMaskedLM", "text", "needs a language model"),
    ],
)
def test_what_a_head_cannot_do_is_refused(
    ends: str, task: str, why: str, checkpoints: dict[str, Path], data: dict[str, str]
) -> None:
    info = family_of("hf:x").info(f"hf:{checkpoints[ends]}", {})
    tasks = {"choice": Choice(data=data["choice"]), "retrieval": retrieval(data), "text": Text(data=data["corpus"])}
    with pytest.raises(UserError, match=why) as refused:
        tasks[task].check(info)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [{"normalise": "bytes"}, {"shots": 1}, {"chat": True}])
def test_options_that_mean_nothing_to_a_head_are_refused(
    options: dict[str, Any], checkpoints: dict[str, Path], data: dict[str, str]
) -> None:
    info = family_of("hf:x").info(f"hf:{checkpoints['ForMultipleChoice']}", {})
    with pytest.raises(UserError, match=f"{next(iter(options))} = .* means nothing to model"):
        Choice(data=data["choice"], **options).check(info)
