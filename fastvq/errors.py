"""Exceptions raised for mistakes that the caller can mend.

Each also derives from the built-in exception a caller would expect, so ``except ValueError`` keeps working. The command
line prints these without a traceback; anything else is a defect and keeps its traceback.
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


class UnavailableError(FastvqError, RuntimeError):
    """An engine, a backend, the compiled extension or an optional dependency is not available here."""
