"""A pool of threads that bring parts of a checkpoint to a device, each with one reused buffer on the host.

For CUDA the buffer is pinned and each thread copies on a stream of its own, so that reads from disk, copies
to the device and conversions there overlap between threads; host memory is the buffers, whatever the model.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from math import prod
from queue import SimpleQueue

import torch
from torch import Tensor

from posttrain.model.tensor_file import TensorFile

CHUNK_BYTES = 16 * 2**20
"""Most that a thread holds of a checkpoint at one time."""


class Worker:
    """What one thread reuses: a staging buffer, pinned for CUDA, and a stream of copies."""

    def __init__(self, device: torch.device):
        self.device = device
        on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_cuda)
        self._used = 0

    def fetch(self, file: TensorFile, name: str, first: int, shape: Sequence[int]) -> Tensor:
        """Elements of a checkpoint tensor from `first` on, on the device; gone when the job ends."""
        dtype = file.dtypes[name]
        end = self._used + prod(shape) * dtype.itemsize
        staged = self._buffer[self._used : end].view(dtype).view(shape)
        self._used = end
        file.read_into(name, first, staged)
        return staged.to(self.device, non_blocking=self.stream is not None)

    def do(self, job: "Job") -> None:
        """Run a job to its end: the buffer is free again."""
        self._used = 0
        with torch.cuda.stream(self.stream):  # no-op without one
            job(self)
        if self.stream is not None:
            self.stream.synchronize()


Job = Callable[[Worker], None]
"""A part of the work that fits in one buffer."""


def run_jobs(jobs: Sequence[Job], device: torch.device, *, threads: int) -> None:
    """All jobs, or the first error; no thread outlives the call."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # what still writes to the parameters, as zero_(), comes first
    idle: SimpleQueue[Worker] = SimpleQueue()
    for _ in range(min(threads, len(jobs))):
        idle.put(Worker(device))

    def run(job: Job) -> None:
        worker = idle.get()
        try:
            worker.do(job)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
