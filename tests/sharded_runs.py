"""What a job computes, on one rank or on a mesh of them, in a form that can be compared: whole tensors and numbers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors import engine_over
from posttrain.compute.collective import Ranks, clip_grad_norm
from posttrain.compute.mesh import Sizes, make_mesh
from posttrain.data.batch import collate
from posttrain.data.context import with_share
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack
from posttrain.model.collectives import Group, fill, full
from posttrain.model.context import gather_tokens
from posttrain.model.forward import forward, logits, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.lora import LoRA, adapters, add_lora, reset_adapters
from posttrain.model.losses.dpo import DPOLoss
from posttrain.model.losses.reward import BradleyTerryLoss
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.weights import hf_tensors
from posttrain.workflow.place import place

PACK_TOKENS = 48
LOSSES = {
    "sft": SFTLoss(),
    "dpo": DPOLoss(beta=0.5, reference_free=True),
    "reward": BradleyTerryLoss(),
}


def packs_of(seed: int, vocab_size: int) -> list[Pack]:
    """Four packs of pairs; documents of unlike length, and tokens without loss among those with."""
    rng = np.random.default_rng(seed)

    def document():
        ids = rng.integers(0, vocab_size, rng.integers(6, 12)).tolist()
        mask = (rng.random(len(ids)) < 0.7).astype(float)
        mask[-1] = 0.5
        return shift(ids, mask.tolist())

    packs = pack([(document(), document()) for _ in range(12)], pack_tokens=PACK_TOKENS)
    assert len(packs) >= 4
    return packs[:4]


def run(ranks: Ranks, folder: str, sizes: dict[str, int], losses: list[str], lora: bool = False) -> dict[str, Any]:
    """Load `folder` onto the mesh, then for each loss take the gradient, and with the first train for three steps."""
    mesh = None
    if ranks.world_size > 1:
        mesh = make_mesh(Sizes(**sizes), world=ranks.world_size, device_type="cpu")

    def prepare(model) -> None:
        if lora:
            add_lora(model, LoRA(rank=2, targets=("all-linear",)), seed=5)
        if mesh is not None:
            place(model, mesh)

    model = load_decoder(folder, heads={"score": 1}, seed=3, place=prepare)
    reset_adapters(model)
    for number, (_, _, adapter) in enumerate(adapters(model)):  # they start at zero, where half of them has no gradient
        fill(adapter.b, 0.1 * torch.randn(adapter.b.shape, generator=torch.Generator().manual_seed(number)))
    share = slice(None) if mesh is None else slice(mesh.sizes.data_rank(ranks.rank), None, mesh.sizes.data)

    def batch_of(each: Pack) -> Batch:
        whole, on = collate(each, pack_tokens=PACK_TOKENS), Sizes(data=1) if mesh is None else mesh.sizes
        return with_share(whole, rank=on.context_rank(ranks.rank), ranks=on.context)

    found: dict[str, Any] = {"held": {name: tuple(held(p).shape) for name, p in model.named_parameters()}}
    packs = packs_of(0, model.config.vocab_size)
    batches = [batch_of(each) for each in packs]
    found["logits"] = logits(model, batches[0])
    if mesh is not None:
        found["logits"] = gather_tokens(found["logits"], Group.of(mesh.context))
    output = forward(model, batches[1])
    found["logprobs"], found["entropy"], found["scores"] = output.logprobs, output.entropy, output.scores["score"]
    for name in losses:
        found[name] = gradient(ranks, model, batches[share], LOSSES[name])
    engine = engine_over(model, hf_tensors, ranks)
    found["steps"] = []
    for step in range(3):
        packs = packs_of(step, model.config.vocab_size)
        total = sum(each.loss_tokens for each in packs)
        mine = [batch_of(each) for each in packs[share]]
        metrics = engine.train_step(step, mine, LOSSES[losses[0]], denominator=total)
        found["steps"].append({key: value for key, value in metrics.items() if not key.startswith("time/")})
        found["logprobs_after"] = engine.logprobs(batches[1], temperature=1.0)  # and the next step sees new weights
    found["weights"] = {name: tensor.clone() for name, tensor in engine.weights()}
    return {key: value if ranks.rank == 0 or key in ("held", "steps") else None for key, value in found.items()}


def gradient(ranks: Ranks, model, batches: list[Batch], loss_fn) -> dict[str, Any]:
    """Metric sums of all ranks, the whole gradient by name, its norm, and what clipping leaves of it."""
    sums: dict[str, float] = {}
    for batch in batches:
        loss, metrics = loss_sum(model, batch, loss_fn, scale=1 / 50)
        loss.backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    ranks.sum_gradients(model.parameters())
    whole = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = clip_grad_norm(model.parameters(), 0.1)
    clipped = torch.stack([full(p.grad).square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    model.zero_grad(set_to_none=True)
    names = sorted(sums)
    if ranks.world_size > 1:  # a rank that has no row of loss knows no name
        known: list[list[str]] = [[] for _ in range(ranks.world_size)]
        torch.distributed.all_gather_object(known, names)
        names = max(known, key=len)
    metrics = dict(zip(names, ranks.sum([sums.get(name, 0.0) for name in names]), strict=True))
    return {"metrics": metrics, "gradient": whole, "norm": norm, "clipped": clipped}


def held(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


def run_all(ranks: Ranks, sizes: dict[str, int], calls: list[list[Any]]) -> dict[str, Any]:
    """run() for every [name, folder, losses]."""
    return {name: run(ranks, folder, sizes, losses, lora=name.startswith("lora")) for name, folder, losses in calls}
