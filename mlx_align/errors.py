"""The errors a user can cause and mend: each message says what is wrong, where, and what to do.

Library code raises these; the command line prints one line and exits with status 1. Anything
else that escapes is a programming mistake and keeps its traceback.
"""


class AlignError(Exception):
    """Base of every error that is the caller's to mend."""


class SettingsError(AlignError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(AlignError):
    """A data file cannot be read, or its rows do not fit the method."""


class ModelError(AlignError):
    """A model folder is incomplete, unsupported, or does not fit an adapter."""


class StaleReferenceError(AlignError):
    """Cached reference log-probabilities do not belong to this model and data."""


class RunError(AlignError):
    """A run folder cannot be written, resumed, or understood."""


class NonFiniteError(AlignError):
    """The loss or a gradient is not a finite number."""


class ExportError(AlignError):
    """A model cannot be written in the asked-for format."""
