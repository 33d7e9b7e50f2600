"""The quick start of the documentation, line by line, as a person types it in a new folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs import ROOT
from test_docs_code import blocks

SMALLER = {
    "num_steps: 120": "num_steps: 4",
    "num_steps: 40": "num_steps: 3",
    "prompts_per_step: 64": "prompts_per_step: 2",
    "group_size: 8": "group_size: 2",
    "num_layers: 4": "num_layers: 1",
}
"""What is changed in the config that `init` makes: how much is trained. And 8 rows are held out, not 256."""


def lines(heading: str) -> list[str]:
    """Commands below a heading of the page, in its order."""
    text = (ROOT / "docs" / "index.md").read_text()
    found = [each.text for each in blocks(ROOT / "docs" / "index.md") if each.text in text.partition(heading)[2]]
    return [line.partition("  #")[0].strip() for each in found for line in each.splitlines()]


@pytest.mark.slow
def test_every_line_of_the_quick_start_works_as_it_is_written(tmp_path):
    typed = [line for line in lines("# Ten minutes") if not line.startswith("source ")]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("METAFLOW_")}
    bins = [str(Path(sys.executable).parent), os.environ["PATH"]]
    kept |= {"METAFLOW_HOME": str(tmp_path / "home"), "USERNAME": "somebody", "PATH": os.pathsep.join(bins)}
    kept["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "lib", ROOT)))
    folder, seen = tmp_path, []
    for line in typed:
        if line.startswith("cd "):
            folder = folder / line.removeprefix("cd ")
            config = folder / "configs" / "grpo.yaml"
            for old, new in SMALLER.items():
                assert old in config.read_text()
                config.write_text(config.read_text().replace(old, new))
            rows = (folder / "data" / "prompts.jsonl").read_text().splitlines()
            (folder / "data" / "mine.jsonl").write_text("\n".join(rows[:50]) + "\n")
            held_out = folder / "data" / "held_out.jsonl"
            held_out.write_text("\n".join(held_out.read_text().splitlines()[:8]) + "\n")
            continue
        if "RUN_ID" in line:
            (run,) = (folder / "runs" / "GRPOFlow").iterdir()
            line = line.replace("RUN_ID", run.name)
        line = line.replace("optim.num_steps=100", "optim.num_steps=4")
        done = subprocess.run(
            line, shell=True, cwd=folder, env=kept, input="sort 31\n", capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert not re.search(r"Traceback|Warning", done.stdout + done.stderr), f"{line}\n{done.stdout}{done.stderr}"
        seen.append(line)
    assert [line.split()[0] for line in seen].count("posttrain") >= 5 and any(" resume" in line for line in seen)
