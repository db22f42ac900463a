"""What this package raises."""


class DataError(ValueError):
    """An input that cannot be used. The message says which, what it was and what is allowed."""


class CorpusUnavailable(DataError):
    """A corpus that is not on this machine and cannot be fetched; says where to put the file."""
