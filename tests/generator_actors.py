"""Generators without a model that fail in every way one can, for processes of their own."""

import os
import signal
import threading
import time
from pathlib import Path

from posttrain.compute.generator.stub import StubGenerator


class NotingGenerator(StubGenerator):
    """Writes down what it is asked, one line a call: its version and the requests' seeds."""

    def __init__(self, *, folder: str, **arguments):
        super().__init__(**{"model_uri": "", "stop_ids": (2,), "pad_id": 0} | arguments)
        self.folder = Path(folder)

    def pid(self):
        return os.getpid()

    def generate(self, requests):
        with open(self.folder / "calls", "a") as file:
            file.write(f"{self.version} {' '.join(str(request.seed) for request in requests)}\n")
        return super().generate(requests)


class DiesOnce(NotingGenerator):
    """The first of its kind dies in its first call."""

    def generate(self, requests):
        made = super().generate(requests)
        if not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return made


class DiesWhenAsked(NotingGenerator):
    def generate(self, requests):
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(NotingGenerator):
    def generate(self, requests):
        threading.Event().wait()


class HangsOnce(NotingGenerator):
    """The first of its kind never answers its first call."""

    def generate(self, requests):
        made = super().generate(requests)
        if not (self.folder / "hung").exists():
            (self.folder / "hung").touch()
            threading.Event().wait()
        return made


class RefusesSeed7(NotingGenerator):
    def generate(self, requests):
        made = super().generate(requests)
        if any(request.seed == 7 for request in requests):
            raise ValueError("no such token")
        return made


class ForgetsOne(NotingGenerator):
    def generate(self, requests):
        return super().generate(requests)[1:]


class TwoAtOnce(NotingGenerator):
    """Answers when two calls are in it at the same time."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.together = threading.Barrier(2)

    def generate(self, requests):
        self.together.wait(timeout=30)
        return super().generate(requests)


class OneAtATime(NotingGenerator):
    """Says whether weights came in the midst of a call."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.working = False

    def generate(self, requests):
        self.working = True
        made = super().generate(requests)
        time.sleep(0.2)  # long enough for a sync to come in between, if it could
        self.working = False
        return made

    def sync(self, version, weights):
        assert not self.working
        return super().sync(version, weights)
