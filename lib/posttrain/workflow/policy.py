"""The policy: SPMD ranks that hold the model and train it in step, and the group that drives them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints, read_tensors
from posttrain.compute.collective import MeetingPoint, Ranks
from posttrain.compute.engine import Engine
from posttrain.compute.mesh import Sizes, make_mesh
from posttrain.compute.weight_sync import digest
from posttrain.compute.workers import ActorGroup, node_address
from posttrain.data.batch import collate
from posttrain.data.pack import attention_cost, deal
from posttrain.data.types import Pack
from posttrain.model.backend import backend_of
from posttrain.model.decoder import Decoder
from posttrain.model.export import join_export
from posttrain.model.flops import FlopCounts, flop_counts, mfu, peak_flops
from posttrain.model.forward import forward, loss_sum
from posttrain.model.losses import Loss
from posttrain.model.moe import router_metrics
from posttrain.model.optim import adamw
from posttrain.model.schedule import lr_scale
from posttrain.workflow.place import place


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
    sharded: bool = False
    """Whether the ranks hold shards, and so must go through a step together."""

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
    """One rank, in a process of its own. All hold equal weights, or each its shard; rank 0 writes and sends them."""

    def __init__(self, *, rank: int, sizes: Sizes, model_uri: str, backend: str, training: Training, reference: bool):
        """
        Args:
            backend: see model/backend.py.
            reference: keep a frozen copy of the starting weights and score batches with it.
        """
        self.rank, self.sizes = rank, sizes
        self.model_uri, self.training, self.has_reference = model_uri, training, reference
        self.backend = backend_of(backend)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        split = sizes.world > sizes.data or sizes.expert > 1
        # Small models on CPUs are held whole: a gather and a reduce for every block would take longer than the block.
        self.sharded = split or (sizes.world > 1 and self.device.type == "cuda" and backend == "posttrain")

    def address(self) -> str:
        """host:port on this rank's machine where rank 0 waits for the others."""
        self.meeting = MeetingPoint(node_address())
        return self.meeting.address

    def join(self, address: str, timeout_s: float) -> Costs:
        """Meet the other ranks, load the model, make the engine; return what packs cost it."""
        training = self.training
        ranks = Ranks(
            rank=self.rank,
            world_size=self.sizes.world,
            meeting=self.meeting if self.rank == 0 else address,
            timeout_s=timeout_s,
            device=self.device,
        )
        self.folder = storage.fetch(self.model_uri)
        options: dict[str, Any] = {"device": self.device}
        if self.sharded:
            mesh = make_mesh(self.sizes, world=self.sizes.world, device_type=self.device.type)
            options["place"] = partial(place, mesh=mesh)
        model = self.backend.load(self.folder, **options)
        self.reference: nn.Module | None = None
        if self.has_reference:
            self.reference = self.backend.load(self.folder, **options).requires_grad_(False)
        optimizer = adamw(model, lr=training.lr, betas=training.betas, weight_decay=training.weight_decay)
        scale = partial(
            lr_scale,
            schedule=training.schedule,
            warmup_steps=training.warmup_steps,
            num_steps=training.num_steps,
        )
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
            sharded=self.sharded,
            peak=peak_flops(torch.cuda.get_device_name()) if self.device.type == "cuda" else None,
        )

    def train_step(
        self, step: int, packs: Sequence[Pack], loss: Loss, denominator: float, repeats: int = 0
    ) -> dict[str, float]:
        """One optimizer step over this rank's share of the global batch; global metrics, and how experts were used.

        The last `repeats` packs count nothing (see Engine.train_step).
        """
        batches = [collate(pack, pack_tokens=self.training.pack_tokens).to(self.device) for pack in packs]
        if self.reference is not None:
            batches = [replace(b, ref_logprobs=self._ref_logprobs(b, loss.temperature)) for b in batches]
        metrics = self.engine.train_step(step, batches, loss, denominator=denominator, repeats=repeats)
        return metrics | {name: float(value) for name, value in router_metrics(self.engine.model).items()}

    def weights(self, dtype: str) -> dict[str, Tensor]:
        """Weights under Hugging Face names, on the CPU, cast to what the generator wants; none but on rank 0."""
        wanted, kept = getattr(torch, dtype), {}
        for name, tensor in self.engine.weights() if self.rank == 0 or self.sharded else ():
            if self.rank == 0:
                kept[name] = tensor.to("cpu", wanted)
        return kept

    def weights_digest(self, dtype: str) -> str:
        """digest() of weights(dtype), taken from what the ranks hold."""
        return digest(self.weights(dtype).items())

    def save(self, checkpoints: Checkpoints, step: int, state: dict[str, Any]) -> str:
        """Commit a checkpoint (rank 0 only: data-parallel replicas are equal)."""
        return checkpoints.save(step, self.engine.state(), state)

    def restore(self, uri: str) -> None:
        """Load a checkpoint; every rank reads and verifies it for itself."""
        self.engine.load_state(read_tensors(storage.fetch(uri)))

    def export(self, uri: str) -> str:
        """Publish the weights as a Hugging Face folder: rank 0 does, the others give it their shards."""
        if self.rank:
            if self.sharded and not storage.exists(storage.join(uri, "manifest.json")):
                join_export(self.engine.model)
            return uri
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

    def __init__(self, group: ActorGroup, costs: Costs, *, sizes: Sizes, pack_tokens: int, timeout_s: float):
        self.group, self.costs, self.pack_tokens, self.timeout_s = group, costs, pack_tokens, timeout_s
        self.sizes = sizes

    @staticmethod
    async def launch(
        *,
        sizes: Sizes,
        model_uri: str,
        backend: str,
        training: Training,
        reference: bool,
        timeout_s: float,
        hardware: dict[str, Any],
    ) -> "Policy":
        """Start the ranks, let them find each other, and load the model."""
        same = {"model_uri": model_uri, "backend": backend, "training": training, "reference": reference}
        per_rank = [{"rank": r, "sizes": sizes, **same} for r in range(sizes.world)]
        group = ActorGroup("policy", PolicyRank, per_rank, **hardware)
        address = await group.call_one(0, "address", timeout_s=timeout_s)
        costs, *_ = await group.call("join", address, timeout_s, timeout_s=timeout_s)
        return Policy(group, costs, sizes=sizes, pack_tokens=training.pack_tokens, timeout_s=timeout_s)

    async def train_step(self, step: int, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Deal the global batch to the ranks and take one optimizer step; metrics are means per loss token."""
        calls = self._calls(step, packs, loss, sum(pack.loss_tokens for pack in packs))
        metrics, *_ = await self.group.call_each("train_step", calls, timeout_s=self.timeout_s)
        seconds = metrics["time/forward_backward_s"] + metrics["time/optimizer_s"]
        return metrics | self.costs.metrics(packs, seconds, ranks=len(calls), pack_tokens=self.pack_tokens)

    def start_weights(self, dtype: str) -> Any:
        """Begin to gather the weights; a handle to rank 0's, to pass to the generators unread."""
        first, *_ = [self.group.start(rank, "weights", dtype) for rank in range(len(self.group))]
        return first

    async def weights_digest(self, dtype: str) -> str:
        """digest() of the weights that start_weights() sends."""
        return (await self.group.call("weights_digest", dtype, timeout_s=self.timeout_s))[0]

    async def save(self, checkpoints: Checkpoints, step: int, state: dict[str, Any]) -> str:
        return await self.group.call_one(0, "save", checkpoints, step, state, timeout_s=self.timeout_s)

    async def restore(self, uri: str) -> None:
        await self.group.call("restore", uri, timeout_s=self.timeout_s)

    async def export(self, uri: str) -> str:
        return (await self.group.call("export", uri, timeout_s=self.timeout_s))[0]

    def _calls(self, step: int, packs: Sequence[Pack], loss: Loss, denominator: float) -> list[tuple[tuple, dict]]:
        """What every rank is told. One that has a pack less than others gets the cheapest of all beside its own, to
        count nothing: ranks of a sharded model go through a step together."""
        shares = deal(packs, ranks=self.sizes.data, cost=self.costs.of)
        most, cheapest = max(map(len, shares)), min(packs, key=self.costs.of)
        calls = []
        for rank in range(self.sizes.world):
            share = shares[self.sizes.data_rank(rank)]
            missing = most - len(share) if self.costs.sharded else 0
            calls.append(((step, share + [cheapest] * missing, loss, denominator, missing), {}))
        return calls
