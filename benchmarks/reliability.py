"""The scorecard of faults: runs every test that is marked `fault`, and writes what each fault came to.

    make faults                                   all of them; most of an hour on two cores
    python -m benchmarks.reliability tests/unit   some, beside what is known of the others

Which test stands for which fault is said by the test itself: `@pytest.mark.fault("F7", outcome="STOP")`. A test of a
fault at run time records how long it took to be noticed, `record_property("detected_s", seconds)`, and what was lost:
any of LOST, `record_property("lost_steps", 2)`. Results are kept in benchmarks/results/reliability.json, those of
benchmarks/gpu_faults.py beside them; benchmarks/reliability_page.py makes docs/reliability.md of them and of the marks.
"""

import ast
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
OUTCOMES = ("REFUSE", "CONTINUE", "RESUME", "STOP")
LOST = {
    "lost_steps": "steps trained again",
    "lost_requests": "requests sampled again",
    "lost_groups": "groups dropped",
    "lost_saves": "saves lost",
}
"""What a fault costs, as a test or a program measures it."""

ROWS = {
    "F1": "`kill -9` of a training rank or the driver in a step",
    "F2": "`kill -9` in every phase of a checkpoint's write",
    "F3": "SIGTERM, the notice of a spot machine",
    "F4": "a second SIGTERM",
    "F5": "a rank that is stopped or hangs",
    "F6": "a generator that dies, idle or serving",
    "F7": "a generator that hangs, is slow, or holds stale weights",
    "F8": "vLLM's processes and GPU memory after their actor was killed",
    "F9": "the driver dies",
    "F10": "a GPU out of memory",
    "F11": "the kernel's out-of-memory killer",
    "F12": "a full disk",
    "F13": "another number of ranks on resume",
    "F14": "another number of data workers, another machine",
    "F15": "the same run started twice at once",
    "F16": "clocks that are skewed or jump",
    "F17": "S3 answers 500, SlowDown or a reset",
    "F18": "S3 is slow, stalls, or sends a part of a body",
    "F19": "a corrupt, cut or missing shard",
    "F20": "a checkpoint, tokenizer or template made to do harm",
    "F21": "a checkpoint of another model, tokenizer, template or dtype",
    "F22": "optimizer, RNG or data state is missing",
    "F23": "a checkpoint of older code",
    "F24": "retention meets damage: is a good checkpoint left?",
    "F25": "the export is not the trained model",
    "F26": "a config with a typo, a wrong type, an impossible combination",
    "F27": "a config key that is not known any more",
    "F28": "an empty dataset, or one that is empty after its filters",
    "F29": "truncated or corrupt Parquet, half-written JSON lines",
    "F30": "text that is not UTF-8, NUL, lone surrogates, a byte order mark",
    "F31": "a wrong schema, mixed types, null content",
    "F32": "no assistant turn, wrong order of roles, an unknown role",
    "F33": "a chat template without generation markers",
    "F34": "a row with no token to train",
    "F35": "a row longer than a pack",
    "F36": "a prompt longer than the limit",
    "F37": "a tokenizer that does not fit the model",
    "F38": "pad is eos, eos is missing, BOS twice",
    "F39": "duplicate rows, held-out questions in the training data",
    "F40": "a preference pair whose answers are equal or whose prompts differ",
    "F41": "a teacher of another vocabulary, missing labels",
    "F42": "NaN or inf in loss or gradients",
    "F43": "replicas drift apart: silent data corruption",
    "F44": "a loss spike, a collapse of entropy or KL",
    "F45": "a reward raises",
    "F46": "a reward or an environment hangs, or kills its process",
    "F47": "a reward is None, NaN, text, or of another number",
    "F48": "groups whose rewards are all equal",
    "F49": "a reward that is not deterministic",
    "F50": "a crash of RL with rollouts under way",
}
"""The faults, by the numbers of docs/faults.md."""

NOT_RUN: dict[str, str] = {}
"""Rows that neither a test nor benchmarks/gpu_faults.py covers, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """A test that stands for a fault."""

    row: str
    outcome: str
    test: str
    """path::name"""
    slow: bool


def marked_tests(folder: Path = ROOT / "tests") -> list[Marked]:
    """Every mark `fault` in the tests, read and not imported, by row.

    Raises:
        ValueError: a mark names no row or no outcome of the contract.
    """
    found: list[Marked] = []
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found += _marks(node, f"{path.relative_to(folder.parent).as_posix()}::{node.name}")
    return sorted(found, key=lambda each: (int(each.row[1:]), OUTCOMES.index(each.outcome), each.slow, each.test))


def _marks(function: ast.FunctionDef, test: str) -> Iterator[Marked]:
    slow = any(ast.unparse(each) == "pytest.mark.slow" for each in function.decorator_list)
    for each in function.decorator_list:
        if not isinstance(each, ast.Call) or ast.unparse(each.func) != "pytest.mark.fault":
            continue
        outcome = {word.arg: ast.literal_eval(word.value) for word in each.keywords}.get("outcome")
        for row in map(ast.literal_eval, each.args):
            if row not in ROWS or outcome not in OUTCOMES:
                raise ValueError(f"{test}: {row} {outcome}; rows are F1 to F50, outcomes {', '.join(OUTCOMES)}")
            yield Marked(row=row, outcome=outcome, test=test, slow=slow)


class Recorder:
    """A pytest plug-in that keeps what became of each marked test, all its parameters together."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a phase's report: of passed ones the call, of all others any."""
        properties = dict(report.user_properties)
        if "fault" not in properties or (report.passed and report.when != "call"):
            return
        entry = self.tests.setdefault(report.nodeid.partition("[")[0], {"passed": 0, "failed": 0, "skipped": 0})
        entry[report.outcome] += 1
        entry["seconds"] = round(entry.get("seconds", 0.0) + report.duration, 1)
        if report.skipped:
            entry["why_skipped"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        for name in {"detected_s", *LOST} & properties.keys():
            entry[name] = round(max(properties[name], entry.get(name, 0.0)), 1)


def run(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run the marked tests among pytest's arguments; test -> what became of it."""
    import pytest

    recorder = Recorder()
    selection = ["-m", "fault and not gpu", "--numprocesses", "2", "--dist", "loadfile", "-q"]
    pytest.main([*selection, *arguments], plugins=[recorder])
    return recorder.tests


def known() -> dict[str, dict[str, Any]]:
    """Results that are kept."""
    return json.loads(RESULTS.read_text())["tests"] if RESULTS.exists() else {}


def main(arguments: Sequence[str]) -> int:
    """Run, keep, write and print; 1 if a test failed."""
    found = run(arguments)
    exist = {each.test for each in marked_tests()}
    kept = {test: entry for test, entry in (known() | found).items() if test in exist}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    RESULTS.write_text(json.dumps({"machine": machine, "tests": kept}, indent=2, sort_keys=True) + "\n")
    from benchmarks import reliability_page as page  # which reads what was written

    page.write()
    page.show()
    return int(any(entry["failed"] for entry in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
