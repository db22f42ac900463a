import sys

import pytest
from flwr_datasets.partitioner import DirichletPartitioner, NaturalIdPartitioner

from shakespeare_data import Corpus, DataError
from shakespeare_data.hf import to_hf_dataset


def test_each_speech_is_a_row(folio: Corpus) -> None:
    rows = to_hf_dataset(folio)
    assert rows.column_names == ["text", "speaker", "play", "act", "scene"]
    assert len(rows) == len(folio.speeches) == 300
    assert "".join(rows["text"]) == folio.text
    assert rows[0] == {"text": "ANN:\naaaa bc 0\n\n", "speaker": "ANN", "play": "Long"} | {
        "act": "",
        "scene": "",
    }


def test_flowers_partitioner_by_natural_id_gives_a_play_each(folio: Corpus) -> None:
    natural = NaturalIdPartitioner(partition_by="play")
    natural.dataset = to_hf_dataset(folio)
    assert natural.num_partitions == 3
    parts = [natural.load_partition(i) for i in range(3)]
    for part in parts:
        (title,) = set(part["play"])
        expected = [speech.text for speech in folio.speeches if speech.play == title]
        assert part["text"] == expected


def test_flowers_dirichlet_partitioner_divides_the_speeches(folio: Corpus) -> None:
    dirichlet = DirichletPartitioner(
        num_partitions=4, partition_by="speaker", alpha=0.5, min_partition_size=5, seed=1
    )
    dirichlet.dataset = to_hf_dataset(folio)
    texts = [text for i in range(4) for text in dirichlet.load_partition(i)["text"]]
    assert sorted(texts) == sorted(speech.text for speech in folio.speeches)


def test_a_missing_datasets_package_is_named(
    folio: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        to_hf_dataset(folio)
