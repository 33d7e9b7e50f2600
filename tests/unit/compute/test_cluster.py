"""Starting Ray: one message where the machine is too busy for it."""

import pytest

from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.errors import ComputeError


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        ("The current node timed out during startup. This could happen because", ComputeError, "Ray did not start"),
        ("something else", RuntimeError, "something else"),
    ],
)
def test_ray_that_is_too_slow_to_start_is_told_and_nothing_else_is_hidden(monkeypatch, raised, kind, message):
    import ray

    def init(**options):
        raise RuntimeError(raised)  # what ray 2.60 does after 30 s, node.py

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(kind, match=message), ray_cluster(Gang(), num_cpus=1, num_gpus=0):
        raise AssertionError("there is no cluster")
