"""The inside of a Child: makes an object and answers calls to it. `python -m posttrain.compute.child_main`.

Standard input brings one JSON line a call, the answers go to what was standard output; what the object
prints goes to standard error. Ends with its standard input, as when the parent dies.
"""

import asyncio
import inspect
import json
import os
import sys
from typing import Any

from posttrain.plugin import resolve

LONGEST_LINE = 2**30


class Server:
    """Calls in, answers out."""

    def __init__(self, out: int):
        self.out, self.object = out, None
        self.running: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer until the input ends. A plain method runs at once; a coroutine beside the others."""
        reader = asyncio.StreamReader(limit=LONGEST_LINE)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            call = json.loads(line)
            task = asyncio.create_task(self._answer(**call), name=f"{call['method']}()")
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def _answer(self, number: int, method: str, args: list[Any]) -> None:
        try:
            value = self._make(*args) if method == "make" else getattr(self.object, method)(*args)
            if inspect.isawaitable(value):
                value = await value
            text = json.dumps({"number": number, "value": value})
        except Exception as error:
            text = json.dumps({"number": number, "error": [type(error).__name__, str(error)]})
        line = memoryview(text.encode() + b"\n")
        while line:
            line = line[os.write(self.out, line) :]

    def _make(self, cls: str, arguments: dict[str, Any]) -> None:
        self.object = resolve(cls, key="child")(**arguments)


def main() -> None:
    """Keep the pipe of the answers for ourselves: a print() of foreign code must not end up in it."""
    out = os.dup(1)
    os.dup2(2, 1)
    asyncio.run(Server(out).serve())
    os._exit(0)  # threads of foreign code hold nobody up


if __name__ == "__main__":
    main()
