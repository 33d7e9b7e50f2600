"""One rank of the policy: it holds the model, or its shard of it, and trains it in step with the others."""

from collections.abc import Sequence
from dataclasses import replace
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
from posttrain.compute.mesh import Sizes, make_mesh
from posttrain.compute.shard_file import read_parts
from posttrain.compute.snapshot import Snapshot
from posttrain.compute.step_timer import StepTimer
from posttrain.compute.weight_sync import Part
from posttrain.compute.weight_transfer import Sender
from posttrain.compute.workers import node_address
from posttrain.data.batch import collate
from posttrain.data.context import with_share
from posttrain.data.types import Batch, Pack
from posttrain.model.backend import backend_of
from posttrain.model.decoder import Decoder
from posttrain.model.export import join_export
from posttrain.model.float8 import precision_on, use_float8
from posttrain.model.flops import flop_counts, peak_flops
from posttrain.model.forward import forward, loss_sum
from posttrain.model.heads import name_outputs
from posttrain.model.lora import adapters_off
from posttrain.model.losses import Loss
from posttrain.model.moe import router_metrics
from posttrain.model.optim import adamw
from posttrain.model.schedule import lr_scale
from posttrain.workflow.costs import Costs
from posttrain.workflow.gpu_memory import naming_what_did_not_fit
from posttrain.workflow.place import place
from posttrain.workflow.policy_model import (
    Build,
    Scores,
    build_policy,
    document_logprobs,
    join_adapter,
    sent_tensors,
    taught_by,
    token_logprobs,
    token_values,
    write_adapter,
)
from posttrain.workflow.training import Training


class PolicyRank:
    """One rank, in a process of its own. All ranks hold equal weights; rank 0 also writes and sends them."""

    def __init__(
        self,
        *,
        rank: int,
        sizes: Sizes,
        model_uri: str,
        backend: str,
        training: Training,
        reference: bool,
        build: Build | None = None,
    ):
        """
        Args:
            sizes: of the mesh of all ranks.
            backend: see model/backend.py.
            reference: score batches with the starting weights: with the adapters off, or by a frozen copy.
        """
        self.rank, self.sizes = rank, sizes
        self.model_uri, self.training, self.has_reference = model_uri, training, reference
        self.build = build or Build()
        self._sender: Sender | None = None
        self.backend = backend_of(backend)
        self.device = set_up_device(deterministic=training.deterministic)
        self.precision, self.float8 = precision_on(self.device, training.precision)
        split = sizes.world > sizes.data or sizes.expert > 1
        # Small models on CPUs are held whole: a gather and a reduce for every block would take longer than the block.
        whole = self.device.type != "cuda" or backend != "posttrain"
        self.sharded = split or (sizes.world > 1 and not whole)

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
            timeout_s=2 * timeout_s,  # the driver's deadline comes first, and knows who did not answer
            device=self.device,
        )
        self.mesh = (
            make_mesh(self.sizes, world=self.sizes.world, device_type=self.device.type) if self.sharded else None
        )
        self.folder = storage.fetch(self.model_uri)
        model, masters = self._model()
        self.reference: nn.Module | None = None
        if self.has_reference and self.build.lora is None:
            self.reference = self._frozen(self.model_uri)
        self.teacher = None if self.build.teacher_uri is None else self._frozen(self.build.teacher_uri)
        read = loss_sum if self.teacher is None else taught_by(self.teacher)
        optimizer = adamw(
            model.parameters() if masters is None else masters,
            lr=training.lr,
            betas=training.betas,
            weight_decay=training.weight_decay,
            stochastic=self.precision == "bfloat16_stochastic",
        )
        planned = {"warmup_steps": training.warmup_steps, "num_steps": training.num_steps}
        scale = partial(lr_scale, schedule=training.schedule, **planned)
        self.snapshot = Snapshot(rank=self.rank, world_size=self.sizes.world)
        self.engine = Engine(
            model,
            optimizer,
            ranks=ranks,
            functions=ModelFunctions(forward=forward, loss_sum=read, named_weights=self.backend.tensors),
            lr_scale=scale,
            max_grad_norm=training.max_grad_norm,
            masters=masters,
        )
        return Costs(
            counts=flop_counts(model) if isinstance(model, Decoder) else None,
            # In multiply-adds of a forward pass, all that a model of unknown shape tells.
            linear=float(sum(p.numel() for p in model.parameters())),
            quadratic=model.config.attention_width,
            sharded=self.sharded,
            peak=peak_flops(torch.cuda.get_device_name()) if self.device.type == "cuda" else None,
        )

    def _model(self) -> tuple[Any, Masters | None]:
        """What is trained, in its precision; sharded float32 is gathered as bfloat16, which is all that is frozen."""
        dtype = torch.bfloat16 if self.precision == "bfloat16_stochastic" else torch.float32
        how: dict[str, Any] = self._placed()
        if self.sharded and self.build.lora is not None and self.precision == "bfloat16":
            dtype, how = torch.bfloat16, how | {"trained_dtype": torch.float32}
        model = build_policy(self.backend, self.folder, self.build, device=self.device, dtype=dtype, **how)
        masters = Masters(model) if self.precision == "bfloat16" and not self.sharded else None
        return self._prepared(model), masters

    def _frozen(self, uri: str) -> Any:
        """A model that is only read, in the precision of computing."""
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        model = self.backend.load(storage.fetch(uri), device=self.device, dtype=dtype, **self._placed())
        return self._prepared(model.requires_grad_(False))

    def _placed(self) -> dict[str, Any]:
        """How a model is loaded onto the mesh, where there is one."""
        if self.mesh is None:
            return {}
        narrow = torch.bfloat16 if self.precision != "float32" else None
        return {"place": partial(place, mesh=self.mesh, prepare=self._prepare, compute_dtype=narrow)}

    def _prepared(self, model: Any) -> Any:
        """The model, ready to compute; one on a mesh has become so before it was sharded."""
        if self.mesh is None:
            self._prepare(model)
        return model

    def _prepare(self, model: Any) -> None:
        """Recompute activations and multiply in float8 as asked; compile the blocks where that pays: on a GPU."""
        if isinstance(model, Decoder):
            model.checkpoint_activations(self.training.activation_checkpointing)
            if self.float8:
                use_float8(model, tensor=self.sizes.tensor)
            if self.device.type == "cuda":
                model.compile_blocks()

    def train_step(
        self, step: int, packs: Sequence[Pack], loss: Loss, denominator: float, repeats: int = 0
    ) -> dict[str, float]:
        """One optimizer step over this rank's share of the global batch; global metrics, and how experts were used.

        The last `repeats` packs count nothing (see Engine.train_step).
        """
        timer = StepTimer(self.device)
        faults.point("policy.train_step", self.rank)
        with naming_what_did_not_fit(self, step, packs):
            batches = [self._batch(pack) for pack in packs]
            if self.has_reference and batches and batches[0].ref_logprobs is None:  # else they bring what it said
                batches = [replace(b, ref_logprobs=self._ref_logprobs(b, loss.temperature)) for b in batches]
            timer.mark("prepare")
            metrics = self.engine.train_step(step, batches, loss, denominator=denominator, repeats=repeats, timer=timer)
        return metrics | {name: float(value) for name, value in router_metrics(self.engine.model).items()}

    def evaluate(self, packs: Sequence[Pack], loss: Loss, denominator: float, repeats: int = 0) -> dict[str, float]:
        """Global metrics of packs that are not trained on; the last `repeats` count nothing."""
        batches = [self._batch(pack) for pack in packs]
        return self.engine.evaluate(batches, loss, denominator=denominator, repeats=repeats)

    def document_logprobs(self, packs: Sequence[Pack]) -> list[list[float]]:
        """Of each pack, the log p of every sample's trained tokens under the current weights, nats."""
        return [document_logprobs(self.engine.model, self._batch(pack)) for pack in packs]

    def _batch(self, pack: Pack) -> Batch:
        """A pack on this rank's device, with its share of the tokens where ranks split those."""
        whole = collate(pack, pack_tokens=self.training.pack_tokens)
        return with_share(whole, rank=self.sizes.context_rank(self.rank), ranks=self.sizes.context).to(self.device)

    def token_scores(self, packs: Sequence[Pack], names: Sequence[str], temperature: float) -> list[Scores]:
        """Of each pack what `names` say of its trained tokens, before a step; see Policy.token_scores()."""
        batches = map(self._batch, packs)
        return [{name: self._score(name, b, temperature).cpu().numpy() for name in names} for b in batches]

    def weights(self, dtype: str, part: Part = "merged") -> dict[str, Tensor]:
        """See sent_tensors(); on the CPU, cast to what the generator wants; none but on rank 0."""
        kept = {}
        for name, tensor in self.sender("tensors", dtype, part) if self.rank == 0 or self.sharded else ():
            if self.rank == 0:
                kept[name] = tensor.cpu()
        return kept

    def weights_digest(self, dtype: str, part: Part = "merged") -> str:
        """digest() of weights(), taken from what the ranks hold, where they hold it."""
        return self.sender("digest", dtype, part) if self.rank == 0 or self.sharded else ""

    def meet_engines(self) -> str:
        """host:port on this rank's machine where its Sender.join() waits for engines."""
        return self.sender("meet", node_address())

    def sender(self, method: str, *args: Any, **named: Any) -> Any:
        """Call a method of this rank's Sender (compute/weight_transfer.py)."""
        if self._sender is None:
            largest = max(parameter.numel() for parameter in self.engine.model.parameters())
            sent = partial(sent_tensors, self.backend, self.engine.model)
            self._sender = Sender(self.device, sent, largest=largest)
        return getattr(self._sender, method)(*args, **named)

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
        """Publish the weights as a Hugging Face folder, adapters merged and beside them: rank 0 does, the others give
        it their shards."""
        if self.rank:
            if self.sharded and not storage.exists(storage.join(uri, "manifest.json")):
                join_export(self.engine.model)
                join_adapter(self.engine.model)
            return uri
        if not storage.exists(storage.join(uri, "manifest.json")):
            with storage.staging(uri) as folder:
                facts = self.backend.export(self.engine.model, folder, like=self.folder)
                if len(self.build.scores) > 1:
                    name_outputs(folder, self.build.scores)
                if self.build.lora is not None:
                    write_adapter(self.engine.model, folder, lora=self.build.lora, base=self.model_uri)
                storage.publish(folder, uri, **facts)
        return uri

    def _score(self, name: str, batch: Batch, temperature: float) -> Tensor:
        if name == "values":
            return token_values(self.engine.model, batch)
        if name == "ref_logprobs":
            return self._ref_logprobs(batch, temperature)
        assert name == "teacher", f"no rank knows {name!r} of a token"
        return token_logprobs(self.teacher, batch, temperature=temperature)

    def _ref_logprobs(self, batch: Batch, temperature: float) -> Tensor:
        if self.reference is None:
            with adapters_off(self.engine.model):
                return self.engine.logprobs(batch, temperature=temperature)
        return token_logprobs(self.reference, batch, temperature=temperature)
