"""The policy: SPMD ranks that hold the model and train it in step, and the group that drives them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from posttrain import faults, storage
from posttrain.compute.collective import MeetingPoint, Ranks
from posttrain.compute.committed import open_checkpoint
from posttrain.compute.device import set_up_device
from posttrain.compute.engine import Engine, ModelFunctions
from posttrain.compute.master import Masters
from posttrain.compute.pool import Pool
from posttrain.compute.shard_file import read_parts
from posttrain.compute.snapshot import Snapshot
from posttrain.compute.step_timer import StepTimer
from posttrain.compute.weight_sync import digest
from posttrain.compute.workers import ActorGroup, node_address
from posttrain.data.batch import collate
from posttrain.data.pack import deal
from posttrain.data.types import Pack
from posttrain.model.backend import backend_of
from posttrain.model.decoder import Decoder
from posttrain.model.flops import flop_counts, peak_flops
from posttrain.model.forward import forward, loss_sum
from posttrain.model.lora import adapters_off
from posttrain.model.losses import Loss, count
from posttrain.model.moe import router_metrics
from posttrain.model.optim import adamw
from posttrain.model.schedule import lr_scale
from posttrain.workflow.costs import Costs
from posttrain.workflow.policy_model import (
    Build,
    build_policy,
    document_logprobs,
    taught_by,
    write_adapter,
)
from posttrain.workflow.straggler import Stragglers, imbalance


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
    precision: str = "auto"
    """float32; bfloat16: that of the model's computing, beside float32 masters (compute/master.py);
    bfloat16_stochastic: of all (StochasticAdamW); auto: bfloat16 on a GPU, float32 on a CPU."""
    activation_checkpointing: str = "none"
    """A mode of model/recompute.py."""
    deterministic: bool = False
    """See compute/device.py."""


class PolicyRank:
    """One rank, in a process of its own. All ranks hold equal weights; rank 0 also writes and sends them."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        model_uri: str,
        backend: str,
        training: Training,
        reference: bool,
        build: Build | None = None,
    ):
        """
        Args:
            backend: see model/backend.py.
            reference: score batches with the starting weights: with the adapters off, or by a frozen copy.
        """
        self.rank, self.world_size = rank, world_size
        self.model_uri, self.training, self.has_reference = model_uri, training, reference
        self.build = build or Build()
        self.backend = backend_of(backend)
        self.device = set_up_device(deterministic=training.deterministic)
        self.precision = training.precision
        if self.precision == "auto":
            self.precision = "bfloat16" if self.device.type == "cuda" else "float32"

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
        model, masters = self._model()
        self.reference: nn.Module | None = None
        if self.has_reference and self.build.lora is None:
            self.reference = self._frozen(self.model_uri)
        optimizer = adamw(
            model.parameters() if masters is None else masters,
            lr=training.lr,
            betas=training.betas,
            weight_decay=training.weight_decay,
            stochastic=self.precision == "bfloat16_stochastic",
        )
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
            functions=ModelFunctions(forward=forward, loss_sum=self._loss_sum(), named_weights=self.backend.tensors),
            lr_scale=scale,
            max_grad_norm=training.max_grad_norm,
            masters=masters,
        )
        return Costs(
            counts=flop_counts(model) if isinstance(model, Decoder) else None,
            # In multiply-adds of a forward pass, all that a model of unknown shape tells.
            linear=float(sum(p.numel() for p in model.parameters())),
            quadratic=model.config.attention_width,
            peak=peak_flops(torch.cuda.get_device_name()) if self.device.type == "cuda" else None,
        )

    def _model(self) -> tuple[Any, Masters | None]:
        """What is trained, in its precision."""
        dtype = torch.bfloat16 if self.precision == "bfloat16_stochastic" else torch.float32
        model = build_policy(self.backend, self.folder, self.build, device=self.device, dtype=dtype)
        masters = Masters(model) if self.precision == "bfloat16" else None
        if isinstance(model, Decoder):
            model.checkpoint_activations(self.training.activation_checkpointing)
        return self._compiled(model), masters

    def _frozen(self, uri: str) -> Any:
        """A model that is only read, in the precision of computing."""
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        model = self.backend.load(storage.fetch(uri), device=self.device, dtype=dtype)
        return self._compiled(model.requires_grad_(False))

    def _compiled(self, model: Any) -> Any:
        """The model, its blocks compiled where that pays: on a GPU."""
        if isinstance(model, Decoder) and self.device.type == "cuda":
            model.compile_blocks()
        return model

    def train_step(self, step: int, packs: Sequence[Pack], loss: Loss, denominator: float) -> dict[str, float]:
        """One optimizer step over this rank's share of the global batch; global metrics, and how experts were used."""
        timer = StepTimer(self.device)
        faults.point("policy.train_step", self.rank)
        batches = [collate(pack, pack_tokens=self.training.pack_tokens).to(self.device) for pack in packs]
        if self.has_reference:
            batches = [replace(b, ref_logprobs=self._ref_logprobs(b, loss.temperature)) for b in batches]
        timer.mark("prepare")
        metrics = self.engine.train_step(step, batches, loss, denominator=denominator, timer=timer)
        return metrics | {name: float(value) for name, value in router_metrics(self.engine.model).items()}

    def evaluate(self, packs: Sequence[Pack], loss: Loss, denominator: float) -> dict[str, float]:
        """Global metrics of packs that are not trained on."""
        batches = [collate(pack, pack_tokens=self.training.pack_tokens).to(self.device) for pack in packs]
        return self.engine.evaluate(batches, loss, denominator=denominator)

    def document_logprobs(self, packs: Sequence[Pack]) -> list[list[float]]:
        """Of each pack, the log p of every sample's trained tokens under the current weights, nats."""
        batches = (collate(pack, pack_tokens=self.training.pack_tokens).to(self.device) for pack in packs)
        return [document_logprobs(self.engine.model, batch) for batch in batches]

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
        self.engine.filled()

    def export(self, uri: str) -> str:
        """Publish the weights as a Hugging Face folder, adapters merged and beside them (rank 0 only)."""
        if not storage.exists(storage.join(uri, "manifest.json")):
            with storage.staging(uri) as folder:
                facts = self.backend.export(self.engine.model, folder, like=self.folder)
                if self.build.lora is not None:
                    write_adapter(self.engine.model, folder, lora=self.build.lora, base=self.model_uri)
                storage.publish(folder, uri, **facts)
        return uri

    def _loss_sum(self) -> Any:
        uri = self.build.teacher_uri
        return loss_sum if uri is None else taught_by(self._frozen(uri))

    def _ref_logprobs(self, batch: Any, temperature: float) -> Tensor:
        if self.reference is None:
            with adapters_off(self.engine.model):
                return self.engine.logprobs(batch, temperature=temperature)
        with torch.no_grad():
            return forward(self.reference, batch, temperature=temperature).logprobs  # pyright: ignore[reportArgumentType]


class Policy:
    """The driver's side of the ranks: one method a phase, whatever the mesh below."""

    def __init__(self, group: ActorGroup, costs: Costs, *, pack_tokens: int, timeout_s: float):
        self.group, self.costs, self.pack_tokens, self.timeout_s = group, costs, pack_tokens, timeout_s
        self.stragglers = Stragglers(group.hosts)
        self.notes: list[str] = []
        """What a person should know of the ranks, each once; who shows a note takes it away."""

    @staticmethod
    async def launch(
        *,
        ranks: int,
        model_uri: str,
        backend: str,
        training: Training,
        reference: bool,
        timeout_s: float,
        pool: Pool,
        build: Build | None = None,
    ) -> "Policy":
        """Start the ranks, let them find each other, and load the model."""
        same = {"model_uri": model_uri, "backend": backend, "training": training, "reference": reference}
        same["build"] = build
        per_rank = [{"rank": r, "world_size": ranks, **same} for r in range(ranks)]
        group = ActorGroup("policy", PolicyRank, per_rank, pool)
        address = await group.call_one(0, "address", timeout_s=timeout_s)
        costs, *_ = await group.call("join", address, timeout_s, timeout_s=timeout_s)
        return Policy(group, costs, pack_tokens=training.pack_tokens, timeout_s=timeout_s)

    async def train_step(self, step: int, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Deal the global batch to the ranks and take one optimizer step; metrics are means per loss token or unit.

        The times are those of rank 0, and "dispatch" is the rest until every rank has answered.
        """
        started = time.perf_counter()
        denominator = count(loss, packs)
        ranks = len(self.group)
        shares = deal(packs, ranks=ranks, cost=self.costs.of)
        calls = [((step, share, loss, denominator), {}) for share in shares]
        answers = await self.group.call_each("train_step", calls, timeout_s=self.timeout_s)
        metrics = answers[0] | self._balance(answers, [sum(map(self.costs.of, share)) for share in shares])
        seconds = sum(metrics.get(f"time/{name}_s", 0.0) for name in ("forward", "backward", "reduce", "optimizer"))
        metrics |= self.costs.metrics(packs, seconds, ranks=ranks, pack_tokens=self.pack_tokens)
        accounted = sum(value for name, value in metrics.items() if name.startswith("time/"))
        return metrics | {"time/dispatch_s": max(0.0, time.perf_counter() - started - accounted)}

    def _balance(self, answers: Sequence[dict[str, float]], work: Sequence[float]) -> dict[str, float]:
        """How even the step was, by FLOPs dealt and by seconds taken; notes a straggler."""
        if len(answers) == 1:
            return {}
        seconds = [a.get("time/forward_s", 0.0) + a.get("time/backward_s", 0.0) for a in answers]
        note = self.stragglers.seen(seconds, work)
        self.notes += [note] if note else []
        return {"data/imbalance": imbalance(work), "perf/imbalance": imbalance(seconds)}

    async def evaluate(self, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Metrics of packs that are not trained on, under the current weights."""
        shares = deal(packs, ranks=len(self.group), cost=self.costs.of)
        calls = [((share, loss, count(loss, packs)), {}) for share in shares]
        metrics, *_ = await self.group.call_each("evaluate", calls, timeout_s=self.timeout_s)
        return metrics

    async def document_logprobs(self, packs: Sequence[Pack]) -> list[list[float]]:
        """Of each pack, in order, the log p of every sample's trained tokens under the current weights, nats."""
        ranks = len(self.group)
        calls = [((packs[rank::ranks],), {}) for rank in range(ranks)]
        found = await self.group.call_each("document_logprobs", calls, timeout_s=self.timeout_s)
        return [found[number % ranks][number // ranks] for number in range(len(packs))]

    async def export(self, uri: str) -> str:
        return await self.group.call_one(0, "export", uri, timeout_s=self.timeout_s)
