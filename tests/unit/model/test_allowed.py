"""The policy among allowed tokens against the plain float64 formula: a softmax over their logits alone."""

import torch

from posttrain.data.types import Batch
from posttrain.model.allowed import renormalised
from posttrain.model.forward import forward, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.policy_gradient import TruncatedLoss
from tiny import tiny_model

ALLOWED = [[3, 5, 9], [4, 6, -1], [-1, -1, -1], [8, -1, -1]]
TARGETS = [5, 4, 7, 8]


def plain(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies by masking: [4] each."""
    masked = logits.clone()
    for row, ids in enumerate(ALLOWED):
        if ids[0] >= 0:
            kept = torch.zeros(logits.shape[1], dtype=torch.bool)
            kept[[i for i in ids if i >= 0]] = True
            masked[row] = masked[row].masked_fill(~kept, -torch.inf)
    log_p = masked.log_softmax(-1)
    return log_p[range(4), TARGETS], torch.special.entr(log_p.exp()).sum(-1)


def test_values_and_gradients_are_those_of_masked_logits():
    torch.manual_seed(0)
    logits = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    ids = torch.tensor(ALLOWED)
    columns = torch.cat((torch.tensor(TARGETS)[:, None], ids.clamp(min=0)), 1)
    log_p = logits.log_softmax(-1)
    found, entropy = renormalised(log_p.gather(1, columns), ids, torch.special.entr(log_p.exp()).sum(-1))
    expected, spread = plain(logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, spread)
    mine, theirs = (torch.autograd.grad((weights * each).sum(), logits)[0] for each in (found, expected))
    torch.testing.assert_close(mine, theirs)


def test_the_loss_of_a_model_sees_the_renormalised_policy(tmp_path):
    model = load_decoder(tiny_model(tmp_path))
    n = len(TARGETS)
    inputs = torch.tensor([11, *TARGETS[:-1]])
    batch = Batch(
        input_ids=inputs,
        target_ids=torch.tensor(TARGETS),
        position_ids=torch.arange(n),
        doc_id=torch.zeros(n, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
        loss_idx=torch.arange(n),
        loss_mask=torch.ones(n),
        max_doc_len=n,
        num_samples=1,
        advantages=torch.tensor([1.0, -2.0, 0.5, 3.0]),
        allowed_ids=torch.tensor(ALLOWED),
    )
    logits = (model(batch) @ model.output_head.weight.T)[:, : model.config.vocab_size] / 0.7
    expected, spread = plain(logits)
    found = forward(model, batch, temperature=0.7)
    torch.testing.assert_close(found.logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, spread, atol=1e-5, rtol=1e-5)

    batch = Batch(**{**_columns(batch), "sampler_logprobs": expected.detach()})
    loss, metrics = loss_sum(model, batch, TruncatedLoss(temperature=0.7))
    assert metrics["mismatch_abs"] < 1e-5
    weight = model.output_head.weight
    (mine,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(-(batch.advantages * expected).sum(), weight)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def _columns(batch: Batch) -> dict:
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}
