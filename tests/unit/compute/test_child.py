"""A child process leaves nothing behind that its parent would hear of when it ends."""

import asyncio
import gc
import warnings

import pytest

from posttrain.compute.child import Child


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_killed_child_leaves_no_open_transport_when_the_loop_ends_soon_after(turns: int):
    # The end of the loop cancels the child's last task a second time, wherever it has come to.
    async def start_and_kill():
        child = await Child.start("reward 0", "builtins:dict", {}, timeout_s=60)
        child.kill()
        for _ in range(turns):
            await asyncio.sleep(0)
        return child.process

    gc.collect()  # what earlier tests left open is not this one's
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        process = asyncio.run(start_and_kill())
        assert process.returncode == -9
        del process
        gc.collect()
    assert not [str(each.message) for each in said if "unclosed" in str(each.message)]
