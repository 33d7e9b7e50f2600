"""Slices of an evaluation: named by a column, or refused before anything is tokenised."""

import pytest

from posttrain.data.slices import slices_of
from posttrain.errors import DataError


def test_rows_are_named_by_their_column():
    assert slices_of([{"lang": "de"}, {"lang": "en"}, {"lang": "de"}], "lang") == ["de", "en", "de"]
    assert slices_of([{"level": 1}, {"level": 2}], "level") == ["1", "2"]


@pytest.mark.parametrize("row", [{}, {"lang": None}, {"lang": ["de"]}, {"lang": 0.5}])
def test_a_row_without_a_slice_is_refused_by_its_number(row):
    with pytest.raises(DataError, match=r"eval.slice_by: 'lang' of data.held_out, row 1, is"):
        slices_of([{"lang": "de"}, row], "lang")


def test_an_id_is_no_slice():
    with pytest.raises(DataError, match=r"'id' has 51 values in data.held_out, more than 50"):
        slices_of([{"id": number} for number in range(51)], "id")
