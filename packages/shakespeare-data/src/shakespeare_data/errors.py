"""What this package raises."""

import numpy as np


class DataError(ValueError):
    """An input that cannot be used. The message says which, what it was and what is allowed."""


class CorpusUnavailable(DataError):
    """A corpus that is not on this machine and cannot be fetched; says where to put the file."""


def whole_number(name: str, value: int, least: int) -> int:
    """`value` as an int. Raises `DataError` naming it if it is none or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, it is {value!r}")
    return int(value)
