"""The Dockerfile as far as its text goes: versions, environment, user and files. No test here builds it."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()
ORDERS = [tuple(line.split(maxsplit=1)) for line in LINES if line and not line.startswith("#")]


def said(order: str) -> list[str]:
    return [rest for word, rest in ORDERS if word == order]


def requirements() -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    listed = [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]
    return {each.name: each for each in listed}


def test_the_python_is_one_that_the_project_supports():
    (base,) = [text for text in said("ARG") if text.startswith("BASE=")]
    version = re.search(r"python:(\d+\.\d+)", base)
    assert version and SpecifierSet(PROJECT["requires-python"]).contains(version[1])


def test_pins_are_versions_that_the_project_allows():
    pins = [line for line in (ROOT / "constraints" / "gpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert {line.partition("==")[0] for line in pins} >= {"torch", "vllm"}
    for name, _, version in (line.partition("==") for line in pins):
        assert requirements()[name].specifier.contains(version), f"{name}=={version}"


def test_the_extras_exist():
    (extras,) = re.findall(r"\.\[([\w,]+)\]", " ".join(said("RUN")))
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert "dev" not in extras.split(",")


def test_tasks_need_no_package_index():
    assert "METAFLOW_SKIP_INSTALL_DEPENDENCIES=1" in " ".join(said("ENV")).split()


def test_containers_run_as_a_user_in_a_folder_of_its_own():
    words = [word for word, _ in ORDERS]
    assert said("USER") == ["1000"] and words[words.index("USER") + 1 :] == ["WORKDIR"]
    assert said("WORKDIR")[-1] == "/home/posttrain" and "--create-home --uid 1000 posttrain" in said("RUN")[-1]


def test_the_image_holds_no_secret():
    for text in said("ENV") + said("ARG"):
        assert not re.search(r"(TOKEN|PASSWORD|SECRET|KEY)(_ID)?=", text), text


def test_what_is_copied_is_there_and_is_sent_to_the_builder():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for text in said("COPY") for source in text.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists() and any(fnmatch(source, pattern) for pattern in allowed), source
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "lib", "steps"} <= set(copied)
