"""A terminal: lines of shell as the documentation has them, typed in a folder by a user without a past."""

import os
import re
import subprocess
import sys
from pathlib import Path

from runs import ROOT
from test_docs_code import OURS

FOREIGN = ("METAFLOW_", "AWS_", "KUBE", "COLUMNS", "NO_COLOR", "TERM")
"""Variables of this machine's own that would let another Metaflow, cloud or screen in."""


def named(page: Path) -> str:
    """How the tables of tests name a page: README.md, bring/data.md."""
    return str(page.relative_to(ROOT / "docs" if ROOT / "docs" in page.parents else ROOT))


def lines_of(page: str, words: str) -> list[str]:
    """The lines of the one block of shell of a page that has these words, without comments."""
    (text,) = [b.text for path, b in OURS if named(path) == page and b.kind == "bash" and words in b.text]
    return [line for each in text.splitlines() if (line := re.sub(r"\s+#.*", "", each).strip())]


def line_of(page: str, words: str) -> str:
    """The one line with these words."""
    (line,) = [line for line in lines_of(page, words) if words in line]
    return line


class Terminal:
    """Types lines one after another; `cd` moves it, and activating an environment is done already."""

    def __init__(self, folder: Path, **env: str):
        self.folder, self.seen = folder, list[tuple[str, str]]()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        paths = [str(ROOT / "tests"), str(ROOT / "lib"), str(ROOT)]
        bins = [str(Path(sys.executable).parent), os.environ["PATH"]]
        kept |= {"METAFLOW_HOME": str(folder / "home"), "USERNAME": "somebody", "AWS_EC2_METADATA_DISABLED": "true"}
        self.env = kept | {"PATH": os.pathsep.join(bins), "PYTHONPATH": os.pathsep.join(paths)} | env

    def type(self, line: str, *, status: int = 0, given: str = "") -> str:
        """What a line prints, both streams together.

        Args:
            status: how it must end.
            given: what it reads from the keyboard.
        """
        if line.startswith("source "):
            return ""
        if line.startswith("cd "):
            self.folder = self.folder / line.removeprefix("cd ")
            return ""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(line, shell=True, cwd=self.folder, env=self.env, input=given, timeout=600, **streams)
        assert done.returncode == status, f"{line}\nends with {done.returncode}\n{done.stdout[-6000:]}"
        assert not re.search(r"Traceback|Warning", done.stdout), f"{line}\n{done.stdout}"
        self.seen.append((line, done.stdout))
        return done.stdout


def clone(folder: Path) -> Terminal:
    """A terminal at the root of what a clone of the repository has, as far as pages type in one."""
    for name in ("flows", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return Terminal(folder)
