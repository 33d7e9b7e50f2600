"""vLLM on the GPU that trains: weights by CUDA IPC with proof, logprobs near the trainer's, memory given back."""

from copy import deepcopy

import pytest
import torch

from benchmarks.engine_process import EngineProcess
from posttrain.compute.generator.vllm import vllm_is_installed
from posttrain.compute.weight_sync import Part, digest
from posttrain.compute.weight_transfer import Sender
from posttrain.model.backend import backend_of
from posttrain.model.load import load_decoder
from posttrain.model.lora import LoRA, add_lora
from posttrain.workflow.policy_model import sent_tensors
from vllm_models import asked, model_folder, our_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not vllm_is_installed(), reason="vllm is not installed"),
]

LORA = LoRA(rank=16, alpha=32.0)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1003}


class Colocated:
    """A model of ours in this process and its engine in another, on one GPU."""

    def __init__(self, folder, lora: LoRA | None = None, **settings):
        self.model = load_decoder(folder, device=torch.device("cuda"), dtype=torch.bfloat16)
        self.parts: list[Part] = ["merged"]
        if lora is not None:
            add_lora(self.model, lora, seed=0)
            settings["adapters"] = (lora.rank, LoRA().targets)
            self.parts = ["whole", "adapters"]
        self.sender = Sender(torch.device("cuda"), self.sent, largest=1003 * 256)
        self.engine = EngineProcess(
            model_uri=str(folder), stop_ids=(7,), pad_id=0, max_tokens=512, memory_share=0.3, **settings
        )
        assert self.engine.call("gpu") == self.sender.gpu()
        self.handle = self.sender.handle()

    def sent(self, part: Part):
        return sent_tensors(backend_of("posttrain"), self.model, part)

    def sync(self, version: int) -> None:
        part = self.parts[0] if version == 0 else self.parts[-1]
        self.engine.call("begin_sync", version)
        self.sender.start("bfloat16", part)
        while packed := self.sender.fill():
            self.engine.call("load_bucket", packed, self.handle)
        sent = digest((name, tensor.bfloat16()) for name, tensor in self.sent(part))
        assert self.engine.call("end_sync") == self.sender.digest("bfloat16", part) == sent

    def train(self) -> None:
        with torch.no_grad():
            for parameter in filter(lambda each: each.requires_grad, self.model.parameters()):
                parameter.add_(0.02 * torch.randn_like(parameter))

    def mismatch(self, version: int) -> tuple[float, float, float]:
        """Mean and largest |difference| of the sampler's logprobs from ours, and the mean of ours from those of the
        same weights in float32, nats."""
        requests = [asked(*range(20, 20 + n), seed=n, new=128) for n in range(1, 33)]
        gaps, rounding, exact = [], [], deepcopy(self.model).float()
        for request, made in zip(requests, self.engine.call("generate", requests), strict=True):
            assert set(made.versions) == {version}
            ours = our_logprobs(self.model, request, made).float().cpu()
            gaps.append((ours - torch.tensor(made.logprobs)).abs())
            rounding.append((ours - our_logprobs(exact, request, made).cpu()).abs())
        all_gaps = torch.cat(gaps)
        return float(all_gaps.mean()), float(all_gaps.max()), float(torch.cat(rounding).mean())


@pytest.mark.parametrize(("family", "lora"), [("qwen3", None), ("llama", None), ("qwen3", LORA)])
def test_each_sync_is_proved_and_its_logprobs_are_near_ours(tmp_path, family, lora):
    pair = Colocated(model_folder(tmp_path / family, model_type=family, **SIZES), lora)
    try:
        for version in range(2):
            pair.sync(version)
            mean, most, rounding = pair.mismatch(version)
            kind = family if lora is None else f"adapters on {family}"
            print(f"\n{kind}, after {version} updates: mean |difference| {mean:.5f}, largest {most:.4f} nats")
            assert 0 < mean < 2 * rounding, "both are as far from float32, each in its own direction"
            pair.train()
    finally:
        pair.engine.close()


@pytest.mark.parametrize("lora", [None, LORA])
def test_an_engine_that_sleeps_gives_its_memory_back_and_goes_on_after_a_sync(tmp_path, lora):
    pair = Colocated(model_folder(tmp_path / "m", **SIZES), lora, can_sleep=True)
    try:
        pair.sync(0)
        awake = pair.engine.call("free_memory")
        pair.engine.call("sleep")
        asleep = pair.engine.call("free_memory")
        assert asleep - awake > 0.2 * torch.cuda.get_device_properties(0).total_memory, "of a share of 0.3"
        pair.train()
        pair.sync(1)
        mean, _, rounding = pair.mismatch(1)
        assert 0 < mean < 2 * rounding
        assert pair.engine.call("free_memory") < asleep
    finally:
        pair.engine.close()
