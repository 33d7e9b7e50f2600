"""Is a stream from S3 as fast as one from the local disk, and does a training step ever wait for it?

The same files are read from the disk and from an S3 protocol server in a process of its own on this machine. A real
store takes no CPU time of the reader's, so the server has the last core for itself and the reader, its fetching
threads included, the first one; windows are tokenised online, in one thread. `cpu_ratio` compares the reader's CPU
seconds, which other work on the machine hardly changes. Then a loader over S3 feeds a loop whose step takes 200 ms: the
share of the time that the loop waits in take(), the first batch apart. Prints one JSON line per file type and writes
benchmarks/results/s3_stream.json.

    python benchmarks/s3_stream.py [--windows 40] [--steps 150] [--packs-per-step 8] [--folder /tmp]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from conversations import GROUP_ROWS, conversations, make_tokenizer, open_stream

from posttrain.data.loader import loading
from posttrain.data.source import Source
from posttrain.data.tokenizer import BaseHFModelTokenizer

RESULTS = Path(__file__).parent / "results" / "s3_stream.json"
STEP_S = 0.2
FILES = 6
REPEATS = 2


def serve() -> None:
    """An S3 server until standard input ends; prints its address."""
    from moto.server import ThreadedMotoServer

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
    sys.stdin.read()
    server.stop()


@contextmanager
def s3_server() -> Iterator[Any]:
    """A client of a server in another process, with a bucket `bench`; this process' environment points there."""
    import boto3

    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        address = process.stdout.readline().strip()
        os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "METAFLOW_S3_ENDPOINT_URL": address}
        os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="bench")
        try:
            yield client
        finally:
            process.stdin.close()


def write_files(folder: Path, kind: str) -> None:
    """FILES files of four row groups, or as many JSON lines."""
    folder.mkdir()
    for n in range(FILES):
        table = conversations(4 * GROUP_ROWS, seed=n)
        if kind == "parquet":
            pq.write_table(table, folder / f"{n}.parquet", row_group_size=GROUP_ROWS, write_page_checksum=True)
        else:
            (folder / f"{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def windows_per_s(tokenizer: BaseHFModelTokenizer, uri: str, windows: int) -> tuple[float, float]:
    """Of a stream that is opened anew, and CPU seconds a window; its index and first window are not counted."""
    stream = open_stream(tokenizer, [Source(uri, key="data.sources[0]")])
    stream.window(0)
    start, used = time.perf_counter(), time.process_time()
    for window in range(1, windows + 1):
        stream.window(window)
    return windows / (time.perf_counter() - start), (time.process_time() - used) / windows


def waiting(tokenizer: BaseHFModelTokenizer, uri: str, *, steps: int, packs_per_step: int) -> tuple[float, float]:
    """Share of the time that a loop of 200 ms steps waits for its packs, and the longest wait in seconds."""
    stream, waits = open_stream(tokenizer, [Source(uri, key="data.sources[0]")]), []
    with loading(stream) as loader:
        loader.take(packs_per_step)
        begin = time.perf_counter()
        for _ in range(steps):
            time.sleep(STEP_S)
            asked = time.perf_counter()
            loader.take(packs_per_step)
            waits.append(time.perf_counter() - asked)
        return sum(waits) / (time.perf_counter() - begin), max(waits)


def row(tokenizer: BaseHFModelTokenizer, folder: Path, client: Any, kind: str, options: Any) -> dict[str, Any]:
    """One file type, on disk and on S3."""
    write_files(folder / kind, kind)
    for path in (folder / kind).iterdir():
        client.upload_file(str(path), "bench", f"{kind}/{path.name}")
    speeds: dict[str, list[tuple[float, float]]] = {"disk": [], "s3": []}
    for _ in range(REPEATS):
        speeds["disk"].append(windows_per_s(tokenizer, str(folder / kind), options.windows))
        speeds["s3"].append(windows_per_s(tokenizer, f"s3://bench/{kind}", options.windows))
    share, longest_s = waiting(
        tokenizer, f"s3://bench/{kind}", steps=options.steps, packs_per_step=options.packs_per_step
    )
    disk, s3 = max(speeds["disk"])[0], max(speeds["s3"])[0]
    disk_cpu_s, s3_cpu_s = (min(cpu for _, cpu in speeds[side]) for side in ("disk", "s3"))
    return {
        "benchmark": "s3_stream",
        "workload": f"{options.windows} windows of {FILES} {kind} files, tokenised online",
        "hardware": f"{os.cpu_count()} CPU cores: one for the reader, one for the server, {platform.machine()}",
        "versions": {name: version(name) for name in ("boto3", "moto", "pyarrow", "tokenizers")},
        "ours": round(s3, 3),
        "baseline": round(disk, 3),
        "ratio": round(s3 / disk, 3),
        "unit": f"windows a second from S3; baseline: the same files on disk; best of {REPEATS}",
        "cpu_ratio": round(disk_cpu_s / s3_cpu_s, 3),
        "waiting_share": round(share, 5),
        "longest_wait_s": round(longest_s, 4),
        "step": f"{options.steps} steps of {STEP_S} s, {options.packs_per_step} packs each",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--packs-per-step", type=int, default=8)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name, s3_server() as client:
        folder = Path(name)
        texts = [m["content"] for row in conversations(10_000, seed=0).to_pylist() for m in row["messages"]]
        tokenizer = make_tokenizer(folder / "tokenizer", texts)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        rows = [row(tokenizer, folder, client, kind, options) for kind in ("parquet", "jsonl")]
    for each in rows:
        print(json.dumps(each))
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
