"""Exceptions raised for mistakes that the caller can mend, and warnings.

Each exception also derives from the built-in one a caller would expect, so ``except ValueError`` keeps working. The
command line prints these without a traceback; anything else is a defect and keeps its traceback.
"""


class FastvqError(Exception):
    """Base of every error that fastvq raises on purpose."""


class ArgumentError(FastvqError, ValueError):
    """An argument has a value or a shape that does not fit."""


class ArgumentTypeError(FastvqError, TypeError):
    """An argument has a Python type or a tensor dtype that does not fit."""


class MissingFileError(FastvqError, FileNotFoundError):
    """A path does not lead to what was asked for."""


class FileConflictError(FastvqError, FileExistsError):
    """Going on would overwrite or mix up something that is already there."""


class CorruptFileError(FastvqError, ValueError):
    """A file is there but its contents are damaged or not what they should be."""


class DiskFullError(FastvqError, OSError):
    """There is no room for a file; what stood in its place before still does."""


class UnavailableError(FastvqError, RuntimeError):
    """An engine, a backend, the compiled extension or an optional dependency is not available here."""


class TraceError(UnavailableError):
    """A network could not be written as a plan for the cached engines."""


class CausalityError(ArgumentError):
    """Logits of a prior depend on codes that are not known when they are needed."""


class PeerError(FastvqError, RuntimeError):
    """Another process of a group has failed, so this one cannot go on.

    Attributes:
        words: what the other one said, or what has become of it.
        rank: its number; None if it is not known.
    """

    def __init__(self, words: str, rank: int | None = None) -> None:
        super().__init__(words if rank is None else f"process {rank}: {words}")
        self.words, self.rank = words, rank


class NaiveEngineWarning(UserWarning):
    """``engine="auto"`` takes the naive sampler for a prior that differs from one that a cached engine could run."""


class AccelerationWarning(UserWarning):
    """A known quantiser of a model is left as it is, because it differs from what could replace it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the process to end. It unwinds as Ctrl-C does."""
