"""Token Parquet gives back the units that were written, in the order of the draws, and notices damage."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.data import token_files
from posttrain.data.sample import shift
from posttrain.data.source import Source
from posttrain.data.token_files import (
    TAUGHT,
    TokenUnits,
    UnitsFile,
    block_units,
    lengths_and_duplicates,
    read_units,
    write_units,
)
from posttrain.errors import DataError


def unit(number, *lengths):
    """A unit whose tokens tell which it is: document d of unit n begins with 1000 n + d."""
    return tuple(
        shift([1000 * number + d, *range(length)], [0.0, *np.linspace(0.5, 1, length)])
        for d, length in enumerate(lengths)
    )


UNITS = [unit(n, *((3 + n % 7,) if n % 3 else (2, 4 + n % 5))) for n in range(300)]
"""Single documents and pairs."""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The units in two files of several row groups each."""
    monkeypatch.setattr(token_files, "GROUP_TOKENS", 200)
    hashes = [7 if n in (5, 6, 290) else (None if n == 9 else n + 1000) for n in range(300)]
    for name, part in (("a", slice(0, 120)), ("b", slice(120, 300))):
        write_units(zip(UNITS[part], hashes[part], strict=True), tmp_path / f"{name}.parquet")
    return Source([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")], key="data.sources[0]")


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("input_ids", "target_ids", "loss_mask"):
            assert getattr(one, name).dtype == getattr(other, name).dtype
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.sampler_logprobs, one.advantages) == (None, None)


def test_an_epoch_gives_every_unit_once_as_it_was_written(written):
    assert len(written.block_rows) > 5
    made = TokenUnits(written, seed=0, number=0).units(np.arange(300))
    numbers = [int(found[0][0].input_ids[0]) // 1000 for found in made]
    assert sorted(numbers) == list(range(300)) and numbers != list(range(300))
    for number, (found,) in zip(numbers, made, strict=True):
        assert_equal(found, UNITS[number])


def test_a_draw_gives_the_same_unit_however_it_is_asked_for(written):
    source = TokenUnits(written, seed=0, number=0)
    every = source.units(np.arange(600))
    for positions in ([599, 3, 300], [3], []):
        found = source.units(np.array(positions, np.int64))
        for (one,), position in zip(found, positions, strict=True):
            assert_equal(one, every[position][0])


def test_lengths_and_exact_copies_are_counted_without_the_tokens(written):
    lengths, duplicates = lengths_and_duplicates(written)
    assert lengths.tolist() == [sum(map(len, each)) for each in UNITS]
    assert duplicates == 2, "three rows are the same; a split row's later units have no hash"


@pytest.mark.fault("F19", outcome="STOP")
def test_a_flipped_bit_is_noticed_and_the_file_named(written):
    path = Path(written.shards[0].file.uri)
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)
    damaged = Source([str(path)], key="data.sources[0]")
    with pytest.raises(DataError, match=r"data\.sources\[0\]: .*a\.parquet, block \d+: its bytes are damaged"):
        TokenUnits(damaged, seed=0, number=0).units(np.arange(120))


def test_fields_of_every_document_come_back(tmp_path):
    pair = tuple(replace(s, fields={"margin": 0.5, "ref_logprob": -float(n)}) for n, s in enumerate(unit(1, 3, 4)))
    with UnitsFile(tmp_path / "units.parquet") as file:
        file.add(pair, 7)
        file.add(unit(2, 5), None)
    found = read_units(tmp_path / "units.parquet")
    assert [sample.fields for sample in found[0]] == [sample.fields for sample in pair] and found[1][0].fields == {}
    assert_equal(found[0], pair)
    source = Source([str(tmp_path / "units.parquet")], key="data.sources[0]")
    (first, a), (second, b) = block_units(source, 0)
    assert (a, b) == (7, None) and first[1].fields["ref_logprob"] == -1 and len(second) == 1


def taught(documents, *, k):
    """The same documents with k numbers for each of their trained tokens."""
    rng = np.random.default_rng(0)
    shapes = [(int(np.count_nonzero(sample.loss_mask)), k) for sample in documents]
    return tuple(
        replace(
            sample,
            teacher_ids=rng.integers(0, 50, shape, dtype=np.int32),
            teacher_logprobs=rng.normal(size=shape).astype(np.float32),
        )
        for sample, shape in zip(documents, shapes, strict=True)
    )


def test_what_a_teacher_said_comes_back_with_each_document_in_groups_of_as_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "GROUP_TOKENS", 200)
    units = [taught(each, k=6) for each in UNITS[:60]]
    write_units(((each, None) for each in units), tmp_path / "taught.parquet", schema=TAUGHT)
    write_units(((each, None) for each in UNITS[:60]), tmp_path / "plain.parquet")
    source = Source(str(tmp_path / "taught.parquet"), key="data.sources[0]")
    blocks = [unit for block in range(len(source.block_rows)) for unit, _ in block_units(source, block)]
    drawn = [unit for (unit,) in TokenUnits(source, seed=1, number=0).units(np.arange(60))]  # pyright: ignore
    for found in (read_units(tmp_path / "taught.parquet"), blocks, sorted(drawn, key=lambda u: u[0].input_ids[0])):
        for one, other in zip(found, units, strict=True):
            assert_equal(one, other)
            for name in ("teacher_ids", "teacher_logprobs"):
                for mine, theirs in zip(one, other, strict=True):
                    np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    plain = Source(str(tmp_path / "plain.parquet"), key="data.sources[0]")
    assert len(source.block_rows) > 3 * len(plain.block_rows)
