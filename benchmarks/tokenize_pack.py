"""From text to packs: our stream beside TRL's preparation of the same conversations, on two cores.

Both get the same rows, the same tokenizer (a byte-level BPE of 32k trained on the rows' words) and the same chat
template, TRL's training template of Qwen3. TRL maps the whole data set in two processes (`dataset_num_proc=2`,
`assistant_only_loss`, packing bfd); ours computes windows in two processes and sends every pack to this one. Where the
two did not train the same ids, it stops. Then a source of 10 GB: seconds to the first batch and the memory
of a fresh process that streams from it. TRL's first batch would come after all of it is prepared, which is computed
from its rate. Prints one JSON line per row and writes benchmarks/results/tokenize_pack.json.

    python benchmarks/tokenize_pack.py [--rows 30000] [--gigabytes 10] [--folder /tmp]

Needs twice `--gigabytes` of disk in `--folder` for as long as it runs.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from conversations import GROUP_ROWS, T, conversations, make_tokenizer, open_stream

from posttrain.data.loader import loading
from posttrain.data.mixture import WINDOW
from posttrain.data.pack import fill
from posttrain.data.source import Source
from posttrain.data.stream import PackStream, Window
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Pack

RESULTS = Path(__file__).parent / "results" / "tokenize_pack.json"
CORES = 2


_STREAM: list[PackStream] = []
"""The stream of a worker process."""


def open_worker(folder: str, uri: str) -> None:
    """A worker's stream; its tokenizer uses one thread, since there is a worker for each core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _STREAM.append(open_stream(BaseHFModelTokenizer(folder), [Source(uri, key="data.sources[0]")]))


def worker_window(index: int) -> tuple[Window, float]:
    """A window of the worker's stream, and the CPU seconds that it took."""
    start = time.process_time()
    return _STREAM[0].window(index), time.process_time() - start


@contextmanager
def worker_pool(folder: Path, uri: str, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that have opened the stream, each of them warm."""
    with ProcessPoolExecutor(workers, get_context("spawn"), open_worker, (str(folder), uri)) as pool:
        list(pool.map(worker_window, [0] * (2 * workers)))
        yield pool


def ours(pool: ProcessPoolExecutor, rows: int) -> dict[str, Any]:
    """Seconds until every window has come to this process, CPU seconds of the workers, and the packs."""
    start = time.perf_counter()
    found = list(pool.map(worker_window, range(-(-rows // WINDOW))))
    wall = time.perf_counter() - start
    packs = [each for window, _ in found for each in window.packs]
    return {"wall_s": wall, "cpu_s": sum(seconds for _, seconds in found), "packs": packs}


def trl_trainer(folder: Path, out: Path, rows: Any) -> Any:
    """An SFTTrainer whose preparation can be called: the smallest model there is."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32_000, num_attention_heads=2, num_key_value_heads=1, **shape))
    args = SFTConfig(
        output_dir=str(out),
        max_length=T,
        packing=True,
        packing_strategy="bfd",
        assistant_only_loss=True,
        dataset_num_proc=CORES,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def trl(trainer: Any, dataset: Any) -> dict[str, Any]:
    """Seconds of the trainer's own preparation of rows that are in Arrow already, CPU seconds, and what it made."""
    before, start = cpu_seconds(), time.perf_counter()
    made = trainer._prepare_dataset(dataset, trainer.processing_class, trainer.args, True, None, "train")
    return {"wall_s": time.perf_counter() - start, "cpu_s": cpu_seconds() - before, "made": made}


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def trained_by_ours(packs: Sequence[Pack]) -> Counter[bytes]:
    """Every document's ids and trained targets."""
    samples = [sample for each in packs for sample in each.samples]
    return Counter(s.input_ids.tobytes() + b"|" + s.target_ids[s.loss_mask > 0].tobytes() for s in samples)


def trained_by_trl(made: Any) -> Counter[bytes]:
    """The same of TRL's packs: labels are not shifted yet, and -100 where nothing is trained."""
    found: Counter[bytes] = Counter()
    for ids, labels, lengths in zip(made["input_ids"], made["labels"], made["seq_lengths"], strict=True):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            document, wanted = np.array(ids[start:end], np.int32), np.array(labels[start + 1 : end], np.int32)
            found[document[:-1].tobytes() + b"|" + wanted[wanted >= 0].tobytes()] += 1
    return found


def preparation(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    """All rows through both, alternating; the best of each counts."""
    from datasets import Dataset, disable_caching, disable_progress_bars

    disable_caching()
    disable_progress_bars()
    uri = str(folder / "rows.parquet")
    pq.write_table(conversations(rows, seed=1), uri, row_group_size=GROUP_ROWS, write_page_checksum=True)
    dataset: Any = Dataset.from_parquet(uri, cache_dir=str(folder / "arrow"))
    trainer = trl_trainer(folder / "tokenizer", folder / "out", dataset.select(range(8)))
    runs: dict[str, list[dict[str, Any]]] = {"two": [], "trl": [], "one": []}
    for _ in range(repeats):
        with worker_pool(folder / "tokenizer", uri, CORES) as pool:
            runs["two"].append(ours(pool, rows))
        runs["trl"].append(trl(trainer, dataset))
        with worker_pool(folder / "tokenizer", uri, 1) as pool:
            runs["one"].append(ours(pool, rows))
    packs = runs["two"][0]["packs"]
    if trained_by_ours(packs) != trained_by_trl(runs["trl"][0]["made"]):
        raise SystemExit("the two sides trained different tokens; the comparison would mean nothing")
    best = {name: min(each["wall_s"] for each in found) for name, found in runs.items()}
    cpu = {name: min(each["cpu_s"] for each in found) for name, found in runs.items()}
    tokens = sum(each.num_tokens for each in packs)
    return {
        "workload": f"{rows} conversations in Parquet, median {_median_tokens(packs)} tokens, packs of {T}, 32k BPE",
        "ours": round(tokens / best["two"]),
        "baseline": round(tokens / best["trl"]),
        "ratio": round(best["trl"] / best["two"], 2),
        "unit": f"tokens a second, text to packs, {CORES} processes; baseline: TRL's preparation; best of {repeats}",
        "ours_one_thread": round(tokens / best["one"]),
        "ours_rows_per_s": round(rows / best["two"]),
        "baseline_rows_per_s": round(rows / best["trl"]),
        "cpu_ratio": round(cpu["trl"] / cpu["two"], 2),
        "fill": round(fill(packs, pack_tokens=T), 4),
    }


def _median_tokens(packs: Sequence[Pack]) -> int:
    return int(np.median([len(sample) for each in packs for sample in each.samples]))


def write_parquet(folder: Path, gigabytes: float) -> str:
    """`gigabytes` of snappy Parquet in ten files, row groups of about 15 MB in memory; the folder's uri."""
    folder.mkdir()
    groups = [conversations(GROUP_ROWS, seed=seed) for seed in range(2, 6)]
    first = folder / "0.parquet"
    with pq.ParquetWriter(first, groups[0].schema, write_page_checksum=True) as writer:
        for n in range(1_000_000):
            if first.stat().st_size >= gigabytes * 1e8:
                break
            writer.write_table(groups[n % len(groups)], row_group_size=GROUP_ROWS)
    for n in range(1, 10):
        shutil.copyfile(first, folder / f"{n}.parquet")
    return str(folder)


def write_lines(path: Path, gigabytes: float) -> str:
    """`gigabytes` of JSON lines in one file; its uri."""
    records = conversations(GROUP_ROWS, seed=2).to_pylist()
    piece = "".join(json.dumps(record) + "\n" for record in records).encode()
    with open(path, "wb") as file:
        for _ in range(max(1, round(gigabytes * 1e9 / len(piece)))):
            file.write(piece)
    return str(path)


def first_batch(tokenizer_folder: str, uri: str, windows: int) -> None:
    """What a fresh process does until it can train, and then `windows` more; prints its times and memory."""
    marks = [time.perf_counter()]
    tokenizer = BaseHFModelTokenizer(tokenizer_folder)
    marks.append(time.perf_counter())
    before = _memory_mib("VmRSS")
    source = Source(uri, key="data.sources[0]")
    marks.append(time.perf_counter())
    with loading(open_stream(tokenizer, [source])) as loader:
        loader.take(1)
        marks.append(time.perf_counter())
        while loader.window < windows:
            loader.take(1)
    tokenizer_s, index_s, window_s = np.diff(marks).tolist()
    found = {"tokenizer_s": tokenizer_s, "index_s": index_s, "window_s": window_s}
    memory = {"tokenizer_mib": before, "above_mib": _memory_mib("VmHWM") - before}
    print(json.dumps(found | memory | {"rows": source.num_rows}))


def _memory_mib(name: str) -> float:
    """A number of /proc/self/status: VmRSS now, VmHWM the most since the process began."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) / 1024


def big_source(folder: Path, uri: str, kind: str, *, gigabytes: float, windows: int, rate: float) -> dict[str, Any]:
    """A fresh process that opens a large source.

    Args:
        rate: rows a second of TRL's preparation, which comes before its first batch.
    """
    command = [sys.executable, __file__, "--first-batch", str(folder / "tokenizer"), uri, str(windows)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    first_s = found["index_s"] + found["window_s"]
    return {
        "workload": f"first batch of {gigabytes:g} GB of {kind}, {found['rows']} rows; memory over {windows} windows",
        "ours": round(first_s, 2),
        "baseline": round(found["rows"] / rate),
        "ratio": round(found["rows"] / rate / first_s),
        "unit": "seconds from opening the source to the first pack, the tokenizer being open; baseline from TRL's rate",
        **{name: round(found[name], 2) for name in ("tokenizer_s", "index_s", "window_s")},
        "rss_above_tokenizer_mib": round(found["above_mib"]),
        "rss_tokenizer_mib": round(found["tokenizer_mib"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--first-batch", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        first_batch(options.first_batch[0], options.first_batch[1], int(options.first_batch[2]))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, size = Path(name), {"gigabytes": options.gigabytes, "windows": options.windows}
        texts = [m["content"] for row in conversations(10_000, seed=0).to_pylist() for m in row["messages"]]
        make_tokenizer(folder / "tokenizer", texts)
        rows = [preparation(folder, options.rows, options.repeats)]
        rate = rows[0]["baseline_rows_per_s"]
        uri = write_parquet(folder / "big", options.gigabytes)
        rows.append(big_source(folder, uri, "Parquet", rate=rate, **size))
        shutil.rmtree(uri)
        uri = write_lines(folder / "big.jsonl", options.gigabytes)
        rows.append(big_source(folder, uri, "JSON lines", rate=rate, **size))
    common = {
        "benchmark": "tokenize_pack",
        "hardware": f"{CORES} of {os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "trl", "datasets", "pyarrow")},
    }
    rows = [common | each for each in rows]
    for each in rows:
        print(json.dumps(each))
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
