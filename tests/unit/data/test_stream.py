"""From files to global batches: exact wherever it is stopped, by whoever it is computed."""

import hashlib
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.encode import Encoder
from posttrain.data.loader import loading
from posttrain.data.mixture import Mixture, Part
from posttrain.data.pack import deal
from posttrain.data.row_reader import RowReader
from posttrain.data.source import Source
from posttrain.data.stream import PackStream, UnitSource
from posttrain.errors import DataError
from tiny import tiny_tokenizer

T, W, G = 64, 32, 4
READ = RowReader(wanted="conversation")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def record(n, digits):
    asked = {"role": "user", "content": f"sort {digits}"}
    return {"messages": [asked, {"role": "assistant", "content": f"{n} " + "".join(sorted(digits))}]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two sources of 300 and 120 conversations, every one with a number of its own."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for name, first, count in (("one", 0, 300), ("two", 1000, 120)):
        rows = [
            record(n, "".join(map(str, rng.integers(0, 10, rng.integers(1, 12))))) for n in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "one.jsonl"), str(folder / "two.jsonl")]


def stream(tokenizer, files, *, seed=0, max_draws=(None, None), pack_tokens=T, over_long="error", window=W):
    encoder = Encoder(tokenizer, wanted="conversation", pack_tokens=pack_tokens, over_long=over_long)
    sources = [
        UnitSource(Source(file, key=f"data.sources[{n}]"), encoder, read=READ, seed=seed, number=n)
        for n, file in enumerate(files)
    ]
    parts = [
        Part(name=str(n), num_rows=unit.source.num_rows, weight=((0, 1.0 + n),), max_draws=cap)
        for n, (unit, cap) in enumerate(zip(sources, max_draws, strict=False))
    ]
    return PackStream(Mixture(parts, seed=seed, window=window), sources, pack_tokens=pack_tokens, seed=seed)


def digest(packs):
    chain = hashlib.sha256()
    for each in packs:
        for sample in each.samples:
            chain.update(sample.input_ids.tobytes() + sample.target_ids.tobytes() + sample.loss_mask.tobytes())
    return chain.hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tokenizer, files):
    """Digests of 40 global batches, and the state before each."""
    digests, states = [], []
    with loading(stream(tokenizer, files)) as loader:
        for _ in range(40):
            states.append(json.loads(json.dumps(loader.state())))
            digests.append(digest(loader.take(G)))
    assert len(set(digests)) == 40
    return digests, states


def test_a_capped_mixture_trains_every_row_as_often_as_planned(tokenizer, files):
    made = stream(tokenizer, files, max_draws=(300, 240))
    windows = [made.window(index) for index in range(20)]
    draws = sorted(n for window in windows for each in window.packs for n in each.draws)
    assert draws == list(range(540))
    texts = [tokenizer.hf.decode(s.target_ids[s.loss_mask > 0]) for w in windows for p in w.packs for s in p.samples]
    numbers = sorted(int(text.split()[0]) for text in texts)
    assert numbers == sorted([*range(300), *range(1000, 1120), *range(1000, 1120)])
    assert windows[-1].num_draws == 0


@settings(deadline=None, max_examples=15)
@given(first=st.integers(0, 30), second=st.integers(0, 8))
def test_two_resumes_at_any_batch_give_the_batches_of_the_uninterrupted_run(
    tokenizer, files, uninterrupted, first, second
):
    digests, states = uninterrupted
    with loading(stream(tokenizer, files), state=states[first]) as loader:
        assert [digest(loader.take(G)) for _ in range(second)] == digests[first : first + second]
        state = json.loads(json.dumps(loader.state()))
    with loading(stream(tokenizer, files), state=state) as loader:
        assert digest(loader.take(G)) == digests[first + second]


@pytest.mark.fault("F14", outcome="CONTINUE")
def test_windows_do_not_depend_on_who_computed_those_before(tokenizer, files):
    walked = stream(tokenizer, files)
    for index in range(6):
        walked.window(index)
    assert digest(walked.window(6).packs) == digest(stream(tokenizer, files).window(6).packs)


def test_a_place_in_windows_of_another_size_is_refused(tokenizer, files, uninterrupted):
    wrong = loading(stream(tokenizer, files, window=2 * W), state=uninterrupted[1][3])
    with pytest.raises(DataError, match=f"windows of {W} draws and this run's have {2 * W}"), wrong:
        pass


def test_a_state_from_before_sizes_were_kept_counts_in_windows_of_1024(tokenizer, files):
    with loading(stream(tokenizer, files, window=1024)) as loader:
        loader.take(G)
        old = {key: value for key, value in loader.state().items() if key != "draws"}
        second = digest(loader.take(G))
    with loading(stream(tokenizer, files, window=1024), state=old) as loader:
        assert digest(loader.take(G)) == second
    with pytest.raises(DataError, match="windows of 1024 draws"), loading(stream(tokenizer, files), state=old):
        pass


def test_the_world_size_decides_who_trains_a_pack_and_not_which_packs(tokenizer, files, uninterrupted):
    digests, states = uninterrupted
    for world, first in ((1, 0), (2, 10), (4, 20)):
        with loading(stream(tokenizer, files), state=states[first]) as loader:
            packs = loader.take(G)
        shares = deal(packs, ranks=world, cost=lambda each: each.num_tokens)
        place = {id(each): n for n, each in enumerate(packs)}
        assert digest(sorted((p for share in shares for p in share), key=lambda p: place[id(p)])) == digests[first]


def test_another_seed_gives_other_batches(tokenizer, files, uninterrupted):
    with loading(stream(tokenizer, files, seed=1)) as loader:
        assert digest(loader.take(G)) != uninterrupted[0][0]


def test_the_end_of_the_data_is_said(tokenizer, files):
    with (
        loading(stream(tokenizer, files, max_draws=(10, 10))) as loader,
        pytest.raises(DataError, match=r"the data end in window 1, .*allow more epochs"),
    ):
        loader.take(1000)


@pytest.fixture
def flawed(tmp_path):
    lines = [json.dumps(record(n, "21")) for n in range(20)]
    lines[7] = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]})
    lines[12] = '{"messages": ['
    (tmp_path / "flawed.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "flawed.jsonl")


@pytest.mark.fault("F32", outcome="CONTINUE")
def test_bad_rows_are_counted_within_their_budget(tokenizer, flawed):
    with loading(stream(tokenizer, [flawed], max_draws=(20,)), max_bad_rows=2) as loader:
        packs = loader.take(1)
        assert loader.state()["dropped"] == {"unknown_role": 1, "not_json": 1}
    resumed = loading(stream(tokenizer, [flawed], max_draws=(20,)), max_bad_rows=2, state=loader.state())
    with resumed as again:
        packs += again.take(1)
        assert again.state()["dropped"] == {"unknown_role": 1, "not_json": 1}, "not counted twice"


@pytest.mark.fault("F32", outcome="STOP")
def test_one_bad_row_too_many_stops_the_run_and_is_named(tokenizer, flawed):
    with (
        loading(stream(tokenizer, [flawed], max_draws=(20,)), max_bad_rows=1) as loader,
        pytest.raises(DataError, match=rf"2 bad rows.*allows 1.*data\.sources\[0\]: {flawed}:(8|13): "),
    ):
        loader.take(1)


@pytest.fixture
def lengthy(tmp_path):
    rows = [record(n, "3" * (100 if n == 5 else 2)) for n in range(10)]
    (tmp_path / "lengthy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "lengthy.jsonl")


@pytest.mark.fault("F35", outcome="STOP")
def test_a_row_too_long_is_an_error_that_shows_the_lengths(tokenizer, lengthy):
    with pytest.raises(DataError, match=r"1 of 10 rows are longer than a pack of 64 tokens, the longest \d+ \("):
        stream(tokenizer, [lengthy], max_draws=(10,)).window(0)


@pytest.mark.fault("F35", outcome="CONTINUE")
def test_a_row_too_long_can_be_dropped_and_counted(tokenizer, lengthy):
    window = stream(tokenizer, [lengthy], max_draws=(10,), over_long="drop").window(0)
    assert [each.reason for each in window.dropped] == ["too_long"]
    assert sum(each.num_units for each in window.packs) == 9


@pytest.mark.fault("F35", outcome="CONTINUE")
def test_a_row_too_long_can_be_split_and_every_trained_token_is_trained_once(tokenizer, lengthy):
    def trained(window):
        return sum(each.loss_tokens for each in window.packs)

    whole = stream(tokenizer, [lengthy], max_draws=(10,), pack_tokens=1024).window(0)
    split = stream(tokenizer, [lengthy], max_draws=(10,), over_long="split").window(0)
    assert trained(split) == trained(whole)
    assert not split.dropped and all(each.num_tokens <= T for each in split.packs)


def test_a_row_cut_before_its_answer_has_nothing_left(tokenizer, lengthy):
    window = stream(tokenizer, [lengthy], max_draws=(10,), over_long="truncate").window(0)
    assert [each.reason for each in window.dropped] == ["nothing_left"]


def test_a_pair_is_one_unit_in_one_pack(tokenizer, tmp_path):
    asked = [{"role": "user", "content": "sort 21"}]
    pairs = [
        {
            "prompt": asked,
            "chosen": [{"role": "assistant", "content": "12"}],
            "rejected": [{"role": "assistant", "content": "21"}],
        }
    ] * 9
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    encoder = Encoder(tokenizer, wanted="preference", pack_tokens=T)
    source = UnitSource(
        Source(str(tmp_path / "pairs.jsonl"), key="x"), encoder, read=RowReader(wanted="preference"), seed=0, number=0
    )
    mixture = Mixture([Part(name="x", num_rows=9, weight=((0, 1.0),), max_draws=9)], seed=0, window=W)
    window = PackStream(mixture, [source], pack_tokens=T, seed=0).window(0)
    assert not window.dropped
    assert all(len(each.samples) == 2 * each.num_units for each in window.packs)
    texts = [tokenizer.hf.decode(s.target_ids[s.loss_mask > 0]) for each in window.packs for s in each.samples]
    assert texts == ["12<|im_end|>", "21<|im_end|>"] * 9


def test_a_window_under_way_ends_before_the_loading_does(tokenizer, files):
    begun, ended = threading.Event(), threading.Event()
    made = stream(tokenizer, files)

    def work(index):
        window = made.window(index)
        if index:
            begun.set()
            asked_to_end.wait(60)
            ended.set()
        return window

    asked_to_end, before = threading.Event(), set(threading.enumerate())
    with loading(made, workers=[work]) as loader:
        loader.take(1)
        assert begun.wait(60)
        asked_to_end.set()
    assert ended.is_set()
    assert set(threading.enumerate()) <= before


def test_sources_of_which_every_row_is_dropped_end_the_run_and_say_why(tokenizer, lengthy, tmp_path):
    rows = [record(n, "3" * 100) for n in range(4)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (
        loading(stream(tokenizer, [str(tmp_path / "long.jsonl")], over_long="drop")) as loader,
        pytest.raises(DataError, match=r"no row is left of the last 512 draws \(dropped so far: 512 too_long\)"),
    ):
        loader.take(1)
