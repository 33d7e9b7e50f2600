"""What some ranks of a large job would hold of a model that has no values, in a process that alone plays them.

python fake_mesh.py CONFIG SIZES RANK...: CONFIG is a config.json, SIZES JSON of compute.mesh.Sizes; prints JSON,
rank -> parameter -> [local shape, bytes].
"""

import json
import multiprocessing
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from posttrain.compute.mesh import Sizes, make_mesh
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.workflow.place import place


def be_rank(rank: int, sizes: Sizes, config, sender) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world)
    with torch.device("meta"):
        model = Decoder(config)
    place(model, make_mesh(sizes, world=sizes.world, device_type="cpu"))
    held = {name: p.to_local() for name, p in model.named_parameters()}
    sender.send({name: [list(local.shape), local.nbytes] for name, local in held.items()})


def main(path: str, sizes: str, *ranks: str) -> None:
    with open(path) as file:
        config = decoder_config(json.load(file))
    found = {}
    for rank in map(int, ranks):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        # A process each, as DTensor caches what depends on the rank; forked, as importing torch takes seconds.
        child = multiprocessing.get_context("fork").Process(
            target=be_rank, args=(rank, Sizes(**json.loads(sizes)), config, sender)
        )
        child.start()
        sender.close()
        found[rank] = receiver.recv()
        child.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
