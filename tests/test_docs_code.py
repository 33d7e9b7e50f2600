"""Every block of code in the documentation is of a kind that is tested: commands parse, configs load."""

import ast
import importlib.util
import json
import re
import shlex
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from posttrain.cli import app
from posttrain.config import RunConfig
from posttrain.config_file import load_config
from posttrain.config_retrain import RetrainConfig
from posttrain.errors import ConfigError
from test_docs import PAGES, ROOT, sections

ELSEWHERE = {"cd", "source", "docker", "kubectl", "pip", "git"}
"""Commands that are not ours; their words are not looked at."""
OF_A_FLOW = {"run", "resume", "card", "argo-workflows", "kubernetes", "batch", "tag", "show"}
"""Metaflow's commands that the documentation uses."""
PLACEHOLDER = re.compile(r"\b(my|sft|dpo|run)\.yaml\b|\b[A-Z][A-Z_]+\b|(^|/)config\.yaml$")
"""What a reader puts a name of their own in the place of."""


BESIDE = ({}, {"checkpoint.root": "s3://bucket/runs"}, {"warmup": None})
"""What the text around a few lines of config says of the rest."""


class Block(NamedTuple):
    """A block of code: what its fence says, and its text."""

    kind: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fence = re.compile(r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.M | re.S)
    found = [Block(kind or guessed(body), title or "", body) for kind, title, body in fence.findall(text)]
    rest = fence.sub("", text)
    if page.name == "api.md":  # instructions to mkdocstrings, tested in test_docs.py
        return found
    indented = re.findall(r"(?:^|\n\n)((?:    \S[^\n]*\n(?:    [^\n]*\n|\n(?=    ))*))", rest)
    return [*found, *(Block(guessed(body), "", re.sub(r"^    ", "", body, flags=re.M)) for body in indented)]


def guessed(body: str) -> str:
    """The kind of a block without one: shell where it begins with a command, else YAML or Python."""
    first = body.split()[0]
    if first in ELSEWHERE | {"python", "posttrain", "make"}:
        return "bash"
    return "python" if first in ("from", "import") else "yaml"


ALL = [(page, block) for page in PAGES for block in blocks(page)]
NAMES = [f"{page.name}-{number}" for number, (page, _) in enumerate(ALL)]
OURS = [(page, block) for page, block in ALL if not block.title.startswith("theirs")]


def of(kind: str):
    """Parameters of a test over the blocks of one kind."""
    chosen = [(page, block) for page, block in OURS if block.kind == kind and "--8<--" not in block.text]
    return pytest.mark.parametrize(("page", "block"), chosen, ids=[f"{p.name}: {b.text[:30]!r}" for p, b in chosen])


@pytest.mark.parametrize(("page", "block"), ALL, ids=NAMES)
def test_every_block_is_of_a_kind_that_is_tested(page: Path, block: Block):
    assert block.kind in {"bash", "yaml", "python", "text"}, block.kind
    for path in re.findall(r'--8<-- "([^"]+)"', block.text):
        assert (ROOT / path).is_file() and path.startswith("examples/"), "what tests/test_examples.py runs"


@of("bash")
def test_commands_exist_and_their_words_parse(page: Path, block: Block):
    for line in block.text.replace("\\\n", " ").splitlines():
        check_command(shlex.split(line.replace("[", "").replace("]", ""), comments=True), where=page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_a_sentence_parse_too(page: Path):
    for line in re.findall(r"`((?:python|posttrain) [^`\n]+)`", page.read_text()):
        if not line.endswith(("…", " -m")):
            check_command(shlex.split(line), where=page.name)


def check_command(words: list[str], *, where: str) -> None:
    """A command of ours names what there is; click itself reads the options of `posttrain`."""
    words = [word for word in words if not re.match(r"^[A-Z_]+=", word)]
    if not words or words[0] in ELSEWHERE:
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"{where}: {words}"
    elif words[0] == "posttrain":
        command = typer.main.get_command(app)
        words = words[1:]
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{where}: posttrain {words[0]}"
            command, words = command.commands[words[0]], words[1:]
        if words and not hasattr(command, "commands"):  # the bare name of a command is no call of it
            words = ["1" if word in ("N", "X") else word for word in words]
            command.make_context("posttrain", words)
    else:
        assert words[0] == "python" and len(words) > 1, f"{where}: {words}"
        check_python(words[1:], where=where)


def check_python(words: list[str], *, where: str) -> None:
    """A module, a script of the repository, or a flow with a command of Metaflow's and a config that is there."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"{where}: python -m {words[1]}"
        return
    script = next(
        (p for p in (ROOT / words[0].removeprefix("../../"), *ROOT.glob(f"examples/*/{words[0]}")) if p.is_file()), None
    )
    assert script or "…" in words[0] or "*" in words[0] or words[0].startswith("-"), f"{where}: python {words[0]}"
    if script is None or not script.name.endswith("_flow.py"):
        return
    assert len(words) == 1 or OF_A_FLOW & set(words), f"{where}: {words}"
    for option, value in pairwise(words):
        if option == "--config" and not PLACEHOLDER.search(value):
            assert (ROOT / value).is_file() or value == "configs/grpo.yaml", f"{where}: {value}"


@of("yaml")
def test_a_config_loads_whole_or_as_changes_to_a_recipe(page: Path, block: Block):
    document = yaml.safe_load(block.text)
    if block.title.startswith("ours"):
        load_config(block.text)
        return
    refusals = {}
    for base, beside in product(sorted((ROOT / "configs").glob("*_tiny.yaml")), BESIDE):
        schema = RetrainConfig if base.name.startswith("retrain") else RunConfig
        try:
            load_config(json.dumps({"base": str(base)} | beside | document), schema)
            return
        except ConfigError as error:
            refusals[base.name] = str(error)
    raise AssertionError(f"{page.name}: no recipe takes it: {refusals}")


@of("python")
def test_python_compiles_and_what_it_imports_of_ours_exists(page: Path, block: Block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("posttrain", "steps"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(submodule), f"{page.name}: {submodule}"


def test_the_first_lines_of_a_reward_run_as_the_page_says(capsys):
    (block,) = [b for b in blocks(ROOT / "docs" / "bring" / "reward.md") if "RewardWorker" in b.text]
    exec(compile(block.text, "reward.md", "exec"), {})
    assert capsys.readouterr().out.strip() == block.text.rpartition("# ")[2].strip()


MIGRATIONS = ["from_trl.md", "from_verl.md", "from_axolotl.md"]


def keys_of_theirs(block: Block) -> set[str]:
    """Every key that another framework's config sets."""
    if block.kind == "python":
        calls = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call)]
        return {keyword.arg for call in calls for keyword in call.keywords}
    if block.kind == "bash":
        return {word.partition("=")[0] for word in shlex.split(block.text.replace("\\\n", " ")) if "=" in word}
    found = set()
    for key, value in yaml.safe_load(block.text).items():
        found |= {f"{key}.{inner}" for each in value for inner in each} if isinstance(value, list) else {key}
    return found


@pytest.mark.parametrize("name", MIGRATIONS)
def test_a_translation_names_each_key_of_theirs_and_only_keys_that_we_have(name: str):
    found = blocks(ROOT / "docs" / name)
    assert [b.title.split(":")[0] for b in found if b.title.startswith(("theirs", "ours"))].count("ours") >= 1
    rows = [line.split("|")[1:3] for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("| `")]
    left, right = ({key for row in rows for key in re.findall(r"`([\w.]+)`", row[side])} for side in (0, 1))
    theirs = {key for block in found if block.title.startswith("theirs") for key in keys_of_theirs(block)}
    assert theirs <= left, f"{name}: no row for {sorted(theirs - left)}"
    known = {f"{path}.{key}".lstrip(".") for path, section in sections(RetrainConfig) for key in section.model_fields}
    assert right <= known | {"format"}, sorted(right - known)


def test_the_keys_of_trl_are_its_own():
    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

    known = {"SFTConfig": SFTConfig, "GRPOConfig": GRPOConfig, "LoraConfig": LoraConfig}
    for block in blocks(ROOT / "docs" / "from_trl.md"):
        for call in (
            [n for n in ast.walk(ast.parse(block.text)) if isinstance(n, ast.Call)] if block.kind == "python" else []
        ):
            unknown = {keyword.arg for keyword in call.keywords} - set(known[call.func.id].__dataclass_fields__)
            assert not unknown, f"{call.func.id} has no {unknown}"


def test_the_keys_of_verl_are_its_own():
    """In the lane of `make test-verl`, which has verl; nothing of it is imported."""
    verl = importlib.util.find_spec("verl")
    if verl is None or verl.origin is None:
        pytest.skip("verl is not installed: make test-verl")
    path = Path(verl.origin).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    known = yaml.safe_load(path.read_text())
    theirs = {key for b in blocks(ROOT / "docs" / "from_verl.md") if b.title == "theirs" for key in keys_of_theirs(b)}
    assert theirs and not {key for key in theirs if not in_tree(known, key.split("."))}


def in_tree(tree: object, parts: list[str]) -> bool:
    """Whether a nested mapping has the key."""
    return not parts or (isinstance(tree, dict) and parts[0] in tree and in_tree(tree[parts[0]], parts[1:]))
