"""A head of your own: two layers that say of a whole document which of three moods it has.

`python head.py MODEL OUT` takes a model folder, as a run exports it, trains the head and the model below it on
moods.jsonl, and writes both: OUT/ opens in transformers, OUT/heads/ holds the head, and load_decoder(OUT) finds it.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from posttrain.compute.collective import Ranks
from posttrain.compute.engine import Engine, ModelFunctions
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.export import export_model
from posttrain.model.forward import forward, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.reward import MultiTaskLoss, PointwiseLoss
from posttrain.model.optim import adamw
from posttrain.model.weights import hf_tensors

MOODS = ("joy", "anger", "fear")


class Moods(torch.nn.Sequential):
    """[S, hidden_size] -> [S, 3] logits; a head is any module that is made with the hidden size."""

    def __init__(self, hidden_size: int):
        super().__init__(torch.nn.Linear(hidden_size, 16), torch.nn.Tanh(), torch.nn.Linear(16, len(MOODS)))


def train(model_folder: str, out: str, *, steps: int = 60) -> list[float]:
    """The loss of every step."""
    tokenizer, units = BaseHFModelTokenizer(model_folder), []
    for row in map(json.loads, (Path(__file__).parent / "moods.jsonl").open()):
        ids = tokenizer.prompt([{"role": "user", "content": row["text"]}])
        labels = {mood: float(row["mood"] == mood) for mood in MOODS}
        units.append((replace(shift(ids, [1.0] * len(ids)), fields=labels),))
    batches = [collate(each, pack_tokens=256) for each in pack(units, pack_tokens=256)]
    model = load_decoder(model_folder, heads={"moods": "head:Moods"})  # module:name, found as a reward's is
    functions = ModelFunctions(forward=forward, loss_sum=loss_sum, named_weights=hf_tensors)
    one = Ranks(rank=0, world_size=1, meeting="", timeout_s=60, device=torch.device("cpu"))
    optimizer = adamw(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    engine = Engine(model, optimizer, ranks=one, functions=functions, lr_scale=lambda step: 1.0, max_grad_norm=1.0)
    mood = {"kind": "bce", "head": "moods", "outputs": len(MOODS)}
    loss = MultiTaskLoss(parts=tuple((1.0, PointwiseLoss(label=m, column=n, **mood)) for n, m in enumerate(MOODS)))
    losses = [engine.train_step(step, batches, loss, denominator=len(units))["loss"] for step in range(steps)]
    Path(out).mkdir(parents=True)
    export_model(model, out, like=model_folder)
    return losses


if __name__ == "__main__":
    print("loss", *[f"{loss:.3f}" for loss in train(*sys.argv[1:3])])
