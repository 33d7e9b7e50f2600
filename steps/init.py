"""A folder of a user's own: `posttrain init grpo my-task` copies a recipe with the rows and the reward that it names.

What comes out is whole: flows/ (the graph; a cluster takes along what lies beside it, the reward too), configs/ (one
file), data/ (rows as a user would write them), README.md. Nothing in it names the built-in task any more.
"""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import posttrain
from posttrain.errors import ConfigError, StorageError
from steps.init_readme import readme

TASK = "posttrain.data.sort_digits"
ROWS = 2048
"""Of a file at most: what a person may still read."""
RECIPES = ("sft", "dpo", "reward", "distill", "grpo")
KEYS = "KEYS.md"
SHARED = ("base.py", "placement.py", "refusal.py", "spot.py", "tags.py")
REWARD = '''"""The reward of this run: what a completion is worth. Named in configs/ as my_reward:reward."""


def reward(row: dict, completion: str) -> float:
    """1 when the completion is exactly the row's answer, else 0.

    `row` is a line of data.prompts, with all its fields. A dict of named parts does as well as a number; an error drops
    the group and is never a reward of 0.
    """
    return float(completion.strip() == row["answer"])
'''


def flows_folder() -> Path:
    """The flows of this posttrain: in the package where it was built as a wheel, beside lib/ in a checkout."""
    packed = Path(posttrain.__file__).parents[1] / "posttrain_project"
    return (packed if packed.is_dir() else Path(posttrain.__file__).parents[2]) / "flows"


def init(recipe: str, folder: Path) -> dict[str, Any]:
    """Fill a new folder.

    Returns:
        folder, files (name -> what it is), next (commands to type).

    Raises:
        ConfigError: no such recipe, or the folder is not new.
        StorageError: it cannot be made.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"posttrain init {recipe}: no recipe of that name; one of {', '.join(RECIPES)}")
    folder = folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"posttrain init: {folder} exists and is not empty; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"posttrain init: {error}; name a folder that can be made") from None
    source, own = flows_folder(), f"{recipe}.yaml"
    text = (source.parent / "configs" / f"{recipe}_tiny.yaml").read_text()
    rows = {name: f"data/{name}.jsonl" for name in re.findall(rf"{re.escape(TASK)}:(\w+)", text) if name != "reward"}
    for name, path in rows.items():
        text = text.replace(f"{TASK}:{name}\n", f"{path}\n")
    text = text.replace(f"{TASK}:reward", "my_reward:reward")
    _write(folder / "configs" / own, _told(text, recipe))
    for name, path in rows.items():
        lines = [json.dumps(row) for row in getattr(import_module(TASK), name)(0)[:ROWS]]
        _write(folder / path, "\n".join(lines) + "\n")
    flow = (source / f"{recipe}_flow.py").read_text()
    _write(folder / "flows" / f"{recipe}_flow.py", flow.replace(f'"{recipe}_tiny.yaml"', f'"{own}"'))
    for name in SHARED:
        shutil.copyfile(source / name, folder / "flows" / name)
    shutil.copyfile(source.parent / "docs" / "config.md", folder / "configs" / KEYS)
    files = {f"configs/{own}": "the run: every key it sets", f"flows/{recipe}_flow.py": "starts it"}
    files[f"configs/{KEYS}"] = "what every key means"
    if "my_reward:" in text:
        _write(folder / "flows" / "my_reward.py", REWARD)
        files["flows/my_reward.py"] = "what a completion is worth"
    files |= {path: "rows, one a line" for path in rows.values()}
    _write(folder / "README.md", readme(folder, recipe))
    files = {"README.md": "how to run it, what to change first, how to go on"} | files
    _write(folder / ".gitignore", "runs/\n.metaflow/\n__pycache__/\n")
    steps = [f"cd {folder}", f"posttrain preview configs/{own}", f"python flows/{recipe}_flow.py run"]
    return {"folder": str(folder), "files": files, "next": steps}


def _told(text: str, recipe: str) -> str:
    """The config with a head that fits its new place."""
    while text.startswith("#"):
        text = text.partition("\n")[2]
    return f"# python flows/{recipe}_flow.py run\n# Every key: configs/{KEYS}\n{text}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
