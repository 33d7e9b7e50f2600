"""Ranks that all hold a parameter whole hold the same bits: a flipped bit on one of them is no noise but damage.

Nothing else would show it: each rank goes on with its own weights, the sum of their gradients is of two models, and
the loss may even fall. Such a parameter's gradient is one sum that all ranks receive (Ranks.sum_gradients), so all take
the same step to the bit. What is sharded is left out: most of it is held once, and what tensor ranks keep alike they
compute each by itself, where a kernel may add up in another order.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from posttrain.compute.weight_sync import digest
from posttrain.errors import ComputeError

CHECK_EVERY = 50
"""Optimizer steps between two checks; one reads every parameter once and sends two hashes a rank."""

Replica = tuple[str, str]
"""Which tensors a rank holds whole, and the digest of their bits; both hex."""


def replica(parameters: Iterable[tuple[str, Tensor]]) -> Replica:
    """Of this rank's named parameters."""
    whole = [(name, tensor) for name, tensor in parameters if not isinstance(tensor, DTensor)]
    which = hashlib.sha256(repr([(name, tuple(tensor.shape)) for name, tensor in whole]).encode()).hexdigest()
    return which, digest(whole)


def check_replicas(found: Sequence[Replica], *, step: int) -> None:
    """Compare what every rank says of itself, in rank order.

    Raises:
        ComputeError: ranks that hold the same tensors hold other bits; names those that differ from most, or all where
            none are most.
    """
    for which in dict.fromkeys(which for which, _ in found):
        ranks = {rank: bits for rank, (each, bits) in enumerate(found) if each == which}
        (usual, count), *others = Counter(ranks.values()).most_common()
        if others:
            known = count > others[0][1]
            odd = [rank for rank, bits in ranks.items() if bits != usual or not known]
            raise ComputeError(
                f"step {step}: weights of policy {', '.join(map(str, odd))} differ "
                f"{'from those of its replicas' if known else 'though they are replicas'}, which no arithmetic "
                "explains: a bit was changed in memory. This step changed nothing. Fix: look at the memory and the GPU "
                "of those ranks' machines, and start the run again from its last checkpoint"
            )
