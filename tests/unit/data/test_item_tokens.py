import pytest

from posttrain.data.item_tokens import PlainItems


def test_every_item_is_one_token_of_its_own_in_the_order_of_the_items():
    items = PlainItems([12, 3, 12])
    assert items.vocabulary == ("<item_3>", "<item_12>")
    assert items.tokens(12) == ("<item_12>",)


def test_an_item_that_the_vocabulary_lacks_has_no_name():
    with pytest.raises(KeyError):
        PlainItems([3]).tokens(4)
