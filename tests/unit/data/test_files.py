"""Which files a path names, and their bytes in any order: on disk, on S3, and through a local cache."""

import errno
import glob
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain import storage
from posttrain.data.chunk_cache import ChunkCache
from posttrain.data.files import File, list_files, open_file
from posttrain.data.get_range import Range
from posttrain.data.ranged import RangedFile
from posttrain.errors import DataError

DATA = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
TREE = ["a.jsonl", "b.parquet", "c.txt", "sub/a.jsonl", "sub/deep/er/z.JSONL", "sub2/[x].jsonl", "sub2/x.jsonl"]
HIDDEN = [".hidden.jsonl", "_success.jsonl", ".cache/a.jsonl", "sub/_tmp/a.jsonl", "sub/.git/deep/a.jsonl"]
SUFFIXES = (".jsonl", ".parquet")


def write_tree(root, names):
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())


def names(uri, root, suffixes=SUFFIXES):
    return [file.uri.removeprefix(f"{root}/") for file in list_files(uri, suffixes=suffixes)]


def test_a_folder_stands_for_all_known_files_below_it_that_are_not_hidden(root_uri):
    write_tree(root_uri, [*TREE, *HIDDEN])
    wanted = sorted(name for name in TREE if not name.endswith(".txt"))
    assert names(root_uri, root_uri) == names(root_uri + "/", root_uri) == wanted
    assert names(storage.join(root_uri, "sub"), root_uri) == ["sub/a.jsonl", "sub/deep/er/z.JSONL"]  # and not sub2


def test_a_file_stands_for_itself_and_is_listed_with_its_size(root_uri):
    write_tree(root_uri, TREE)
    for name in ("a.jsonl", "sub2/[x].jsonl"):  # the second would match sub2/x.jsonl, were it a glob
        (file,) = list_files(storage.join(root_uri, name), suffixes=SUFFIXES)
        assert (file.uri, file.size) == (storage.join(root_uri, name), len(name))
        assert file.version


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.jsonl", "?.jsonl", "**/*.jsonl", "**", "sub/**", "sub*/?.jsonl", "sub/**/z.JSONL", "**/deep/**/*.JSONL"],
)
def test_a_glob_matches_what_it_matches_in_a_shell(root_uri, tmp_path, pattern):
    compare_with_glob(root_uri, tmp_path, pattern)


@pytest.mark.parametrize(
    "pattern",
    ["[ab].*", "[!a].*", "[^a].jsonl", "*/*.jsonl", "sub[0-9]/*", "**/[[]x].jsonl", "sub2/[[]x[]].jsonl", "sub/a**"],
)
def test_a_set_of_characters_matches_what_it_matches_in_a_shell(root_uri, tmp_path, pattern):
    compare_with_glob(root_uri, tmp_path, pattern)


def compare_with_glob(root_uri, tmp_path, pattern):
    write_tree(root_uri, [*TREE, *HIDDEN[-2:]])
    oracle = tmp_path / "oracle"
    for name in TREE:
        (oracle / name).parent.mkdir(parents=True, exist_ok=True)
        (oracle / name).touch()
    found = sorted(f for f in glob.glob(pattern, root_dir=oracle, recursive=True) if (oracle / f).is_file())
    assert names(storage.join(root_uri, pattern), root_uri, suffixes=("",)) == found


def test_a_hidden_name_is_listed_when_the_glob_spells_it(root_uri):
    write_tree(root_uri, [*TREE, *HIDDEN])
    assert names(storage.join(root_uri, "_succ*"), root_uri) == ["_success.jsonl"]
    assert names(storage.join(root_uri, "*", "_tmp", "*"), root_uri) == ["sub/_tmp/a.jsonl"]


def test_nothing_found_is_an_error_that_says_what_was_looked_for(root_uri):
    write_tree(root_uri, TREE)
    for name in ("absent", "absent/*.jsonl", "c.txt", "*.txt", "sub/a"):
        uri = storage.join(root_uri, name)
        with pytest.raises(DataError, match="Fix: name an existing file, folder or glob") as error:
            list_files(uri, suffixes=SUFFIXES)
        missing = name in ("absent", "sub/a")
        looked_for = "does not exist" if missing else "holds no file that ends in .jsonl, .parquet"
        assert str(error.value).startswith(f"{uri} {looked_for}")
        assert ("1 other files, as " in str(error.value)) == name.endswith(".txt")


def test_a_set_that_is_none_is_refused(root_uri):
    with pytest.raises(DataError, match=r"\[z-a\].jsonl: is not a glob"):
        list_files(storage.join(root_uri, "[z-a].jsonl"), suffixes=SUFFIXES)


def test_a_bucket_that_does_not_exist_is_named(s3_bucket):
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x: cannot be listed.*NoSuchBucket"):
        list_files("s3://no-such-bucket/x", suffixes=SUFFIXES)


def test_a_whole_bucket_of_more_than_a_page_is_listed(s3_bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # S3 itself lists at most 1000 keys a page
    wanted = [f"{number}.jsonl" for number in range(7)]
    write_tree(s3_bucket, wanted)
    assert names(s3_bucket, s3_bucket) == names(f"{s3_bucket}/*", s3_bucket) == wanted


def test_links_are_followed_once_and_a_dangling_one_is_refused(tmp_path):
    write_tree(str(tmp_path / "data"), ["a.jsonl"])
    write_tree(str(tmp_path / "elsewhere"), ["b.jsonl"])
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert names(str(tmp_path / "data"), tmp_path / "data") == ["a.jsonl", "linked/b.jsonl"]
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
        list_files(str(tmp_path / "data"), suffixes=SUFFIXES)


def test_home_and_relative_paths_become_absolute(tmp_path, monkeypatch):
    write_tree(str(tmp_path), ["data/a.jsonl"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wanted = list_files(str(tmp_path / "data"), suffixes=SUFFIXES)
    for uri in ("~/data", "data", "./data/*.jsonl", "~/data/a.jsonl"):
        assert list_files(uri, suffixes=SUFFIXES) == wanted


def test_a_file_on_disk_that_changed_or_went_since_it_was_listed_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(DATA)
    (file,) = list_files(str(path), suffixes=SUFFIXES)
    assert open_file(file).read() == DATA
    stamp = path.stat()
    path.write_bytes(DATA[::-1])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"a\.jsonl: changed since it was indexed \(5000 bytes then, 5000 now\)"):
        open_file(file)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be opened: No such file"):
        open_file(file)


@pytest.fixture
def listed(s3_bucket, proxy) -> File:
    storage.write_bytes(f"{s3_bucket}/data.bin", DATA)
    return list_files(s3_bucket, suffixes=(".bin",))[0]


def ranged(file: File, **options) -> RangedFile:
    return RangedFile(file.uri, size=file.size, etag=file.version, **({"chunk_bytes": 512} | options))


OFFSETS = st.integers(0, len(DATA) + 10)
CALLS = st.one_of(
    st.tuples(st.just("seek"), OFFSETS),
    st.tuples(st.just("back"), OFFSETS),
    st.tuples(st.just("read"), st.one_of(st.none(), st.integers(-1, 2000))),
    st.tuples(st.just("readline"), st.integers(-1, 700)),
    st.tuples(st.just("readinto"), st.integers(0, 2000)),
    st.tuples(st.sampled_from(["prefetch", "drop"]), OFFSETS),
)


def answer(file, call, number):
    """What one call on a file returns, and where it leaves the position."""
    if call == "seek":
        result = file.seek(number)
    elif call == "back":
        result = file.seek(-min(number, len(DATA)), io.SEEK_END)
    elif call == "readinto":
        buffer = bytearray(number)
        result = (file.readinto(buffer), bytes(buffer))
    elif call in ("prefetch", "drop"):
        result = getattr(file, call)(number, 1500) if isinstance(file, RangedFile) else None
    else:
        result = getattr(file, call)(number)
    return result, file.tell()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(CALLS, max_size=12),
    chunk_bytes=st.integers(300, 6000),
    memory_chunks=st.integers(1, 5),
    starts=st.none() | st.sets(st.integers(1, len(DATA) - 1), max_size=9).map(lambda found: [0, *sorted(found)]),
)
def test_any_sequence_of_calls_answers_as_bytes_in_memory_do(listed, calls, chunk_bytes, memory_chunks, starts):
    oracle = io.BytesIO(DATA)
    with ranged(listed, chunk_bytes=chunk_bytes, memory_chunks=memory_chunks, starts=starts) as file:
        for call, number in calls:
            assert answer(file, call, number) == answer(oracle, call, number)


def test_lines_are_read_whole_across_chunks(listed):
    assert list(ranged(listed)) == list(io.BytesIO(DATA))
    assert list(io.BufferedReader(ranged(listed))) == list(io.BytesIO(DATA))


def test_a_seek_before_the_start_and_a_read_after_close_are_refused(listed):
    file = ranged(listed)
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-1)
    file.close()
    for call in (file.read, file.tell, file.readline, lambda: file.prefetch(0, 1)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_an_empty_object_is_read_without_asking_for_it(s3_bucket, proxy):
    storage.write_bytes(f"{s3_bucket}/empty.bin", b"")
    (listed,) = list_files(s3_bucket, suffixes=(".bin",))
    assert open_file(listed).read() == b""
    assert proxy.gets == []


def test_many_threads_on_overlapping_ranges_fetch_each_chunk_once(listed, proxy):
    together = threading.Barrier(8)

    def read(seed):
        offsets = np.random.default_rng(seed).integers(0, len(DATA), 50)
        together.wait()
        return all(file.read_at(at, 900) == DATA[at : at + 900] for at in offsets.tolist())

    with ranged(listed) as file, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert sorted(get.range for get in proxy.gets) == sorted({get.range for get in proxy.gets})
    assert len(proxy.gets) == 10


def test_memory_holds_the_chunks_read_last(listed, proxy):
    with ranged(listed, memory_chunks=2) as file:
        for offset in (600, 3000, 601, 4500, 602, 3000):
            assert file.read_at(offset, 1) == DATA[offset : offset + 1]
    assert [int(get.range[6:].split("-")[0]) // 512 for get in proxy.gets] == [1, 5, 8, 5]


def test_chunks_may_begin_where_blocks_do_and_are_forgotten_when_dropped(listed, proxy):
    with ranged(listed, starts=[0, 700, 1900]) as file:
        assert file.read_at(700, 1200) + file.read_at(900, 5) == DATA[700:1900] + DATA[900:905]
        assert [get.range for get in proxy.gets] == ["bytes=700-1899"], "the block, and nothing around it"
        file.drop(600, 1300)
        assert file.read_at(650, 100) == DATA[650:750]
    assert sorted(get.range for get in proxy.gets[1:]) == ["bytes=0-699", "bytes=700-1899"]


def test_a_file_longer_than_memory_is_read_with_one_get_a_chunk(listed, proxy):
    with ranged(listed, memory_chunks=4, chunk_bytes=100) as file:
        file.prefetch(0, len(DATA))
        assert file.read() == DATA
    assert len(proxy.gets) == 50


def test_prefetch_asks_before_the_reader_does_and_sequential_reads_ask_ahead(listed, proxy):
    with ranged(listed) as file:
        file.prefetch(2000, 10)
        assert proxy.arrived.wait(60)
        assert proxy.gets[0].range == "bytes=1536-2047"
        assert file.read_at(2000, 10) == DATA[2000:2010]
        assert len(proxy.gets) == 1
        assert file.read_at(0, 1) == DATA[:1]  # somewhere else: nothing ahead
        assert file.read_at(1, 1) == DATA[1:2]  # goes on: chunks 1 and 2
        assert file.read_at(600, 1) + file.read_at(1100, 1) == DATA[600:601] + DATA[1100:1101]
    assert sorted(int(get.range[6:].split("-")[0]) // 512 for get in proxy.gets) == [0, 1, 2, 3]


@pytest.mark.parametrize("pre_buffer", [True, False])
def test_pyarrow_reads_parquet_through_it(root_uri, tmp_path, pre_buffer):
    rng = np.random.default_rng(1)
    columns = {"id": np.arange(20_000), "x": rng.random(20_000), "text": [f"row {n}" * (n % 7) for n in range(20_000)]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=3_000)
    storage.write_bytes(storage.join(root_uri, "t.parquet"), (tmp_path / "t.parquet").read_bytes())
    (listed,) = list_files(root_uri, suffixes=SUFFIXES)
    file = ranged(listed, chunk_bytes=20_000) if storage.is_s3(root_uri) else open_file(listed)
    parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=pre_buffer)
    oracle = pq.read_table(tmp_path / "t.parquet")
    assert parquet.read_row_group(5).equals(oracle.slice(15_000, 3_000))
    assert parquet.read_row_group(0, columns=["text"]).equals(oracle.select(["text"]).slice(0, 3_000))
    assert parquet.read(use_threads=True).equals(oracle)


FORKED = """
import os, sys
from posttrain.data.files import list_files
from posttrain.data.ranged import RangedFile
def read():
    (file,) = list_files(sys.argv[1], suffixes=(".bin",))
    return RangedFile(file.uri, size=file.size, etag=file.version, chunk_bytes=500).read()
before = read()
child = os.fork()
if child == 0:
    os._exit(0 if read() == before else 1)
assert os.waitpid(child, 0)[1] == 0 and read() == before
"""


def test_a_child_of_a_fork_reads_with_threads_and_connections_of_its_own(listed):
    subprocess.run([sys.executable, "-c", FORKED, listed.uri], check=True, timeout=120)


RANGE = Range(uri="s3://b/k", size=1000, etag='"e"', first=0, last=99)


def other(number):
    return Range(uri="s3://b/k", size=100_000, etag='"e"', first=number * 100, last=number * 100 + 99)


def test_a_second_epoch_is_read_from_the_cache(listed, proxy, tmp_path):
    for _ in range(2):
        with ranged(listed, cache=ChunkCache(tmp_path, 20_000)) as file:
            assert file.read() == DATA
    assert len(proxy.gets) == 10


def test_a_damaged_entry_is_fetched_again_and_never_returned(listed, proxy, tmp_path):
    cache = ChunkCache(tmp_path, 20_000)
    ranged(listed, cache=cache).read()
    entries = sorted(tmp_path.iterdir())
    entries[0].write_bytes(entries[1].read_bytes())
    entries[2].write_bytes(entries[2].read_bytes()[:-1])
    entries[3].write_bytes(b"")
    assert ranged(listed, cache=cache).read() == DATA
    assert len(proxy.gets) == 13
    assert ranged(listed, cache=cache).read() == DATA
    assert len(proxy.gets) == 13


def test_any_flipped_bit_of_an_entry_is_noticed(tmp_path):
    cache = ChunkCache(tmp_path, 10_000)
    cache.put(RANGE, DATA[:100])
    (path,) = tmp_path.iterdir()
    entry = path.read_bytes()
    for at in range(len(entry)):
        path.write_bytes(entry[:at] + bytes([entry[at] ^ 1 << at % 8]) + entry[at + 1 :])
        assert cache.get(RANGE) is None
        assert not path.exists()
    path.write_bytes(entry)
    assert cache.get(RANGE) == DATA[:100]


def test_an_entry_belongs_to_one_version_and_range(tmp_path):
    cache = ChunkCache(tmp_path, 10_000)
    cache.put(RANGE, DATA[:100])
    for change in ({"uri": "s3://b/l"}, {"etag": '"f"'}, {"size": 999}, {"first": 100, "last": 199}):
        fields = {name: getattr(RANGE, name) for name in ("uri", "size", "etag", "first", "last")}
        assert cache.get(Range(**(fields | change))) is None
    assert cache.get(RANGE) == DATA[:100]


def test_the_least_recently_used_entries_leave_and_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_bytes(bytes(5000))
    cache = ChunkCache(tmp_path, 1100)  # nine entries of 112 bytes
    for number in range(9):
        cache.put(other(number), bytes([number]) * 100)
    assert cache.get(other(0)) == bytes(100)  # used again: 1 is the oldest now
    cache.put(other(9), bytes([9]) * 100)
    kept = [number for number in range(10) if cache.get(other(number)) is not None]
    assert kept[0] == 0 and kept[-1] == 9 and 1 not in kept and len(kept) >= 8
    assert (tmp_path / "notes.txt").stat().st_size == 5000


def test_the_cache_never_passes_its_bound_and_a_chunk_that_cannot_fit_is_not_kept(tmp_path):
    sizes = np.random.default_rng(2).integers(1, 300, 60).tolist()
    caches = [ChunkCache(tmp_path, 1000) for _ in range(6)]
    for number, size in enumerate(sizes):
        cache = caches[number // 10]
        wanted = Range(uri="s3://b/k", size=10**6, etag='"e"', first=number * 1000, last=number * 1000 + size - 1)
        cache.put(wanted, bytes(size))
        assert cache.get(wanted) == bytes(size)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    cache.put(RANGE, bytes(100))
    ChunkCache(tmp_path / "small", 100).put(RANGE, bytes(100))
    assert not (tmp_path / "small").exists()


def test_a_process_sees_what_another_one_wrote_before_it_writes(tmp_path):
    caches = [ChunkCache(tmp_path, 1100) for _ in range(2)]
    for number in range(40):
        caches[number % 2].put(other(number), bytes(100))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1100


HAMMER = """
import sys
from posttrain.data.chunk_cache import ChunkCache
from posttrain.data.get_range import Range
cache, seed, hits = ChunkCache(sys.argv[1], 20_000), int(sys.argv[2]), 0
for step in range(1500):
    number = (step * 7 + seed * 13 + step * step) % 40
    wanted = Range(uri="s3://b/k", size=10**6, etag="e", first=number * 1000, last=number * 1000 + 999)
    data = bytes([number]) * 1000
    found = cache.get(wanted)
    assert found in (None, data), number
    hits += found is not None
    if found is None:
        cache.put(wanted, data)
assert hits and cache._writes
"""


def test_processes_share_one_folder(tmp_path):
    runs = [subprocess.Popen([sys.executable, "-W", "error", "-c", HAMMER, tmp_path, str(n)]) for n in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".chunk"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000 + 3 * (20_000 // 16 + 1012)


LIMITED = """
import resource, sys, warnings
from posttrain.data.chunk_cache import ChunkCache
from posttrain.data.get_range import Range
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
cache = ChunkCache(sys.argv[1], 10**6)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for number, size in enumerate((500, 5000, 6000, 500)):
        wanted = Range(uri="s3://b/k", size=size, etag=str(number), first=0, last=size - 1)
        cache.put(wanted, bytes(size))
        print(cache.get(wanted) == bytes(size), len(said))
print(said[0].message)
"""


def test_a_disk_that_takes_no_more_ends_the_writing_with_one_warning(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[:4] == ["True 0", "False 1", "False 1", "False 1"]
    assert f"{tmp_path}: cannot keep chunks here ({os.strerror(errno.EFBIG)}); going on without" in lines[4]
    assert len(list(Path(tmp_path).iterdir())) == 1
