"""A death by the kernel's out-of-memory killer is told from any other SIGKILL by the count of its cgroup."""

from pathlib import Path

import pytest

from posttrain.compute import out_of_memory
from posttrain.compute.out_of_memory import killed_since, oom_count

EVENTS = "low 0\nhigh 0\nmax 7\noom 1\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"

CGROUPS = {
    "version 2": ("0::/pods/a\n", "pods/a/memory.events", EVENTS),
    "version 2 in a container": ("0::/pods/a\n", "memory.events", EVENTS),
    "version 1": ("9:name=systemd:/x\n4:cpu,memory:/pods/a\n0::/\n", "memory/pods/a/memory.oom_control", CONTROL),
    "version 1 in a container": ("4:memory:/pods/a\n", "memory/memory.oom_control", CONTROL),
}


def laid_out(folder: Path, monkeypatch, memberships: str, file: str, text: str) -> Path:
    """A folder that looks like a system's cgroups; returns the file of its counts."""
    monkeypatch.setattr(out_of_memory, "CGROUPS", str(folder))
    monkeypatch.setattr(out_of_memory, "PROC_CGROUP", str(folder / "self"))
    (folder / "self").write_text(memberships)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text.format(2))
    return folder / file


@pytest.mark.parametrize("kind", CGROUPS)
def test_a_rise_of_the_count_is_named_with_its_file(kind: str, tmp_path: Path, monkeypatch):
    file = laid_out(tmp_path, monkeypatch, *CGROUPS[kind])
    before = oom_count()
    assert before is not None and (before.file, before.kills) == (str(file), 2)
    assert killed_since(before) == ""
    file.write_text(CGROUPS[kind][2].format(3))
    assert f"ended 1 process(es) of its cgroup ({file}: oom_kill 2 -> 3)" in killed_since(before)
    assert "parallel.memory_gib" in killed_since(before)


def test_a_system_without_counts_says_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(out_of_memory, "PROC_CGROUP", str(tmp_path / "none"))
    assert oom_count() is None
    file = laid_out(tmp_path, monkeypatch, *CGROUPS["version 2"])
    before = oom_count()
    file.unlink()
    assert before is not None and killed_since(before) == ""


def test_this_systems_own_count_is_read_where_it_keeps_one():
    found = oom_count()
    if found is None:
        pytest.skip("no memory cgroup of this process can be read")
    assert Path(found.file).is_file() and found.kills >= 0
