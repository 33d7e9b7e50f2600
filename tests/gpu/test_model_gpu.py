"""The decoder's fast paths on a GPU against plain float64 formulas and the CPU: attention, experts, head, compile."""

import numpy as np
import pytest
import torch

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack
from posttrain.model.attention import Layout, attend
from posttrain.model.attention_flash4 import has_flash4
from posttrain.model.forward import forward, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.sft import SFTLoss
from tiny_families import FAMILIES, random_config, random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLASH4 = torch.cuda.is_available() and has_flash4(torch.device("cuda"))
FAST = ["flex", "varlen", pytest.param("flash4", marks=pytest.mark.skipif(not FLASH4, reason="needs flash-attn-4"))]


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Every test compiles for itself: one process may hold few graphs of one function."""
    torch._dynamo.reset()


def batch_of(lengths: list[int], *, vocab: int, seed: int = 0, tail: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    samples = tuple(shift(ids, [1.0] * len(ids)) for ids in (rng.integers(0, vocab, n + 1).tolist() for n in lengths))
    return collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=sum(lengths) + tail)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the expected norm; where that is zero by the formula, to one a thousand elements."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / max(expected.norm(), 1e-3 * expected.numel() ** 0.5))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 128), (5, 1, 64)])
def test_attention_and_its_gradients_equal_float64(backend, with_sinks, window, heads, kv_heads, head_dim):
    torch.manual_seed(0)
    batch = batch_of([300, 5, 1, 150, 700], vocab=50, tail=124).to("cuda")
    size = len(batch.input_ids)

    def draw(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()

    q, k, v = draw(size, heads, head_dim), draw(size, kv_heads, head_dim), draw(size, kv_heads, head_dim)
    sinks = draw(heads) * 3 if with_sinks else None
    upstream = draw(size, heads, head_dim)
    inputs = [q, k, v] + ([sinks] if with_sinks else [])

    def run(backend, tensors, upstream):
        leaves = [each.clone().requires_grad_() for each in tensors]
        layout = Layout.of(batch, backend=backend, windows={window})
        call = torch.compile(attend, fullgraph=True, dynamic=False) if backend == "flex" else attend
        sink = leaves[3] if with_sinks else None
        out = call(leaves[0], leaves[1], leaves[2], layout, window=window, scale=head_dim**-0.5, sinks=sink)
        return out, torch.autograd.grad(out, leaves, upstream)

    expected, expected_grads = run("sdpa", [each.double() for each in inputs], upstream.double())
    got, grads = run(backend, inputs, upstream)
    assert error(got, expected) < 5e-3
    # A window of one sees a single key: all that reaches q and k is what the sink leaves over, small beside the
    # rounding of FlexAttention's two larger terms that cancel (1.2e-2 on an H100).
    bound = 2e-2 if backend == "flex" and with_sinks and window == 1 else 1e-2
    for name, ours, theirs in zip(("q", "k", "v", "sinks"), grads, expected_grads, strict=False):
        assert error(ours, theirs) < bound, name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_family_in_bfloat16_is_near_its_float32_self(tmp_path, family, backend):
    config = random_config(family, 3) | {"head_dim": 64, "hidden_size": 256, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"layer_types": ["sliding_attention", "full_attention"]} if "layer_types" in config else {}
    folder = random_model(config, tmp_path, std=0.05)
    batch = batch_of([100, 3, 60], vocab=60, tail=29)
    with torch.no_grad():
        expected = forward(load_decoder(folder), batch).logprobs
    model = load_decoder(folder, device="cuda", dtype=torch.bfloat16)
    model.attention = backend
    model.compile_blocks()
    with torch.no_grad():
        got = forward(model, batch.to("cuda")).logprobs.cpu()
    assert float((got - expected).abs().mean()) < 0.02


def test_the_head_equals_float64_on_the_gpu():
    from posttrain.model.head import Head, logprobs_and_entropy, row_loss

    torch.manual_seed(0)
    rows, vocab, padded, d = 3000, 5003, 5056, 64
    hidden = torch.randn(rows, d, device="cuda").bfloat16()
    weight = (torch.randn(padded, d, device="cuda") * 0.3).bfloat16()
    targets = torch.randint(0, vocab, (rows, 3), device="cuda")
    targets[:, 2] = targets[:, 0]
    weights = torch.randn(rows, 3, device="cuda")

    def reference(hidden, weight):
        exact = hidden @ weight.T
        rounded = exact + (exact.to(torch.bfloat16).double() - exact).detach()  # the head's logits are bfloat16
        scaled = rounded[:, :vocab] / 0.7
        log_p = scaled - scaled.logsumexp(-1, keepdim=True)
        return log_p.gather(1, targets), -(log_p.exp() * log_p).sum(-1)

    leaves = [each.double().requires_grad_() for each in (hidden, weight)]
    log_p, entropy = reference(*leaves)
    expected = torch.autograd.grad((log_p * weights).sum(), leaves)
    head = Head(vocab_size=vocab, temperature=0.7)
    for kind in ("logprobs", "rows"):
        ours = [each.clone().requires_grad_() for each in (hidden, weight)]
        if kind == "logprobs":
            got, got_entropy = logprobs_and_entropy(*ours, targets, head)
            assert error(got, log_p.detach()) < 2e-3 and error(got_entropy, entropy.detach()) < 2e-3
            loss = (got * weights).sum()
        else:
            loss = row_loss(*ours, targets, head, lambda rows, lp, _: (lp * weights[rows]).sum())
        assert float(loss.detach()) == pytest.approx(float((log_p * weights).sum()), rel=2e-2, abs=5.0)
        for mine, theirs in zip(torch.autograd.grad(loss, ours), expected, strict=True):
            assert error(mine, theirs) < 1e-2
        assert not torch.autograd.grad(row_loss(*ours, targets, head, lambda r, lp, _: lp.sum()), ours)[1][vocab:].any()


@pytest.mark.parametrize("backend", FAST)
def test_a_step_never_recompiles_and_never_waits_for_the_device(tmp_path, backend):
    from torch._dynamo.utils import counters

    config = random_config("qwen3", 1) | {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2}
    model = load_decoder(random_model(config, tmp_path), device="cuda", dtype=torch.bfloat16)
    model.attention = backend
    model.compile_blocks()
    rng = np.random.default_rng(0)

    def step(seed: int) -> None:
        lengths = rng.multinomial(1000, rng.dirichlet(np.ones(int(rng.integers(3, 20))))) + 1
        batch = batch_of(lengths.tolist(), vocab=60, seed=seed, tail=1024 - int(lengths.sum())).to("cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if seed > 2 else "default")
        loss, _ = loss_sum(model, batch, SFTLoss())
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")

    for seed in range(3):
        step(seed)
    before = counters["stats"]["unique_graphs"]
    for seed in range(3, 10):
        step(seed)
    assert counters["stats"]["unique_graphs"] == before > 0
