"""The scorecard is whole: every fault has a test that says so, or a reason why not, and the page is what was found."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import reliability  # noqa: E402  (found through the line above)


@pytest.fixture(scope="module")
def marks() -> list[reliability.Marked]:
    return reliability.marked_tests()


@pytest.mark.parametrize("row", reliability.ROWS)
def test_every_fault_has_a_test_or_a_reason_why_not_and_not_both(marks: list[reliability.Marked], row: str):
    tested = [each.test for each in marks if each.row == row]
    assert bool(tested) != (row in reliability.NOT_RUN), f"{row}: {tested or 'no test is marked with it'}"


def test_a_mark_that_names_no_row_or_no_outcome_is_refused(tmp_path: Path):
    file = tmp_path / "tests" / "test_it.py"
    file.parent.mkdir()
    for mark in ('"F51", outcome="STOP"', '"F1", outcome="LUCK"', '"F1"'):
        file.write_text(f"@pytest.mark.fault({mark})\ndef test_it(): ...\n")
        with pytest.raises(ValueError, match="test_it: F"):
            reliability.marked_tests(file.parent)


def test_the_page_is_what_the_marks_and_the_results_say():
    assert reliability.PAGE.read_text() == reliability.document(), "run `make docs`: docs/reliability.md is old"


def test_nothing_is_green_that_failed():
    failed = [test for test, entry in reliability.known().items() if entry["failed"]]
    assert not failed


def test_faults_md_knows_the_rows_that_it_names():
    rows = set(re.findall(r"\| (F\d+) ", (ROOT / "docs" / "faults.md").read_text()))
    assert rows <= reliability.ROWS.keys()


def test_a_run_counts_all_parameters_of_a_test_and_the_longest_time(tmp_path: Path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        '@pytest.mark.fault("F1", outcome="STOP")\n'
        '@pytest.mark.parametrize("seconds", [2, 3, 4])\n'
        "def test_it(seconds, record_property):\n"
        '    record_property("detected_s", seconds)\n'
        "    assert seconds < 4\n\n"
        "def test_other(): ...\n"
    )
    tests = reliability.run([str(tmp_path), "--rootdir", str(tmp_path), "-p", "no:cacheprovider"])
    ((name, entry),) = tests.items()
    assert name.endswith("test_it.py::test_it")
    assert {key: entry[key] for key in ("passed", "failed", "detected_s")} == {
        "passed": 2,
        "failed": 1,
        "detected_s": 4,
    }
