"""Provide Shakespeare's plays as training data: corpora, a tokenizer, partitions and batches."""

from importlib.metadata import version

from shakespeare_data.batches import Batches, sample_windows, sequential_batches
from shakespeare_data.corpus import CORPORA, Corpus, Split, load_corpus
from shakespeare_data.errors import CorpusUnavailable, DataError
from shakespeare_data.partition import SCHEMES, Partition, PartReport, partition
from shakespeare_data.parts import Part, read_part
from shakespeare_data.plays import Act, Play, Scene, Speech
from shakespeare_data.sources import cache_dir
from shakespeare_data.tokenizer import CharTokenizer

__version__ = version("shakespeare-data")

__all__ = [
    "CORPORA",
    "SCHEMES",
    "Act",
    "Batches",
    "CharTokenizer",
    "Corpus",
    "CorpusUnavailable",
    "DataError",
    "Part",
    "PartReport",
    "Partition",
    "Play",
    "Scene",
    "Speech",
    "Split",
    "cache_dir",
    "load_corpus",
    "partition",
    "read_part",
    "sample_windows",
    "sequential_batches",
]
