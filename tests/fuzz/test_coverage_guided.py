"""The parsers that coverage_guided.py fuzzes take its seeds and what is near them; its fuzzer sees what is raised."""

import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import coverage_guided

NAMES = ("parquet", "arrow", "jsonl", "safetensors", "index", "manifest", "model_config", "config")


@pytest.mark.parametrize("name", NAMES)
def test_a_parser_takes_its_seeds_and_their_mutants(tmp_path: Path, name: str):
    corpus, scratch = tmp_path / "corpus", tmp_path / "scratch"
    corpus.mkdir()
    scratch.mkdir()
    coverage_guided.seeds(name, corpus)
    parse, chance = coverage_guided.parsers(scratch)[name], random.Random(0)
    sound = [path.read_bytes() for path in corpus.iterdir()]
    assert sound and any(parse(data) is not None for data in sound), "a seed is not refused"
    for _ in range(10):
        data = bytearray(chance.choice(sound))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        parse(bytes(data[: chance.randint(1, len(data))]))


def test_every_parser_is_fuzzed_by_make(tmp_path: Path):
    assert coverage_guided.parsers(tmp_path).keys() == set(NAMES)
    assert all(f" {name}" in (Path(__file__).parents[2] / "Makefile").read_text() for name in NAMES)


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: make fuzz-long")
def test_a_finding_ends_the_fuzzer_and_is_kept(tmp_path: Path):
    """The harness sees what a parser raises: one that raises on an even length is found at once."""
    program = (
        "import coverage_guided as c\n"
        "def broken(data): assert len(data) % 2, 'even'\n"
        "c.parsers = lambda folder: {'jsonl': broken}\n"
        "c.main(['jsonl', '-max_total_time=20'])\n"
    )
    path = ":".join([str(Path(__file__).parents[1]), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ended.returncode != 0 and "AssertionError: even" in ended.stderr + ended.stdout
    assert list(tmp_path.glob("crash-*"))
