"""Is this machine fit for a run? Python, packages, GPUs, disk, /dev/shm, Metaflow and S3, each fine or with its fix.

In: where runs' files go. Out: one Check a fact. Nothing is changed; on S3 an object of a few bytes is written, read and
deleted, as a run would.
"""

import filecmp
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from posttrain import s3, storage

GIB = 2**30
DISK_GIB = 10
"""A warning, not a bound: the default run needs 0.1, two checkpoints of a 0.6B model 14."""
SHM_GIB = 1
"""Ray's object store and NCCL lie there; a container has 64 MiB unless it is told otherwise."""
NEEDED_FOR = {"vllm": "rollout.generator: vllm", "kubernetes": "parallel.backend: kubernetes"}
"""An optional package and what it is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One fact about the machine."""

    name: str
    found: str
    fix: str = ""
    """What to do about it; empty where all is well."""

    def plain(self) -> dict[str, str]:
        """For --json."""
        return asdict(self)


def examine(root: str) -> list[Check]:
    """Every check, in the order in which a person would mend them.

    Args:
        root: folder or s3:// prefix of the runs' files.
    """
    return [*_python(), *_packages(), *_gpus(), *_room(root), *_metaflow(), *_flows_here()]


def _python() -> Iterator[Check]:
    needed, has = SpecifierSet(metadata.metadata("posttrain")["Requires-Python"]), platform.python_version()
    fix = "" if needed.contains(has) else f"posttrain needs Python {needed}: make the environment with another one"
    yield Check(name="python", found=f"{has}, posttrain {metadata.version('posttrain')}", fix=fix)


def _packages() -> Iterator[Check]:
    """The ranges are those that posttrain was installed with."""
    for line in metadata.requires("posttrain") or ():
        needed = Requirement(line)
        optional = needed.name in NEEDED_FOR and needed.marker is not None
        if needed.marker is not None and not (optional and not needed.marker.evaluate({"extra": "dev"})):
            continue
        yield _package(needed, optional=optional)


def _package(needed: Requirement, *, optional: bool) -> Check:
    try:
        has = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        if optional:
            found = f"not installed; {NEEDED_FOR[needed.name]} needs it: pip install 'posttrain[{needed.name}]'"
            return Check(name=needed.name, found=found)
        return Check(name=needed.name, found="not installed", fix=f"pip install '{needed.name}{needed.specifier}'")
    fits = needed.specifier.contains(has, prereleases=True)
    return Check(name=needed.name, found=has, fix="" if fits else f"pip install '{needed.name}{needed.specifier}'")


def _gpus() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            said = f"{facts.name}, {total / GIB:.0f} GiB, {free / GIB:.0f} free, CUDA {torch.version.cuda}"
            busy = "" if free > 0.9 * total else "another process holds memory of this GPU: nvidia-smi shows which"
            yield Check(name=f"gpu {number}", found=said, fix=busy)
        return
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    built = "a CPU build of torch" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda}"
    if not driver:
        yield Check(name="gpu", found=f"none, and {built}: runs on {os.cpu_count()} CPU cores")
        return
    fix = "install torch's CUDA build" if torch.version.cuda is None else "a newer driver, or torch for an older CUDA"
    yield Check(name="gpu", found=f"a driver is here, and {built} sees no GPU", fix=fix)


def _room(root: str) -> Iterator[Check]:
    if storage.is_s3(root):
        yield _s3(root)
    else:
        place = Path(root).expanduser().resolve()
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free / GIB
        fix = "" if free >= DISK_GIB else f"free some: a small model wants {DISK_GIB} GiB (posttrain plan CONFIG)"
        if not os.access(there, os.W_OK):
            fix = f"{there} cannot be written: choose another with checkpoint.root"
        yield Check(name="disk", found=f"{free:,.0f} GiB free for {place}", fix=fix)
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / GIB
        fix = "" if size >= SHM_GIB else "start the container with more: docker run --shm-size=8g"
        yield Check(name="/dev/shm", found=f"{size:,.1f} GiB", fix=fix)


def _s3(root: str) -> Check:
    """A write, a read and a delete, each tried once: a person waits."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = s3.place(storage.join(root, f"doctor-{uuid.uuid4().hex}"))
    fix = "see that AWS_* or a role may put, get and delete there, and METAFLOW_S3_ENDPOINT_URL"
    try:
        client = s3.s3_client(retries=0, connections=1)
        client.put_object(Bucket=bucket, Key=key, Body=b"posttrain")
        same = client.get_object(Bucket=bucket, Key=key)["Body"].read() == b"posttrain"
        client.delete_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError) as error:
        return Check(name="s3", found=f"{root}: {error}", fix=fix)
    if not same:
        return Check(name="s3", found=f"{root}: what was written is not what is read", fix=fix)
    return Check(name="s3", found=f"{root}: written, read, deleted")


def _metaflow() -> Iterator[Check]:
    """Where artifacts and cards go, by the environment and Metaflow's own file, in which the environment wins."""
    home = Path(os.environ.get("METAFLOW_HOME", "~/.metaflowconfig")).expanduser()
    profile = os.environ.get("METAFLOW_PROFILE")
    path = home / (f"config_{profile}.json" if profile else "config.json")
    try:
        stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        yield Check(name="datastore", found=f"{path}: {error}", fix="mend the file, or remove it")
        return
    settings = stored | {key: value for key, value in os.environ.items() if key.startswith("METAFLOW_")}
    kind, place = settings.get("METAFLOW_DEFAULT_DATASTORE", "local"), settings.get("METAFLOW_DATASTORE_SYSROOT_S3")
    where = {"local": ".metaflow of the folder where a flow is started", "s3": place or "no place"}.get(kind, "")
    lacks = kind == "s3" and not place
    fix = "set METAFLOW_DATASTORE_SYSROOT_S3=s3://BUCKET/metaflow" if lacks else ""
    yield Check(name="datastore", found=f"Metaflow's, {kind}: {where}", fix=fix)


def _flows_here() -> Iterator[Check]:
    """Flows that `posttrain init` copied, beside those of the posttrain that is installed now."""
    from steps.init import SHARED, flows_folder

    here, ours = Path.cwd() / "flows", flows_folder()
    shared = [name for name in SHARED if (here / name).is_file()]
    if not shared or here == ours:
        return
    _, differs, missing = filecmp.cmpfiles(here, ours, shared, shallow=False)
    other = sorted([*differs, *missing])
    fix = "posttrain init another folder and take its flows, unless you changed these yourself" if other else ""
    found = f"{', '.join(other)} not as in the installed posttrain" if other else "as in the installed posttrain"
    yield Check(name="flows", found=found, fix=fix)
