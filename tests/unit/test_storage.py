"""A folder is published whole or not at all, on disk and behind a real S3 protocol server."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from posttrain import storage
from posttrain.errors import CheckpointError

FILES = {"weights.bin": bytes(range(256)) * 40, "nested/deep/notes.txt": b"notes", "empty": b""}


def publish(uri, files=FILES, **facts):
    with storage.staging(uri) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        storage.publish(folder, uri, **facts)


def contents(folder):
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != "manifest.json"}


def test_a_published_folder_comes_back_whole(root_uri):
    uri = storage.join(root_uri, "folder")
    publish(uri, step=7)
    assert contents(storage.fetch(uri)) == FILES
    assert storage.manifest_of(uri)["step"] == 7
    assert storage.manifest_of(uri)["files"].keys() == FILES.keys()


def test_a_published_folder_is_never_overwritten(root_uri):
    uri = storage.join(root_uri, "folder")
    publish(uri)
    with pytest.raises(CheckpointError, match="already published"):
        publish(uri, {"weights.bin": b"other"})
    assert contents(storage.fetch(uri)) == FILES


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("weights.bin", lambda data: bytes([data[0] ^ 1]) + data[1:], "differs from its hash"),
        ("weights.bin", lambda data: data[:-1], "has 10239 bytes, expected 10240"),
        ("nested/deep/notes.txt", None, "is missing"),
        ("manifest.json", lambda data: data[:-20], "is not JSON"),
    ],
    ids=["flipped-bit", "truncated", "missing", "truncated-manifest"],
)
def test_a_damaged_folder_is_refused_by_the_name_of_its_file(root_uri, name, damage, message):
    uri = storage.join(root_uri, "folder")
    publish(uri)
    file = storage.join(uri, name)
    if damage:
        storage.write_bytes(file, damage(storage.read_bytes(file)))
    else:
        storage.remove_file(file)
    with pytest.raises(CheckpointError) as error:
        storage.fetch(uri)
    assert str(error.value).startswith(f"{file} {message}")


def test_a_folder_without_a_manifest_is_not_there(root_uri):
    uri = storage.join(root_uri, "folder")
    publish(uri)
    storage.remove_file(storage.join(uri, "manifest.json"))
    with pytest.raises(CheckpointError, match="never committed"):
        storage.fetch(uri)
    with pytest.raises(CheckpointError, match="is not published"):
        storage.manifest_of(uri)


def test_a_folder_that_was_never_written_is_not_there(root_uri):
    uri = storage.join(root_uri, "folder")
    with pytest.raises(CheckpointError, match="never committed"):
        storage.fetch(uri)
    assert storage.list_folders(root_uri) == []
    assert not storage.exists(uri)


def test_what_an_interrupted_publish_left_behind_gives_way_to_the_next_one(root_uri):
    uri = storage.join(root_uri, "folder")
    storage.write_bytes(storage.join(uri, "weights.bin"), b"half")
    publish(uri)
    assert contents(storage.fetch(uri)) == FILES


def test_staging_is_removed_when_filling_it_fails(root_uri):
    left: list[Path] = []
    with pytest.raises(ZeroDivisionError), storage.staging(storage.join(root_uri, "folder")) as folder:
        (folder / "half").write_bytes(b"half")
        left.append(folder)
        raise ZeroDivisionError
    assert not left[0].exists()
    assert storage.list_folders(root_uri) == []


def test_staging_is_removed_when_publishing_is_refused(root_uri):
    uri = storage.join(root_uri, "folder")
    publish(uri)
    with pytest.raises(CheckpointError):
        publish(uri)
    assert storage.list_folders(root_uri) == ["folder"]


def test_staging_leaves_nothing_beside_what_it_published(root_uri):
    with storage.staging(storage.join(root_uri, "folder")) as folder:
        (folder / "file").write_bytes(b"x")
        storage.publish(folder, storage.join(root_uri, "folder"))
    assert not folder.exists()
    assert storage.list_folders(root_uri) == ["folder"]


def test_staging_lies_beside_its_target_so_that_a_rename_commits_it(tmp_path):
    with storage.staging(str(tmp_path / "root" / "folder")) as folder:
        assert folder.parent == tmp_path / "root"


def test_two_writers_of_one_folder_leave_one_whole_folder_and_one_refusal(tmp_path):
    uri, outcomes, together = str(tmp_path / "root" / "folder"), [], threading.Barrier(2)

    def write(name):
        with storage.staging(uri) as folder:
            (folder / name).write_bytes(name.encode())
            together.wait()
            try:
                storage.publish(folder, uri)
            except CheckpointError as error:
                outcomes.append(str(error))
            else:
                outcomes.append(name)

    for attempt in range(10):
        writers = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        (winner,) = contents(storage.fetch(uri))
        assert sorted(outcomes) == sorted([winner, next(o for o in outcomes if "already published" in o)]), attempt
        assert storage.list_folders(str(tmp_path / "root")) == ["folder"]
        shutil.rmtree(uri)
        outcomes.clear()


def test_ensure_folder_fills_a_folder_once(root_uri):
    uri, filled = storage.join(root_uri, "folder"), []

    def fill(folder):
        filled.append(folder)
        (folder / "file").write_bytes(b"x")

    storage.ensure_folder(uri, fill)
    storage.ensure_folder(uri, fill)
    assert len(filled) == 1
    assert contents(storage.fetch(uri)) == {"file": b"x"}


def test_folders_are_listed_by_name_and_files_are_not(root_uri):
    for name in ("step_10", "step_2", "step_1"):
        publish(storage.join(root_uri, name), {"nested/file": b"x"})
    storage.write_bytes(storage.join(root_uri, "file"), b"x")
    assert storage.list_folders(root_uri) == ["step_1", "step_10", "step_2"]


def test_removing_a_folder_leaves_its_namesakes(root_uri):
    for name in ("step_1", "step_10"):
        publish(storage.join(root_uri, name))
    storage.remove_folder(storage.join(root_uri, "step_1"))
    assert storage.list_folders(root_uri) == ["step_10"]
    assert contents(storage.fetch(storage.join(root_uri, "step_10"))) == FILES


def test_a_folder_of_more_than_a_page_of_objects_is_fetched_listed_and_removed_whole(s3_bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # S3 itself lists at most 1000 keys a page
    files = {f"{number}/file": b"" for number in range(7)}
    publish(f"{s3_bucket}/many", files)
    assert contents(storage.fetch(f"{s3_bucket}/many")) == files
    assert storage.list_folders(f"{s3_bucket}/many") == [str(number) for number in range(7)]
    storage.remove_folder(f"{s3_bucket}/many")
    assert storage.list_folders(s3_bucket) == []


def test_removing_one_file_leaves_the_others(root_uri):
    for name in ("file", "file.txt"):
        storage.write_bytes(storage.join(root_uri, name), b"x")
    storage.remove_file(storage.join(root_uri, "file"))
    assert not storage.exists(storage.join(root_uri, "file"))
    assert storage.exists(storage.join(root_uri, "file.txt"))


def test_a_folder_set_aside_is_no_longer_there_but_its_bytes_are_kept(root_uri):
    uri = storage.join(root_uri, "folder")
    for data in (b"first", b"second"):  # the same folder may be damaged twice
        publish(uri, {"file": data})
        aside = storage.set_aside(uri)
        assert storage.read_bytes(storage.join(aside, "file")) == data
        with pytest.raises(CheckpointError, match="never committed"):
            storage.fetch(uri)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(root_uri):
    uri = storage.join(root_uri, "nested", "live.json")
    assert not storage.exists(uri)
    for data in (b"old and longer", b"new"):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data
    assert storage.exists(uri)
    if not storage.is_s3(uri):
        assert os.listdir(Path(uri).parent) == ["live.json"]


def test_a_prefix_is_not_a_file(root_uri):
    storage.write_bytes(storage.join(root_uri, "folder", "file"), b"x")
    assert not storage.exists(storage.join(root_uri, "folder"))
    assert not storage.exists(storage.join(root_uri, "folder", "fil"))


def test_joining_adds_one_slash():
    assert storage.join("s3://bucket/", "a", "b") == storage.join("s3://bucket", "a", "b") == "s3://bucket/a/b"
    assert storage.join("/disk", "a") == "/disk/a"
