"""The decoder: a flat batch of tokens in, hidden states out. The LM head is applied in forward.py."""

import torch
from torch import Tensor, nn

from posttrain.data.types import Batch
from posttrain.model.attention import Attention, DocumentLayout
from posttrain.model.families import DecoderConfig
from posttrain.model.layers import MLP, Linear, RMSNorm, rope_tables


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with a residual."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: DocumentLayout) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, layout)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token embedding, blocks, final norm, output head; one definition for every family.

    Parameters are made uninitialised: load weights (model/load.py) or draw them
    (model/build.py) before use. With tied embeddings `output_head.weight` is
    `embedding.weight` itself.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(
            config.padded_vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.padded_vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.output_head = Linear(config.hidden_size, config.padded_vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's weight, when the config says so; again after to_empty()."""
        if self.config.tied_embeddings:
            self.output_head.weight = self.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, batch: Batch) -> Tensor:
        """Final hidden states [T, hidden], normed, in the parameters' dtype."""
        layout = DocumentLayout.of(batch)
        cos, sin = rope_tables(batch.position_ids, self.config.head_dim, self.config.rope_theta)
        x = self.embedding(batch.input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, layout)
        return self.norm(x)
