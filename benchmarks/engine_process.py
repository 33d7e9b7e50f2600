"""A VllmGenerator in a process of its own, driven over a pipe without Ray: what shares a GPU with a policy rank."""

from multiprocessing import get_context
from typing import Any


class EngineProcess:
    """Calls by method name; an error there is raised here."""

    def __init__(self, **settings: Any):
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, method: str, *args: Any) -> None:
        self.pipe.send((method, args))

    def result(self, timeout_s: float = 400.0) -> Any:
        """What the call that was started returned."""
        assert self.pipe.poll(timeout_s), f"no answer within {timeout_s:g} s"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, method: str, *args: Any) -> Any:
        self.start(method, *args)
        return self.result()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def together(engines: list[EngineProcess], method: str, *args: Any) -> list[Any]:
    """Call a method of all engines at once."""
    for engine in engines:
        engine.start(method, *args)
    return [engine.result() for engine in engines]


def _serve(pipe: Any, settings: dict[str, Any]) -> None:
    """The engine's process: answers calls until the pipe is closed."""
    from posttrain.compute.generator.vllm import VllmGenerator

    engine = VllmGenerator(**settings)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_free_memory() if method == "free_memory" else getattr(engine, method)(*args))
        except Exception as error:
            pipe.send(RuntimeError(f"{method}: {type(error).__name__}: {error}"))


def _free_memory() -> int:
    """Bytes of the GPU that no process holds."""
    import torch

    return torch.cuda.mem_get_info()[0]
