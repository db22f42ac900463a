"""The exceptions of this package, and one check that several modules share."""

import numpy as np


class DataError(ValueError):
    """An input that cannot be used.

    The message names the input, says what it was, and says what is allowed.
    """


class CorpusUnavailable(DataError):
    """A corpus that is not on this machine and cannot be fetched.

    The message says where to put the missing file, or which package to install.
    """


def whole_number(name: str, value: int, least: int) -> int:
    """Return `value` as an `int`.

    Raises `DataError` if `value` is not an integer or is below `least`. The error calls it `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, it is {value!r}")
    return int(value)
