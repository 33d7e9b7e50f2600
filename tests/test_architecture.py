"""The architecture, executable: who may import whom, one home per verb, budgets of size."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("lib", "steps", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]

GROUND = {"errors", "plugin", "deadline", "faults", "manifest", "notice", "s3", "storage"}
MAY_IMPORT = {
    "collector": set(),
    "errors": set(),
    "deadline": {"errors"},
    "faults": set(),
    "manifest": {"errors"},
    "notice": set(),
    "plugin": {"errors"},
    "s3": {"errors"},
    "storage": {"errors", "faults", "manifest", "s3"},
    "config_section": set(),
    "config_data": {"config_section"},
    "config_model": {"config_section"},
    "config_method": {"config_model", "config_section"},
    "config_parallel": {"config_section"},
    "config_reward": {"config_section"},
    "config": {"config_reward", "config_parallel", "config_data", "config_method", "config_model", "config_section"},
    "config_retrain": {"config", "config_section"},
    "config_text": {"errors"},
    "config_file": {"errors", "config", "config_text"},
    "overrides": {"errors", "config_text"},
    "cli": {
        *("cli_registry", "cli_tables", "collector", "config", "config_file", "config_retrain", "errors", "overrides"),
        *("storage", "workflow"),
    },
    "cli_registry": {"storage", "workflow"},
    "cli_tables": {"terminal_table"},
    "terminal_table": set(),
    "data": GROUND,
    "model": GROUND | {"data"},
    "compute": GROUND | {"data"},
    "workflow": GROUND | {"data", "model", "compute", "terminal_table"},
}
"""Part of lib/posttrain -> the parts it may import beside itself."""

ONLY_IN = {
    r"\.backward\(": {"lib/posttrain/compute/engine.py"},
    r"optimizer\.step\(": {"lib/posttrain/compute/engine.py"},
    r"\.apply_chat_template\(": {"lib/posttrain/data/tokenizer.py"},
    r"softmax_stats\(|softmax_gradient_\(": {"lib/posttrain/model/softmax.py", "lib/posttrain/model/head.py"},
    r"log_softmax\(": set(),  # over a vocabulary it is softmax.py's, which keeps no second copy of the logits
    r"ids\[1:\]": {"lib/posttrain/data/sample.py"},
    r"torch\.load\(|pickle\.load|weights_only\s*=\s*False": set(),
    r"except\s*:|except BaseException": set(),
    r"0\.0\.0\.0": set(),
}
"""A verb and the files it may occur in."""

METAFLOW = re.compile(r"flows/|lib/posttrain/workflow/(card|pages|charts)\.py")
RAY_OR_VLLM = re.compile(r"lib/posttrain/compute/")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str | None:
    """The part of lib/posttrain that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    return parts[2].removesuffix(".py") if parts[:2] == ("lib", "posttrain") else None


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a tree imports; `from posttrain import storage` counts as posttrain.storage."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "posttrain":
            names |= {f"posttrain.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_one_way(path: Path):
    home = part_of(path)
    for name in imports(ast.parse(path.read_text())):
        top, *rest = name.split(".")
        if home and home in MAY_IMPORT and top == "posttrain" and rest:
            assert rest[0] == home or rest[0] in MAY_IMPORT[home], f"{home} may not import {name}"
        if home:
            below = ("flows", "tests") if home == "cli" else ("steps", "flows", "tests")
            assert top not in below, f"the library may not import {name}"
        if path.parts[-2] == "steps":
            assert top not in ("flows", "tests"), f"a step may not import {name}"
        if top == "metaflow":
            assert METAFLOW.match(relative(path)), "Metaflow belongs to flows/ and the cards"
        if top in ("ray", "vllm", "verl"):
            assert RAY_OR_VLLM.match(relative(path)), f"{top} belongs to compute/"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_ray_and_vllm_are_imported_inside_functions(path: Path):
    top_level = ast.Module(
        [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)], []
    )
    late = {"ray", "vllm", "verl"} | ({"steps"} if part_of(path) == "cli" else set())
    assert not {name.split(".")[0] for name in imports(top_level)} & late


@pytest.mark.parametrize("pattern", ONLY_IN)
def test_each_verb_has_one_home(pattern: str):
    found = {relative(path) for path in FILES if re.search(pattern, path.read_text())}
    assert found <= ONLY_IN[pattern]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_stay_small(path: Path):
    text = path.read_text()
    limit = 90 if path.name.endswith("_flow.py") else 300
    assert text.count("\n") <= limit, f"over {limit} lines: a second noun is hiding inside"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is over 60 lines"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_names_have_a_docstring(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a file says what enters and what leaves"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_importing_the_package_is_light():
    heavy = ["torch", "numpy", "transformers", "ray", "vllm", "metaflow", "pyarrow"]
    code = f"import sys, posttrain, posttrain.config_file, steps; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_what_a_reward_imports_is_light():
    names = ["types", "reward", "environment", "verifiers.text", "sort_digits"]
    code = f"import sys, {', '.join(f'posttrain.data.{name}' for name in names)}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False", "every process of reward.workers would start by it"


def test_importing_posttrain_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import posttrain; print(sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['posttrain']", "what takes time is imported where it is used"
