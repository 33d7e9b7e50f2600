"""Errors a person can act on; a mistake of our own stays an AssertionError.

Each says what, where, the value, and the fix, in one line. They carry plain strings
and nothing else, so that they survive the trip out of a Ray actor.
"""


class PosttrainError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(PosttrainError, ValueError):
    """A value in the run config is wrong or contradicts another."""


class DataError(PosttrainError, ValueError):
    """A file or row cannot become a training sample."""


class RowError(DataError):
    """One row is unfit; it is counted under `reason` and costs one of the budget of bad rows."""

    def __init__(self, reason: str, detail: str):
        """
        Args:
            reason: a short slug to count by, as `no_assistant_turn`.
            detail: what is wrong with the row and how to mend it; the caller adds file and row.
        """
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


class CodesFullError(DataError):
    """More items share all codes than a semantic id's last code can tell apart."""


class ModelError(PosttrainError, ValueError):
    """A model folder or its tensors are not what the decoder expects."""


class CheckpointError(PosttrainError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class DamagedError(CheckpointError):
    """A checkpoint's bytes are not those that were committed; the one before it may be used."""


class StorageError(PosttrainError, RuntimeError):
    """A disk is full or a store does not answer within its budget; what is committed is untouched."""


class PreemptedError(PosttrainError, RuntimeError):
    """The run was asked to stop, has saved, and goes on from there when it is started again."""


class ComputeError(PosttrainError, RuntimeError):
    """A worker died, hung past its deadline, or produced a value that must stop the run."""


class WorkerDiedError(ComputeError):
    """The process of a worker ended: the cause of what its peers may raise after it."""


class WorkerHungError(ComputeError):
    """A worker did not answer by its deadline."""


class GenerationError(ComputeError):
    """A generator could not answer some requests, and lives."""


class RewardError(PosttrainError, RuntimeError):
    """A reward raised, timed out, or returned something that is not a finite number."""


class EpisodeError(PosttrainError, RuntimeError):
    """An environment raised, hung, died, or said what cannot be a turn."""


class SyncError(PosttrainError, RuntimeError):
    """The generator does not hold the weights that the policy sent."""


class StalenessError(PosttrainError, RuntimeError):
    """A rollout is older than rollout.max_staleness allows; it is not trained."""


class GateError(PosttrainError, RuntimeError):
    """A trained model is worse on held-out rows than the run's gate allows."""
