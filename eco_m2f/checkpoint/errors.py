"""The error of everything that reads or writes weights."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: which file, why, and what to do about it."""
