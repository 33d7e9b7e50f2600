"""Real ranks on the CPU: processes of one gloo group, all running one function, their results brought back.

As a program: python gloo_ranks.py FILE, where FILE holds [function, world, out, arguments].
"""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from posttrain.compute.collective import MeetingPoint, Ranks
from posttrain.plugin import resolve

TESTS = Path(__file__).parent
TIMEOUT_S = 120.0


def launch(function: str, out: Path, *arguments: Any, world: int = 4) -> list[Any]:
    """Call `package.module:name` as function(ranks, *arguments) on `world` ranks; what each returned.

    Args:
        out: an empty folder.
        arguments: plain data.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "call.json").write_text(json.dumps([function, world, str(out), arguments]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "gloo_ranks.py"), str(out / "call.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(world)]


def be_rank(rank: int, world: int, function: str, out: str, meeting: MeetingPoint, arguments: list[Any]) -> None:
    ranks = Ranks(
        rank=rank,
        world_size=world,
        meeting=meeting if rank == 0 else meeting.address,
        timeout_s=TIMEOUT_S,
        device=torch.device("cpu"),
    )
    result = resolve(function, key="function")(ranks, *arguments)
    torch.save(result, f"{out}/rank{rank}.pt")
    ranks.close()


def main(call: str) -> None:
    function, world, out, arguments = json.loads(Path(call).read_text())
    resolve(function, key="function")  # what it imports, the children need not
    meeting = MeetingPoint("127.0.0.1")
    fork = multiprocessing.get_context("fork")  # as importing torch takes seconds
    children = [
        fork.Process(target=be_rank, args=(rank, world, function, out, meeting, arguments)) for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    codes = [child.exitcode for child in children]
    sys.exit(f"exit codes of the ranks: {codes}" if any(codes) else 0)


if __name__ == "__main__":
    main(sys.argv[1])
