"""Reads from S3 through a proxy that breaks them: the same bytes, or a named error after a counted budget."""

import contextlib
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from faulty_s3 import Fault, FaultyS3
from posttrain import storage
from posttrain.data.chunk_cache import ChunkCache
from posttrain.data.files import list_files
from posttrain.data.get_range import Patience
from posttrain.data.ranged import RangedFile
from posttrain.errors import DataError

DATA = bytes(range(256)) * 20
CHUNK = 1024
QUICK = Patience(attempts=4, first_wait_s=0.001, longest_wait_s=0.005)
RECOVERABLE = [
    Fault.SERVER_ERROR,
    Fault.SLOW_DOWN,
    Fault.RESET_BEFORE_HEADERS,
    Fault.RESET_IN_BODY,
    Fault.TRUNCATED,
    Fault.STALLED,
    Fault.NO_RANGE,
]


@pytest.fixture
def listed(s3_bucket, proxy):
    storage.write_bytes(f"{s3_bucket}/data.bin", DATA)
    (file,) = list_files(s3_bucket, suffixes=(".bin",))
    return file


def ranged(file, **options):
    options = {"patience": QUICK, "chunk_bytes": CHUNK} | options
    return RangedFile(file.uri, size=file.size, etag=file.version, **options)


def patience_for(fault):
    return dataclasses.replace(QUICK, read_timeout_s=0.5) if fault == Fault.STALLED else QUICK


@pytest.mark.parametrize("fault", RECOVERABLE)
@pytest.mark.fault("F18", outcome="CONTINUE")
def test_a_passing_fault_costs_an_attempt_and_no_byte(proxy, listed, fault):
    proxy.script.extend([fault, None, fault])
    with ranged(listed, patience=patience_for(fault)) as file:
        assert file.read() == DATA
    assert proxy.faults == [fault, fault]
    assert len(proxy.gets) == len(DATA) // CHUNK + 2


@pytest.mark.fault("F17", outcome="CONTINUE")
def test_a_mixed_storm_of_faults_on_many_threads_changes_no_byte(proxy, listed):
    storm = [fault for fault in RECOVERABLE if fault != Fault.STALLED]
    proxy.script.extend(fault for pair in zip(storm, [None] * len(storm), strict=True) for fault in pair)
    patient = dataclasses.replace(QUICK, attempts=len(storm) + 1)
    with ranged(listed, patience=patient, chunk_bytes=512) as file, ThreadPoolExecutor(8) as pool:
        offsets = range(0, len(DATA), 300)
        assert list(pool.map(lambda at: file.read_at(at, 700), offsets)) == [DATA[at : at + 700] for at in offsets]
    assert sorted(proxy.faults) == sorted(storm)


@pytest.mark.parametrize("fault", RECOVERABLE)
def test_a_fault_that_stays_ends_in_an_error_that_names_object_range_and_attempts(proxy, listed, fault):
    proxy.always = fault
    patience = dataclasses.replace(patience_for(fault), attempts=3)
    with ranged(listed, patience=patience) as file, pytest.raises(DataError) as error:
        file.read_at(1500, 10)
    assert str(error.value).startswith(f"{listed.uri}, bytes 1024-2047: not read after 3 of 3 attempts")
    assert [get.range for get in proxy.gets] == ["bytes=1024-2047"] * 3


def test_the_last_cause_is_part_of_the_error(proxy, listed):
    proxy.always = Fault.TRUNCATED
    with ranged(listed) as file, pytest.raises(DataError, match="ended after 512 of 1024 bytes"):
        file.read(1)


@pytest.mark.fault("F17", outcome="STOP")
def test_a_store_that_is_not_there_is_given_up_after_the_budget(s3_bucket, s3_server, monkeypatch, noticed):
    storage.write_bytes(f"{s3_bucket}/data.bin", DATA)
    (listed,) = list_files(s3_bucket, suffixes=(".bin",))
    with FaultyS3(s3_server) as proxy:
        monkeypatch.setenv("METAFLOW_S3_ENDPOINT_URL", proxy.address)
    message = "bytes 0-1023: not read after 4 of 4 attempts.*Could not connect"
    with ranged(listed) as file, noticed(), pytest.raises(DataError, match=message):
        file.read(1)


@pytest.mark.fault("F18", outcome="STOP")
def test_a_body_that_drips_is_given_up_at_the_deadline(proxy, listed, noticed):
    proxy.always = Fault.DRIPPING  # 20 s for a chunk, and never silent for as long as the read timeout
    patience = dataclasses.replace(QUICK, deadline_s=0.5, read_timeout_s=10)
    message = r"not read after 1 of 4 attempts.*: \d{1,3} of 1024 bytes had come by the deadline"
    with ranged(listed, patience=patience) as file, noticed(), pytest.raises(DataError, match=message):
        file.read_at(1500, 1)
    assert len(proxy.gets) == 1


@pytest.mark.parametrize(
    ("fault", "message"), [(Fault.NOT_FOUND, "is gone since it was indexed"), (Fault.FORBIDDEN, "403 AccessDenied")]
)
def test_what_another_attempt_cannot_mend_is_asked_once(proxy, listed, fault, message):
    proxy.always = fault
    with ranged(listed) as file, pytest.raises(DataError, match=f"{re.escape(listed.uri)}, bytes 0-1023.*{message}"):
        file.read_at(1, 10)
    assert len(proxy.gets) == 1


@pytest.mark.parametrize("fault", [None, Fault.NO_IF_MATCH])
@pytest.mark.parametrize("new", [DATA[::-1], DATA[:100]], ids=["same-size", "shorter"])
def test_an_object_that_was_overwritten_is_refused(proxy, listed, fault, new):
    with ranged(listed) as file:
        assert file.read_at(4000, 10) == DATA[4000:4010]
        storage.write_bytes(listed.uri, new)
        before, proxy.always = len(proxy.gets), fault
        with pytest.raises(DataError, match=f"{re.escape(listed.uri)}, bytes 0-1023: changed since it was indexed"):
            file.read_at(1, 10)
        assert len(proxy.gets) == before + 1
        assert file.read_at(4000, 10) == DATA[4000:4010]  # of the version that was indexed


def test_a_cached_chunk_of_an_overwritten_object_belongs_to_the_old_version(proxy, listed, tmp_path):
    cache = ChunkCache(tmp_path, 10 * len(DATA))
    ranged(listed, cache=cache).read()
    storage.write_bytes(listed.uri, DATA[::-1])
    (new,) = list_files(listed.uri, suffixes=(".bin",))
    assert ranged(new, cache=cache).read() == DATA[::-1]
    assert ranged(listed, cache=cache).read() == DATA


def test_a_bad_answer_is_not_cached(proxy, listed, tmp_path):
    cache = ChunkCache(tmp_path, 10 * len(DATA))
    proxy.script.extend([*RECOVERABLE[:2], Fault.TRUNCATED, Fault.NO_RANGE])
    assert ranged(listed, cache=cache, patience=dataclasses.replace(QUICK, attempts=5)).read() == DATA
    before = len(proxy.gets)
    assert ranged(listed, cache=cache).read() == DATA
    assert len(proxy.gets) == before


def test_all_readers_that_joined_a_failed_fetch_are_told(proxy, listed):
    proxy.always = Fault.SERVER_ERROR
    with ranged(listed) as file, ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(file.read_at, at, 10) for at in range(8)]
        assert all(isinstance(read.exception(), DataError) for read in reads)


def test_closing_a_file_ends_the_attempts_of_its_readers(proxy, listed):
    proxy.always = Fault.SLOW_DOWN
    file = ranged(listed, patience=Patience(first_wait_s=300, longest_wait_s=300, deadline_s=1000))
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(file.read_at, 1500, 1)
        assert proxy.arrived.wait(60)
        file.close()
        assert isinstance(read.exception(timeout=60), DataError)
    assert len(proxy.gets) == 1


def test_what_was_fetched_ahead_in_vain_is_fetched_again_by_its_reader(proxy, listed):
    proxy.script.append(Fault.SERVER_ERROR)
    with ranged(listed, patience=dataclasses.replace(QUICK, attempts=1)) as file:
        file.prefetch(0, 1)
        assert proxy.arrived.wait(60)
        with contextlib.suppress(DataError):  # joined the fetch that fails, or came after it
            file.read(1)
        assert file.read_at(0, len(DATA)) == DATA
    assert proxy.faults == [Fault.SERVER_ERROR]
