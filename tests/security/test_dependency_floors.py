"""The oldest versions that pyproject.toml allows have the fixes that SECURITY.md relies on."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
FLOORS = {
    "torch": "2.10",  # CVE-2026-24747: memory corruption in torch.load with weights_only
    "vllm": "0.18",  # CVE-2026-27893: trust_remote_code=False was bypassed
    "ray": "2.54",  # CVE-2026-27482: its job API deleted unasked; tokens are known from 2.52
    "transformers": "5.0",  # CVE-2026-1839: a pickle beside checkpoints
    "pyarrow": "14.0.1",  # CVE-2023-47248: code in IPC files
}


def requirements() -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"]
    return {r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *extras["vllm"]])}


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_the_oldest_version_that_is_allowed_has_the_fix(name: str, floor: str):
    oldest = [Version(each.version) for each in requirements()[name].specifier if each.operator == ">="]
    assert oldest and max(oldest) >= Version(floor)


def test_the_pinned_versions_are_those_that_are_allowed():
    text = (Path(__file__).parents[2] / "constraints" / "cpu.txt").read_text()
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.M))
    for name, requirement in requirements().items():
        if name in pins:
            assert requirement.specifier.contains(pins[name].split("+")[0]), f"{name}=={pins[name]}"
    assert "torch" in pins


def test_a_release_waits_for_the_audit_of_its_dependencies():
    jobs = yaml.safe_load((Path(__file__).parents[2] / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    audited = [name for name, job in jobs.items() if any("pip_audit" in step.get("run", "") for step in job["steps"])]
    assert audited and jobs["publish"]["needs"] in audited
    assert not any(step.get("continue-on-error") for name in audited for step in jobs[name]["steps"])
