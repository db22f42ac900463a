"""Define the exceptions of this package, and one check that several modules use."""

import numpy as np


class DataError(ValueError):
    """The exception for an input that cannot be used.

    The message names the input and its value, and says which values are allowed.
    """


class CorpusUnavailable(DataError):
    """The exception for a corpus that is not on this machine and cannot be downloaded.

    The message says where to put the missing file, or which package to install.
    """


def whole_number(name: str, value: int, least: int) -> int:
    """Check that `value` is an integer, and return it as an `int`.

    Raises `DataError` if `value` is not an integer or is less than `least`. The message uses `name`
    as the name of the input.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, it is {value!r}")
    return int(value)
