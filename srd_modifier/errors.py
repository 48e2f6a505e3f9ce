"""What this package raises when the input or the environment is at fault.

Every message is one sentence that says what is wrong, where (file, module or field) and what to do. The
commands print it on stderr and exit with status 1; a traceback is kept for our own mistakes.
"""


class SRDError(Exception):
    """The input or the environment is at fault; the message is meant for the user."""


class ConfigError(SRDError, ValueError):
    """A setting is outside what this version accepts.

    It is also a `ValueError` so that pydantic reports it as a validation error of the recipe field.
    """


class CheckpointError(SRDError):
    """A checkpoint on disk is damaged, incomplete, or does not belong to its sidecar."""


class RecipeError(SRDError):
    """A recipe cannot give a residual: wrong order, wrong scheme, or nothing to correct."""


class MissingExtraError(SRDError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""
