"""A VllmGenerator in a process of its own, driven over a pipe: what shares a GPU with this one."""

from multiprocessing import get_context
from typing import Any


class EngineProcess:
    """Calls by method name; an error there is raised here."""

    def __init__(self, **settings: Any):
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, method: str, *args: Any, timeout_s: float = 240.0) -> Any:
        self.pipe.send((method, args))
        assert self.pipe.poll(timeout_s), f"{method}() did not finish within {timeout_s:g} s"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def serve(pipe: Any, settings: dict[str, Any]) -> None:
    """The engine's process."""
    from posttrain.compute.generator.vllm import VllmGenerator

    engine = VllmGenerator(**settings)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(free_memory() if method == "free_memory" else getattr(engine, method)(*args))
        except Exception as error:
            pipe.send(RuntimeError(f"{method}: {type(error).__name__}: {error}"))


def free_memory() -> int:
    """Bytes of the GPU that no process holds."""
    import torch

    return torch.cuda.mem_get_info()[0]
