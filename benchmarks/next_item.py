"""Does a decoder over events rank the next item better than what is simpler? Three worlds, every ranker on each.

Ours is configs/events_sft.yaml, run as a flow; popularity, item-kNN and SASRec read the same events before the
cutoff. All rank the whole catalogue, cold items included, at every play since the cutoff, after all that lies before
it. `truth` ranks by the world's own probabilities: no ranker can do better. Writes benchmarks/results/next_item.json.

    python -m benchmarks.next_item [--seeds 0 1 2] [--out FILE]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.next_item_baselines import item_knn, popularity, sasrec
from posttrain.data.event_world import Event, World
from posttrain.data.event_world_rows import plain_items, schema, world_and_events
from posttrain.data.events import rows
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.item_scores import item_scores
from posttrain.model.load import load_decoder
from posttrain.workflow.ranking import ranking_metrics

ROOT = Path(__file__).resolve().parent.parent
JUDGED = "ndcg@10"
BASELINES = ("popularity", "item_knn", "sasrec")


def asked(world: World) -> tuple[list[list[Event]], list[tuple[int, int]]]:
    """Every member's events, and (member, place) of each play since the cutoff: the positions of rows(), in order."""
    histories = [world.history(member) for member in range(len(world.activity))]
    places = [
        (member, place)
        for member, history in enumerate(histories)
        for place, event in enumerate(history)
        if event.time >= world.cutoff and event.action != "skip"
    ]
    return histories, places


def baseline_scores(world: World, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Scores [N, C] by ranker, the right column [N], and whether it is a cold item."""
    histories, places = asked(world)
    items = len(world.genre)

    def played(events: Sequence[Event]) -> list[int]:
        return [event.item for event in events if event.action != "skip"]

    train = [played([event for event in history if event.time < world.cutoff]) for history in histories]
    before = [played(histories[member][:place]) for member, place in places]
    targets = np.array([histories[member][place].item for member, place in places])
    found = {
        "popularity": popularity(train, before, items),
        "item_knn": item_knn(train, before, items),
        "sasrec": sasrec(train, before, items, seed=seed),
        "truth": np.stack([world.choice(m, histories[m][:at], histories[m][at].time) for m, at in places]),
    }
    return found, targets, world.cold[targets]


def our_scores(folder: str, world: World, seed: int) -> np.ndarray:
    """[N, C] of an exported model."""
    names, events = plain_items(seed), world_and_events(seed)[1]
    held_out = list(rows(events, schema(names), after=world.cutoff, unnamed=True))
    tokenizer, model = BaseHFModelTokenizer(folder), load_decoder(folder)
    catalogue = range(len(world.genre))
    return item_scores(model, tokenizer, held_out, names, catalogue, pack_tokens=1024)


def run_flow(seed: int, folder: str, changes: Sequence[str] = ()) -> str:
    """Train as the config says, but for its seed; the exported folder."""
    from metaflow import Run, namespace

    run_id = Path(folder, f"run_id_{seed}")
    flow = [sys.executable, str(ROOT / "flows" / "sft_flow.py"), "--config", str(ROOT / "configs" / "events_sft.yaml")]
    words = [word for change in (f"seed={seed}", *changes) for word in ("--config-value", change)]
    with open(Path(folder, "log"), "a") as log:
        command = [*flow, *words, "run", "--run-id-file", str(run_id)]
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=subprocess.STDOUT)
    namespace(None)
    return Run(f"SFTFlow/{run_id.read_text()}")["end"].task.data.exported["uri"]  # pyright: ignore


def measure(seed: int, folder: str, changes: Sequence[str]) -> dict[str, Any]:
    """Every ranker's metrics in the world of a seed, and NDCG@10 on warm items alone."""
    start = time.monotonic()
    exported = run_flow(seed, folder, changes)
    seconds = time.monotonic() - start
    world = world_and_events(seed)[0]
    scores, targets, cold = baseline_scores(world, seed)
    scores["ours"] = our_scores(exported, world, seed)
    metrics = {name: ranking_metrics(each, targets) for name, each in scores.items()}
    for name, each in scores.items():
        metrics[name] |= {"ndcg@10_warm": ranking_metrics(each[~cold], targets[~cold])[JUDGED]}
    rounded = {name: {key: round(value, 4) for key, value in each.items()} for name, each in metrics.items()}
    return {"seed": seed, "positions": len(targets), "cold": int(cold.sum()), "seconds": round(seconds), **rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config-value", action="append", default=[], help="change of the config; for trying")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] = folder
        os.environ["METAFLOW_USER"] = "benchmark"
        os.environ["METAFLOW_CLIENT_CACHE_PATH"] = str(Path(folder, "cache"))
        seeds = []
        for seed in options.seeds:
            seeds.append(measure(seed, folder, options.config_value))
            print(seeds[-1], flush=True)
    found = [
        report.row(
            "next_item",
            f"configs/events_sft.yaml against {name}: every play since the cutoff of a simulated service, all items",
            ours=fmean(each["ours"][JUDGED] for each in seeds),
            baseline=fmean(each[name][JUDGED] for each in seeds),
            unit="NDCG@10, mean of the seeds",
            truth=round(fmean(each["truth"][JUDGED] for each in seeds), 4),
            by_seed=[
                {key: each[key] for key in ("seed", "positions", "cold", "seconds", "ours", name)} for each in seeds
            ],
        )
        for name in BASELINES
    ]
    report.write("next_item", found, options.out)


if __name__ == "__main__":
    main()
