"""The decoder: a flat batch of tokens in, hidden states out. The heads are applied in forward.py."""

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from posttrain.data.types import Batch
from posttrain.model.attention import Attention, Layout, default_backend
from posttrain.model.collectives import Group, copy_in, shared
from posttrain.model.families import DecoderConfig
from posttrain.model.heads import SIDE, make_head
from posttrain.model.layers import MLP, Embedding, Linear, RMSNorm
from posttrain.model.moe import MoE
from posttrain.model.recompute import run_block
from posttrain.model.rope import Rope, rope_tables


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP or experts, each with a residual; Gemma3 norms both again after."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(
                config.hidden_size, config.norm_eps, cast_first=config.norm_cast_first, offset=config.norm_offset
            )

        self.attention_norm = norm()
        self.attention = Attention(config, layer)
        self.attention_out_norm = norm() if config.sandwich_norms else nn.Identity()
        self.mlp_norm = norm()
        if config.experts is not None and config.experts.layers[layer]:
            self.mlp = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.mlp_size, activation=config.activation, bias=config.mlp_bias)
        self.mlp_out_norm = norm() if config.sandwich_norms else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sins: Tensor, layout: Layout) -> Tensor:
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), cos, sins, layout))
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Token embedding, blocks, final norm, heads; one definition for every family.

    Parameters are made uninitialised: load weights (model/load.py) or draw them
    (model/build.py) before use. With tied embeddings `output_head.weight` is
    `embedding.weight` itself.
    """

    def __init__(self, config: DecoderConfig, *, attention: str | None = None):
        """
        Args:
            attention: backend of attend(); None takes the fastest for the device and dtype of a batch.
        """
        super().__init__()
        self.config, self.attention = config, attention
        rows = config.padded_vocab_size
        self.embedding = Embedding(rows, config.hidden_size, scale=config.embedding_scale)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(
            config.hidden_size, config.norm_eps, cast_first=config.norm_cast_first, offset=config.norm_offset
        )
        self.output_head = Linear(config.hidden_size, rows) if config.lm_head else None
        self.heads = nn.ModuleDict(
            {name: make_head(spec, config.hidden_size, name=name) for name, spec in config.heads.items()}
        )
        self.tensor: Group | None = None
        """Ranks that share every block, and the rows that carry loss (model/parallel.py)."""
        self.context: Group | None = None
        """Ranks that share the tokens of a batch."""
        self._compiled, self._recompute = False, "none"
        self._frequencies: dict[tuple[Rope, torch.device], Tensor] = {}
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's weight, where the config says so."""
        if self.config.tied_embeddings and self.output_head is not None:
            self.output_head.weight = self.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]

    def to_empty(self, *, device, recurse: bool = True) -> "Decoder":
        """Parameters without values on `device`, the head still tied, the experts' load zero."""
        super().to_empty(device=device, recurse=recurse)
        self.tie()
        for buffer in self.buffers():
            buffer.zero_()
        return self

    def checkpoint_activations(self, mode: str) -> None:
        """Keep less for the backward, by a mode of recompute.MODES; before compile_blocks()."""
        self._recompute = mode

    def compile_blocks(self) -> None:
        """Compile every block by itself: one graph serves all layers of a kind, and a step's shapes never change it."""
        self._compiled = True
        if self._recompute == "selective":
            functorch_config.activation_memory_budget = 0.5
            self._recompute = "none"  # the compiler does it
        for layer in self.layers:
            mlp, apart = layer.mlp, False
            if isinstance(mlp, MoE) and mlp.expert is not None:
                mlp.leave_exchange_uncompiled()
                apart = True
            layer.compile(fullgraph=not apart, dynamic=False)

    def forward(self, batch: Batch) -> Tensor:
        """Final hidden states [T, hidden], normed, in the parameters' dtype; of batch.share's tokens where ranks share
        those.

        Ranks that share blocks all have them; the gradient that each gives back is its own part of a sum.
        """
        assert (batch.share is None) == (self.context is None), "a model that shares tokens needs to know which"
        config, weight = self.config, self.embedding.weight
        layout = Layout.of(
            batch,
            backend=self.attention or default_backend(weight.device, weight.dtype, compiled=self._compiled),
            windows=set(config.windows),
        )
        held = slice(None) if batch.share is None else batch.share.token_idx
        x = self.embedding(batch.input_ids[held])
        tables = {rope: self._tables(rope, batch.position_ids[held], x.dtype) for rope in set(config.ropes)}
        if SIDE in self.heads and batch.features is not None:
            x = x + self.heads[SIDE](batch.features[held]).to(x.dtype)
        x = shared(x, self.tensor)
        for layer, rope in zip(self.layers, config.ropes, strict=True):
            x = run_block(layer, x, *tables[rope], layout, mode=self._recompute)
        return self.norm(copy_in(x, self.tensor))

    def _tables(self, rope: Rope, position_ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
        key = (rope, position_ids.device)
        if key not in self._frequencies:  # kept, as a copy to the device every step would wait for the host
            self._frequencies[key] = torch.tensor(rope.frequencies, dtype=torch.float32, device=position_ids.device)
        return [each.to(dtype) for each in rope_tables(rope, position_ids, self._frequencies[key])]
