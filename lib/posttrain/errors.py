"""Errors a person can act on; a mistake of our own stays an AssertionError.

Each says what, where, the value, and the fix, in one line. They carry a plain
message and nothing else, so that they survive the trip out of a Ray actor.
"""


class PosttrainError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(PosttrainError, ValueError):
    """A value in the run config is wrong or contradicts another."""


class DataError(PosttrainError, ValueError):
    """A file or row cannot become a training sample."""


class ModelError(PosttrainError, ValueError):
    """A model folder or its tensors are not what the decoder expects."""


class CheckpointError(PosttrainError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ComputeError(PosttrainError, RuntimeError):
    """A worker died, hung past its deadline, or produced a value that must stop the run."""


class RewardError(PosttrainError, RuntimeError):
    """A reward raised, timed out, or returned something that is not a finite number."""


class SyncError(PosttrainError, RuntimeError):
    """The generator does not hold the weights that the policy sent."""
