"""Numbers beside tokens: which token has which feature, where a label stands, and the way to a batch and to disk."""

import numpy as np
import pytest

from posttrain.data.batch import collate
from posttrain.data.encode import Encoder
from posttrain.data.pack import pack
from posttrain.data.token_files import BESIDE, read_units, schema_with, write_units
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.turn_numbers import Numbers
from posttrain.data.types import Row
from posttrain.errors import RowError
from tiny import tiny_model

NUMBERS = Numbers(features=("gap", "device"), labels=("click",))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BaseHFModelTokenizer:
    return BaseHFModelTokenizer(tiny_model(tmp_path_factory.mktemp("model")))


def conversation() -> Row:
    first = {"features": {"gap": 1.5, "device": 2}, "labels": {"click": 1}, "weight": 0}
    return {
        "messages": [
            {"role": "user", "content": "sort 31"},
            {"role": "assistant", "content": "1 3", **first},
            {"role": "user", "content": "sort 92"},
            {"role": "assistant", "content": "2 9", "features": {"gap": 7}, "labels": {"click": 0}},
        ]
    }


def encoder(tokenizer: BaseHFModelTokenizer, **options) -> Encoder:
    return Encoder(tokenizer, **{"wanted": "conversation", "pack_tokens": 128, "numbers": NUMBERS, **options})


def sample_of(found):
    ((unit,),) = found
    (sample,) = unit
    return sample


def test_a_feature_reaches_from_the_answer_before_to_the_end_of_its_own(tokenizer):
    sample = sample_of(encoder(tokenizer)([conversation()]))
    stops = np.flatnonzero(sample.input_ids == tokenizer.stop_id)
    ends = [stops[1], len(sample)]  # the first stop ends the user's turn; the last is no input
    gaps, devices = sample.features.T
    assert (gaps[: ends[0] + 1] == 1.5).all() and (devices[: ends[0] + 1] == 2).all()
    assert (gaps[ends[0] + 1 : stops[-1] + 1] == 7).all() and np.isnan(devices[ends[0] + 1 :]).all()


def test_a_label_stands_where_the_answer_has_been_read_and_its_end_is_predicted_trained_or_not(tokenizer):
    sample = sample_of(encoder(tokenizer)([conversation()]))
    at = np.flatnonzero(~np.isnan(sample.labels[:, 0]))
    assert sample.labels[at, 0].tolist() == [1, 0]
    assert sample.target_ids[at].tolist() == [tokenizer.stop_id] * 2
    assert tokenizer.decode(sample.input_ids[at[0] - 2 : at[0] + 1]).endswith("3")
    assert sample.loss_mask[at].tolist() == [0, 1]


def test_tokens_and_masks_are_those_without_numbers(tokenizer):
    for train_on in ("weights", "all", "last"):
        plain = sample_of(encoder(tokenizer, numbers=Numbers(), train_on=train_on)([conversation()]))
        sample = sample_of(encoder(tokenizer, train_on=train_on)([conversation()]))
        assert sample.target_ids.tolist() == plain.target_ids.tolist()
        assert sample.loss_mask.tolist() == plain.loss_mask.tolist()
        assert plain.features is None and plain.labels is None


def test_pieces_of_a_long_row_keep_the_numbers_of_their_own_tokens(tokenizer):
    row = {"messages": conversation()["messages"] * 3}
    whole = sample_of(encoder(tokenizer)([row]))
    (units,) = encoder(tokenizer, pack_tokens=16, over_long="split", train_on="all")([row])
    samples = [sample for (sample,) in units]
    assert len(samples) > 2
    np.testing.assert_array_equal(np.concatenate([each.features for each in samples]), whole.features)
    np.testing.assert_array_equal(np.concatenate([each.labels for each in samples]), whole.labels)


@pytest.mark.parametrize("bad", [{"gap": "3"}, {"gap": True}, {"gap": float("inf")}, [1.0]])
def test_a_number_that_is_none_is_refused_with_its_name(tokenizer, bad):
    row = conversation()
    row["messages"][3]["features"] = bad
    (found,) = encoder(tokenizer)([row])
    assert isinstance(found, RowError) and found.reason == "bad_number" and "features" in str(found)


def test_a_row_without_numbers_has_none_and_shares_a_pack(tokenizer):
    text = {"messages": [{"role": "user", "content": "sort 1"}, {"role": "assistant", "content": "1"}]}
    units = [unit for found in encoder(tokenizer)([conversation(), text]) for unit in found]
    (packed,) = pack(units, pack_tokens=128)
    batch = collate(packed, pack_tokens=128)
    assert batch.features.shape == (128, 2) and batch.features[packed.num_tokens :].isnan().all()
    assert batch.labels.tolist() in ([[1.0], [0.0]],)
    assert batch.target_ids[batch.label_idx].tolist() == [tokenizer.stop_id] * 2


def test_they_survive_token_files(tokenizer, tmp_path):
    (units,) = encoder(tokenizer, pack_tokens=16, over_long="split", train_on="all")([conversation()])
    write_units([(unit, None) for unit in units], tmp_path / "units.parquet", schema=schema_with(BESIDE))
    for (read,), (written,) in zip(read_units(tmp_path / "units.parquet"), units, strict=True):
        np.testing.assert_array_equal(read.features, written.features)
        np.testing.assert_array_equal(read.labels, written.labels)
