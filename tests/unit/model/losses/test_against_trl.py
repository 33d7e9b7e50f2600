"""Our losses and TRL's own code, driven on the same tensors: values, metrics and gradients.

DPO, GRPO and the reward loss run inside TRL's trainers, on tiny models of random weights;
our side takes its logprobs from the same model's transformers logits. The reference-free
losses call TRL's function directly; for distillation, test_distill.py does.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack
from posttrain.model.losses import count
from posttrain.model.losses.dpo import DPOLoss
from posttrain.model.losses.policy_gradient import (
    ClippedLoss,
    SequenceLoss,
    SequenceTruncatedLoss,
    TruncatedLoss,
    UncorrectedLoss,
)
from posttrain.model.losses.reward import BradleyTerryLoss
from posttrain.model.output import Output

WORDS = [f"w{i}" for i in range(60)]
PAIRS = [([5, 6, 7], [8, 9, 10, 11], [12, 13]), ([14, 15], [16, 17, 3], [18, 19, 20, 21, 22]), ([23], [24], [25, 26])]
"""Prompt, chosen and rejected token ids."""
QUIET: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "seed": 0,
}


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate([*WORDS, "<pad>", "<eos>"])}, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="w0")


def model_of(kind: type, seed: int) -> Any:
    """Two layers of random weights, drawn wide enough that logprobs differ by nats."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=60,
        eos_token_id=61,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return kind(config)


def padded(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    fills = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)])


def documents_of(pairs: list) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) in our order: chosen and rejected of a pair side by side."""
    return [(prompt, completion) for prompt, *both in pairs for completion in both]


def batch_of(documents: list[tuple[list[int], list[int]]], **columns: Any) -> Batch:
    samples = tuple(shift([*p, *c], [0.0] * len(p) + [1.0] * len(c)) for p, c in documents)
    batch = collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=50)
    return replace(batch, **columns)


def logprobs_of(model: nn.Module, documents: list[tuple[list[int], list[int]]]) -> Tensor:
    """[N] log p of every completion token, a document at a time."""
    parts = []
    for prompt, completion in documents:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        parts.append(torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1))
    return torch.cat(parts)


def output_of(logprobs: Tensor) -> Output:
    return Output(logprobs=logprobs, entropy=torch.zeros(len(logprobs)))


def assert_same_gradients(model: nn.Module, ours: Tensor, theirs: Tensor):
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, theirs)]
    for name, a, b in zip([n for n, _ in model.named_parameters()], *pairs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


DPO_CASES = {
    "sigmoid": ({"loss_type": ["sigmoid"]}, DPOLoss(beta=0.3), PAIRS),
    "hinge": ({"loss_type": ["hinge"]}, DPOLoss(beta=0.3, kind="hinge"), PAIRS),
    "ipo": ({"loss_type": ["ipo"]}, DPOLoss(beta=0.3, kind="ipo", length_normalised=True), PAIRS),
    "sigmoid by token": ({"loss_type": ["sigmoid_norm"]}, DPOLoss(beta=0.3, length_normalised=True), PAIRS),
    # TRL's SFT term is a mean over all chosen tokens of a batch, ours over each document: equal for one pair.
    "rpo": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]},
        DPOLoss(beta=0.3, sft_coef=0.4),
        PAIRS[:1],
    ),
    # Of one pair, aot is the smoothed sigmoid of the same difference; over several it sorts them first.
    "smoothed": ({"loss_type": ["aot"], "label_smoothing": 0.1}, DPOLoss(beta=0.3, label_smoothing=0.1), PAIRS[:1]),
}


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_equals_the_trainer_of_trl(tmp_path, case: str):
    options, loss_fn, pairs = DPO_CASES[case]
    model, reference = model_of(Qwen3ForCausalLM, 0), model_of(Qwen3ForCausalLM, 1)
    rows = [{"prompt": "w5 w6", "chosen": " w7", "rejected": " w8"}] * 2
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), beta=0.3, **options, **QUIET),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    sequences = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    inputs = {
        "input_ids": padded([p + c for p, c in sequences], 60),
        "attention_mask": padded([[1] * len(p + c) for p, c in sequences], 0),
        "completion_mask": padded([[0] * len(p) + [1] * len(c) for p, c in sequences], 0),
    }
    theirs: Any = trainer.compute_loss(trainer.model, inputs)

    documents = documents_of(pairs)
    with torch.no_grad():
        ref_logprobs = logprobs_of(reference, documents)
    loss, sums = loss_fn(output_of(logprobs_of(model, documents)), batch_of(documents, ref_logprobs=ref_logprobs))
    ours, count = loss / len(pairs), len(pairs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, ours, theirs)
    logged = trainer._metrics["train"]
    names = {"chosen_logprob": "logps/chosen", "rejected_logprob": "logps/rejected", "accuracy": "rewards/accuracies"}
    if not loss_fn.length_normalised:  # TRL logs rewards without the normalisation that it trains on
        names |= {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected", "margin": "rewards/margins"}
    for name, their_name in names.items():
        assert sums[name].item() / count == pytest.approx(logged[their_name][0], abs=1e-5), name


@pytest.mark.parametrize(
    ("kind", "smoothing"),
    [("simpo", 0.0), ("simpo", 0.1), ("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0)],
)
def test_reference_free_losses_equal_the_function_of_trl(kind: str, smoothing: float):
    by_token = kind in ("simpo", "ipo")
    loss_fn = DPOLoss(
        beta=2.0,
        kind="sigmoid" if kind == "simpo" else kind,  # pyright: ignore[reportArgumentType]
        gamma=0.7 if kind == "simpo" else 0.0,
        label_smoothing=smoothing,
        length_normalised=by_token,
        reference_free=True,
    )
    documents = documents_of(PAIRS)
    logprobs = -3 * torch.rand(sum(len(c) for _, c in documents), generator=torch.manual_seed(0), dtype=torch.float64)
    sums = torch.stack([p.mean() if by_token else p.sum() for p in logprobs.split([len(c) for _, c in documents])])
    options = {"alpha": 0.0, "loss_type": kind, "simpo_gamma": 0.7, "beta": 2.0, "label_smoothing": smoothing}
    trainer: Any = SimpleNamespace(**options, accelerator=SimpleNamespace(device="cpu"))
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, sums[0::2], sums[1::2])
    loss, metrics = loss_fn(output_of(logprobs), batch_of(documents))
    torch.testing.assert_close(loss, losses.sum())
    torch.testing.assert_close(metrics["chosen_reward"], chosen.sum())
    torch.testing.assert_close(metrics["rejected_reward"], rejected.sum())


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_equals_the_trainer_of_trl(tmp_path, with_margin: bool, center: float | None):
    model = model_of(Qwen3ForSequenceClassification, 0)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=center, **QUIET),
        train_dataset=Dataset.from_list([{"chosen": "w5 w6", "rejected": "w7 w8"}] * 2),
        processing_class=tokenizer(),
    )
    sequences = [p + c for p, c, _ in PAIRS] + [p + r for p, _, r in PAIRS]
    inputs = {
        "input_ids": padded(sequences, 60),
        "attention_mask": padded([[1] * len(row) for row in sequences], 0),
    }
    margins = torch.tensor([0.5, 0.0, 1.5])
    theirs: Any = trainer.compute_loss(trainer.model, inputs | ({"margin": margins} if with_margin else {}))

    documents = documents_of(PAIRS)
    scores = torch.cat([model(input_ids=torch.tensor([p + c])).logits for p, c in documents])
    batch = batch_of(documents, fields={"margin": margins.repeat_interleave(2)} if with_margin else {})
    output = Output(logprobs=torch.zeros(0), entropy=torch.zeros(0), scores={"score": scores})
    loss, metrics = BradleyTerryLoss(center_coef=center or 0.0)(output, batch)
    torch.testing.assert_close(loss / 3, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, loss / 3, theirs)
    assert metrics["accuracy"].item() / 3 == pytest.approx(trainer._metrics["train"]["accuracy"][0])
    assert metrics["margin"].item() / 3 == pytest.approx(trainer._metrics["train"]["margin"][0], abs=1e-5)


def grpo_trainer(model: Any, folder: Any, **settings: Any) -> Any:
    """TRL's trainer over six completions of seven tokens at most, its reference and sampler set by hand."""
    kl_coef = settings.pop("kl_coef", 0.0)
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(folder),
            beta=0.0,
            max_completion_length=7,
            per_device_train_batch_size=6,
            num_generations=6,
            use_bias_correction_kl=False,  # ours is the k3 estimate of GRPO's eq. 4, differentiated as it stands
            **settings,
            **QUIET,
        ),
        train_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * 6),
        processing_class=tokenizer(),
    )
    trainer.beta = kl_coef  # set late: the constructor would look for a reference model by name
    trainer.current_gradient_accumulation_steps = 1
    return trainer


class Rollouts:
    """Six completions with logprobs of a trainer, a sampler and a reference that differ by parts of a nat."""

    def __init__(self, model: Any, spread: float):
        self.documents = documents_of(PAIRS)
        self.lengths = [len(c) for _, c in self.documents]
        self.tokens = sum(self.lengths)
        self.ours = logprobs_of(model, self.documents)
        generator = torch.manual_seed(0)
        self.sampler = self.ours.detach() + spread * torch.randn(self.tokens, generator=generator)
        self.reference = self.ours.detach() + 0.5 * torch.randn(self.tokens, generator=generator)
        self.advantages = torch.randn(len(self.documents), generator=generator)

    def by_row(self, column: Tensor) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(column.split(self.lengths)), batch_first=True)

    def inputs(self) -> dict[str, Tensor]:
        return {
            "prompt_ids": padded([p for p, _ in self.documents], 60, left=True),
            "prompt_mask": padded([[1] * len(p) for p, _ in self.documents], 0, left=True),
            "completion_ids": padded([c for _, c in self.documents], 60),
            "completion_mask": padded([[1] * len(c) for _, c in self.documents], 0),
            "advantages": self.advantages,
            "num_items_in_batch": torch.tensor(float(self.tokens)),
            "ref_per_token_logps": self.by_row(self.reference),
        }

    def batch(self, *, reference: bool) -> Batch:
        return batch_of(
            self.documents,
            sampler_logprobs=self.sampler,
            ref_logprobs=self.reference if reference else None,
            advantages=self.advantages.repeat_interleave(torch.tensor(self.lengths)),
        )


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_truncated_equals_the_grpo_trainer_of_trl(tmp_path, kl_coef: float, corrected: bool, loss_type: str):
    model = model_of(Qwen3ForCausalLM, 0)
    trainer = grpo_trainer(model, tmp_path, loss_type=loss_type, kl_coef=kl_coef)
    made = Rollouts(model, 0.8 if corrected else 0.0)
    inputs = made.inputs()
    if corrected:  # the truncated weight, made by TRL when it samples and passed with the batch
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
        inputs["importance_sampling_ratio"] = made.by_row((made.ours.detach() - made.sampler).exp().clamp(max=1.5))
    theirs = trainer._compute_loss(trainer.model, inputs)

    loss_fn = TruncatedLoss(temperature=1.0, importance_cap=1.5, kl_coef=kl_coef)
    loss, metrics = loss_fn(output_of(made.ours), made.batch(reference=bool(kl_coef)))
    # These normalisations are all a sum over tokens divided by one count; loss_type "grpo" weighs by length instead.
    ours = loss / (len(made.documents) * 7 if loss_type == "dr_grpo" else made.tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, ours, theirs)
    if kl_coef:
        assert metrics["kl"].item() / made.tokens == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_clipped_and_sequence_equal_the_grpo_trainer_of_trl(tmp_path, kl_coef, low, high, level):
    model = model_of(Qwen3ForCausalLM, 0)
    settings = {"loss_type": "dapo", "epsilon": low, "epsilon_high": high, "importance_sampling_level": level}
    trainer = grpo_trainer(model, tmp_path, kl_coef=kl_coef, **settings)
    made = Rollouts(model, 0.4)
    theirs = trainer._compute_loss(trainer.model, made.inputs() | {"old_per_token_logps": made.by_row(made.sampler)})

    kind = ClippedLoss if level == "token" else SequenceLoss
    loss_fn = kind(temperature=1.0, low=low, high=high, kl_coef=kl_coef)
    loss, metrics = loss_fn(output_of(made.ours), made.batch(reference=bool(kl_coef)))
    ours = loss / made.tokens
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, ours, theirs)
    assert metrics["ratio_clipped"] > 0, "the case must reach the bounds"


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_truncated_by_sequence_equals_the_grpo_trainer_of_trl(tmp_path, kl_coef: float):
    model = model_of(Qwen3ForCausalLM, 0)
    trainer = grpo_trainer(model, tmp_path, loss_type="dapo", kl_coef=kl_coef)
    made = Rollouts(model, 0.8)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    gap = made.by_row(made.ours.detach() - made.sampler)
    # What TRL makes when it samples with vllm_importance_sampling_mode = "sequence_truncate".
    ratio = gap.sum(-1, keepdim=True).exp().clamp(max=1.5)
    theirs = trainer._compute_loss(trainer.model, made.inputs() | {"importance_sampling_ratio": ratio})
    loss_fn = SequenceTruncatedLoss(temperature=1.0, importance_cap=1.5, kl_coef=kl_coef)
    batch = made.batch(reference=bool(kl_coef))
    loss, metrics = loss_fn(output_of(made.ours), batch)
    torch.testing.assert_close(loss / made.tokens, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, loss / made.tokens, theirs)
    clipped = sum(n for n, r in zip(made.lengths, ratio.squeeze(-1).tolist(), strict=True) if r == 1.5)
    assert metrics["importance_clipped"] == clipped and 0 < clipped < made.tokens


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_uncorrected_equals_the_grpo_trainer_of_trl_without_correction(tmp_path, kl_coef: float):
    model = model_of(Qwen3ForCausalLM, 0)
    trainer = grpo_trainer(model, tmp_path, loss_type="dapo", kl_coef=kl_coef)
    made = Rollouts(model, 0.8)
    theirs = trainer._compute_loss(trainer.model, made.inputs())  # which know nothing of the sampler
    loss_fn = UncorrectedLoss(temperature=1.0, kl_coef=kl_coef)
    loss, metrics = loss_fn(output_of(made.ours), made.batch(reference=bool(kl_coef)))
    torch.testing.assert_close(loss / made.tokens, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, loss / made.tokens, theirs)
    assert metrics["mismatch_abs"] > 0, "measured all the same"


@pytest.mark.parametrize("kind", [SequenceTruncatedLoss, SequenceLoss])
def test_losses_with_a_ratio_a_sequence_are_counted_by_token(kind):
    samples = tuple(shift([5] * (n + 1), [0.0] + [1.0] * n) for n in (4, 2))
    assert count(kind(temperature=1.0), [Pack(samples=samples, num_units=2)]) == 6


def test_truncated_equals_trls_cispo(tmp_path):
    model = model_of(Qwen3ForCausalLM, 0)
    trainer = grpo_trainer(model, tmp_path, loss_type="cispo", epsilon_high=1.5)
    made = Rollouts(model, 0.8)
    theirs = trainer._compute_loss(trainer.model, made.inputs() | {"old_per_token_logps": made.by_row(made.sampler)})
    loss, metrics = TruncatedLoss(temperature=1.0, importance_cap=1.5)(
        output_of(made.ours), made.batch(reference=False)
    )
    assert metrics["importance_clipped"] > 0
    # The values differ, as TRL's holds log p where ours holds a ratio of value 1; it is the gradient that trains.
    assert_same_gradients(model, loss / made.tokens, theirs)
