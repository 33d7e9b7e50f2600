"""What a config's GPUs and generators become: pools, and who shares what."""

import pytest

from posttrain.config import Parallel
from steps.hardware import hardware


@pytest.mark.parametrize(
    ("gpus", "ranks", "generators", "beside", "each"),
    [
        (2, 1, 1, 0, 1),  # one for the rank, one for the generator
        (2, 2, 2, 1, 0.4),
        (2, 2, 6, 3, 0.1333),
        (1, 1, 2, 2, 0.2),
        (0, 2, 2, 0, 0),
    ],
)
def test_generators_have_gpus_of_their_own_or_share_those_of_the_ranks(gpus, ranks, generators, beside, each):
    found = hardware(Parallel(gpus_per_node=gpus, data=ranks), generators)
    assert (found.shared, found.generator.gpus) == (beside, each)
    if gpus:
        assert ranks * found.policy.gpus + generators * found.generator.gpus <= gpus, "Ray places them all"
        if found.shared:
            assert found.policy.gpus + (beside + 1) * found.generator.gpus > 1, "and none too many on one GPU"
