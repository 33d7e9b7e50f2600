"""The documentation is true: generated pages are current, links resolve, and every command shown exists."""

import importlib
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from posttrain import errors
from posttrain.config import Section
from posttrain.config_retrain import RetrainConfig
from posttrain.config_section import docstrings

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
TOP = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "examples/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]


def test_generated_config_pages_are_current():
    from generate_config import documents

    for name, text in documents().items():
        assert (ROOT / "docs" / name).read_text() == text, f"run `make docs`: docs/{name} is old"


@pytest.mark.parametrize("generator", ["generate_data", "generate_cli"])
def test_other_generated_pages_are_current(generator: str):
    for name, text in importlib.import_module(generator).documents().items():
        assert (ROOT / "docs" / name).read_text() == text, f"run `make docs`: docs/{name} is old"


def test_the_performance_page_and_its_plots_are_those_of_the_results():
    from generate_performance import documents

    for path, text in documents().items():
        assert path.read_text() == text, f"run `make docs`: {path.name} is old"


@pytest.mark.parametrize(
    ("benchmark", "page"),
    [
        ("recipes_learning", "recipes"),
        ("recipes_speed", "recipes"),
        ("next_item", "events"),
        ("slates", "semantic_ids"),
    ],
)
def test_tables_in_pages_are_the_results(benchmark: str, page: str):
    module = importlib.import_module(f"benchmarks.{benchmark}")
    table = module.table(json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text()))
    assert table in (ROOT / "docs" / f"{page}.md").read_text(), f"docs/{page}.md has not the table of today:\n{table}"


def sections(section: type[Section], path: str = "") -> list[tuple[str, type[Section]]]:
    from generate_config import sections_of

    found = [(path, section)]
    for name, field in section.model_fields.items():
        for inner in sections_of(field):
            found += sections(inner, f"{path}.{name}")
    return found


@pytest.mark.parametrize(("path", "section"), sections(RetrainConfig))
def test_every_key_is_documented_once(path: str, section: type[Section]):
    from generate_config import sections_of

    described = docstrings(section)
    for name, field in section.model_fields.items():
        assert sections_of(field) or described.get(name), f"{path}.{name} has no docstring"


def test_every_key_is_used():
    schema = {"config.py", "config_data.py", "config_method.py", "config_model.py", "config_section.py"}
    files = [p for folder in ("lib", "steps", "flows") for p in (ROOT / folder).rglob("*.py")]
    code = "\n".join(p.read_text() for p in files if p.name not in schema)
    handed_on_whole = {"hidden_size", "num_layers", "num_heads", "num_kv_heads", "betas"}
    handed_on_whole |= {"weight_decay", "max_grad_norm", "schedule"}
    for path, section in sections(RetrainConfig):
        for name in section.model_fields.keys() - handed_on_whole:
            assert re.search(rf"[.\"']{name}\b", code), f"{path}.{name} is read nowhere"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_resolve(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"
    folders = "lib|steps|flows|configs|docs|examples|notebooks|tests|benchmarks|constraints"
    for target in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / target).exists(), f"{page.name}: {target} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_shown_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"\bmake ([a-z][a-z-]+)\b", page.read_text()):
        assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_keys_shown_exist(page: Path):
    known = {f"{path}.{name}".lstrip(".") for path, section in sections(RetrainConfig) for name in section.model_fields}
    heads = {key.split(".")[0] for key in known}
    text = page.read_text()
    if page.name.startswith("from_"):  # what a table translates is another framework's, and tests/test_docs_code.py's
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.M)
    for key in re.findall(r"--config-value ([\w.]+)=", text):
        assert key in known or key == "KEY", f"{page.name}: {key}"
    for key in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)`", text):
        if key.split(".")[0] in heads and not key.endswith((".py", ".yaml", ".md", ".json")):
            assert key in known, f"{page.name}: `{key}` is no config key"


def test_metaflow_knows_the_settings_of_the_operations_page():
    import metaflow

    page = (ROOT / "docs" / "operations.md").read_text()
    sources = "\n".join(p.read_text() for p in Path(metaflow.__file__).parent.rglob("*.py"))
    known = set(re.findall(r"from_conf\(\s*\"(\w+)\"|METAFLOW_(\w+)", sources))
    for name in re.findall(r"\bMETAFLOW_(\w+)", page):
        assert name in {word for pair in known for word in pair}, f"METAFLOW_{name}"


def test_every_error_has_its_section():
    kinds = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    told = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "errors.md").read_text(), re.M))
    assert told == kinds - {"PosttrainError"}


def test_the_pages_and_pictures_of_the_site_exist():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(nav):
        for entry in nav:
            inner = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from pages(inner) if isinstance(inner, list) else [inner]

    assert site["strict"] and {"Data", "Model", "Compute", "Workflow"} <= {next(iter(entry)) for entry in site["nav"]}
    for page in pages(site["nav"]):
        assert (ROOT / "docs" / page).is_file(), page
    for picture in (ROOT / "docs" / "pictures").glob("*.svg"):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert picture.name in (ROOT / "docs" / "concepts" / f"{picture.stem}.md").read_text()


def test_the_api_page_names_what_there_is():
    for module, options in re.findall(r"^::: ([\w.]+)\n((?:    .+\n)*)", (ROOT / "docs" / "api.md").read_text(), re.M):
        found = importlib.import_module(module)
        for name in (yaml.safe_load(options) or {"options": {"members": []}})["options"]["members"]:
            assert hasattr(found, name), f"{module}.{name}"


def test_the_pictures_of_cards_are_of_every_card_and_small():
    import card_images

    flows = "".join(path.read_text() for path in (ROOT / "flows").glob("*.py"))
    cards = set(re.findall(r'@card\(type="blank", id="(\w+)"', flows))
    assert cards <= card_images.CARDS.keys() == card_images.SAYS.keys()
    assert (ROOT / "docs" / "cards.md").read_text() == card_images.page(), "run `make card-images`"
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").glob("*.png")}
    assert max(sizes.values()) <= card_images.MOST_BYTES, sizes
