"""Files that someone made to do harm: nothing of them is executed, and nothing outside their folder read or written."""

import ast
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import boto3
import pytest

from posttrain import storage
from posttrain.compute.committed import fact, open_checkpoint, read_state, sealed
from posttrain.data.source import Source, check_source
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import CheckpointError, ConfigError, DamagedError, DataError, ModelError, RowError
from posttrain.manifest import MANIFEST, verify_folder, write_manifest
from posttrain.model.backend import backend_of
from posttrain.model.load import load_decoder, read_config
from saves import save_alone
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What code that should not run would leave."""
    return tmp_path / "executed"


@pytest.fixture
def pickled(mark: Path) -> bytes:
    data = pickle.dumps(Payload(mark))
    pickle.loads(data)
    assert mark.exists(), "the payload works"
    mark.unlink()
    return data


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return tiny_model(folder)


PICKLES = ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", ".metadata", "__0_0.distcp")
"""Names under which peers keep pickles."""


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("backend", ["posttrain", "transformers"])
def test_pickles_beside_the_weights_are_not_opened(model: Path, mark: Path, pickled: bytes, backend: str):
    for name in PICKLES:
        (model / name).write_bytes(pickled)
    backend_of(backend).load(model)
    BaseHFModelTokenizer(model)
    assert not mark.exists()


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("backend", ["posttrain", "transformers"])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_in_place_of_the_weights_are_refused(model: Path, mark: Path, pickled: bytes, name: str, backend: str):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickled)
    with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
        backend_of(backend).load(model)
    assert not mark.exists()


@pytest.mark.fault("F20", outcome="REFUSE")
def test_a_pickle_named_as_tensors_is_damage(model: Path, mark: Path, pickled: bytes):
    (model / "model.safetensors").write_bytes(pickled)
    with pytest.raises(ModelError, match="is damaged"):
        load_decoder(model)
    assert not mark.exists()


@pytest.mark.fault("F20", outcome="REFUSE")
def test_pickles_in_a_checkpoint_are_ignored_beside_its_files_and_damage_in_their_place(
    tmp_path: Path, mark: Path, pickled: bytes
):
    uri = f"{tmp_path}/c"
    save_alone(uri, 1)
    step = tmp_path / "c" / "step_000001"
    (step / ".metadata").write_bytes(pickled)
    open_checkpoint(str(step))
    for name in ("state.json", "index.json", MANIFEST):
        broken = tmp_path / f"broken_{name}"
        shutil.copytree(step, broken)
        (broken / name).write_bytes(pickled)
        with pytest.raises(DamagedError):
            open_checkpoint(str(broken))
    assert not mark.exists()


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "a/../../b"])
def test_a_checkpoint_whose_manifest_leads_elsewhere_is_damage(tmp_path: Path, folder: str):
    save_alone(f"{tmp_path}/c", 1)
    step = tmp_path / "c" / "step_000001"
    manifest = json.loads((step / MANIFEST).read_text())
    del manifest["sha256"]
    (step / MANIFEST).write_bytes(sealed(manifest | {"folder": folder}))
    for read in (open_checkpoint, read_state):
        with pytest.raises(DamagedError, match="a folder elsewhere"):
            read(str(step))


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("state", [b"[1]", b"{", b"[" * 100_000])
def test_a_checkpoint_whose_state_is_no_object_is_damage_however_well_it_is_hashed(tmp_path: Path, state: bytes):
    save_alone(f"{tmp_path}/c", 1)
    step = tmp_path / "c" / "step_000001"
    manifest = json.loads((step / MANIFEST).read_text())
    del manifest["sha256"]
    (step / "state.json").write_bytes(state)
    (step / MANIFEST).write_bytes(sealed(manifest | {"files": manifest["files"] | {"state.json": fact(state)}}))
    with pytest.raises(DamagedError, match=r"state\.json is no"):
        open_checkpoint(str(step))


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str):
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "published"
    folder.mkdir()
    manifest = write_manifest(folder)
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        verify_folder(folder)


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "/tmp/posttrain-escaped"])
def test_an_object_of_s3_whose_key_leads_elsewhere_is_not_downloaded(s3_bucket: str, name: str):
    client = boto3.client("s3", endpoint_url=os.environ["METAFLOW_S3_ENDPOINT_URL"])
    client.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key=f"published/{name}", Body=b"x")
    with pytest.raises(CheckpointError, match="outside of its folder; remove that object"):
        storage.download(f"{s3_bucket}/published")
    assert not Path("/tmp/posttrain-escaped").exists()


@pytest.mark.fault("F20", outcome="REFUSE")
def test_an_index_of_weights_that_names_a_file_elsewhere_is_refused(model: Path):
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names '\.\./outside\.safetensors', which is not there"):
        load_decoder(model)


@pytest.mark.fault("F20", outcome="REFUSE")
def test_a_saved_dataset_that_names_a_file_elsewhere_is_refused(tmp_path: Path):
    (tmp_path / "outside.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "inside.jsonl").write_text('{"text": "x"}\n')
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../outside.jsonl"}]}))
    with pytest.raises(DataError, match=r"state\.json names \.\./outside\.jsonl, which is not there"):
        Source(str(folder), key="data.sources[0]")


CODE = "open({mark!r}, 'w').close()\n"


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("backend", ["posttrain", "transformers"])
def test_a_model_that_brings_code_is_refused_and_its_code_is_not_run(model: Path, mark: Path, backend: str):
    (model / "modeling_evil.py").write_text(CODE.format(mark=str(mark)))
    config = read_config(model) | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    for work in (backend_of(backend).shape, backend_of(backend).load):
        with pytest.raises(ModelError, match="asks to run code from the folder"):
            work(model)
    assert not mark.exists()


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("known", [True, False], ids=["a class of transformers", "a class of its own"])
def test_the_code_of_a_tokenizer_is_not_run(tmp_path: Path, mark: Path, known: bool):
    tiny_tokenizer(tmp_path)
    (tmp_path / "tokenization_evil.py").write_text(CODE.format(mark=str(mark)))
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    if not known:
        settings["tokenizer_class"] = "Evil"
    file.write_text(json.dumps(settings))
    try:
        BaseHFModelTokenizer(tmp_path)
    except DataError as error:
        assert "holds no tokenizer" in str(error)
    assert not mark.exists()


def test_whoever_opens_a_folder_with_transformers_says_that_its_code_is_not_run():
    opened = 0
    for path in (file for part in ("lib", "steps", "flows") for file in (ROOT / part).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or getattr(call.func, "attr", "") != "from_pretrained":
                continue
            text = ast.unparse(call)
            says_so = "trust_remote_code=False" in text or "**FROM_FOLDER" in text
            assert says_so or ("**kwargs" in text and "| FROM_FOLDER" in path.read_text()), f"{path}: {text}"
            opened += 1
    assert opened >= 6


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ namespace.__init__.__globals__.os.system('touch MARK') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ (''|attr('__class__')).__base__.__subclasses__() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ messages.append(messages[0]) }}",
    "{% include 'MARK' %}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "{% for i in range(999999999) %}x{% endfor %}",
]


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, mark: Path, escape: str):
    tokenizer = tiny_tokenizer(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(escape.replace("MARK", str(mark)) + tokenizer.stock.text)
    messages = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]
    try:
        opened = BaseHFModelTokenizer(tmp_path)
        text = opened.stock.render(messages)[0]
    except (DataError, RowError):
        text = ""
    assert not mark.exists()
    assert not any(word in text for word in ("__", "<class", "globals", "built-in"))
    assert len(messages) == 2


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize(
    "path", ["os:system('touch x')", "../evil:f", "os;import sys:f", "/tmp/evil.py:f", ":f", "a:b:c"]
)
def test_an_import_path_is_a_name_and_no_code(path: str):
    from posttrain.config_file import load_config

    with pytest.raises(ConfigError, match=r"reward\.function"):
        load_config(json.dumps({"base": str(ROOT / "configs" / "grpo_tiny.yaml"), "reward.function": path}))


NAMES = [
    *("../../etc/passwd", "/etc/passwd", "rows.jsonl\0.parquet", "a\0b", "file:///etc/passwd"),
    *("http://169.254.169.254/latest/meta-data", "hf://someone/evil", "someone/evil", "git+ssh://evil/x.jsonl"),
    *("$(touch MARK).jsonl", "| touch MARK", "`touch MARK`.parquet", "x; touch MARK; .jsonl"),
]


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_data_is_no_command_no_address_and_no_file_of_another_kind(name: str, mark: Path, monkeypatch):
    import socket

    def nobody(*address: object, **_: object):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", nobody)
    with pytest.raises((DataError, ConfigError)):
        check_source(name.replace("MARK", str(mark)), key="data.sources[0]")
    assert not mark.exists()


def zipped(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../escaped", "x")
        archive.writestr("rows.jsonl", '{"text": "x"}')


def tarred(file: Path) -> None:
    with tarfile.open(file, "w:gz") as archive:
        info = tarfile.TarInfo("../escaped")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))


@pytest.mark.fault("F20", outcome="REFUSE")
@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", ["rows.zip", "rows.tar.gz", "rows.jsonl", "rows.parquet", "rows.arrow"])
def test_an_archive_is_not_unpacked_whatever_it_is_called(tmp_path: Path, pack, name: str):
    folder = tmp_path / "data"
    folder.mkdir()
    pack(folder / name)
    with pytest.raises(DataError):
        source = Source(str(folder / name), key="data.sources[0]")
        errors = [record for _, _, record in source.in_order() if isinstance(record, RowError)]
        raise DataError(f"{len(errors)} of {source.num_rows} lines are none") if errors else AssertionError(name)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]


@pytest.mark.fault("F20", outcome="REFUSE")
def test_an_archive_in_place_of_the_weights_is_refused(model: Path):
    for pack in (zipped, tarred):
        pack(model / "model.safetensors")
        with pytest.raises(ModelError):
            load_decoder(model)
    assert not (model.parent / "escaped").exists()


def test_nothing_in_the_library_unpacks_an_archive():
    unpacking = {"zipfile", "tarfile", "unpack_archive", "extractall"}
    for path in (file for part in ("lib", "steps", "flows") for file in (ROOT / part).rglob("*.py")):
        found = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        found |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not found & unpacking, path


@pytest.mark.parametrize(
    "document", ["!!python/object/apply:os.system ['touch MARK']", "{model: !!python/name:os.system }"]
)
def test_yaml_makes_plain_values_only(mark: Path, document: str):
    from posttrain.config_file import load_config

    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(document.replace("MARK", str(mark)))
    assert not mark.exists()
