"""A corpus as a Hugging Face `Dataset`; needs the package `datasets` (extra `hf`)."""

from typing import TYPE_CHECKING

from shakespeare_data.corpus import Corpus
from shakespeare_data.errors import DataError

if TYPE_CHECKING:
    import datasets


def to_hf_dataset(corpus: Corpus) -> "datasets.Dataset":
    """One row a speech, in order: `text`, `speaker`, `play`, `act` and `scene`, all strings.

    The texts, joined, are the corpus' text. The partitioners of `flwr_datasets` work on it, such as
    `NaturalIdPartitioner(partition_by="play")`. Raises `DataError` if `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("a Hugging Face Dataset needs datasets: pip install datasets") from error
    columns = ("text", "speaker", "play", "act", "scene")
    return datasets.Dataset.from_dict(
        {column: [getattr(speech, column) for speech in corpus.speeches] for column in columns}
    )
