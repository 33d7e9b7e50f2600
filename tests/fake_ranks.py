"""Fill a sharded decoder as every rank of a world in turn, and keep what each rank holds.

python fake_ranks.py FOLDER OUT WORLD [VOCAB_SIZE]: FOLDER is a model folder, OUT gets rank<i>.pt with
{"<parameter>": (local tensor, offsets)}. Dimension 0 is sharded over the first half of the mesh and the last
dimension over the second where WORLD reads as "4x2"; with "8" it is FSDP2 itself.
"""

import multiprocessing
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.load import fill, read_config


def on_a_grid(model: nn.Module, mesh) -> None:
    """Make every parameter a DTensor, dimension 0 and the last one sharded."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                placements = (Shard(0), Shard(parameter.ndim - 1))
                shape, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
                local = torch.full(shape, torch.nan, dtype=parameter.dtype)
                whole = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
                made[id(parameter)] = nn.Parameter(DTensor.from_local(local, mesh, placements, **whole))
            setattr(module, name, made[id(parameter)])


def be_rank(rank: int, sizes: tuple[int, ...], folder: str, out: str, vocab_size: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(sizes).numel())
    mesh = init_device_mesh("cpu", sizes)
    config = decoder_config(read_config(folder))
    with torch.device("meta"):
        model = Decoder(replace(config, vocab_size=vocab_size or config.vocab_size))
    if len(sizes) == 2:
        on_a_grid(model, mesh)
    else:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter.to_local(), torch.nan)
    assert fill(model, folder) == []
    held = {}
    for name, parameter in model.named_parameters():
        where = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)[1]
        held[name] = (parameter.to_local().detach().clone(), where)
    torch.save(held, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


def main(folder: str, out: str, world: str, vocab_size: str = "0") -> None:
    sizes = tuple(int(size) for size in world.split("x"))
    decoder_config(read_config(folder))  # what it imports, the children need not
    for rank in range(torch.Size(sizes).numel()):
        # A process each, as DTensor caches what depends on the rank; forked, as importing torch takes seconds.
        child = multiprocessing.get_context("fork").Process(
            target=be_rank, args=(rank, sizes, folder, out, int(vocab_size))
        )
        child.start()
        child.join()
        assert child.exitcode == 0, f"rank {rank} failed"


if __name__ == "__main__":
    main(*sys.argv[1:])
