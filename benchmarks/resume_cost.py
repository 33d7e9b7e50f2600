"""What a resume costs, at any depth: from a loader's state to the first batch, beyond computing its window.

A source of 10 million short conversations in thousands of blocks, mixed with a small one, is resumed at its beginning,
in its middle and at its end. Every resume opens the stream anew from the index that the run keeps, as a new process
would. The baseline is the median time of the next windows of that stream, which hold everything open. Also shows how
long the index takes, made once a run, and how long its plain form takes to read. Prints one JSON line per depth and
writes benchmarks/results/resume_cost.json.

    python benchmarks/resume_cost.py [--rows 10000000] [--folder /tmp]
"""

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from conversations import conversations, make_tokenizer, open_stream

from posttrain.data.loader import loading
from posttrain.data.mixture import WINDOW
from posttrain.data.source import Source
from posttrain.data.tokenizer import BaseHFModelTokenizer

RESULTS = Path(__file__).parent / "results" / "resume_cost.json"
BLOCK_ROWS = 2000
DEPTHS = (0.0, 0.5, 0.99)
REPEATS = 3


def write_source(path: Path, rows: int) -> str:
    """Short conversations in row groups of BLOCK_ROWS; the same ones over and over."""
    table = conversations(BLOCK_ROWS, seed=1, median_words=14)
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        for _ in range(-(-rows // BLOCK_ROWS)):
            writer.write_table(table)
    return str(path)


def resume(tokenizer: BaseHFModelTokenizer, index: str, state: dict[str, Any]) -> dict[str, float]:
    """Seconds to read the index, from there to the first pack, and of one window once all is open."""
    start = time.perf_counter()
    sources = [Source.indexed(each) for each in json.loads(index)]
    read_s = time.perf_counter() - start
    start = time.perf_counter()
    with loading(open_stream(tokenizer, sources), state=state) as loader:
        loader.take(1)
        first_s = time.perf_counter() - start
    # A stream of its own, since the loader's thread may still be in the window after; the first opens and reads.
    stream, seconds = open_stream(tokenizer, [Source.indexed(each) for each in json.loads(index)]), []
    stream.mixture.resume(state["window"], state["counts"])
    for window in range(state["window"], state["window"] + 9):
        start = time.perf_counter()
        stream.window(window)
        seconds.append(time.perf_counter() - start)
    window_s = float(np.median(seconds[1:]))
    return {"read_index_s": read_s, "first_s": first_s, "window_s": window_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        texts = [m["content"] for row in conversations(10_000, seed=0).to_pylist() for m in row["messages"]]
        tokenizer = make_tokenizer(folder / "tokenizer", texts)
        uris = [write_source(folder / "large.parquet", options.rows), write_source(folder / "small.parquet", 100_000)]
        start = time.perf_counter()
        sources = [Source(uri, key=f"data.sources[{n}]") for n, uri in enumerate(uris)]
        index_s = time.perf_counter() - start
        index = json.dumps([source.plain_index() for source in sources])
        mixture = open_stream(tokenizer, sources).mixture
        rows = []
        for depth in DEPTHS:
            window = int(depth * sum(source.num_rows for source in sources)) // WINDOW
            counts = mixture.counts_before(window).tolist()
            state = {"window": window, "packs": 0, "counts": counts, "dropped": {}}
            found = [resume(tokenizer, index, state) for _ in range(REPEATS)]
            best = min(found, key=lambda each: each["first_s"])
            rows.append(
                {
                    "benchmark": "resume_cost",
                    "workload": f"{sum(s.num_rows for s in sources)} rows in {sum(len(s.block_rows) for s in sources)} "
                    f"Parquet row groups, resumed at window {window} ({depth:.0%})",
                    "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
                    "versions": {name: version(name) for name in ("numpy", "pyarrow", "tokenizers")},
                    "ours": round(best["first_s"], 3),
                    "baseline": round(best["window_s"], 3),
                    "ratio": round(best["first_s"] / best["window_s"], 2),
                    "unit": f"seconds to the first batch; baseline: one window once all is open; best of {REPEATS}",
                    "beyond_one_window_s": round(best["first_s"] - best["window_s"], 3),
                    "read_index_s": round(best["read_index_s"], 3),
                    "make_index_s": round(index_s, 3),
                }
            )
    for each in rows:
        print(json.dumps(each))
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
