"""The exceptions.

MoeError
|- MoeValueError    an argument is wrong (also a ValueError)
|- CheckpointError  a file cannot be read as weights or tokens, or cannot be written
"""


class MoeError(Exception):
    """Base of everything that moe_numba raises on purpose."""


class MoeValueError(MoeError, ValueError):
    """An argument is not what it must be. The message names it, its value and the rule."""


class CheckpointError(MoeError):
    """A file is missing, unreadable, truncated or does not hold what it should."""
