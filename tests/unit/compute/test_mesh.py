"""The mesh: which rank trains on what, and refusals of sizes that lay out nothing."""

import pytest

from posttrain.compute.mesh import Sizes, make_mesh
from posttrain.errors import ComputeError


def test_ranks_of_a_tensor_or_context_group_train_on_the_same_packs():
    sizes = Sizes(data=4, context=2, tensor=2, expert=2)
    assert sizes.world == 16
    # (replica, context, expert, tensor), the last fastest
    assert [sizes.data_rank(rank) for rank in range(16)] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert [sizes.context_rank(rank) for rank in range(16)] == [0, 0, 0, 0, 1, 1, 1, 1] * 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (Sizes(data=2, tensor=2), r"data \* context \* tensor = 4, but there are 8 ranks"),
        (Sizes(data=0, tensor=8), "each must be at least 1"),
        (Sizes(data=8, expert=3), "expert must divide data"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ComputeError, match=words):
        make_mesh(sizes, world=8, device_type="cpu")
