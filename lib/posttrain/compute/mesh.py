"""How the ranks of a training job are laid out: sizes become one DeviceMesh, and a mesh for each kind of split.

Ranks count through (replica, context, expert, tensor), the last fastest: a tensor group, which speaks most, is
neighbours. Data ranks are replica x expert; expert parallelism is carved out of them and takes no ranks of its own.
"""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from posttrain.errors import ComputeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Ranks along each axis; `data * context * tensor` of them in all."""

    data: int
    """Ranks, or groups of them, that train on packs of their own."""
    context: int = 1
    """Ranks that share the tokens of every pack."""
    tensor: int = 1
    """Ranks that share every matrix of a block."""
    expert: int = 1
    """Data ranks that share the experts of every layer."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.data * self.context * self.tensor

    def data_rank(self, rank: int) -> int:
        """Which share of a global batch a rank trains on; ranks of one tensor or context group have one."""
        rest, expert = divmod(rank // self.tensor, self.expert)
        return rest // self.context * self.expert + expert

    def context_rank(self, rank: int) -> int:
        """Which tokens of a pack a rank has."""
        return rank // (self.tensor * self.expert) % self.context

    def check(self, world: int) -> None:
        """Refuse sizes that do not lay out `world` ranks.

        Raises:
            ComputeError: says which and why.
        """
        named = f"data {self.data}, context {self.context}, tensor {self.tensor}, expert {self.expert}"
        if min(self.data, self.context, self.tensor, self.expert) < 1:
            raise ComputeError(f"parallel sizes are {named}; each must be at least 1")
        if self.world != world:
            raise ComputeError(
                f"parallel sizes are {named}: data * context * tensor = {self.world}, but there are {world} ranks. "
                "Fix: change one of them until they multiply to the number of ranks"
            )
        if self.data % self.expert:
            raise ComputeError(
                f"parallel sizes are {named}: experts are shared among data ranks, so expert must divide data"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The one DeviceMesh of a job, and the one-dimensional meshes that splits run over, as this rank sees them."""

    sizes: Sizes
    whole: DeviceMesh
    tensor: DeviceMesh
    context: DeviceMesh
    expert: DeviceMesh
    blocks: DeviceMesh
    """Every rank that holds the same part of a tensor-parallel block: FSDP shards blocks over it."""
    experts: DeviceMesh
    """Every rank that holds the same experts: FSDP shards those over it."""
    all: DeviceMesh
    """Every rank: FSDP shards what is not tensor-parallel over it, the embedding and the heads."""


def make_mesh(sizes: Sizes, *, world: int, device_type: str) -> Mesh:
    """Lay out the ranks of the initialised default process group; every rank calls it, as groups are made.

    Raises:
        ComputeError: the sizes do not multiply to `world`, or expert does not divide data.
    """
    sizes.check(world)
    axes = {"replica": sizes.data // sizes.expert, "context": sizes.context}
    axes |= {"expert": sizes.expert, "tensor": sizes.tensor}
    if device_type == "cuda":
        torch.cuda.set_device(
            torch.cuda.current_device()
        )  # else torch guesses one by the rank's number, with a warning
    whole = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    return Mesh(
        sizes=sizes,
        whole=whole,
        tensor=whole["tensor"],
        context=whole["context"],
        expert=whole["expert"],
        blocks=whole["replica", "context", "expert"]._flatten("blocks"),
        experts=whole["replica", "context"]._flatten("experts"),
        all=whole._flatten("all"),
    )
