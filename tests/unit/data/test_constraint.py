"""What a sampler could choose from, told again from the tokens it wrote."""

from pathlib import Path

import pytest

from posttrain.data.batch import collate
from posttrain.data.constraint import allowed_ids, load_constraint
from posttrain.data.pack import pack
from posttrain.data.rollout import group_units
from posttrain.data.types import Prompt, Rollout
from posttrain.errors import ConfigError, GenerationError
from small_constraints import AfterOneFreeToken, slates

NOWHERE = Path()


def rollout(token_ids: tuple[int, ...], mask: tuple[float, ...] | None = None) -> Rollout:
    count = len(token_ids)
    return Rollout(
        prompt=Prompt(uid=0, token_ids=(1, 2), row={}),
        sample_index=0,
        token_ids=token_ids,
        logprobs=(-0.5,) * count,
        versions=(0,) * count,
        finish_reason="stop",
        loss_mask=mask,
    )


def test_a_row_for_each_token_says_what_could_have_stood_there():
    found = allowed_ids(slates(NOWHERE), (1, 2), (10, 20, 30, 10), (1.0,) * 4)
    assert found.tolist() == [[10, 11, 12], [20, 21, -1], [30, 31, -1], [10, 11, 12]]


def test_a_turn_begins_anew_after_what_an_environment_wrote():
    completion, mask = (60, 50, 7, 99, 61, 40), (1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    rule = AfterOneFreeToken()
    with pytest.raises(GenerationError, match=r"wrote token 7 after \[60, 50\].* allows \[40, 50\]"):
        allowed_ids(rule, (1, 2), completion, mask)
    found = allowed_ids(rule, (1, 2), (60, 50, 40, 99, 61, 41), mask)
    assert found.tolist() == [[-1, -1], [40, 50], [40, 50], [-1, -1], [41, 50]]


def test_units_of_different_widths_share_a_batch_in_the_order_of_its_loss_rows():
    group = [rollout((10, 20, 30)), rollout((12, 99, 12, 23), (1.0, 0.0, 1.0, 1.0))]
    units = group_units(group, [1.0, -1.0], constraint=slates(NOWHERE))
    (packed,) = pack(units, pack_tokens=16)
    batch = collate(packed, pack_tokens=16)
    assert batch.allowed_ids is not None
    expected = {(10, 20, 30): [[10, 11, 12], [20, 21, -1], [30, 31, -1]], (12, 12, 23): [[10, 11, 12]] * 2 + [[23]]}
    targets = batch.target_ids[batch.loss_idx].tolist()
    for chosen, rows in expected.items():
        start = next(i for i in range(4) if tuple(targets[i : i + 3]) == chosen)
        found = batch.allowed_ids[start : start + 3].tolist()
        assert [[i for i in row if i >= 0] for row in found] == [[i for i in row if i >= 0] for row in rows]
    assert batch.rows(slice(1, 3)).allowed_ids.tolist() == batch.allowed_ids[1:3].tolist()


def test_a_plug_in_that_allows_nothing_at_all_is_refused():
    with pytest.raises(
        ConfigError, match="environment, its constraint: small_constraints:no_constraint made a object without `allowed"
    ):
        load_constraint("small_constraints:no_constraint", NOWHERE)
    rule = load_constraint("small_constraints:nothing", NOWHERE)
    with pytest.raises(GenerationError, match=r"allows no token after the completion \[\]"):
        allowed_ids(rule, (1,), (5,), (1.0,))
