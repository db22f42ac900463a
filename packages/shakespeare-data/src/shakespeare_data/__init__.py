"""Shakespeare as characters: corpus, tokenizer, contiguous parts, batches."""

from importlib.metadata import version

from shakespeare_data.batches import (
    Batches,
    epoch_batches,
    num_epoch_batches,
    sample_windows,
    sequential_batches,
)
from shakespeare_data.corpus import Corpus, load_corpus
from shakespeare_data.errors import CorpusUnavailable, DataError
from shakespeare_data.partition import Part, contiguous, partition, read_part, write_partitions
from shakespeare_data.sources import cache_dir
from shakespeare_data.tokenizer import CharTokenizer

__version__ = version("shakespeare-data")

__all__ = [
    "Batches",
    "CharTokenizer",
    "Corpus",
    "CorpusUnavailable",
    "DataError",
    "Part",
    "cache_dir",
    "contiguous",
    "epoch_batches",
    "load_corpus",
    "num_epoch_batches",
    "partition",
    "read_part",
    "sample_windows",
    "sequential_batches",
    "write_partitions",
]
