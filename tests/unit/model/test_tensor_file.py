"""A safetensors file is proved before it is read, and read only where it is asked."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from posttrain import storage
from posttrain.errors import ModelError
from posttrain.model.tensor_file import INDEX, TensorFile, open_tensor_files

TENSORS = {
    "a": torch.arange(60, dtype=torch.float32).view(12, 5),
    "b": torch.arange(24, dtype=torch.bfloat16).view(4, 3, 2),
    "c": torch.arange(7, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
}


def write(uri: str, tensors: dict[str, torch.Tensor] = TENSORS, tmp: Path | None = None) -> str:
    local = Path(uri) if tmp is None else tmp
    local.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, local, metadata={"format": "pt"})
    if tmp is not None:
        storage.write_bytes(uri, local.read_bytes())
    return uri


def at(root_uri: str, name: str, tmp_path: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> str:
    return write(storage.join(root_uri, name), tensors, tmp_path / "staged.safetensors")


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_tensors_and_rows_read_as_they_were_written(root_uri: str, tmp_path: Path):
    file = TensorFile(at(root_uri, "x.safetensors", tmp_path))
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert file.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read(name, 2, 4), tensor[2:4])
        assert torch.equal(file.read(name, stop=1), tensor[:1])
        assert torch.equal(file.read(name, 3), tensor[3:])


def test_threads_share_a_file(root_uri: str, tmp_path: Path):
    file = TensorFile(at(root_uri, "x.safetensors", tmp_path))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: file.read("a", row, row + 1), [*range(12)] * 5))
    assert torch.equal(torch.cat(found), TENSORS["a"].repeat(5, 1))


def test_only_the_header_and_the_rows_asked_for_are_fetched(proxy, s3_bucket: str, tmp_path: Path):
    file = TensorFile(at(s3_bucket, "x.safetensors", tmp_path))
    whole = (tmp_path / "staged.safetensors").read_bytes()
    assert sum(fetched(proxy)) == len(whole) - len(header_of(whole)[1])
    before = len(proxy.gets)
    file.read("a", 3, 5)
    assert fetched(proxy)[before:] == [2 * 5 * 4]


def fetched(proxy) -> list[int]:
    spans = [get.range.removeprefix("bytes=").split("-") for get in proxy.gets]
    return [int(last) - int(first) + 1 for first, last in spans]


def test_a_read_survives_a_cut_connection(proxy, s3_bucket: str, tmp_path: Path):
    from faulty_s3 import Fault

    file = TensorFile(at(s3_bucket, "x.safetensors", tmp_path))
    proxy.script.extend([Fault.RESET_IN_BODY, Fault.SLOW_DOWN])
    assert torch.equal(file.read("a"), TENSORS["a"])
    assert len(proxy.faults) == 2


@pytest.mark.parametrize("keep", [0, 5, 8, 20, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, keep: int):
    path = tmp_path / "x.safetensors"
    write(str(path))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"is damaged: .*Fix: copy or download the file again"):
        TensorFile(path)


def test_a_file_that_is_cut_after_it_was_opened_is_refused(tmp_path: Path):
    file = TensorFile(write(str(tmp_path / "x.safetensors")))
    with open(tmp_path / "x.safetensors", "r+b") as raw:
        raw.truncate(500)
    with pytest.raises(ModelError, match="was cut while it was read"):
        [file.read(name) for name in TENSORS]


def entry(dtype: str, shape: object, offsets: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "header is not JSON"),
        (b"[" * 9000, "header is not JSON"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', "header is not JSON"),
        (b"\xff\xfe", "header is not JSON"),
        (b'{"a": {}, "a": {}}', "a name occurs twice"),
        ([1], "no JSON object"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"a": entry("Q7", [4], [0, 4])}, "a has dtype 'Q7'"),
        ({"a": entry("U8", [5], [0, 4])}, r"a has 4 bytes, but its shape \[5\] of U8 takes 5"),
        ({"a": entry("U8", [-2, -2], [0, 4])}, "lists of counts"),
        ({"a": entry("U8", [True] * 4, [0, 4])}, "lists of counts"),
        ({"a": entry("U8", [4.0], [0, 4])}, "lists of counts"),
        ({"a": entry("U8", [4], [0, 4, 4])}, "lists of counts"),
        ({"a": entry("U8", [4], [4, 0])}, "takes 4"),
        ({"a": {"dtype": "U8", "shape": [4]}}, "not described by"),
        ({"a": entry("U8", [2], [0, 2]), "b": entry("U8", [3], [1, 4])}, "b starts at byte 1"),
        ({"a": entry("U8", [1], [0, 1]), "b": entry("U8", [2], [2, 4])}, "b starts at byte 2"),
        ({"a": entry("U8", [3], [0, 3])}, "bytes were added"),
        ({"a": entry("U8", [5], [0, 5])}, "it is cut short"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: object, message: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(header, b"1234"))
    with pytest.raises(ModelError, match=message):
        TensorFile(path)


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**63])
def test_a_header_of_impossible_length_is_refused(tmp_path: Path, length: int):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 50)
    with pytest.raises(ModelError, match=f"claims {length} bytes"):
        TensorFile(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_header_byte_is_refused_or_changes_no_more_than_a_name(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    whole = Path(write(str(folder / "whole.safetensors"))).read_bytes()
    _, body = header_of(whole)
    place = data.draw(st.integers(0, len(whole) - len(body) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    path = folder / "flipped.safetensors"
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    try:
        file = TensorFile(path)
    except ModelError as error:
        assert "is damaged" in str(error) and "\n" not in str(error)
        return
    read = {name: file.read(name) for name in file.shapes}
    sizes = sorted(tensor.nbytes for tensor in read.values())
    assert sizes == sorted(tensor.nbytes for tensor in TENSORS.values())


def test_a_missing_file_is_refused(root_uri: str, tmp_path: Path):
    at(root_uri, "x.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"y\.safetensors cannot be opened"):
        TensorFile(storage.join(root_uri, "y.safetensors"))


def test_a_folder_without_an_index_is_all_its_files(root_uri: str, tmp_path: Path):
    at(root_uri, "x.safetensors", tmp_path, {"a": torch.ones(2)})
    at(root_uri, "y.safetensors", tmp_path, {"b": torch.zeros(3)})
    at(root_uri, "below/z.safetensors", tmp_path, {"c": torch.zeros(3)})
    storage.write_bytes(storage.join(root_uri, "config.json"), b"{}")
    files = open_tensor_files(root_uri)
    assert sorted(files) == ["a", "b"]
    assert torch.equal(files["a"].read("a"), torch.ones(2))


def test_a_name_in_two_files_is_refused(root_uri: str, tmp_path: Path):
    at(root_uri, "x.safetensors", tmp_path)
    at(root_uri, "y.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"is in x\.safetensors and in y\.safetensors"):
        open_tensor_files(root_uri)


def test_a_folder_without_weights_is_refused(root_uri: str):
    with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
        open_tensor_files(root_uri)


def indexed(root_uri: str, tmp_path: Path, index: object) -> str:
    at(root_uri, "m-1.safetensors", tmp_path, {"a": torch.ones(2)})
    at(root_uri, "m-2.safetensors", tmp_path, {"b": torch.zeros(3), "a": torch.zeros(2)})
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    storage.write_bytes(storage.join(root_uri, INDEX), text)
    return root_uri


def test_an_index_says_which_file_counts(root_uri: str, tmp_path: Path):
    index = {"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    files = open_tensor_files(indexed(root_uri, tmp_path, index))
    assert torch.equal(files["a"].read("a"), torch.ones(2)) and torch.equal(files["b"].read("b"), torch.zeros(3))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b'{"weight_map"', "is not JSON"),
        (b"\xff", "is not JSON"),
        ([], "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ({"weight_map": {"a": "m-3.safetensors"}}, r"names 'm-3\.safetensors', which is not there"),
        ({"weight_map": {"a": "../m-1.safetensors"}}, r"names '\.\./m-1\.safetensors', which is not there"),
        ({"weight_map": {"b": "m-1.safetensors"}}, r"says that m-1\.safetensors holds b; it does not"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, index: object, message: str):
    with pytest.raises(ModelError, match=message):
        open_tensor_files(indexed(str(tmp_path / "root"), tmp_path, index))


def test_an_index_beside_a_file_that_it_does_not_name_as_its_own_is_refused(tmp_path: Path):
    root = indexed(str(tmp_path / "root"), tmp_path, {"weight_map": {"a": "m-1.safetensors"}})
    at(root, "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match="and an index of other files"):
        open_tensor_files(root)
