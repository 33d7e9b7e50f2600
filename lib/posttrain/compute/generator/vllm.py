"""vLLM as a generator, in this process: token ids in, token ids and logprobs out, weights replaced between two tokens.

The one file that knows vLLM's versions: 0.25 beside torch 2.11 on GPUs, 0.32 and later beside torch 2.13.
vllm_requests.py and vllm_worker.py, of which it is made, know what all of them share.

One thread owns the engine and steps it; callers hand that thread work and wait. A sync comes between two steps: what is
under way is finished, weights are loaded, and the cache is dropped, that of running requests too, so that every later
token is of the new weights alone; the requests themselves go on.
"""

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from posttrain import faults, storage
from posttrain.compute.generator import Completion, Request, vllm_adapters, vllm_constraint
from posttrain.compute.generator.vllm_requests import sampling_params
from posttrain.compute.generator.vllm_start import keep_weights_unpacked, starting_alone
from posttrain.compute.generator.vllm_steps import Steps
from posttrain.compute.vllm_logprobs import ENVIRONMENT, require_vllm
from posttrain.compute.weight_sync import WRAP, Held, digest_of
from posttrain.compute.weight_transfer import Packed, gpu_id
from posttrain.errors import ComputeError

ON_CPU = {
    "TORCHDYNAMO_DISABLE": "1",  # its sampler would compile for 20 s
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS is the pool's
}

MAX_SEQUENCES = {"cpu": 64, "cuda": 512}
"""Requests decoded together; more wait."""
MAX_TOKENS = {"cpu": None, "cuda": 8192}
"""Of prompts in one step: those of a whole batch come at once, and vLLM's own 2048 makes many steps of them."""


class VllmGenerator:
    """Samples by vLLM's LLMEngine, in float32 on CPU or bfloat16 on GPUs, tensor-parallel over all that it sees."""

    max_adapter_rank: ClassVar[int] = 512
    """vLLM's own limit."""

    def __init__(
        self,
        *,
        model_uri: str,
        stop_ids: Sequence[int],
        pad_id: int,
        max_tokens: int | None = None,
        memory_share: float = 0.9,
        can_sleep: bool = False,
        adapters: tuple[int, Sequence[str]] | None = None,
        constraint: str | None = None,
    ):
        """
        Args:
            max_tokens: of a prompt with its completion; the model's own limit when None or less.
            memory_share: of each GPU's memory, for weights and cache.
            can_sleep: sleep() gives the memory of a GPU back.
            adapters: rank, and names of the modules, of adapters that sync() will bring apart from the weights.
            constraint: see load_constraint().

        Raises:
            ComputeError: vLLM is missing, or does not run this model on this machine.
        """
        require_vllm()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.stop_ids, self.can_sleep = list(stop_ids), can_sleep and self.device == "cuda"
        self.version, self.asleep, self._paused = -1, False, False
        self.adapters, self.constraint = adapters, constraint
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._broken: ComputeError | None = None
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        folder = str(storage.fetch(model_uri))
        try:
            with starting_alone(self.device):
                self.engine = self._start(folder, max_tokens, memory_share)
        except Exception as error:  # vLLM raises many kinds for a model or a machine that it does not serve
            reason = " ".join(str(error).split())
            raise ComputeError(f"vllm cannot run {model_uri}: {type(error).__name__}: {reason}") from error
        self.steps = Steps(self.engine)
        threading.Thread(target=self._loop, name="vllm-engine", daemon=True).start()

    def weight_dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        room = self.engine.vllm_config.model_config.max_model_len
        asked = [(request, sampling_params(request, stop_ids=self.stop_ids, room=room)) for request in requests]
        return [done.result() for done in self._on_engine(lambda: [self._add(*each) for each in asked])]

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> str:
        return self._on_engine(lambda: self._sync(version, weights))

    def sleep(self) -> None:
        """Give the GPU's memory back; running requests are kept and go on after the next sync, which takes it again."""
        self._on_engine(self._sleep)

    def gpu(self) -> str:
        """See weight_transfer.gpu_id(); an engine that shares a GPU with a policy rank has no other."""
        return gpu_id()

    def workers(self) -> int:
        """Processes that hold a part of the model each."""
        return self.engine.vllm_config.parallel_config.tensor_parallel_size

    def join(self, address: str, first_rank: int, world_size: int, timeout_s: float) -> None:
        """Meet the policy in a group that buckets are broadcast in; see Sender.join()."""
        named = {"first_rank": first_rank, "world_size": world_size, "timeout_s": timeout_s}
        self._on_engine(lambda: self.engine.collective_rpc("posttrain_join", args=(address,), kwargs=named))

    def begin_sync(self, version: int) -> None:
        """As sync(), with weights that come in buckets: stop, keep requests, and mark what they have."""
        self._on_engine(lambda: self._begin(version))

    def load_bucket(self, packed: Sequence[Packed], handle: Any = None) -> None:
        """Load the bucket that is broadcast now, or that `handle` maps."""
        self._on_engine(lambda: self._bucket(packed, handle))

    def end_sync(self) -> str:
        """Go on with the new weights; digest() of what is held."""
        return self._on_engine(self._end)

    def _start(self, folder: str, max_tokens: int | None, memory_share: float) -> Any:
        on_cpu = self.device == "cpu"
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        for key, value in (ENVIRONMENT | (ON_CPU if on_cpu else {})).items():
            os.environ.setdefault(key, value)
        from transformers import AutoConfig
        from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

        shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        if on_cpu:
            keep_weights_unpacked(shape)
        longest = shape.max_position_embeddings
        workers = 1 if on_cpu else torch.cuda.device_count()
        return LLMEngine.from_engine_args(
            EngineArgs(
                model=folder,
                load_format="dummy",  # what is sampled from comes by sync()
                dtype=self.weight_dtype(),
                max_model_len=min(max_tokens or longest, longest),
                max_num_seqs=MAX_SEQUENCES[self.device],
                max_num_batched_tokens=MAX_TOKENS[self.device],
                gpu_memory_utilization=memory_share,
                enforce_eager=on_cpu,
                enable_prefix_caching=True,  # samples of a group share their prompt
                tensor_parallel_size=workers,
                distributed_executor_backend="mp" if workers > 1 else "uni",
                logprobs_mode="processed_logprobs",  # at the request's temperature: what the loss divides by
                generation_config="vllm",  # not the folder's: no top_p, top_k or penalty of its own
                skip_tokenizer_init=True,
                disable_log_stats=True,
                enable_sleep_mode=self.can_sleep,
                worker_extension_cls="posttrain.compute.generator.vllm_worker.WeightsWorker",
                seed=0,
                **({} if self.adapters is None else vllm_adapters.engine_arguments(*self.adapters)),
                **({} if self.constraint is None else vllm_constraint.engine_arguments(self.constraint)),
            )
        )

    def _on_engine(self, work: Callable[[], Any]) -> Any:
        """Have the engine's thread do `work` between two steps; its result, or its error."""
        done: Future = Future()
        self._jobs.put((work, done))
        return done.result()

    def _loop(self) -> None:
        """The engine's thread: work that was handed in comes first, and steps while requests are open."""
        while True:
            idle = self._paused or not self.steps.running
            try:
                work, done = self._jobs.get(block=idle)
            except queue.Empty:
                self._step()
                continue
            try:
                if self._broken is not None:
                    raise self._broken
                done.set_result(work())
            except Exception as error:  # it is the caller's
                done.set_exception(error)

    def _step(self) -> None:
        faults.point("vllm.step")
        try:
            self.steps.step(self.version)
        except Exception as error:  # whatever it is, the engine's state is not known any more
            self._broken = ComputeError(f"vllm's engine failed: {type(error).__name__}: {error}")
            self.steps.fail(self._broken)

    def _add(self, request: Request, sampling: Any) -> Future:
        assert self.version >= 0, "generate() before the first sync(): the generator holds no weights"
        adapter = None if self.adapters is None else vllm_adapters.request()
        return self.steps.add({"prompt_token_ids": list(request.token_ids)}, sampling, adapter)

    def _sync(self, version: int, weights: Mapping[str, Tensor]) -> str:
        self._begin(version)
        self._load(version, weights)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        return self._end()

    def _begin(self, version: int) -> None:
        """Stop between two steps; what is sampled so far is of the old version."""
        if self.asleep:
            self.engine.wake_up(tags=["weights"])
        self._pause()
        self.steps.mark(self.version)
        self.version, self._shapes = version, {}

    def _bucket(self, packed: Sequence[Packed], handle: Any) -> None:
        self._shapes |= {each.name: each.shape for each in packed}
        self.engine.collective_rpc("posttrain_bucket", args=(list(packed), handle))

    def _end(self) -> str:
        """Go on with the new weights; the digest of what is held of the tensors that were sent."""
        self.engine.collective_rpc("posttrain_adapt")
        held = self._held(self._shapes)
        if self.asleep:
            self.engine.wake_up(tags=["kv_cache"])
            self.asleep = False
        core = self.engine.engine_core.engine_core
        core.reset_prefix_cache(reset_running_requests=True)
        core.resume_scheduler()
        self._paused = False
        return held

    def _pause(self) -> None:
        core = self.engine.engine_core.engine_core
        core.pause_scheduler("keep", clear_cache=False)
        self._paused = True
        while core.batch_queue:  # what was scheduled ahead is of the old weights, and so is its version
            self._step()

    def _load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        self.engine.collective_rpc("posttrain_load", args=(list(weights.items()),))

    def _held(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """digest() of what the workers hold together."""
        first, *others = self.engine.collective_rpc("posttrain_held", args=(dict(shapes),))
        marks = [each.fingerprint for each in first]
        for other in others:
            marks = [(mark + each.fingerprint) % WRAP for mark, each in zip(marks, other, strict=True)]
        return digest_of(
            Held(name=each.name, shape=each.shape, dtype=each.dtype, fingerprint=mark)
            for each, mark in zip(first, marks, strict=True)
        )

    def _sleep(self) -> None:
        if self.can_sleep and not self.asleep:
            self._pause()
            # What comes once is kept, in host memory; weights that every sync brings need not be.
            self.engine.engine_core.engine_core.sleep(2 if self.adapters is None else 1, "keep")
            self.asleep = True


def vllm_is_installed() -> bool:
    """Whether vLLM can be imported, found without importing it."""
    return find_spec("vllm") is not None
