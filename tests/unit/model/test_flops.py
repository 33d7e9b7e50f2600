"""The count of a step is what torch's counter sees a model multiply, where documents have their own lengths.

The oracle is FlopCounterMode, which adds up matmuls by the shapes that they ran with. Two things it cannot see are put
into its terms: grouped_mm becomes a loop over experts, and attention a plain product of every position with every
other, whose bmm calls it lists apart from the mm and addmm of all else. So they must be length squared pairs, and how
many of those a causal mask or a window leaves is held against a loop over positions.
"""

import types
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack
from posttrain.model import attention, moe
from posttrain.model.build import draw_weights, fresh_config
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.flops import Flops, flop_counts, mfu, peak_flops, visible_pairs
from posttrain.model.forward import forward, loss_sum
from posttrain.model.lora import LoRA, add_lora
from posttrain.model.losses.sft import SFTLoss
from tiny_families import FAMILIES, random_config

QWEN3_1_7B = fresh_config(
    vocab_size=151936, hidden_size=2048, num_layers=28, num_heads=16, num_kv_heads=8, mlp_size=6144, max_length=40960
)

TRAINED = (
    *("output_head", "norm", "layers.2", "layers.1.attention.k_norm", "layers.1.mlp.router", "embedding", "nothing"),
    *("layers.1.mlp.experts.down_proj", "layers.2.mlp_norm output_head"),
)
"""Names of what is trained, all else frozen."""

PEAKS = {
    989e12: ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    756e12: ("NVIDIA H100 PCIe",),
    835.5e12: ("NVIDIA H100 NVL", "NVIDIA H200 NVL"),
    312e12: ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "A100-PCIE-40GB"),
    362.05e12: ("NVIDIA L40S",),
    2250e12: ("NVIDIA B200",),
    None: ("NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H20"),
}


def two_layers(hidden_size: int) -> nn.Module:
    """A user's own head."""
    return nn.Sequential(nn.Linear(hidden_size, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def seen_by_the_counter(monkeypatch):
    """Attention and experts as matmuls that FlopCounterMode lists."""

    def every_pair(q: Tensor, k: Tensor, v: Tensor, layout, *, window, scale, sinks) -> Tensor:
        group = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        scores = q @ k.mT * scale
        if sinks is not None:
            scores = torch.cat((sinks[:, None, None].expand(-1, len(layout.doc_id), 1), scores), dim=-1)
        return (scores.softmax(-1)[..., -len(layout.doc_id) :] @ v).transpose(0, 1)

    def one_by_one(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        bounds = [0, *offs.tolist()]
        return torch.cat([x[a:b] @ weights[e] for e, (a, b) in enumerate(pairwise(bounds))])

    monkeypatch.setattr(attention, "attend", every_pair)
    monkeypatch.setattr(moe, "F", types.SimpleNamespace(grouped_mm=one_by_one, silu=F.silu))


def decoder(family: str, seed: int = 0, **changes) -> Decoder:
    """A small model; its vocabulary is 128, so that no row of the head is padding."""
    model = Decoder(decoder_config(random_config(family, seed) | {"vocab_size": 128} | changes))
    draw_weights(model, std=0.2, seed=seed)
    return model


def packed(*lengths: int, prompt: int = 0, tail: int = 0) -> Batch:
    rng = np.random.default_rng(0)
    samples = tuple(
        shift(rng.integers(1, 60, n + 1).tolist(), [0.0] * prompt + [1.0] * (n + 1 - prompt)) for n in lengths
    )
    return collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=sum(lengths) + tail)


def measured(run) -> tuple[float, float]:
    """FLOPs of attention (bmm) and of all other matmuls while `run` runs."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_kind = {str(kind): float(flops) for kind, flops in counter.get_flop_counts().get("Global", {}).items()}
    assert by_kind.keys() <= {"aten.mm", "aten.addmm", "aten.bmm"}
    pairs = by_kind.pop("aten.bmm", 0.0)
    return pairs, sum(by_kind.values())


def hold_against_the_counter(model: Decoder, length: int = 11) -> None:
    """Trunk forward, trunk backward, then a whole step with its head, over one document."""
    counts, batch, hidden = flop_counts(model), packed(length, prompt=4), []
    pair = sum(counts.pairs.values(), Flops())
    backward = lambda part: part.input_grad + part.weight_grad  # noqa: E731
    ran = measured(lambda: hidden.append(model(batch)))
    assert ran == (pair.forward * length**2, counts.token.forward * length)
    if hidden[0].requires_grad:
        ran = measured(lambda: hidden[0].sum().backward())
        assert ran == (backward(pair) * length**2, backward(counts.token) * length)
    rows = len(batch.loss_idx)

    def step() -> None:
        loss, _ = loss_sum(model, batch, SFTLoss())
        if loss.requires_grad:
            loss.backward()

    # The head's gradient multiplies a row's targets with one another, here one with itself: a bmm of two operations.
    targets = 2 * rows * bool(counts.row.input_grad + counts.row.weight_grad)
    pairs, linear = measured(step)
    assert pairs - targets == pair.total * length**2
    assert linear == counts.token.total * length + counts.row.total * rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_costs_what_the_counter_sees(seen_by_the_counter, family, seed):
    hold_against_the_counter(decoder(family, seed))


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("targets", ("all-linear", "q_proj", "v_proj down_proj", "layers.1.attention.o_proj"))
def test_adapters_cost_their_own_and_what_leads_to_them(seen_by_the_counter, targets, dora):
    model = decoder("qwen3", 3, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    add_lora(model, LoRA(rank=2, targets=tuple(targets.split()), dora=dora), seed=0)
    for module in model.modules():
        if getattr(module, "magnitude", None) is not None:  # DoRA's row norms are left out of the count: constants here
            module._row_norms = lambda weight: 1.0
    hold_against_the_counter(model)


def test_adapters_on_every_linear_skip_the_weights_gradient():
    model = decoder("llama", num_hidden_layers=8, tie_word_embeddings=False)
    full = flop_counts(model).token
    base = full.forward
    assert (full.input_grad, full.weight_grad) == (base, base)
    add_lora(model, LoRA(rank=2, targets=("all-linear",)), seed=0)
    adapters = 2.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = flop_counts(model)
    assert (counts.token.forward, counts.token.weight_grad) == (base + adapters, adapters)
    # All but what would lead from the first layer's q, k and v to the frozen embedding.
    first = model.layers[0].attention
    saved = sum(2.0 * (p.weight.numel() + p.adapter.a.numel()) for p in (first.q_proj, first.k_proj, first.v_proj))
    assert counts.token.input_grad == base + adapters - saved
    assert counts.row == Flops(2.0 * 128 * model.config.hidden_size, 2.0 * 128 * model.config.hidden_size, 0.0)


@pytest.mark.parametrize("trained", TRAINED)
def test_only_what_is_trained_and_what_lies_above_has_a_backward(seen_by_the_counter, trained):
    experts = {"decoder_sparse_step": 1, "mlp_only_layers": [0], "num_experts": 4, "num_experts_per_tok": 2}
    model = decoder("qwen3_moe", 1, num_hidden_layers=3, tie_word_embeddings=False, **experts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained.split())))
    hold_against_the_counter(model)


def test_a_sink_needs_what_lies_above_it_and_no_pairs(seen_by_the_counter):
    model = decoder("gpt_oss", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    model.requires_grad_(False)
    model.layers[1].attention.sinks.requires_grad_(True)
    counts, batch = flop_counts(model), packed(7)
    # The plain attention above also makes each pair's gradient; a kernel needs the sum of out * dout over a row.
    _, linear = measured(lambda: model(batch).sum().backward())
    assert linear == counts.token.total * 7 and counts.token.input_grad > 0
    assert counts.pairs[None].input_grad == 0


def test_a_frozen_embedding_saves_nothing_but_the_first_projections_input_gradient():
    model = decoder("llama", tie_word_embeddings=False)
    before = flop_counts(model)
    model.embedding.requires_grad_(False)
    assert flop_counts(model) == before, "the first norm is trained, and its gradient comes through them"
    model.layers[0].attention_norm.requires_grad_(False)
    first = model.layers[0].attention
    saved = 2.0 * sum(each.weight.numel() for each in (first.q_proj, first.k_proj, first.v_proj))
    assert before.token.total - flop_counts(model).token.total == saved
    tied = decoder("qwen3", tie_word_embeddings=True)
    tied.embedding.requires_grad_(False)
    assert flop_counts(tied).row.weight_grad == 0, "the head is the embedding"


@pytest.mark.parametrize("head", (3, f"{__name__}:two_layers"), ids=str)
@pytest.mark.parametrize("frozen_trunk", (False, True))
def test_score_heads_cost_once_a_document(seen_by_the_counter, head, frozen_trunk):
    model = decoder("llama", 1, posttrain_heads={"score": head, "other": 1})
    if frozen_trunk:
        model.requires_grad_(False)
        model.heads.requires_grad_(True)
    counts, batch = flop_counts(model), packed(5, 9)
    scores = lambda: forward(model, batch, with_logprobs=False).scores.values()  # noqa: E731
    _, linear = measured(lambda: sum(each.sum() for each in scores()).backward())
    assert linear == counts.token.total * 14 + counts.sample.total * 2
    pairs = sum(pair.total for pair in counts.pairs.values()) * (15 + 45)
    assert counts.step([5, 9], 0, num_samples=2) == linear + pairs
    without = flop_counts(Decoder(replace(model.config, heads={"score": 1}, lm_head=False)))
    assert without.row == Flops() and without.sample.forward == 2 * model.config.hidden_size
    assert (counts.token.total == counts.token.forward) == frozen_trunk


def test_padding_of_the_vocabulary_and_of_a_pack_is_not_counted(seen_by_the_counter):
    model = decoder("llama", vocab_size=97, tie_word_embeddings=False)
    counts, batch = flop_counts(model), packed(6, tail=5)
    assert counts.row.forward == 2 * 97 * model.config.hidden_size
    _, linear = measured(lambda: loss_sum(model, batch, SFTLoss())[0].backward())
    ran = counts.token.total * (6 + 5) + counts.row.total * 6 * model.config.padded_vocab_size / 97
    assert linear == pytest.approx(ran, rel=1e-12)
    pairs = sum(pair.total for pair in counts.pairs.values()) * 21
    assert counts.step([6], 6) == counts.token.total * 6 + counts.row.total * 6 + pairs


@pytest.mark.parametrize("window", (None, 1, 2, 7, 20, 21, 300))
def test_visible_pairs_are_those_of_a_mask(window):
    for length in range(0, 22):
        reach = length if window is None else window
        assert visible_pairs(length, window) == sum(i - reach < j <= i for i in range(length) for j in range(length))


def test_every_window_counts_its_own_layers():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = decoder("gpt_oss", num_hidden_layers=3, layer_types=kinds, sliding_window=4)
    counts, width = flop_counts(model), 4.0 * model.config.num_heads * model.config.head_dim
    assert counts.pairs == {4: Flops(2 * width, 4 * width, 0.0), None: Flops(width, 2 * width, 0.0)}
    full, narrow = 6 + 55, 6 + (1 + 2 + 3 + 7 * 4)
    assert counts.forward([3, 10], 0) == counts.token.forward * 13 + width * full + 2 * width * narrow


def test_packing_does_not_change_the_count():
    counts = flop_counts(decoder("gemma3_text", 2))
    rng = np.random.default_rng(0)
    for _ in range(20):
        lens = rng.integers(1, 100, 30).tolist()
        units = [(shift([1] * (n + 1), [1.0] * (n + 1)),) for n in lens]
        packs = pack(units, pack_tokens=int(rng.integers(100, 500)))
        each = [counts.step([len(s) for s in p.samples], int(p.loss_tokens), num_samples=len(p.samples)) for p in packs]
        assert sum(each) == counts.step(lens, sum(lens), num_samples=30)


def test_qwen3_1_7b_by_hand():
    with torch.device("meta"):
        model = Decoder(decoder_config(QWEN3_1_7B))
    counts = flop_counts(model)
    # q and o: 2 x 2048 x 16 x 128; k and v: 2 x 2048 x 8 x 128; gate, up and down: 3 x 2048 x 6144
    layer = 2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144
    assert layer == 50_331_648 and counts.token == Flops(*[2.0 * 28 * layer] * 3)
    assert counts.row == Flops(*[2.0 * 151936 * 2048] * 3)
    # norms: two of 2048 and two of 128 a layer, one of 2048 at the end; the tied embedding once
    params = 28 * (layer + 2 * 2048 + 2 * 128) + 2048 + 151936 * 2048
    assert params == 1_720_574_976
    # 6 N = 10.323e9, 12 L H head_dim T = 12 x 28 x 16 x 128 x 4096 = 2.819e9; 13.142e9 together
    assert counts.palm(1, 4096) == 6 * params + 2_818_572_288 == 13_142_022_144
    # exact: 6 x (28 x layer + head) = 10.323e9, and 12 x 28 x 16 x 128 a pair, 4097 / 2 pairs a token
    assert counts.step([4096], 4096) / 4096 == 6 * (28 * layer + 151936 * 2048) + 688_128 * 4097 / 2


def test_palm_counts_no_embedding_of_its_own_and_the_experts_that_a_token_meets():
    tied = decoder("llama", tie_word_embeddings=True)
    untied = decoder("llama", tie_word_embeddings=False)
    assert flop_counts(tied).palm_params == flop_counts(untied).palm_params
    assert flop_counts(tied).palm_params == sum(p.numel() for p in tied.parameters())
    sizes = {"num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": True}
    sparse = decoder("qwen3_moe", num_experts_per_tok=2, **sizes)
    experts = sum(p.numel() for name, p in sparse.named_parameters() if ".experts." in name)
    everything = sum(p.numel() for p in sparse.parameters())
    assert flop_counts(sparse).palm_params == everything - experts * 6 / 8


@pytest.mark.parametrize(("name", "peak"), [(name, peak) for peak, names in PEAKS.items() for name in names])
def test_a_peak_is_of_a_known_device_or_none(name, peak):
    assert peak_flops(name) == peak


def test_mfu_is_a_share_of_all_devices_and_none_without_a_peak():
    assert mfu(4e15, 2.0, 4, 1e15) == 0.5
    assert mfu(4e15, 2.0, 4, None) is None
