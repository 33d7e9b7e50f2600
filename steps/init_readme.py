"""The README.md of a folder that `posttrain init` made: how to run it, what to change, how to go on, what to read.

In: the folder, with its config, its flow and its rows. All that is said of the recipe is read from these.
"""

import ast
import json
import re
from pathlib import Path

from posttrain.config import RunConfig
from posttrain.config_file import load_config

DOCS = {"guides": "a guide to each recipe", "data": "rows, and what a bad one gets", "errors": "every kind of refusal"}
"""Pages of the repository's docs/ that the README names."""
HEADINGS = ("what", "where", "key", "now")


def readme(folder: Path, recipe: str) -> str:
    """The text, for a folder in which all else is there."""
    config_file = f"configs/{recipe}.yaml"
    config = load_config((folder / config_file).read_text())
    flow = f"flows/{recipe}_flow.py"
    source = (folder / flow).read_text()
    about = (ast.get_docstring(ast.parse(source)) or "").partition(" `python")[0]
    (name,) = re.findall(r"^class (\w+)\(", source, re.M)
    run, every = f"runs/{name}/RUN_ID", config.checkpoint.every_steps
    commands = {
        "run": [
            ("posttrain doctor", "is this machine fit?"),
            (f"posttrain preview {config_file}", "rows, masks and packs, as they would be trained"),
            (f"python {flow} run", "prints its RUN_ID at every line"),
        ],
        "resume": [(f"python {flow} resume", f"the last run, from its last checkpoint; one comes every {every} steps")],
        "look": [
            *([] if config.method.name == "reward" else [(f"posttrain chat {run}/export", "talk to the model")]),
            (f"posttrain audit {run}", "proves what it trained, each draw once"),
            (f"posttrain lineage {run}/export", "from the model back to its rows"),
            (f"python {flow} card view train", "its charts"),
        ],
    }
    block = {key: _block(lines) for key, lines in commands.items()}
    pages = "\n".join(f"- `docs/{page}.md`: {what}" for page, what in DOCS.items())
    return f"""# {folder.resolve().name}

{about}

Made by `posttrain init {recipe}`. It runs as it is, on a laptop:

{block["run"]}

## Change first

{_table(folder, config, config_file)}

`--config-value optim.num_steps=10` changes a key for one run; `posttrain preview` takes it too. A wrong key or path is
refused before anything is trained, with the fix.

## Stopped?

A run that was killed goes on:

{block["resume"]}

## What comes out

`{run}` holds `metrics/`, `checkpoints/` and `export/`, a Hugging Face folder.

{block["look"]}

## Read on

`configs/KEYS.md` has every key, `posttrain COMMAND --help` every option. In posttrain's repository:

{pages}
"""


def _block(lines: list[tuple[str, str]]) -> str:
    """Commands with what each is for, as one block of shell."""
    width = max(len(command) for command, _ in lines)
    return "\n".join(["```bash", *(f"{command:<{width}}  # {what}" for command, what in lines), "```"])


def _table(folder: Path, config: RunConfig, config_file: str) -> str:
    """What is a reader's own, the nearest to the task first: the file, the key that names it, and what is there now."""
    rl, judge = config.method.name == "grpo", []
    if config.reward is not None and config.reward.function is not None:
        scores = "decides what is learned" if rl else "judges at the end, and trains nothing"
        judge = [("what an answer is worth", "flows/my_reward.py", "reward.function", scores)]
    learns = "what the warm-up learns from" if rl else "what it learns from"
    sources = config.data.sources[0].path if config.data.sources else None
    files = [
        ("what it is asked", config.data.prompts, "data.prompts"),
        (learns, sources, "data.sources"),
        ("what it is judged on", config.data.held_out, "data.held_out"),
        ("what it is asked when judged", config.eval.prompts, "eval.prompts"),
    ]
    rows = [(what, path, key, _rows(folder / path)) for what, path, key in files if path is not None]
    teacher = getattr(config.method, "teacher", None)
    drawn = [("the model", "model", config.model), ("the teacher", "method.teacher", teacher)]
    warmed = drawn[1 if teacher else 0][0]
    for what, key, origin in drawn:
        if getattr(origin, "fresh", None) is not None:
            now = f"drawn at random; `{key}.path: FOLDER` in its place takes one that is trained"
            now += ", with `warmup: null`" if config.warmup is not None and what == warmed else ""
            rows.append((what, config_file, f"{key}.fresh", now))
    rows = [*judge, *rows] if rl else [*rows, *judge]
    cells = [(what, f"`{where}`", f"`{key}`", now) for what, where, key, now in rows]
    return "\n".join(f"| {' | '.join(each)} |" for each in (HEADINGS, ("---",) * len(HEADINGS), *cells))


def _rows(path: Path) -> str:
    """How many rows a file has, and their columns."""
    lines = path.read_text().splitlines()
    return f"{len(lines):,} rows of {', '.join(f'`{name}`' for name in json.loads(lines[0]))}"
