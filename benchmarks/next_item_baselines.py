"""What a next-item model is compared with: popularity, item-kNN, and a SASRec-style transformer over item ids.

Each reads the positive events before the cutoff, and ranks every item of the catalogue for a history.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Histories = Sequence[Sequence[int]]
"""Columns of the items that a member played, oldest first."""


def popularity(train: Histories, histories: Histories, items: int) -> np.ndarray:
    """[N, C]: how often each item was played in training."""
    counts = np.bincount(np.concatenate([np.asarray(each, int) for each in train]), minlength=items)
    return np.tile(counts.astype(np.float64), (len(histories), 1))


def item_knn(train: Histories, histories: Histories, items: int, *, recent: int = 10, decay: float = 0.7) -> np.ndarray:
    """[N, C]: cosine of the members who played both (Sarwar et al. 2001), summed over the latest items of a history,
    each counting `decay` of the one after it."""
    played = np.zeros((len(train), items))
    for member, history in enumerate(train):
        played[member, list(history)] = 1
    norms = np.maximum(np.sqrt(played.sum(0)), 1)
    near = played.T @ played / np.outer(norms, norms)
    np.fill_diagonal(near, 0)
    scores = np.zeros((len(histories), items))
    for n, history in enumerate(histories):
        for age, item in enumerate(reversed(history[-recent:])):
            scores[n] += decay**age * near[item]
    return scores


class SASRec(nn.Module):
    """Causal self-attention over item ids with learned positions (arXiv:1808.09781), trained by softmax cross-entropy
    over all items, which is stronger than its sampled loss (arXiv:2309.07602)."""

    def __init__(self, items: int, *, hidden: int = 96, layers: int = 2, heads: int = 2, length: int = 64):
        super().__init__()
        self.length, self.none = length, items
        self.item = nn.Embedding(items + 1, hidden, padding_idx=items)
        self.place = nn.Embedding(length, hidden)
        block = nn.TransformerEncoderLayer(hidden, heads, hidden * 4, 0.2, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm, self.dropout = nn.LayerNorm(hidden), nn.Dropout(0.2)
        nn.init.normal_(self.item.weight, std=0.02)

    def forward(self, items: Tensor) -> Tensor:
        """[B, L] ids, `none` where there is none, at the end -> [B, L, items] logits of the next."""
        length = items.shape[1]
        x = self.dropout(self.item(items) * self.item.embedding_dim**0.5 + self.place.weight[:length])
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        return self.norm(self.blocks(x, mask=causal, is_causal=True)) @ self.item.weight[: self.none].T


def sasrec(
    train: Histories, histories: Histories, items: int, *, seed: int, epochs: int = 60, patience: int = 6
) -> np.ndarray:
    """[N, C] logits of the epoch whose loss on each member's last training event was least; that event is in no
    gradient. `patience` epochs without a better one end it."""
    torch.manual_seed(seed)
    model = SASRec(items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    known = [list(each) for each in train if len(each) > 2]
    fit = _padded([each[:-1] for each in known], model)
    last = _padded([each[:-1] for each in known], model), torch.tensor([each[-1] for each in known])
    best, kept, at = np.inf, model.state_dict(), 0
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(fit)).split(64):
            inputs, targets = fit[rows, :-1], fit[rows, 1:]
            loss = F.cross_entropy(model(inputs).transpose(1, 2), targets, ignore_index=model.none)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss = F.cross_entropy(_last_logits(model, last[0]), last[1]).item()
        if loss < best:
            best, kept, at = loss, {name: value.clone() for name, value in model.state_dict().items()}, epoch
        if epoch - at == patience:
            break
    model.load_state_dict(kept)
    return _last_logits(model, _padded(histories, model)).double().numpy()


def _padded(histories: Histories, model: SASRec) -> Tensor:
    """[N, longest] of the latest ids of each history, `none` behind them."""
    cut = [list(each)[-model.length :] for each in histories]
    rows = [each + [model.none] * (max(map(len, cut)) - len(each)) for each in cut]
    return torch.tensor(rows)


@torch.no_grad()
def _last_logits(model: SASRec, histories: Tensor) -> Tensor:
    """[N, items] after the last item of each history."""
    model.eval()
    ends = (histories != model.none).sum(1).clamp(min=1) - 1
    parts = [
        model(histories[rows])[torch.arange(len(rows)), ends[rows]] for rows in torch.arange(len(histories)).split(256)
    ]
    return torch.cat(parts)
