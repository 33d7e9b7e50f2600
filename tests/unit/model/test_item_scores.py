"""Ranking through our own forward, against transformers' class on one question at a time; every family may rank."""

from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch

from posttrain.data.event_schema import EventSchema, Field
from posttrain.data.events import question, rows
from posttrain.data.item_tokens import PlainItems
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.train_tokenizer import word_tokenizer
from posttrain.errors import DataError
from posttrain.model.build import build_model, fresh_config
from posttrain.model.item_scores import item_scores
from posttrain.model.load import load_decoder
from tiny import tiny_model
from tiny_families import FAMILIES, random_config

SCHEMA = EventSchema(items=PlainItems(range(7)), outcome=(Field(column="action", values=("finish", "skip")),))


def history(events: int) -> list[dict]:
    """Rows of two members, an item 9 without a name among theirs."""
    items = [9 if n == 3 else n * 3 % 7 for n in range(events)]
    times = [datetime(2025, 1, 1) + timedelta(hours=2 * n) for n in range(events)]
    columns = {"member": [n % 2 for n in range(events)], "item": items, "action": ["finish"] * events}
    return list(rows(pa.table({**columns, "time": pa.array(times, pa.timestamp("us"))}), SCHEMA))


def fresh(folder, family: str):
    size = word_tokenizer(SCHEMA.vocabulary, folder)
    if family == "small":
        shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 64}
        config = fresh_config(vocab_size=size, max_length=128, **shape)
    else:
        config = random_config(family, 0) | {"vocab_size": size, "initializer_range": 0.02}
    build_model(folder, config, seed=1)
    return BaseHFModelTokenizer(folder), load_decoder(folder)


def test_scores_are_what_transformers_gives_the_items_after_each_question(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer, model = fresh(tmp_path, "small")
    found = history(12)
    catalogue = [9, *range(7)]
    scores = item_scores(model, tokenizer, found, SCHEMA.items, catalogue, pack_tokens=128)
    assert scores.shape == (12, 8) and np.isneginf(scores[:, 0]).all()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer.hf.convert_tokens_to_ids(list(SCHEMA.items.vocabulary))
    expected = []
    for row in found:
        for place in row["asked"]:
            prompt = tokenizer.prompt(question(row | {"messages": row["messages"][: 2 * place + 2]})["messages"])
            with torch.no_grad():
                expected.append(theirs(torch.tensor([prompt])).logits[0, -1, ids].log_softmax(-1).numpy())
    np.testing.assert_allclose(scores[:, 1:], np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2"])
def test_a_model_of_any_family_ranks_items(tmp_path, family):
    tokenizer, model = fresh(tmp_path, family)
    scores = item_scores(model, tokenizer, history(6), SCHEMA.items, range(7), pack_tokens=64)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-5)


def test_qwen2_whose_tokenizer_transformers_replaces_is_refused(tmp_path):
    """transformers opens every Qwen2 folder with Qwen2's own tokenizer class, whatever the folder says."""
    tokenizer, model = fresh(tmp_path, "qwen2")
    with pytest.raises(DataError, match="cannot be ranked"):
        item_scores(model, tokenizer, history(4), SCHEMA.items, range(7), pack_tokens=64)


def test_items_of_several_tokens_are_refused(tmp_path):
    class Codes(PlainItems):
        def tokens(self, item):
            return ("<item_1>", "<item_2>")

    tokenizer, model = fresh(tmp_path, "small")
    with pytest.raises(DataError, match="item 0 is 2 tokens"):
        item_scores(model, tokenizer, history(4), Codes(range(3)), range(3), pack_tokens=64)


def test_a_text_model_whose_vocabulary_grew_reads_text_and_ranks_items(tmp_path):
    tokenizer = BaseHFModelTokenizer(tiny_model(tmp_path))
    tokenizer.add_tokens(SCHEMA.vocabulary)
    model = load_decoder(tmp_path, vocab_size=tokenizer.max_id + 1)
    with torch.no_grad():  # new rows are all the mean of the old ones; a little training tells them apart
        new = model.embedding.weight[tokenizer.max_id + 1 - len(SCHEMA.vocabulary) :]
        new += torch.randn(new.shape, generator=torch.Generator().manual_seed(0))
    plain = history(6)
    told = [row | {"messages": [{"role": "system", "content": "sort 3141592"}, *row["messages"]]} for row in plain]
    ids, mask = tokenizer.conversation(told[0]["messages"])
    trained = tokenizer.hf.convert_ids_to_tokens([i for i, weight in zip(ids, mask, strict=True) if weight])
    assert trained == ["<item_0>", "<|im_end|>", "<item_6>", "<|im_end|>", "<item_5>", "<|im_end|>"]
    without, with_text = (
        item_scores(model, tokenizer, each, SCHEMA.items, range(7), pack_tokens=128) for each in (plain, told)
    )
    np.testing.assert_allclose(np.exp(with_text).sum(1), 1, atol=1e-5)
    assert np.abs(with_text - without).max() > 1e-6  # the text is read


def test_a_model_with_a_module_at_its_front_ranks_by_the_features_of_rows(tmp_path):
    tokenizer, _ = fresh(tmp_path, "small")
    model = load_decoder(tmp_path, heads={"side": "posttrain.model.side:EventNumbers"}, seed=0)
    plain = history(6)
    (row, *_) = plain
    told = [{**m, "features": {"gap_minutes": 500.0}} if m["role"] == "assistant" else m for m in row["messages"]]
    found = [
        item_scores(model, tokenizer, each, SCHEMA.items, range(7), pack_tokens=64)
        for each in (plain, [row | {"messages": told}, *plain[1:]])
    ]
    changed = np.abs(found[0] - found[1]).max(1) > 1e-4
    assert changed[: len(row["asked"])].all() and not changed[len(row["asked"]) :].any()
