"""Twenty steps of the SFT recipe equal a plain transformers loop that packs nothing."""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from posttrain import storage
from posttrain.compute.mesh import Sizes
from posttrain.data.loader import loading
from posttrain.data.types import Pack
from posttrain.model.schedule import lr_scale
from posttrain.model.weights import hf_tensors
from posttrain.workflow.policy_rank import PolicyRank
from runs import prepared, recipe_config
from steps.recipes import build_of, loss_of, training_of
from steps.streams import open_stream

STEPS = 20


def ours(config, model_uri: str, global_batches: list[list[Pack]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the weights after the last step, of a policy rank: packed, its own decoder, head and engine."""
    training, build = training_of(config, "sft"), build_of(config, None)
    shared = {"backend": "posttrain", "training": training, "reference": False, "build": build}
    rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=model_uri, **shared)
    rank.address()
    rank.join("", 60.0)
    loss, losses = loss_of(config, "sft"), []
    for step, packs in enumerate(global_batches):
        losses.append(rank.train_step(step, packs, loss, sum(pack.loss_tokens for pack in packs))["loss"])
    return losses, dict(hf_tensors(rank.engine.model))


def theirs(config, model_uri: str, global_batches: list[list[Pack]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same of transformers' class and torch's optimizer: a document at a time, the loss over all its tokens."""
    model = AutoModelForCausalLM.from_pretrained(storage.fetch(model_uri), dtype=torch.float32)
    optim = config.optim
    named = [p for p in model.parameters()]
    decay, rest = [p for p in named if p.ndim >= 2], [p for p in named if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
    facts = {"schedule": optim.schedule, "warmup_steps": optim.warmup_steps, "num_steps": optim.num_steps}
    losses = []
    for step, packs in enumerate(global_batches):
        samples = [sample for pack in packs for sample in pack.samples]
        tokens, total = sum(float(s.loss_mask.sum()) for s in samples), 0.0
        for sample in samples:
            logits = model(torch.tensor(sample.input_ids[None].astype("int64"))).logits[0]
            each = cross_entropy(logits, torch.tensor(sample.target_ids.astype("int64")), reduction="none")
            loss = (each * torch.tensor(sample.loss_mask)).sum() / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_scale(step, **facts)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_twenty_steps_equal_a_plain_transformers_loop_without_packing(tmp_path: Path):
    changes = {"optim.num_steps": STEPS, "optim.lr": 1e-3, "optim.schedule": "linear", "optim.weight_decay": 0.1}
    config = recipe_config("sft", **changes)
    base = prepared(tmp_path, config)
    stream = open_stream(config, tokens_uri=base.tokens_uri, model_uri=base.model_uri, stage="sft")
    with loading(stream) as loader:
        global_batches = [loader.take(config.method.packs_per_step) for _ in range(STEPS)]
    assert max(len(pack.samples) for packs in global_batches for pack in packs) > 3, "packed, or it proves nothing"

    (mine, weights), (plain, expected) = (run(config, base.model_uri, global_batches) for run in (ours, theirs))
    assert mine[-1] < mine[0] - 0.1
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-4)
    tied = {name: tensor for name, tensor in expected.items() if name in weights}
    assert weights.keys() == tied.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, tied[name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
