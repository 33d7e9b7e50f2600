"""Does a decoder over events rank the next item better than what is simpler? Three worlds, every ranker on each.

Ours is configs/events_sft.yaml, trained by the steps of its flow; popularity, item-kNN and SASRec read the same
events before the cutoff. All rank the whole catalogue, cold items included, at every play since the cutoff, after all
that lies before it. `truth` ranks by the world's own probabilities: no ranker can do better. Writes
benchmarks/results/next_item.json after every seed.

    python -m benchmarks.next_item [--seeds 0 1 2] [--out FILE]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.inputs import prepared
from benchmarks.next_item_baselines import item_knn, popularity, sasrec
from posttrain import storage
from posttrain.config_file import load_config
from posttrain.data.event_world import Event, World
from posttrain.data.event_world_rows import plain_items, schema, world_and_events
from posttrain.data.events import rows
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.item_scores import item_scores
from posttrain.model.load import load_decoder
from posttrain.workflow.ranking import ranking_metrics
from steps.train import train

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


def trained(seed: int, folder: Path, changes: dict[str, Any]) -> str:
    """Train as the config says, but for its seed, by the steps of the flow in one process; the folder of the model."""
    path = str(ROOT / "configs" / "events_sft.yaml")
    config = load_config(json.dumps({"base": path, "seed": seed, **changes}))
    done = train(config, **prepared(config, folder).plain(), recipe=True)
    assert done is not None
    return str(storage.fetch(done["model_uri"]))


def measure(seed: int, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Every ranker's metrics in the world of a seed, and NDCG@10 on warm items alone."""
    start = time.monotonic()
    model = trained(seed, folder, changes)
    seconds = time.monotonic() - start
    world = world_and_events(seed)[0]
    scores, targets, cold = baseline_scores(world, seed)
    scores["ours"] = our_scores(model, world, seed)
    metrics = {name: ranking_metrics(each, targets) for name, each in scores.items()}
    for name, each in scores.items():
        metrics[name] |= {"ndcg@10_warm": ranking_metrics(each[~cold], targets[~cold])[JUDGED]}
    rounded = {name: {key: round(value, 4) for key, value in each.items()} for name, each in metrics.items()}
    return {"seed": seed, "positions": len(targets), "cold": int(cold.sum()), "seconds": round(seconds), **rounded}


def described(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every baseline, of the seeds so far."""
    return [
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


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line a ranker, NDCG@10 of every seed, and means; the line of `truth` has its mean alone."""
    by_name = {name: [each[name] for each in row["by_seed"]] for row, name in zip(results, BASELINES, strict=True)} | {
        "ours": [each["ours"] for each in results[0]["by_seed"]]
    }
    seeds = [each["seed"] for each in results[0]["by_seed"]]
    head = ["ranker", *(f"NDCG@10, seed {seed}" for seed in seeds), "mean", "of known items", "Recall@10", "MRR"]
    lines = [head, ["---"] * len(head)]
    for name, found in by_name.items():
        means = [fmean(each[key] for each in found) for key in (JUDGED, f"{JUDGED}_warm", "recall@10", "mrr")]
        lines.append([name, *(f"{value:.3f}" for value in [*(each[JUDGED] for each in found), *means])])
    lines.append(["truth", *[""] * len(seeds), f"{results[0]['truth']:.3f}", "", "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--changes", type=json.loads, default={}, help="of the config, as JSON; for trying")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    seeds: list[dict[str, Any]] = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(measure(seed, Path(folder), options.changes))
        print(json.dumps(seeds[-1]), flush=True)
        report.write("next_item", described(seeds), options.out)


if __name__ == "__main__":
    main()
