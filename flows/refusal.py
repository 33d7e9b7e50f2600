"""An error with a known cause ends a task with one message, and says by the exit code whether another attempt helps."""

from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY, MetaflowException

from posttrain.errors import (
    ComputeError,
    ConfigError,
    DataError,
    ModelError,
    PosttrainError,
    PreemptedError,
    StorageError,
    SyncError,
)
from posttrain.workflow.stopping import EXIT_CODE


class Refused(MetaflowException):
    """Something in the config, the data or the model that a person can fix."""

    headline = "posttrain refused to run"


class Stopped(MetaflowException):
    """The run could not go on: a worker died or hung, a reward kept failing, a checkpoint is not this run's."""

    headline = "posttrain stopped"


def refusing(program, *args, **kwargs):
    """Call a step's program; errors with a known cause end the task with one message, others with a traceback."""
    try:
        return program(*args, **kwargs)
    except PosttrainError as error:
        global _exit_code
        if isinstance(error, PreemptedError):
            _exit_code = EXIT_CODE
        elif not isinstance(error, ComputeError | StorageError | SyncError):
            _exit_code = METAFLOW_EXIT_DISALLOW_RETRY
        kind = Refused if isinstance(error, ConfigError | DataError | ModelError) else Stopped
        raise kind(f"{type(error).__name__}: {error}") from None


_exit_code: int | None = None
"""What main() tells Metaflow by: that a retry would only meet the same again, or that the run was asked to stop, has
saved, and goes on in the next attempt."""


def exit_code() -> int | None:
    """What this process is to end with, where refusing() has ended its task."""
    return _exit_code
