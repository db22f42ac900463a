"""Convert a corpus to a Hugging Face `Dataset`. The module needs `datasets` (extra `hf`)."""

from typing import TYPE_CHECKING

from shakespeare_data.corpus import Corpus
from shakespeare_data.errors import DataError

if TYPE_CHECKING:
    import datasets


def to_hf_dataset(corpus: Corpus) -> "datasets.Dataset":
    """Return a dataset with one row for each speech, in the order of the text.

    The columns are `text`, `speaker`, `play`, `act` and `scene`. All columns contain strings. If
    the texts of all rows are joined, the result is the text of the corpus. The partitioners of
    `flwr_datasets` can divide this dataset. An example is
    `NaturalIdPartitioner(partition_by="play")`. Raises `DataError` if the package `datasets` is not
    installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("a Hugging Face Dataset needs datasets: pip install datasets") from error
    columns = ("text", "speaker", "play", "act", "scene")
    return datasets.Dataset.from_dict(
        {column: [getattr(speech, column) for speech in corpus.speeches] for column in columns}
    )
