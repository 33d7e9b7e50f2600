"""The built-in task is honest: careless demonstrations, an exact check, and questions never seen in training."""

import pytest

from posttrain.data.sort_digits import CARELESS, demonstrations, held_out, prompts, reward


def question(row):
    return row["messages"][0]["content"].removeprefix("sort ")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_questions_never_occur_in_training(seed):
    reserved = {question(row) for row in held_out(seed)}
    assert len(reserved) == 256
    for rows in (demonstrations(seed), prompts(seed)):
        assert not reserved & {question(row) for row in rows}


def test_held_out_questions_do_not_depend_on_the_seed():
    assert held_out(0) == held_out(1)


def test_training_rows_depend_on_the_seed_alone():
    for rows in (demonstrations, prompts):
        assert rows(3, 100) == rows(3, 100) != rows(4, 100)
    assert [question(row) for row in prompts(3, 100)] != [question(row) for row in demonstrations(3, 100)]


def test_about_six_in_ten_demonstrations_are_careless():
    rows = demonstrations(0)
    wrong = sum(row["messages"][1]["content"] != "".join(sorted(question(row))) for row in rows)
    assert CARELESS == 0.6
    assert wrong / len(rows) == pytest.approx(0.6, abs=0.015)  # standard error 0.004


def test_a_careless_answer_is_two_neighbours_away_from_right():
    for row in demonstrations(1, 500):
        answer, right = row["messages"][1]["content"], "".join(sorted(question(row)))
        swaps = {right[:i] + right[i + 1] + right[i] + right[i + 2 :] for i in range(len(right) - 1)}
        assert answer == right or answer in swaps


def test_questions_have_four_to_eight_digits():
    for rows in (demonstrations(0, 500), prompts(0, 500), held_out(0)):
        assert {len(question(row)) for row in rows} == {4, 5, 6, 7, 8}
        assert all(question(row).isdigit() for row in rows)


def test_a_demonstration_is_a_question_and_an_answer():
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in demonstrations(0, 50))


def test_only_the_sorted_digits_are_rewarded():
    for row in [*prompts(0, 50), *held_out(0)]:
        right = "".join(sorted(question(row)))
        assert reward(row, right) == 1.0
        for wrong in ("", right[:-1], right + right[-1], f" {right}", f"{right}\n", right[::-1] + "x"):
            assert reward(row, wrong) == 0.0
