"""A manifest is true of its folder, or says which file is not what it was."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import CheckpointError
from posttrain.manifest import file_sha256, json_sha256, read_manifest, verify_folder, write_manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nested").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "nested" / "b.bin").write_bytes(b"")
    return tmp_path


def test_a_manifest_lists_every_file_with_size_hash_and_the_facts_given(folder):
    manifest = write_manifest(folder, step=3)
    assert manifest == {
        "format": 1,
        "step": 3,
        "files": {
            "a.bin": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
            "nested/b.bin": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
        },
    }
    assert read_manifest(folder) == verify_folder(folder) == manifest


def test_writing_a_manifest_again_does_not_list_the_manifest(folder):
    assert write_manifest(folder) == write_manifest(folder)


def test_a_folder_without_a_manifest_was_never_committed(folder):
    with pytest.raises(CheckpointError, match=r"never committed"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.bin", lambda path: path.write_bytes(b"abd"), "/a.bin differs from its hash"),
        ("a.bin", lambda path: path.write_bytes(b"ab"), "/a.bin has 2 bytes, expected 3"),
        ("nested/b.bin", lambda path: path.unlink(), "/nested/b.bin is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_a_damaged_file_is_named(folder, name, damage, message):
    write_manifest(folder)
    damage(folder / name)
    with pytest.raises(CheckpointError) as error:
        verify_folder(folder, shown_as="s3://bucket/x")
    assert str(error.value).startswith(f"s3://bucket/x{message}")


@pytest.mark.parametrize("bytes_", [b'{"format": 1, "fil', b"\xff\xfe", b""])
def test_a_truncated_manifest_is_named(folder, bytes_):
    (folder / "manifest.json").write_bytes(bytes_)
    with pytest.raises(CheckpointError, match=r"manifest\.json is not JSON"):
        read_manifest(folder)


@pytest.mark.parametrize("value", [{"format": 2, "files": {}}, {"files": {}}, []])
def test_a_manifest_of_another_format_is_refused(folder, value):
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="another format"):
        read_manifest(folder)


def test_the_hash_of_a_file_is_the_hash_of_its_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_the_hash_of_a_value_does_not_depend_on_key_order(value):
    assert json_sha256(dict(reversed(value.items()))) == json_sha256(value)


@given(JSON, JSON)
def test_values_that_differ_hash_differently(one, other):
    assert (json_sha256(one) == json_sha256(other)) == (
        json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    )
