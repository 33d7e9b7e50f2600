"""A checkpoint of any number of ranks on any mesh restores on any other, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.compute.checkpoint_index import index_of, parse_index
from posttrain.compute.shards import Part, owned
from posttrain.errors import DamagedError

TESTS = Path(__file__).parents[2]
PLAN = ["1:whole", "2:rows", "4:grid", "4:fsdp+tp", "1:whole"]
MORE = ["4:hybrid", "3:columns", "4:cube", "3:fsdp", "2:columns", "3:whole", "4:rows", "4:fsdp"]


@pytest.mark.parametrize("plan", [PLAN, pytest.param(MORE, marks=pytest.mark.slow)], ids=["1-2-4-1", "more"])
@pytest.mark.fault("F13", outcome="RESUME")
def test_every_rank_reads_its_part_bitwise_from_any_other_sharding(tmp_path, plan):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(TESTS / "reshard_ranks.py"), str(tmp_path), *plan]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == plan


def test_what_all_ranks_hold_alike_is_dealt_out_once_and_evenly():
    held = {f"p{number}": torch.zeros(size) for number, size in enumerate([100, 60, 50, 40, 40, 10])}
    shares = [owned(held, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(held)
    sizes = [sum(local.numel() for _, local in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 50


def test_the_common_part_of_two_boxes():
    assert Part((0, 2), (4, 4)).common(Part((2, 0), (4, 3))) == Part((2, 2), (2, 1))
    assert Part((0,), (3,)).common(Part((3,), (3,))) is None
    assert Part((), ()).common(Part((), ())) == Part((), ())
    assert Part((2, 3), (1, 1)).slices_in(Part((2, 2), (2, 2))) == (slice(0, 1), slice(1, 2))


def report(**changes):
    part = {"dtype": "F32", "at": [0], "shape": [2], "offset": 8, "sha256": ["x"]}
    return {"file": "rank_00000.safetensors", "bytes": 16, "tensors": {"w": part | changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [1]}, "parts of 1 elements, 2 in the tensor"),
        ({"shape": [3]}, "lies outside"),
        ({"at": [-1]}, "sizes"),
        ({"at": [True]}, "sizes"),
        ({"offset": 9}, "lies outside its file"),
        ({"dtype": "PICKLE"}, "PICKLE"),
        ({"sha256": []}, "0 hashes"),
    ],
)
@pytest.mark.fault("F20", outcome="REFUSE")
def test_an_index_that_does_not_add_up_is_refused(changes, message):
    good = index_of({"w": (2,)}, [report()]).to_json()
    assert parse_index(good, where="here").num_bytes == 16
    document = good.decode()
    for key, value in changes.items():
        before = json.dumps(report()["tensors"]["w"][key], separators=(",", ":"))
        after = json.dumps(value, separators=(",", ":"))
        where = '"parts":[' if key != "dtype" else '"w":{'
        head, tail = document.split(where, 1)
        document = head + where + tail.replace(f'"{key}":{before}', f'"{key}":{after}', 1)
    with pytest.raises(DamagedError, match=message):
        parse_index(document.encode(), where="here")


@pytest.mark.parametrize("name", ["../rank_00000.safetensors", "/etc/passwd", "rank_0.safetensors"])
@pytest.mark.fault("F20", outcome="REFUSE")
def test_an_index_names_no_file_outside_its_folder(name):
    document = index_of({"w": (2,)}, [report()]).to_json().decode().replace("rank_00000.safetensors", name)
    with pytest.raises(DamagedError, match="is no index of a checkpoint"):
        parse_index(document.encode(), where="here")
