"""The best weights are known from a run's history, and are the only ones kept once it is committed."""

from posttrain.workflow.held_out import HeldOut

HISTORY = [{"step": 0.0, "loss": 3.0}, *({"step": float(s), "eval/loss": x} for s, x in ((1, 2.0), (3, 1.0), (5, 1.5)))]


def held_out(uri):
    return HeldOut([], every_steps=2, num_steps=8, best_uri=uri)


def test_the_least_loss_of_the_history_is_the_best(tmp_path):
    assert held_out(str(tmp_path)).best(HISTORY) == (f"{tmp_path}/step_000004", 1.0)
    assert held_out(str(tmp_path)).best([]) == (None, float("inf"))
    assert held_out(None).best(HISTORY)[0] is None


def test_a_commit_removes_all_others(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"step_{step:06d}").mkdir()
    held_out(str(tmp_path)).prune(HISTORY)
    assert [each.name for each in tmp_path.iterdir()] == ["step_000004"]
