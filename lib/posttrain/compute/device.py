"""The device of this process, and whether its kernels give the same bits every time."""

import os

import torch


def set_up_device(*, deterministic: bool) -> torch.device:
    """The GPU that this process sees, or the CPU.

    Args:
        deterministic: only kernels that add up in a fixed order, so that a step repeated on the same kind of device
            gives the same bits; an operation that has none raises RuntimeError and names itself. Slower: the backward
            of flash attention and of an index. To be called before CUDA is used in this process.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS picks its workspace, and so its order, once
        torch.use_deterministic_algorithms(True)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
