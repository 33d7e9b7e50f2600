"""The audit accepts what a run really trained and names the first fact that does not hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints
from posttrain.data.loader import loading
from posttrain.data.mixture import Mixture, Part
from posttrain.data.sample import shift
from posttrain.data.stream import PackStream
from posttrain.errors import CheckpointError, RowError
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import LedgerFile, read_ledger
from runs import prepared, result_of, run_step, small_config
from saves import save_state
from steps.audit import audit, replay_stream

STEPS, PACKS, PACK_TOKENS = 9, 55, 64
"""Nine batches of 55 packs end in the middle of the third window of 1,024 draws."""

ROWS = 500
LONG = {7, 11, 140}
"""Rows that are dropped; with over_long: split they become three units."""


class Numbered:
    """A source of numbers: row n is a document that only n has."""

    def __init__(self, *, split: bool = False, changed: int | None = None):
        self.split, self.changed = split, changed

    def units(self, positions):
        return [self._row(int(position) % ROWS) for position in positions]

    def _row(self, n):
        if n in LONG and not self.split:
            return RowError("too_long", f"row {n}")
        document = shift([n, n + 1 + (n == self.changed), *range(n % 23)], [0, *[1.0] * (n % 23 + 1)])
        return [(document,)] * (3 if n in LONG else 1)


def stream_of(source, *, seed=0):
    mixture = Mixture([Part(name="numbers", num_rows=ROWS, weight=((0, 1.0),))], seed=seed)
    return PackStream(mixture, [source], pack_tokens=PACK_TOKENS, seed=seed)


def write_config(root, over_long="drop"):
    data = {"prompts": "x:y", "held_out": "x:y", "sources": "numbers.jsonl", "over_long": over_long}
    config = {"model": {"path": "m"}, "data": data, "warmup": {"packs_per_step": PACKS}, "reward": {"function": "x:y"}}
    storage.write_bytes(f"{root}/config.json", json.dumps(config).encode())


def train(root, source, *, over_long="drop", seed=0, stop_at=STEPS):
    """What the training loop does to the run's folder, beside training."""
    write_config(root, over_long)
    file, ledger = LedgerFile(f"{root}/ledger/warmup.jsonl"), Ledger()
    checkpoints = Checkpoints(f"{root}/checkpoints/warmup", identity={}, keep=2)
    file.restore(0)
    with loading(stream_of(source, seed=seed)) as loader, checkpoints.writing():
        for step in range(stop_at):
            packs = loader.take(PACKS)
            draws = [n for pack in packs for n in pack.draws]
            ledger.hand_out(len(draws), loader.dropped)
            file.append({"step": step, **ledger.commit(packs, draws=draws)})
            if step % 3 == 2:
                file.flush()
                save_state(checkpoints, step + 1, {"w": torch.zeros(1)}, {"ledger": ledger.state()})
    file.flush()
    return str(root)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), Numbered())


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def edit(run, step, change):
    """Change the row of one step and write the file again."""
    path = Path(run, "ledger", "warmup.jsonl")
    rows = read_ledger(str(path))
    change(rows[step])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def replayed(run, source, *, seed=0):
    uri = f"{run}/ledger/warmup.jsonl"
    replay_stream(stream_of(source, seed=seed), read_ledger(uri), uri=uri, packs_per_step=PACKS, max_bad_rows=0)


def test_a_sound_run_is_proved(trained):
    rows = read_ledger(f"{trained}/ledger/warmup.jsonl")
    draws = {n for row in rows for first, last in row["draws"] for n in range(first, last + 1)}
    assert 2048 < max(draws) < 3072
    proved = audit(trained, replay=False)
    facts = {"steps": STEPS, "draws": len(draws), "dropped": rows[-1]["dropped"], "checkpoint": 9, "replayed": 0}
    assert proved["stages"] == {"warmup": facts}
    assert proved["equal"] is None
    assert rows[-1]["dropped"]["too_long"] > 12 and json.loads(json.dumps(proved)) == proved
    replayed(trained, Numbered())


def test_a_run_on_s3_is_audited_where_it_is(s3_bucket):
    root = train(f"{s3_bucket}/root", Numbered(), stop_at=4)
    assert audit(root, replay=False)["stages"]["warmup"]["checkpoint"] == 3


def test_a_killed_run_is_proved_as_far_as_it_came(run):
    path = run / "ledger" / "warmup.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    shutil.rmtree(run / "checkpoints" / "warmup" / "step_000009")
    found = audit(str(run), replay=False)["stages"]["warmup"]
    assert (found["steps"], found["checkpoint"]) == (8, 6)


@pytest.mark.parametrize(
    ("source", "seed", "said"),
    [
        (Numbered(changed=300), 0, r"step \d: data and seed give other contents than were trained"),
        (Numbered(split=True), 0, "step 0: data and seed give other draws than were trained"),
        (Numbered(), 1, "step 0: data and seed give other draws than were trained"),
    ],
)
def test_other_data_or_another_seed_do_not_replay(trained, source, seed, said):
    with pytest.raises(CheckpointError, match=said):
        replayed(trained, source, seed=seed)


def remove_first_draw(row):
    row["draws"] = [
        pair for pair in ([row["draws"][0][0] + 1, row["draws"][0][1]], *row["draws"][1:]) if pair[0] <= pair[1]
    ]


def test_a_lost_draw_is_noticed(run):
    edit(run, 1, remove_first_draw)
    with pytest.raises(CheckpointError, match=r"warmup\.jsonl, step 0: .* trained in no step, and \d+ are counted"):
        audit(str(run), replay=False)


def test_a_repeated_draw_is_named_with_both_steps(run):
    first = read_ledger(f"{run}/ledger/warmup.jsonl")[2]["draws"][0][0]
    edit(run, 5, lambda row: row["draws"].append([first, first]))
    with pytest.raises(CheckpointError, match=rf"step 5: draw {first} was trained before, in step 2"):
        audit(str(run), replay=False)


@pytest.mark.parametrize(("step", "change"), [(0, 1), (0, -1), (4, 1), (8, 900), (8, -10)])
def test_a_wrong_count_of_drops_is_noticed(run, step, change):
    edit(run, step, lambda row: row["dropped"].update(too_long=row["dropped"]["too_long"] + change))
    with pytest.raises(CheckpointError, match=rf"warmup\.jsonl, step {step}: "):
        audit(str(run), replay=False)


def test_draws_that_are_no_ranges_are_named(run):
    for wrong in ([], [[5, 3]], [[-1, 3]], [[1]]):
        edit(run, 4, lambda row, wrong=wrong: row.update(draws=wrong))
        with pytest.raises(CheckpointError, match=r"step 4: draws .* are not ascending"):
            audit(str(run), replay=False)


def test_a_checkpoint_of_another_history_is_named(run):
    edit(run, 5, lambda row: row.update(digest="0" * 64))
    with pytest.raises(CheckpointError, match=r"step 5: digest is 0{64}, and .* in .*step_000006/state\.json"):
        audit(str(run), replay=False)


def test_a_ledger_that_ends_before_its_checkpoint_is_noticed(run):
    path = run / "ledger" / "warmup.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
    with pytest.raises(CheckpointError, match=r"ends with step 6, and .*step_000009 holds 9 steps"):
        audit(str(run), replay=False)


def test_a_checkpoint_that_was_changed_is_not_believed(run):
    state = run / "checkpoints" / "warmup" / "step_000009" / "state.json"
    state.write_text(state.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"step_000009/state\.json differs from its hash"):
        audit(str(run), replay=False)


def test_a_split_row_may_be_trained_in_several_batches_where_the_config_says_so(tmp_path):
    root = train(tmp_path, Numbered(split=True), over_long="split")
    assert audit(root, replay=False)["stages"]["warmup"]["dropped"] == {}
    replayed(root, Numbered(split=True))
    write_config(root, "truncate")
    with pytest.raises(CheckpointError, match=r"draw \d+ was trained before"):
        audit(root, replay=False)


def test_a_prompt_is_trained_once_whatever_becomes_of_long_rows(tmp_path):
    write_config(tmp_path, "split")
    file, ledger = LedgerFile(f"{tmp_path}/ledger/grpo.jsonl"), Ledger()
    file.restore(0)
    for step, draws in enumerate([[0, 1], [2, 1]]):
        file.append({"step": step, **ledger.commit([], draws=draws)})
    with pytest.raises(CheckpointError, match=r"grpo\.jsonl, step 1: draw 1 was trained before, in step 0"):
        audit(str(tmp_path))


def test_what_has_not_trained_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not the root of a run that has trained: .*ledger does not exist"):
        audit(str(tmp_path), replay=False)


def test_runs_that_trained_the_same_are_equal(trained, run):
    assert audit(trained, str(run), replay=False)["equal"] is True


def test_runs_that_differ_are_compared_to_the_first_step_that_does(trained, tmp_path):
    other = {
        "contents": (train(tmp_path / "a", Numbered(changed=300)), range(0, 4)),
        "draws": (train(tmp_path / "b", Numbered(), seed=1), range(0, 1)),
        "length": (train(tmp_path / "c", Numbered(), stop_at=6), range(6, 7)),
    }
    for what, (root, steps) in other.items():
        proved = audit(trained, root, replay=False)
        assert proved["equal"] is False
        assert proved["differs"]["warmup"]["what"] == what and proved["differs"]["warmup"]["step"] in steps


@given(dropped=st.lists(st.booleans(), max_size=40), per_step=st.integers(1, 5), wrong=st.integers(0, 1000))
@pytest.mark.fault("F50", outcome="CONTINUE")
def test_of_sampled_batches_every_draw_is_accounted_for_after_every_step(tmp_path_factory, dropped, per_step, wrong):
    """Draws one after the other, as the RL controller admits them: a failed group is replaced by the next draw."""
    root = tmp_path_factory.mktemp("grpo")
    write_config(root)
    file, ledger, batch = LedgerFile(f"{root}/ledger/grpo.jsonl"), Ledger(), []
    file.restore(0)
    for fails in [*dropped, *[False] * per_step]:
        number = ledger.draw()
        if fails:
            ledger.drop("reward_error")
            continue
        batch.append(number)
        if len(batch) == per_step:
            file.append({"step": file.step, **ledger.commit([], draws=batch)})
            batch = []
    rows = read_ledger(file.uri)
    found = audit(str(root))["stages"]["grpo"]
    assert (found["steps"], found["draws"]) == (len(rows), per_step * len(rows))
    step = wrong % len(rows)
    rows[step]["dropped"]["reward_error"] = rows[step]["dropped"].get("reward_error", 0) + 1
    Path(file.uri).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match=f"step {step}: "):
        audit(str(root))


def warm_up(root, *, faults=(None,)):
    """A real warm-up of four steps, by the step's own program; started again after each fault."""
    config = small_config()
    base = prepared(root, config)
    inputs = {"root": str(root), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    for fault in faults:
        done = run_step("train", config, root, fault=fault, **inputs)
        if fault:
            assert done.returncode == -9
        else:
            result_of(done)
    return root


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory):
    return warm_up(tmp_path_factory.mktemp("real"))


def test_a_real_warmup_replays_from_its_own_folder(warmed_up):
    found = audit(str(warmed_up))["stages"]["warmup"]
    assert found["steps"] == found["replayed"] == found["checkpoint"] == 4
    assert found["draws"] > 0 and found["dropped"] == {}


def test_a_real_warmup_of_which_another_batch_is_claimed_does_not_replay(warmed_up, tmp_path):
    run = shutil.copytree(warmed_up, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    edit(run, 2, lambda row: row.update(digest="0" * 64))
    with pytest.raises(CheckpointError, match=r"warmup\.jsonl, step 2: data and seed give other contents"):
        audit(str(run))


@pytest.mark.slow
def test_a_warmup_that_was_killed_twice_is_equal_to_one_left_alone(warmed_up, tmp_path):
    killed = warm_up(tmp_path, faults=("loop.before_train@2", "loop.before_train@4", None))
    proved = audit(str(killed), str(warmed_up))
    assert proved["equal"] is True
    assert proved["stages"]["warmup"]["replayed"] == 4
