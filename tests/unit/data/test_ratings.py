"""Ratings of an answer: numbers, of which some may be missing."""

import math

import pytest

from posttrain.data.encode import Encoder
from posttrain.data.ratings import ratings_of
from posttrain.data.row_reader import RowReader
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.turn_numbers import Numbers
from posttrain.errors import RowError
from tiny import tiny_model

ROW = {"prompt": "sort 21", "completion": "12", "helpful": 4, "verbose": None, "other": 3}


def test_a_missing_rating_is_no_number():
    found = ratings_of(ROW, ("helpful", "verbose"))
    assert found["helpful"] == 4.0 and math.isnan(found["verbose"])


@pytest.mark.parametrize("value", [True, "4", math.inf, math.nan, None])
def test_what_is_no_rating_is_refused(value):
    with pytest.raises(RowError, match=r"bad_rating|a rating is a finite number|none of helpful") as caught:
        ratings_of({"helpful": value}, ("helpful",))
    assert caught.value.reason == "bad_rating"


def test_ratings_travel_from_the_record_to_the_answer_that_is_scored(tmp_path):
    tokenizer = BaseHFModelTokenizer(tiny_model(tmp_path / "tiny"))
    names = ("helpful", "verbose")
    row = RowReader(wanted="conversation", keep=names)(ROW)
    assert row == {"messages": row["messages"], "helpful": 4}
    encoder = Encoder(tokenizer, wanted="conversation", pack_tokens=128, scored=True, numbers=Numbers(ratings=names))
    ((unit,), fault) = encoder([row, {"messages": row["messages"]}])
    (sample,) = unit
    assert sample.fields["helpful"] == 4.0 and math.isnan(sample.fields["verbose"])
    assert sample.input_ids[-1] in tokenizer.stop_ids, "the score is read at the stop token"
    assert isinstance(fault, RowError) and fault.reason == "bad_rating"
