"""A registry never points at part of a model, whoever is killed, late or doubled; on disk and behind S3."""

import json
import os
import signal
import threading

import pytest

import promotions
from posttrain import storage
from posttrain.errors import CheckpointError
from posttrain.manifest import MANIFEST
from posttrain.workflow import registry
from posttrain.workflow.registry import Candidate


def model(root: str, name: str) -> str:
    """A published folder with a model's worth of files."""
    uri = storage.join(root, "runs", name, "export")
    with storage.staging(uri) as folder:
        (folder / "model.safetensors").write_bytes(name.encode() * 5000)
        (folder / "config.json").write_text(json.dumps({"name": name}))
        storage.publish(folder, uri)
    return uri


def candidate(root: str, name: str, parent: int | None) -> Candidate:
    return Candidate(
        run=f"Flow/{name}", parent=parent, model_uri=model(root, name), key=name, facts={"data": {name: "1"}}
    )


def assert_champion(where: str, name: str, number: int) -> None:
    """The pointer names a whole model, that of a run, to the byte."""
    found = registry.champion(where)
    assert found is not None and (found.version, found.manifest["run"]) == (number, f"Flow/{name}")
    registry.check_model(found.model_uri)
    assert storage.read_bytes(storage.join(found.model_uri, "model.safetensors")) == name.encode() * 5000


@pytest.fixture
def where(root_uri: str) -> str:
    """A registry with one champion, a."""
    uri = storage.join(root_uri, "registry")
    assert registry.champion(uri) is None and registry.history(uri) == []
    assert registry.promote(uri, candidate(root_uri, "a", None)) == {"outcome": "promoted", "version": 1, "champion": 1}
    return uri


def test_a_champion_follows_its_parent_and_tells_what_it_was_made_of(root_uri: str, where: str):
    assert registry.promote(where, candidate(root_uri, "b", 1))["champion"] == 2
    assert_champion(where, "b", 2)
    manifest = registry.version(where, 2)
    assert manifest["parent"] == 1 and manifest["data"] == {"b": "1"} and manifest["time"].startswith("20")
    assert [(e["generation"], e["version"], e["action"]) for e in registry.history(where)] == [
        (1, 1, "promote"),
        (2, 2, "promote"),
    ]


def test_the_same_run_promoted_again_changes_nothing(root_uri: str, where: str):
    again = Candidate(run="Flow/a", parent=None, model_uri=storage.join(root_uri, "runs", "a", "export"), key="a")
    assert registry.promote(where, again)["outcome"] == "promoted"
    assert len(registry.history(where)) == 1 and registry.versions(where) == [1]
    registry.promote(where, candidate(root_uri, "b", 1))
    assert registry.promote(where, again) == {"outcome": "promoted", "version": 1, "champion": 2}, (
        "it does not come back"
    )
    assert_champion(where, "b", 2)


def test_a_late_candidate_is_stale_and_leaves_no_trace(root_uri: str, where: str):
    registry.promote(where, candidate(root_uri, "b", 1))
    late = registry.promote(where, candidate(root_uri, "late", 1))
    assert late == {"outcome": "stale", "version": None, "champion": 2}
    assert registry.promote(where, candidate(root_uri, "first", None))["outcome"] == "stale"
    assert registry.versions(where) == [1, 2]
    assert storage.list_folders(storage.join(where, "models", "Flow")) == ["a", "b"]


def test_of_candidates_that_race_one_is_promoted_and_the_others_are_stale(root_uri: str, where: str):
    racers = [candidate(root_uri, name, 1) for name in ("b", "c", "d", "e")]
    ready, outcomes = threading.Barrier(len(racers)), {}

    def race(one: Candidate) -> None:
        ready.wait()
        outcomes[one.run] = registry.promote(where, one)["outcome"]

    threads = [threading.Thread(target=race, args=(one,)) for one in racers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes.values()) == ["promoted", "stale", "stale", "stale"]
    (won,) = [run.removeprefix("Flow/") for run, outcome in outcomes.items() if outcome == "promoted"]
    found = registry.champion(where)
    assert found is not None and found.generation == 2
    assert_champion(where, won, found.version)


def test_one_that_was_paused_before_the_pointer_and_overtaken_is_stale(root_uri: str, where: str):
    paused = promotions.start(where, "Flow/b", 1, model(root_uri, "b"), fault="stop:registry.after_version")
    os.waitpid(paused.pid, os.WUNTRACED)
    assert registry.promote(where, candidate(root_uri, "c", 1))["champion"] == 3
    os.kill(paused.pid, signal.SIGCONT)
    assert json.loads(paused.communicate(timeout=60)[0]) == {"outcome": "stale", "version": None, "champion": 3}
    assert_champion(where, "c", 3)


@pytest.mark.parametrize(
    ("place", "pointed"),
    [
        ("publish.before_manifest", False),
        ("publish.before_commit", False),
        ("publish.after_commit", False),
        ("registry.after_version", False),
        ("registry.after_pointer", True),
    ],
)
def test_a_promotion_killed_anywhere_leaves_a_whole_champion_and_is_finished_by_the_retry(
    root_uri: str, where: str, place: str, pointed: bool
):
    uri = model(root_uri, "b")
    killed = promotions.start(where, "Flow/b", 1, uri, fault=place)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert_champion(where, *(("b", 2) if pointed else ("a", 1)))
    retried = registry.promote(where, Candidate(run="Flow/b", parent=1, model_uri=uri, key="b"))
    assert retried == {"outcome": "promoted", "version": 2, "champion": 2}
    assert_champion(where, "b", 2)
    assert registry.versions(where) == [1, 2] and len(registry.history(where)) == 2


def test_what_half_an_upload_left_is_written_over(root_uri: str, where: str):
    storage.write_bytes(storage.join(where, "models", "Flow", "b", "model.safetensors"), b"half")
    assert registry.promote(where, candidate(root_uri, "b", 1))["champion"] == 2
    assert_champion(where, "b", 2)


def test_another_model_under_the_name_of_a_run_is_refused(root_uri: str, where: str):
    registry.promote(where, candidate(root_uri, "b", 1))
    registry.rollback(where, reason="to promote from 1 again", to=1)
    storage.remove_file(storage.join(where, "versions", "2", MANIFEST))
    pointer = storage.join(where, "champion.json")
    document = json.loads(storage.read_bytes(pointer))
    document["history"] = document["history"][:1]
    storage.write_bytes(pointer, json.dumps(document).encode())
    other = Candidate(run="Flow/b", parent=1, model_uri=model(root_uri, "other"), key="b")
    with pytest.raises(CheckpointError, match=r"but another model of this run's name"):
        registry.promote(where, other)
    assert_champion(where, "a", 1)


def test_rollback_goes_to_the_parent_and_is_a_generation_of_its_own(root_uri: str, where: str):
    registry.promote(where, candidate(root_uri, "b", 1))
    registry.promote(where, candidate(root_uri, "c", 2))
    assert registry.rollback(where, reason="rude") == {"outcome": "rolled back", "champion": 2}
    assert_champion(where, "b", 2)
    assert registry.rollback(where, reason="still rude")["champion"] == 1, "to the parent, not back and forth"
    assert registry.rollback(where, reason="it was better", to=3)["champion"] == 3
    assert registry.rollback(where, reason="said twice", to=3)["outcome"] == "unchanged"
    last = registry.history(where)[-1]
    assert (last["generation"], last["version"], last["reason"]) == (6, 3, "it was better")
    assert_champion(where, "c", 3)


def test_rollback_is_refused_to_what_is_not_there_and_to_a_damaged_model(root_uri: str, where: str):
    empty = storage.join(root_uri, "empty")
    with pytest.raises(CheckpointError, match="nothing was promoted there"):
        registry.rollback(empty, reason="")
    with pytest.raises(CheckpointError, match="version 1 is the first of its line"):
        registry.rollback(where, reason="")
    with pytest.raises(CheckpointError, match="has no version 7; it has 1"):
        registry.rollback(where, reason="", to=7)
    registry.promote(where, candidate(root_uri, "b", 1))
    storage.write_bytes(storage.join(where, "models", "Flow", "a", "model.safetensors"), b"a" * 5000 + b"!")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        registry.rollback(where, reason="")
    assert_champion(where, "b", 2)


def test_a_candidate_that_was_judged_or_rolled_back_is_not_tried_again(root_uri: str, where: str):
    assert registry.tried(where, 1, "b") is None
    registry.promote(where, candidate(root_uri, "b", 1))
    registry.rollback(where, reason="rude")
    assert registry.tried(where, 1, "b") == "promoted as version 2, which was rolled back"
    assert registry.tried(where, 1, "c") is None
    for why in ("worse", "said later"):
        registry.note_judged(where, "c", {"run": "Flow/c", "why": why})
    assert registry.tried(where, 1, "c") == "tried by Flow/c and not promoted: worse"


@pytest.mark.parametrize("damage", [b"{", b'{"format": 2, "history": []}'], ids=["no JSON", "another format"])
def test_a_damaged_pointer_is_named_and_not_taken_for_an_empty_registry(root_uri: str, where: str, damage: bytes):
    storage.write_bytes(storage.join(where, "champion.json"), damage)
    with pytest.raises(CheckpointError, match=r"champion\.json"):
        registry.champion(where)
    with pytest.raises(CheckpointError, match=r"champion\.json"):
        registry.promote(where, candidate(root_uri, "b", None))


def test_a_model_that_was_replaced_after_its_promotion_is_refused(root_uri: str, where: str):
    uri = storage.join(where, "models", "Flow", "a")
    storage.remove_folder(uri)
    with pytest.raises(CheckpointError, match="is not the model that version 1"):
        registry.champion(where)
