"""Any bytes for a manifest, an index, a ledger or a safetensors header: a named error, or what was written."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzzed
from posttrain.compute.checkpoint_index import parse_index
from posttrain.compute.committed import open_checkpoint, read_state, sealed
from posttrain.errors import CheckpointError, DamagedError, ModelError
from posttrain.manifest import MANIFEST, read_manifest, verify_folder, write_manifest
from posttrain.model.load import read_config
from posttrain.model.tensor_file import DTYPES, TensorFile, open_tensor_files
from posttrain.workflow.ledger_file import read_ledger

counts = st.integers(0, 4) | st.integers(-2, 2**70)
scalars = st.none() | st.booleans() | counts | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["a", "model.weight", "__metadata__", "../a", ""])


def described(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping that has most of the fields, each of the right kind most of the time."""
    return st.fixed_dictionaries({}, optional={name: strategy | values for name, strategy in fields.items()})


MANIFESTS = described(
    checkpoint_format=st.just(1),
    format=st.just(1),
    files=st.dictionaries(st.sampled_from(["a", "../a", "index.json", "state.json"]), values, max_size=2),
    folder=st.none() | st.sampled_from(["", "x", "../x", "/"]),
    step=counts,
    token=counts,
    identity=values,
    made_from=values,
)
PARTS = described(
    file=st.just("rank_00000.safetensors"),
    at=st.lists(counts, max_size=2),
    shape=st.lists(counts, max_size=2),
    offset=counts,
    sha256=st.lists(st.text(max_size=4), max_size=2),
)
INDEXES = described(
    files=st.dictionaries(st.just("rank_00000.safetensors"), counts, max_size=1),
    tensors=st.dictionaries(
        names,
        described(
            dtype=st.sampled_from(["F32", "BF16"]),
            shape=st.lists(counts, max_size=2),
            parts=st.lists(PARTS, max_size=2),
        ),
        max_size=2,
    ),
)
HEADERS = st.dictionaries(
    names,
    described(
        dtype=st.sampled_from(sorted(DTYPES)),
        shape=st.lists(counts, max_size=3),
        data_offsets=st.lists(counts, min_size=2, max_size=2),
    ),
    max_size=3,
)


def as_bytes(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=40) | strategy.map(lambda value: json.dumps(value).encode())


@fuzzed
@given(data=as_bytes(MANIFESTS))
def test_any_manifest_of_a_published_folder(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    folder = tmp_path_factory.mktemp("published")
    (folder / MANIFEST).write_bytes(data)
    for check in (read_manifest, verify_folder):
        try:
            assert isinstance(check(folder)["files"], dict)
        except CheckpointError as error:
            assert str(folder) in str(error)


@fuzzed
@given(
    contents=st.dictionaries(
        st.text("abc.", min_size=1, max_size=4).filter(lambda n: n.strip(".")), st.binary(max_size=9), max_size=3
    )
)
def test_what_a_manifest_says_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]):
    folder = tmp_path_factory.mktemp("written")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert verify_folder(folder) == write_manifest(folder) if (folder / MANIFEST).exists() else write_manifest(folder)
    assert verify_folder(folder)["files"].keys() == contents.keys()


@fuzzed
@given(document=MANIFESTS, seal=st.booleans())
@pytest.mark.fault("F19", "F20", outcome="REFUSE")
def test_any_manifest_of_a_checkpoint(tmp_path_factory: pytest.TempPathFactory, document: dict, seal: bool):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / MANIFEST).write_bytes(sealed(document) if seal else json.dumps(document).encode())
    (folder / "index.json").write_bytes(b"{}")
    for read in (open_checkpoint, read_state):
        with pytest.raises(CheckpointError) as error:
            read(str(folder))
        assert str(folder) in str(error.value)


@fuzzed
@given(data=as_bytes(INDEXES))
@pytest.mark.fault("F19", "F20", outcome="REFUSE")
def test_any_index(data: bytes):
    try:
        index = parse_index(data, where="index.json")
    except DamagedError as error:
        assert str(error).startswith("index.json is no index")
        return
    assert parse_index(index.to_json(), where="again") == index


@fuzzed
@given(data=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_any_ledger(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.mktemp("ledger") / "grpo.jsonl"
    path.write_bytes(data)
    try:
        assert isinstance(read_ledger(str(path)), list)
    except CheckpointError as error:
        assert str(path) in str(error)


@fuzzed
@given(data=as_bytes(values))
def test_any_config_of_a_model(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_bytes(data)
    try:
        assert isinstance(read_config(folder), dict)
    except ModelError as error:
        assert str(folder) in str(error)


@fuzzed
@given(header=as_bytes(HEADERS), body=st.binary(max_size=40), lie=st.integers(-3, 3) | st.integers(0, 2**64 - 1))
@pytest.mark.fault("F19", "F20", outcome="REFUSE")
def test_any_header_of_tensors(tmp_path_factory: pytest.TempPathFactory, header: bytes, body: bytes, lie: int):
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    length = len(header) + lie if -3 <= lie <= 3 else lie
    path.write_bytes(struct.pack("<Q", max(0, length) % 2**64) + header + body)
    try:
        file = TensorFile(path)
    except ModelError as error:
        assert str(path) in str(error)
        return
    theirs = safetensors.torch.load(path.read_bytes())
    assert theirs.keys() == file.shapes.keys()
    for name, shape in file.shapes.items():
        ours = file.read(name)
        assert tuple(ours.shape) == shape
        assert ours.view(torch.uint8).numpy().tobytes() == theirs[name].view(torch.uint8).numpy().tobytes()


@fuzzed
@given(
    data=as_bytes(
        described(weight_map=st.dictionaries(names, st.sampled_from(["a.safetensors", "../b", "/c"]), max_size=2))
    )
)
def test_any_index_of_weights(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    folder: Path = tmp_path_factory.mktemp("weights")
    safetensors.torch.save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(data)
    try:
        assert open_tensor_files(folder).keys() <= {"a"}
    except ModelError as error:
        assert str(folder) in str(error)
