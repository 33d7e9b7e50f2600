"""The scripts that measure a GPU run here too, on a tiny model, and what they compare is the same."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import packing, sft, startup, workloads  # noqa: E402  (found through the line above)
from benchmarks.shapes import SIZES  # noqa: E402


def test_packed_and_padded_steps_have_the_losses_of_the_same_documents():
    case = {"size": "tiny", "vocab": SIZES["tiny"][-1], "lr": 1e-2, "micro_tokens": 512, "units": 16, "steps": 2}
    case |= {"precision": "float32", "longest": 512, "workloads": ["W1"], "activation_checkpointing": "none"}
    arms = packing.measure(case)["W1"]
    packed, longest, grouped = (arms[name] for name in ("packed", "longest", "grouped"))
    assert packed["losses"][1] < packed["losses"][0] - 0.05, "nothing was learned, so nothing is compared"
    for arm in (longest, grouped):
        np.testing.assert_allclose(arm["losses"], packed["losses"], rtol=2e-5)
        assert arm["tokens"] == packed["tokens"]
    assert sum(longest["positions"]) > sum(grouped["positions"]) > sum(packed["positions"])
    assert packed["positions"] == packed["tokens"], "every token of these documents is a target"


def test_a_step_of_the_benchmark_is_full_packs_of_whole_documents():
    texts = workloads.documents("W1", 400, seed=0, vocab=1000)
    packs = workloads.packs_of(texts, 8192)
    assert sum(pack.num_tokens for pack in packs) == sum(len(text) - 1 for text in texts)
    assert np.mean([pack.num_tokens for pack in packs[:-1]]) > 0.97 * 8192


@pytest.mark.slow
@pytest.mark.parametrize("beaten", ["neither", "ours"])
def test_the_sft_benchmark_names_the_side_that_failed_and_keeps_the_other(tmp_path, monkeypatch, beaten):
    pytest.importorskip("trl")
    out = tmp_path / "sft.json"
    if beaten == "ours":
        monkeypatch.setenv("POSTTRAIN_FAULT", "policy.train_step@2")  # killed, as one that does not fit may be
    monkeypatch.setattr(sys, "argv", ["sft", "--size", "tiny", "--steps", "1", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        sft.main()
    (found,) = json.loads(out.read_text())
    assert ended.value.code == (1 if beaten == "ours" else 0)
    assert found["baseline"] > 0 and len(found["trl"]["losses"]) == 3
    if beaten == "ours":
        assert found["ours"] is None and found["measured"]["failed"]
    else:
        assert found["ours"] > 0 and found["ratio"] > 0
        assert found["measured"]["losses"][0] == pytest.approx(found["trl"]["losses"][0], abs=0.05), "equal weights"


def test_the_log_of_a_flow_says_how_long_its_steps_took():
    log = """
2026-11-28 20:33:39.794 [17/tokenize/3 (pid 13869)] Task is starting.
2026-11-28 20:33:40.000 [17/tokenize/4 (pid 13870)] Task is starting.
2026-11-28 20:33:41.000 [17/tokenize/3 (pid 13869)] something that a program printed
2026-11-28 20:33:44.794 [17/tokenize/4 (pid 13870)] Task finished successfully.
2026-11-28 20:33:44.294 [17/tokenize/3 (pid 13869)] Task finished successfully.
2026-11-28 20:33:44.800 [17/merge_tokens/5 (pid 13900)] Task is starting.
2026-11-28 20:33:46.100 [17/merge_tokens/5 (pid 13900)] Task finished successfully.
"""
    assert startup.tasks(log) == {"tokenize": 5.0, "merge_tokens": 1.3}


def test_what_a_training_did_is_summed_over_its_steps():
    lines = "\n".join(
        json.dumps({"step": n, "time/forward_s": 1.0, "time/backward_s": 2.0, "time/generate_s": 0.5}) for n in range(2)
    )
    assert startup.times(lines) == {"train": 6.0, "generate": 1.0}
