"""How much of a second GPU arrives? Whole optimizer steps of one policy rank and of two, each with the same share.

Every rank is a PolicyRank in a process of its own, as in a run but without Ray: SFT on packs of 16,384 tokens of
skewed documents, all in the loss, bfloat16 beside float32 masters, random Qwen3-shaped weights. Efficiency is the two
ranks' tokens a second over twice one rank's. Also times one rank at several sizes: tokens a second, exact MFU, memory.

    python -m benchmarks.fsdp_scaling [--size 1.7b] [--ranks 1 2] [--packs 2] [--steps 6] [--out FILE]
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decoder import documents
from benchmarks.report import row, write
from benchmarks.shapes import SIZES, hf_config

T = 16_384


def write_model(folder: Path, size: str, device: str) -> str:
    """A published model folder of random weights, bfloat16."""
    import torch

    from posttrain import storage
    from posttrain.model.decoder import Decoder
    from posttrain.model.export import write_weights
    from posttrain.model.families import decoder_config

    with torch.device("meta"):
        model = Decoder(decoder_config(hf_config(size)))
    model = model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    made = folder / "made"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(hf_config(size)))
    write_weights(made, model)
    storage.publish(made, str(folder / "model"))
    return str(folder / "model")


def packs_of(step: int, rank: int, count: int, vocab: int) -> list[Any]:
    """The rank's share of a step: `count` packs of T tokens."""
    from posttrain.data.sample import shift
    from posttrain.data.types import Pack

    found = []
    for number in range(count):
        seed = 1000 * step + 10 * rank + number
        samples = [shift(ids, np.ones(len(ids))) for ids in documents(T, seed, vocab)]
        found.append(Pack(samples=tuple(samples), num_units=len(samples)))
    return found


def be_rank(rank: int, ranks: int, uri: str, options: dict[str, Any], pipe: Any) -> None:
    """Train in this process and send each step's numbers; rank 0 first sends where it waits."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    import torch

    from posttrain.compute.collective import MeetingPoint
    from posttrain.compute.mesh import Sizes
    from posttrain.model.losses.sft import SFTLoss
    from posttrain.workflow.policy_rank import PolicyRank
    from posttrain.workflow.training import Training

    training = Training(
        num_steps=100,
        lr=1e-5,
        schedule="constant",
        warmup_steps=0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
        pack_tokens=T,
        activation_checkpointing=options["activation_checkpointing"],
    )
    made = PolicyRank(
        rank=rank, sizes=Sizes(data=ranks), model_uri=uri, backend="posttrain", training=training, reference=False
    )
    if rank == 0:
        made.meeting = MeetingPoint("127.0.0.1")
        pipe.send(made.meeting.address)
    costs = made.join(pipe.recv(), 300.0)
    torch.cuda.reset_peak_memory_stats()
    vocab, steps = SIZES[options["size"]][-1], []
    for step in range(options["steps"] + 2):  # the first two compile
        packs = packs_of(step, rank, options["packs"], vocab)
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        metrics = made.train_step(step, packs, SFTLoss(), float(T * options["packs"] * ranks))
        end.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        mfu = costs.metrics(packs, seconds, ranks=1, pack_tokens=T).get("perf/mfu")
        steps.append({"s": seconds, "loss": metrics["loss"], "mfu": mfu})
    pipe.send({"steps": steps[2:], "peak_gib": torch.cuda.max_memory_allocated() / 2**30})


def run(ranks: int, uri: str, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of all ranks together, by the median step of rank 0, its MFU and its memory."""
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        children.append(context.Process(target=be_rank, args=(rank, ranks, uri, options, theirs)))
        children[-1].start()
        theirs.close()
        pipes.append(ours)
    address = pipes[0].recv()
    for pipe in pipes:
        pipe.send(address)
    found = [pipe.recv() for pipe in pipes]
    for child in children:
        child.join()
    steps = found[0]["steps"]
    seconds = float(np.median([step["s"] for step in steps]))
    return {
        "tokens_per_s": round(ranks * options["packs"] * T / seconds, 1),
        "step_s": round(seconds, 4),
        "all_s": [round(step["s"], 4) for step in steps],
        "mfu_exact": round(float(np.median([step["mfu"] for step in steps])), 4) if steps[0]["mfu"] else None,
        "peak_gib": [round(each["peak_gib"], 2) for each in found],
        "losses": [round(step["loss"], 4) for step in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7b", choices=SIZES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--packs", type=int, default=2, help="micro-batches of a rank in a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--activation-checkpointing", default="none")
    parser.add_argument("--out")
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        uri = write_model(Path(folder), options["size"], "cuda")
        found = {ranks: run(ranks, uri, options) for ranks in options["ranks"]}
    least = min(found)
    workload = (
        f"Qwen3 {options['size']}, SFT, {options['packs']} packs of {T} tokens a rank and step, bfloat16 + masters"
    )
    rows = [
        row(
            "fsdp_scaling",
            f"{workload}, {ranks} ranks; baseline: {ranks / least:g} times the tokens of {least}",
            ours=each["tokens_per_s"],
            baseline=found[least]["tokens_per_s"] * ranks / least,
            unit="tokens/s",
            measured=each,
        )
        for ranks, each in found.items()
    ]
    write("fsdp_scaling", rows, options["out"])


if __name__ == "__main__":
    main()
