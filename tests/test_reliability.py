"""The scorecard is whole: every fault has a test that says so, or a reason why not, and the page is what was found."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import gpu_faults, reliability, reliability_page  # noqa: E402  (found through the line above)


@pytest.fixture(scope="module")
def marks() -> list[reliability.Marked]:
    return reliability.marked_tests()


@pytest.mark.parametrize("row", reliability.ROWS)
def test_every_fault_has_a_test_or_a_reason_why_not_and_not_both(marks: list[reliability.Marked], row: str):
    tested = [each.test for each in marks if each.row == row]
    tested += [name for name, case in gpu_faults.CASES.items() if case.row == row]
    assert bool(tested) != (row in reliability.NOT_RUN), f"{row}: {tested or 'no test is marked with it'}"


def test_a_mark_that_names_no_row_or_no_outcome_is_refused(tmp_path: Path):
    file = tmp_path / "tests" / "test_it.py"
    file.parent.mkdir()
    for mark in ('"F51", outcome="STOP"', '"F1", outcome="LUCK"', '"F1"'):
        file.write_text(f"@pytest.mark.fault({mark})\ndef test_it(): ...\n")
        with pytest.raises(ValueError, match="test_it: F"):
            reliability.marked_tests(file.parent)


def test_the_page_is_what_the_marks_and_the_results_say():
    page = reliability_page
    assert page.PAGE.read_text() == page.document(), "run `make docs`: docs/reliability.md is old"
    assert page.README.read_text() == page.readme_with(page.README.read_text()), "run `make docs`: README.md is old"


def test_nothing_is_green_that_failed():
    failed = [test for test, entry in reliability.known().items() if entry["failed"]]
    assert not failed
    assert not [line for line in reliability_page.lines() if line.failed], "a case of benchmarks/gpu_faults.py failed"


def test_what_failed_on_a_gpu_is_told_and_nothing_is_said_of_what_did_not_run(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(reliability_page, "GPU_RESULTS", tmp_path / "gpu_faults.json")
    rows = [
        gpu_faults.row_of("gpu_full", {"passed": False, "happened": "no error", "detected_s": 0.4}, "H200"),
        gpu_faults.row_of("engine_memory", {"passed": True, "happened": "gone", "detected_s": 0.2}, "H200"),
        gpu_faults.row_of("split_memory", {"not_run": "needs two GPUs"}, "H200"),
    ]
    gpu_faults.keep(reliability_page.GPU_RESULTS, rows)
    made = {(line.row, line.outcome): line for line in reliability_page.lines()}
    assert made["F10", "STOP"].failed == 1 and "1 failed on a GPU" in made["F10", "STOP"].result
    assert made["F8", "CONTINUE"].failed == 0 and made["F8", "CONTINUE"].noticed == "0.2 s"
    assert made["F8", "CONTINUE"].result == "1 passed on a GPU, 2 not run on a GPU yet"
    assert "**failed**: no error (H200)" in reliability_page.document()
    assert "1 failed." in reliability_page.summary()


def test_a_machine_that_cannot_run_a_case_takes_no_result_of_it_away(tmp_path: Path):
    file = tmp_path / "gpu_faults.json"
    gpu_faults.keep(file, [gpu_faults.row_of("rank_stopped", {"passed": True, "happened": "named"}, "H200")])
    gpu_faults.keep(file, [gpu_faults.row_of("rank_stopped", {"not_run": "needs two GPUs"}, "no GPU")])
    (row,) = json.loads(file.read_text())
    assert row["passed"] and row["hardware"] == "H200"


@pytest.mark.slow
def test_the_programs_for_gpus_run_on_a_cpu_too(tmp_path: Path):
    file = tmp_path / "found.json"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_faults", "--cpu", "--only", "ranks", "memory", "--out", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    rows = {row["case"]: row for row in json.loads(file.read_text())}
    assert ended.returncode == 0, rows
    assert {name for name, row in rows.items() if row.get("passed")} == {
        *("rank_stopped", "rank_killed", "ranks_resume", "ranks_export", "export")
    }
    assert rows["rank_stopped"]["lost_steps"] == 2 and rows["rank_stopped"]["processes_left"] == 0


def test_faults_md_knows_the_rows_that_it_names():
    rows = set(re.findall(r"\| (F\d+) ", (ROOT / "docs" / "faults.md").read_text()))
    assert rows <= reliability.ROWS.keys()


def test_a_run_counts_all_parameters_of_a_test_and_the_longest_time_and_most_that_was_lost(tmp_path: Path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        '@pytest.mark.fault("F1", outcome="STOP")\n'
        '@pytest.mark.parametrize("seconds", [2, 3, 4])\n'
        "def test_it(seconds, record_property):\n"
        '    record_property("detected_s", seconds)\n'
        '    record_property("lost_steps", 5 - seconds)\n'
        "    assert seconds < 4\n\n"
        "def test_other(): ...\n"
    )
    tests = reliability.run([str(tmp_path), "--rootdir", str(tmp_path), "-p", "no:cacheprovider"])
    ((name, entry),) = tests.items()
    assert name.endswith("test_it.py::test_it")
    assert {key: entry[key] for key in ("passed", "failed", "detected_s", "lost_steps")} == {
        "passed": 2,
        "failed": 1,
        "detected_s": 4,
        "lost_steps": 3,
    }
