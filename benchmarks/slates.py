"""Beyond text, on a simulated service of known truth: does GRPO raise the metric, do semantic IDs reach cold items?

Two questions, three seeds, a World each:
- slates: configs/events_grpo.yaml; the warmed-up policy beside the same after GRPO, on held-out visits.
- cold: a model of single next items with semantic IDs beside one with an id an item, equal but for the names; NDCG@10
  of the events after the cutoff whose item was released after it, among all items that were out at that moment. Both
  give an item that training never had its share of what its name's beginning is worth (rank_items(new=...)); an id an
  item has no beginning, so that all new items are worth the same.

    python -m benchmarks.slates [--seeds 0 1 2] [--parts slates cold] [--out FILE]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.inputs import prepared
from benchmarks.report import RESULTS, row
from benchmarks.rl_learning import ROOT, Start
from posttrain.data import event_slates
from posttrain.data.item_tokens import ItemTokens, PlainItems
from posttrain.data.train_tokenizer import word_tokenizer
from posttrain.data.types import Row
from posttrain.workflow.ranking import ranking_metrics

SFT: dict[str, Any] = {"base": str(ROOT / "configs" / "events_sft.yaml"), "optim.num_steps": 200}
BEAM, ASKED = 32, 100


def semantic(seed: int) -> ItemTokens:
    """Codes of all items, the cold ones added to centroids that never saw them."""
    cold = np.flatnonzero(event_slates.world(seed).cold)
    return event_slates.item_ids(seed).add(cold.tolist(), event_slates.world(seed).item_embeddings[cold])


def plain(seed: int) -> ItemTokens:
    """A token an item; those of cold items are in the vocabulary, and never trained."""
    return PlainItems(range(len(event_slates.world(seed).cold)))


def semantic_tokenizer(folder: Path, seed: int) -> None:
    """model.fresh.tokenizer: its vocabulary has every code, so cold items too."""
    word_tokenizer(event_slates.schema(semantic(seed)).vocabulary, folder)


def plain_tokenizer(folder: Path, seed: int) -> None:
    """model.fresh.tokenizer: a token an item, cold ones among them."""
    word_tokenizer(event_slates.schema(plain(seed)).vocabulary, folder)


def semantic_rows(seed: int) -> list[Row]:
    """data.sources: conversations before the cutoff, items by their codes."""
    return _rows(seed, semantic(seed), "before")


def semantic_held_out(seed: int) -> list[Row]:
    """data.held_out: of 64 members."""
    return _rows(seed, semantic(seed), "after")[:64]


def plain_rows(seed: int) -> list[Row]:
    """data.sources: the same, items by their numbers."""
    return _rows(seed, plain(seed), "before")


def plain_held_out(seed: int) -> list[Row]:
    """data.held_out: of the same members."""
    return _rows(seed, plain(seed), "after")[:64]


def _rows(seed: int, ids: ItemTokens, side: str) -> list[Row]:
    from posttrain.data.events import rows

    world = event_slates.world(seed)
    return list(rows(world.events(), event_slates.schema(ids), **{side: world.cutoff}))


def slates(folder: Path, seed: int) -> dict[str, Any]:
    """The metric and its guardrails before and after GRPO."""
    start = Start(folder, seed, {"base": str(ROOT / "configs" / "events_grpo.yaml")})
    learned = start.run("slates", {})
    parts = {when: start.found[when]["parts"] for when in ("before", "after")}
    mismatch = max(step["policy/mismatch_abs"] for step in start.metrics)
    return {**learned, "parts": parts, "mismatch_abs_max": mismatch}


def cold(folder: Path, seed: int) -> dict[str, Any]:
    """NDCG@10 on cold and on other items of both namings."""
    found: dict[str, Any] = {"seed": seed}
    for name, ids in (("semantic", semantic(seed)), ("plain", plain(seed))):
        start = time.monotonic()
        uri = _trained(folder / name, seed, name)
        found[name] = _ndcg(uri, seed, ids) | {"seconds": round(time.monotonic() - start)}
    return found


def _trained(folder: Path, seed: int, name: str) -> str:
    from posttrain.config_file import load_config
    from steps.train import train

    names = {"data.sources": "rows", "data.held_out": "held_out", "model.fresh.tokenizer": "tokenizer"}
    own = {key: f"benchmarks.slates:{name}_{function}" for key, function in names.items()}
    config = load_config(json.dumps(SFT | own | {"seed": seed}))
    done = train(config, **prepared(config, folder / "run").plain(), recipe=True)
    assert done is not None
    return done["model_uri"]


def _ndcg(uri: str, seed: int, ids: ItemTokens) -> dict[str, float]:
    """NDCG@10 of up to ASKED events of each kind, among the items that were out at their moments."""
    from posttrain import storage
    from posttrain.data.token_trie import trie_of
    from posttrain.data.tokenizer import BaseHFModelTokenizer
    from posttrain.model.load import load_decoder
    from posttrain.model.rank_items import rank_items

    world, folder = event_slates.world(seed), storage.fetch(uri)
    tokenizer = BaseHFModelTokenizer(folder)
    trie = trie_of([ids.tokens(item) for item in range(len(world.cold))], tokenizer.hf.get_vocab())
    visits = event_slates.visits(seed, after=True)
    taken = [event_slates.history(seed, member)[place] for member, place in visits]
    kinds = {"cold": True, "known": False}
    chosen = {
        kind: [n for n, e in enumerate(taken) if world.cold[e.item] == cold][:ASKED] for kind, cold in kinds.items()
    }
    found: dict[str, float] = {}
    for kind, places in chosen.items():
        prompts = [tokenizer.prompt(event_slates.visit(seed, *visits[n], ids)["messages"]) for n in places]
        ranked, logprobs = rank_items(
            load_decoder(folder), prompts, trie, k=BEAM, beam=BEAM, new=np.flatnonzero(world.cold).tolist()
        )
        scores = np.full((len(places), len(world.cold)), -np.inf)
        np.put_along_axis(scores, ranked, logprobs, axis=1)
        now = np.array([taken[n].time for n in places], "datetime64[us]")
        scores[world.release_times[None, :] > now[:, None]] = -np.inf
        targets = np.array([taken[n].item for n in places])
        found |= {f"ndcg_{kind}": round(ranking_metrics(scores, targets)["ndcg@10"], 4), f"events_{kind}": len(places)}
    return found


def _described(part: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    if part == "slates":
        ours, baseline = (fmean(each[when] for each in seeds) for when in ("after", "before"))
        unit = "held-out reward of a slate at temperature 1, mean of the seeds; baseline: the policy before RL"
        return row("slates", "configs/events_grpo.yaml", ours=ours, baseline=baseline, unit=unit, seeds=seeds)
    ours, baseline = (fmean(each[name]["ndcg_cold"] for each in seeds) for name in ("semantic", "plain"))
    unit = "NDCG@10 of cold items, mean of the seeds; baseline: an id an item"
    return row("cold_items", "next items after the cutoff", ours=ours, baseline=baseline, unit=unit, seeds=seeds)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: of slates a line a part of the reward, before and after RL; of cold items a line a kind of names."""
    found = {row["benchmark"]: row["seeds"] for row in results}
    lines = []
    if seeds := found.get("slates"):
        head = ["mean of a slate", *(f"seed {each['seed']}, before and after" for each in seeds)]
        lines += [head, ["---"] * len(head)]
        lines.append(["reward", *(f"{each['before']:.3f}, {each['after']:.3f}" for each in seeds)])
        for part in seeds[0]["parts"]["before"]:
            values = [[each["parts"][when][part] for when in ("before", "after")] for each in seeds]
            lines.append([f"`{part}`", *(f"{before:.3f}, {after:.3f}" for before, after in values)])
        lines.append([])
    if seeds := found.get("cold_items"):
        head = ["names", *(f"new items, seed {each['seed']}" for each in seeds), "new items", "known items"]
        lines += [head, ["---"] * len(head)]
        for name in ("semantic", "plain"):
            cold, known = ([each[name][f"ndcg_{kind}"] for each in seeds] for kind in ("cold", "known"))
            lines.append([name, *(f"{value:.3f}" for value in [*cold, fmean(cold), fmean(known)])])
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=("slates", "cold"), default=["slates", "cold"])
    parser.add_argument("--out", type=Path, default=RESULTS / "slates.json")
    options = parser.parse_args()
    results = {each["benchmark"]: each for each in json.loads(options.out.read_text())} if options.out.exists() else {}
    for part in options.parts:
        seeds: list[dict[str, Any]] = []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                seeds.append({"slates": slates, "cold": cold}[part](Path(folder), seed))
            print(json.dumps({"part": part, **seeds[-1]}), flush=True)
            found = _described(part, seeds)
            results[found["benchmark"]] = found
            options.out.write_text(json.dumps(list(results.values()), indent=2) + "\n")


if __name__ == "__main__":
    main()
