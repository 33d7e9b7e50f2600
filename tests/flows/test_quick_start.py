"""What a new user types from the documentation, line by line: the quick start, the first hour, the command line."""

import re
from contextlib import chdir
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain import cli
from posttrain.workflow import registry
from runs import ROOT
from terminal import Terminal, lines_of, named
from test_docs_code import OURS

pytestmark = pytest.mark.slow
SMALLER = {
    "num_steps: 120": "num_steps: 4",
    "num_steps: 40": "num_steps: 3",
    "prompts_per_step: 64": "prompts_per_step: 2",
    "group_size: 8": "group_size: 2",
    "num_layers: 4": "num_layers: 1",
}
"""What is changed in the config that `init` makes: how much is trained. And 8 rows are held out, not 256."""
INDEX = ("posttrain doctor", "posttrain chat", "data/mine.jsonl", "resume")
"""Words of the blocks of the quick start, in its order."""
LAST = "step_000003"
"""The last checkpoint of a run of three steps, which has forty on the page."""


def make_small(folder: Path) -> None:
    """A config, held-out rows and rows of a user's own, with which a run takes a minute."""
    config = folder / "configs" / "grpo.yaml"
    for old, new in SMALLER.items():
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
    rows = (folder / "data" / "prompts.jsonl").read_text().splitlines()
    (folder / "data" / "mine.jsonl").write_text("\n".join(rows[:50]) + "\n")
    held_out = folder / "data" / "held_out.jsonl"
    held_out.write_text("\n".join(held_out.read_text().splitlines()[:8]) + "\n")


def first_run(folder: Path) -> str:
    """Id of the first run that was started here."""
    return min(path.name for path in (folder / "runs" / "GRPOFlow").iterdir())


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    """A terminal in the folder that the quick start ends in."""
    terminal = Terminal(tmp_path_factory.mktemp("user"))
    for line in [line for words in INDEX for line in lines_of("index.md", words)]:
        if "RUN_ID" in line:
            line = line.replace("RUN_ID", first_run(terminal.folder))
        terminal.type(line.replace("optim.num_steps=100", "optim.num_steps=4"), given="sort 31\n")
        if line.startswith("cd "):
            make_small(terminal.folder)
    return terminal


def test_every_line_of_the_quick_start_works_as_it_is_written(terminal):
    seen = [line for line, _ in terminal.seen]
    assert [line.split()[0] for line in seen].count("posttrain") >= 5 and any(" resume" in line for line in seen)
    (last,) = [said for line, said in terminal.seen if line == "python flows/grpo_flow.py run"]
    assert "before" in last and "after" in last and "exported model: " in last


def test_the_readme_starts_as_the_quick_start_does(terminal):
    done = [*(line for line, _ in terminal.seen), "source .venv/bin/activate", "cd my-task"]
    assert set(lines_of("README.md", "posttrain doctor")) < set(done)


def test_the_first_hour_sees_what_it_says(terminal):
    done = {line: said for line, said in terminal.seen} | {"cd my-task": ""}
    for words in ("posttrain doctor", "data/mine.jsonl", "posttrain audit"):
        for line in lines_of("first_hour.md", words):
            if line not in done:
                typed = line.replace("RUN_ID", first_run(terminal.folder)).replace("step_000040", LAST)
                done[line] = terminal.type(typed, given="sort 5281\n")
    said = {re.sub(r"python flows/\w+.py", "posttrain", line).split()[1]: text for line, text in done.items()}
    assert said["doctor"].endswith("all well\n")
    assert "token by token" in said["preview"] and "every draw is accounted for" in said["audit"]
    assert re.search(r" same +\S+/data/demonstrations\.jsonl", said["lineage"]), said["lineage"]
    assert "Agrees with transformers" in said["verify"] and said["chat"].strip()
    assert (terminal.folder / "out" / "model.safetensors").is_file()


def test_every_command_of_the_reference_runs_with_its_words_replaced(terminal, tmp_path):
    run = f"runs/GRPOFlow/{first_run(terminal.folder)}"
    for number in (1, 2):
        made = {"run": f"GRPOFlow/{number}", "parent": number - 1 or None, "key": str(number)}
        model = str(terminal.folder / run / "export")
        registry.promote(str(tmp_path / "registry"), registry.Candidate(model_uri=model, **made))
    words = {"RECIPE": "dpo", "FOLDER": str(tmp_path / "new"), "CONFIG": "configs/grpo.yaml", "RUN": run, "RUN2": run}
    words |= {"MODEL": f"{run}/export", "CHECKPOINT": f"{run}/checkpoints/grpo/{LAST}", "OUT": str(tmp_path / "out")}
    words |= {"REGISTRY": str(tmp_path / "registry"), "REASON": "rude"}
    texts = [b.text for page, b in OURS if named(page) == "cli.md" and b.kind == "bash"]
    assert len(texts) == len(re.findall(r"^## ", (ROOT / "docs" / "cli.md").read_text(), re.M))
    for text in texts:
        for typed in {
            re.sub(r"\[.*\]", "", text),
            re.sub(r"[\[\]]", "", text),
        }:  # without what may be left out, and with
            arguments = [words.get(word, word) for word in typed.split()[1:]]
            with chdir(terminal.folder), pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str(terminal.folder / "flows"))  # as the command does
                done = CliRunner().invoke(cli.app, arguments, input="sort 31\n")
            assert done.exit_code == 0, f"{arguments}: {done.output}{done.exception!r}"
