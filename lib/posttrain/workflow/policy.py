"""The policy: SPMD ranks that hold the model and train it in step, and the group that drives them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain import faults, storage
from posttrain.compute.collective import MeetingPoint, Ranks
from posttrain.compute.committed import open_checkpoint
from posttrain.compute.engine import Engine
from posttrain.compute.shard_file import read_parts
from posttrain.compute.snapshot import Snapshot
from posttrain.compute.weight_sync import digest
from posttrain.compute.workers import ActorGroup, node_address
from posttrain.data.batch import collate
from posttrain.data.pack import attention_cost, deal
from posttrain.data.types import Pack
from posttrain.model.backend import backend_of
from posttrain.model.decoder import Decoder
from posttrain.model.flops import FlopCounts, flop_counts, mfu, peak_flops
from posttrain.model.forward import forward, loss_sum
from posttrain.model.losses import Loss
from posttrain.model.moe import router_metrics
from posttrain.model.optim import adamw
from posttrain.model.schedule import lr_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a policy is trained: the numbers of the optimizer and its schedule."""

    num_steps: int
    lr: float
    schedule: str
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    pack_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the driver needs to know of a model: what packs cost it, and what its device could do."""

    counts: FlopCounts | None
    """None for a model of unknown shape."""
    linear: float
    quadratic: float
    """Of attention_cost, for that model."""
    peak: float | None
    """FLOP/s of one device by its data sheet, None where unknown."""

    def of(self, pack: Pack) -> float:
        """FLOPs of a pack, forward and backward; in some other unit for a model of unknown shape."""
        if self.counts is None:
            return attention_cost(pack, linear=self.linear, quadratic=self.quadratic)
        rows = sum(int(np.count_nonzero(sample.loss_mask)) for sample in pack.samples)
        return self.counts.step([len(sample) for sample in pack.samples], rows)

    def metrics(self, packs: Sequence[Pack], seconds: float, *, ranks: int, pack_tokens: int) -> dict[str, float]:
        """Useful FLOP/s of one device in a step, as a number and, where its peak is known, as a share: exact (see
        model/flops.py), and by PaLM's convention at the length of a pack, for comparing with who reports that."""
        if self.counts is None:
            return {}
        total, tokens = sum(map(self.of, packs)), sum(pack.num_tokens for pack in packs)
        found = {"perf/tflops": total / seconds / ranks / 1e12}
        exact = mfu(total, seconds, ranks, self.peak)
        palm = mfu(self.counts.palm(tokens, pack_tokens), seconds, ranks, self.peak)
        return found if exact is None or palm is None else found | {"perf/mfu": exact, "perf/mfu_palm": palm}


class PolicyRank:
    """One rank, in a process of its own. All ranks hold equal weights; rank 0 also writes and sends them."""

    def __init__(
        self, *, rank: int, world_size: int, model_uri: str, backend: str, training: Training, reference: bool
    ):
        """
        Args:
            backend: see model/backend.py.
            reference: keep a frozen copy of the starting weights and score batches with it.
        """
        self.rank, self.world_size = rank, world_size
        self.model_uri, self.training, self.has_reference = model_uri, training, reference
        self.backend = backend_of(backend)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def address(self) -> str:
        """host:port on this rank's machine where rank 0 waits for the others."""
        self.meeting = MeetingPoint(node_address())
        return self.meeting.address

    def join(self, address: str, timeout_s: float) -> Costs:
        """Meet the other ranks, load the model, make the engine; return what packs cost it."""
        training = self.training
        ranks = Ranks(
            rank=self.rank,
            world_size=self.world_size,
            meeting=self.meeting if self.rank == 0 else address,
            timeout_s=2 * timeout_s,  # the driver's deadline comes first, and knows who did not answer
            device=self.device,
        )
        self.folder = storage.fetch(self.model_uri)
        model = self.backend.load(self.folder, device=self.device)
        self.reference: nn.Module | None = None
        if self.has_reference:
            self.reference = self.backend.load(self.folder, device=self.device).requires_grad_(False)
        optimizer = adamw(model, lr=training.lr, betas=training.betas, weight_decay=training.weight_decay)
        scale = partial(
            lr_scale,
            schedule=training.schedule,
            warmup_steps=training.warmup_steps,
            num_steps=training.num_steps,
        )
        self.snapshot = Snapshot(rank=self.rank, world_size=self.world_size)
        self.engine = Engine(
            model,
            optimizer,
            ranks=ranks,
            forward=forward,
            loss_sum=loss_sum,
            named_weights=self.backend.tensors,
            lr_scale=scale,
            max_grad_norm=training.max_grad_norm,
        )
        return Costs(
            counts=flop_counts(model) if isinstance(model, Decoder) else None,
            # In multiply-adds of a forward pass, all that a model of unknown shape tells.
            linear=float(sum(p.numel() for p in model.parameters())),
            quadratic=model.config.attention_width,
            peak=peak_flops(torch.cuda.get_device_name()) if self.device.type == "cuda" else None,
        )

    def train_step(self, step: int, packs: Sequence[Pack], loss: Loss, denominator: float) -> dict[str, float]:
        """One optimizer step over this rank's share of the global batch; global metrics, and how experts were used."""
        faults.point("policy.train_step", self.rank)
        batches = [collate(pack, pack_tokens=self.training.pack_tokens).to(self.device) for pack in packs]
        if self.reference is not None:
            batches = [replace(b, ref_logprobs=self._ref_logprobs(b, loss.temperature)) for b in batches]
        metrics = self.engine.train_step(step, batches, loss, denominator=denominator)
        return metrics | {name: float(value) for name, value in router_metrics(self.engine.model).items()}

    def weights(self, dtype: str) -> dict[str, Tensor]:
        """Weights under Hugging Face names, on the CPU, cast to what the generator wants."""
        wanted = getattr(torch, dtype)
        return {name: tensor.to("cpu", wanted) for name, tensor in self.engine.weights()}

    def weights_digest(self, dtype: str) -> str:
        """digest() of weights(dtype), taken from what this rank holds."""
        return digest(self.weights(dtype).items())

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape and bytes of every whole tensor of the training state."""
        state = self.engine.state()
        return {name: (tuple(each.shape), each.numel() * each.element_size()) for name, each in state.items()}

    def begin_save(self, folder: str) -> None:
        """Copy this rank's share of the state to host memory and start to write it into `folder`."""
        self.snapshot.begin(self.engine.state(), folder)

    def save_result(self) -> dict[str, Any] | None:
        """See Snapshot.result()."""
        return self.snapshot.result()

    def restore(self, uri: str) -> None:
        """Fill this rank's share of the state from a checkpoint, by whatever ranks it was written.

        Raises:
            DamagedError: what this rank reads is not what was committed.
            CheckpointError: it is of another model or optimizer; refused before its moments take memory.
        """
        found = open_checkpoint(uri)
        found.index.only("model.").check_same(self.engine.parameters(), where=uri)
        state = self.engine.state_to_fill()
        found.index.check_same(state, where=uri)
        read_parts(found.folder, found.index.stored(), state)

    def export(self, uri: str) -> str:
        """Publish the weights as a Hugging Face folder (rank 0 only)."""
        if not storage.exists(storage.join(uri, "manifest.json")):
            with storage.staging(uri) as folder:
                facts = self.backend.export(self.engine.model, folder, like=self.folder)
                storage.publish(folder, uri, **facts)
        return uri

    def _ref_logprobs(self, batch: Any, temperature: float) -> Tensor:
        with torch.no_grad():
            return forward(self.reference, batch, temperature=temperature).logprobs  # pyright: ignore[reportArgumentType]


class Policy:
    """The driver's side of the ranks: one method a phase, whatever the mesh below."""

    def __init__(self, group: ActorGroup, costs: Costs, *, pack_tokens: int, timeout_s: float):
        self.group, self.costs, self.pack_tokens, self.timeout_s = group, costs, pack_tokens, timeout_s

    @staticmethod
    async def launch(
        *,
        ranks: int,
        model_uri: str,
        backend: str,
        training: Training,
        reference: bool,
        timeout_s: float,
        hardware: dict[str, Any],
    ) -> "Policy":
        """Start the ranks, let them find each other, and load the model."""
        same = {"model_uri": model_uri, "backend": backend, "training": training, "reference": reference}
        per_rank = [{"rank": r, "world_size": ranks, **same} for r in range(ranks)]
        group = ActorGroup("policy", PolicyRank, per_rank, **hardware)
        address = await group.call_one(0, "address", timeout_s=timeout_s)
        costs, *_ = await group.call("join", address, timeout_s, timeout_s=timeout_s)
        return Policy(group, costs, pack_tokens=training.pack_tokens, timeout_s=timeout_s)

    async def train_step(self, step: int, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Deal the global batch to the ranks and take one optimizer step; metrics are means per loss token."""
        denominator = sum(pack.loss_tokens for pack in packs)
        ranks = len(self.group)
        calls = [((step, share, loss, denominator), {}) for share in deal(packs, ranks=ranks, cost=self.costs.of)]
        metrics, *_ = await self.group.call_each("train_step", calls, timeout_s=self.timeout_s)
        seconds = metrics["time/forward_backward_s"] + metrics["time/optimizer_s"]
        return metrics | self.costs.metrics(packs, seconds, ranks=ranks, pack_tokens=self.pack_tokens)

    async def export(self, uri: str) -> str:
        return await self.group.call_one(0, "export", uri, timeout_s=self.timeout_s)
