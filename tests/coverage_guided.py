"""Fuzzing by coverage for as long as one likes: atheris mutates files that are sound, towards lines not yet reached.

    make fuzz-long                                            five minutes of each parser
    python tests/coverage_guided.py arrow -max_total_time=3600 [any option of libFuzzer]

A parser is a function of bytes that returns, whatever they are: what it raises is a finding, as is a crash of the
process, and more than 2 GB or 20 s for one input. What was found is written to crash-* in the current folder; to see it
again, give that file in place of the options. tests/fuzz/test_coverage_guided.py runs each a moment.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "fuzz")]

LIMITS = ("-rss_limit_mb=2048", "-timeout=20", "-max_len=8192")


def parsers(folder: Path) -> dict[str, Callable[[bytes], object]]:
    """By name. What they raise on purpose is what a person is told; all else is a finding."""
    import test_readers

    from posttrain.compute.checkpoint_index import parse_index
    from posttrain.compute.committed import open_checkpoint
    from posttrain.config_file import load_config
    from posttrain.errors import CheckpointError, ConfigError, DamagedError, ModelError
    from posttrain.manifest import MANIFEST, verify_folder
    from posttrain.model.load import read_config
    from posttrain.model.tensor_file import TensorFile

    def refused(work: Callable[[], object], *errors: type[Exception]) -> object:
        try:
            return work()
        except errors as error:
            assert str(error), "an error without a word"

    def written(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def config(data: bytes) -> object:
        return refused(lambda: load_config(data.decode(errors="surrogateescape")), ConfigError)

    def manifest(data: bytes) -> object:
        written("a", b"x")  # the file that the seed names
        written(MANIFEST, data)
        refused(lambda: open_checkpoint(str(folder)), CheckpointError)
        return refused(lambda: verify_folder(folder), CheckpointError)

    return {
        "parquet": lambda data: test_readers.read(folder, "x.parquet", data),
        "arrow": lambda data: test_readers.read(folder, "x.arrow", data),
        "jsonl": lambda data: test_readers.read(folder, "x.jsonl", data),
        "safetensors": lambda data: refused(lambda: TensorFile(str(written("x.safetensors", data))), ModelError),
        "index": lambda data: refused(lambda: parse_index(data, where="x"), DamagedError),
        "manifest": manifest,
        "model_config": lambda data: refused(lambda: (written("config.json", data), read_config(folder)), ModelError),
        "config": config,
    }


def seeds(name: str, folder: Path) -> None:
    """Sound inputs of a parser, a file each."""
    import test_readers
    import torch
    from safetensors.torch import save

    from posttrain.manifest import MANIFEST, write_manifest

    made = folder.parent / f"{folder.name}_made"
    made.mkdir()
    files: dict[str, bytes] = {}
    if name in ("parquet", "arrow", "jsonl"):
        files = {each: data for each, data in test_readers.sound(made).items() if each.endswith(name)}
    elif name == "safetensors":
        files["a"] = save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})
    elif name == "manifest":
        (made / "a").write_bytes(b"x")
        write_manifest(made)
        files["a"] = (made / MANIFEST).read_bytes()
    elif name == "index":
        part = {"file": "rank_00000.safetensors", "at": [0], "shape": [3], "offset": 0, "sha256": ["0" * 64]}
        tensor = {"dtype": "F32", "shape": [3], "parts": [part]}
        files["a"] = json.dumps({"files": {"rank_00000.safetensors": 100}, "tensors": {"a": tensor}}).encode()
    elif name == "model_config":
        model = {"model_type": "qwen3", "hidden_size": 64, "rope_parameters": {"rope_theta": 1e6}}
        files["a"] = json.dumps(model).encode()
    else:
        root = Path(__file__).parents[1] / "configs"
        files = {path.name: path.read_bytes() for path in root.glob("*.yaml")}
    for each, data in files.items():
        (folder / each).write_bytes(data)


def main(arguments: list[str]) -> None:
    """Fuzz one parser until libFuzzer's options say enough; libFuzzer ends the process."""
    import atheris  # pyright: ignore[reportMissingImports]

    name, *options = arguments
    root = Path(tempfile.mkdtemp(prefix="posttrain-fuzz-"))
    corpus, scratch = root / "corpus", root / "scratch"
    corpus.mkdir()
    scratch.mkdir()
    with atheris.instrument_imports(include=["posttrain"]):
        parse = parsers(scratch)[name]
        seeds(name, corpus)
    again = [option for option in options if not option.startswith("-")]
    atheris.Setup(
        [sys.argv[0], *LIMITS, *options, *([] if again else [str(corpus)])], lambda data: parse(data) and None
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
