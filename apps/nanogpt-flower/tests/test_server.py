import logging
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from flower_adapter.testing import LocalGrid
from nanogpt_flower.client_app import app as client_app
from nanogpt_flower.composition import VocabularyMismatch, compression, sample_prompt
from nanogpt_flower.server_app import strategy
from nanogpt_flower.server_text import ask_vocabulary, wait_for_clients
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, DataError


@pytest.fixture(autouse=True)
def server_identity() -> None:
    LocalGrid(client_app, 0)  # lets this process make messages, as a ServerApp does


class Answers(LocalGrid):
    """A grid whose nodes answer a query with a record or an error, or never."""

    def __init__(self, *answers: Callable[[Message], Message | None]) -> None:
        super().__init__(client_app, len(answers))
        self.answers = answers

    def reply(self, message: Message) -> Message | None:
        return self.answers[self.partition(message.metadata.dst_node_id)](message)


def saying(**fields: Any) -> Callable[[Message], Message]:
    return lambda query: Message(RecordDict({"client": ConfigRecord(fields)}), reply_to=query)


def refusing(reason: str) -> Callable[[Message], Message]:
    return lambda query: Message(Error(2, reason), reply_to=query)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what was logged as warnings. Nobody waits for answers."""
    now = iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None)
    monkeypatch.setattr("flower_adapter.server.replies.time", clock)
    caplog.set_level(logging.WARNING, logger="flwr")
    logging.getLogger("flwr").addHandler(caplog.handler)
    yield lambda: sorted({record.getMessage() for record in caplog.records})
    logging.getLogger("flwr").removeHandler(caplog.handler)


def speaking(label: str, vocab: str) -> Callable[[Message], Message]:
    record = ConfigRecord({"label": label, "tokenizer": CharTokenizer(vocab).to_json()})
    return lambda query: Message(RecordDict({"client": record}), reply_to=query)


def test_a_vocabulary_that_all_clients_share_is_taken() -> None:
    grid = Answers(speaking("left", "abc"), speaking("right", "abc"))
    assert ask_vocabulary(grid, Settings()) == CharTokenizer("abc")


def test_the_vocabulary_of_most_clients_is_taken_and_the_others_are_named(warned: Any) -> None:
    grid = Answers(
        speaking("liar", "xyz"),
        speaking("a", "abc"),
        refusing("data: no text\x1b[2J\n" + "x" * 10**6),
        speaking("b", "abc"),
        lambda query: None,
        saying(label="c"),
        saying(label=1, tokenizer="{}"),
        saying(label="d", tokenizer="[" * 50_000),
        saying(label="e", tokenizer='{"type": "char", "vocab": ' + "9" * 5000 + "}"),
        saying(label="f", tokenizer='{"type": "char", "vocab": "\\ud800"}'),
        saying(label="g", tokenizer="x" * 10**6),
        speaking("h", "abc"),
    )
    assert ask_vocabulary(grid, Settings()) == CharTokenizer("abc")
    expected = {
        0: "the vocabulary of liar (3 characters",
        2: r"data: no text\x1b[2J\nxxx",
        4: "no answer in time",
        5: "its answer has no label, or no tokenizer",
        6: "its answer has no label, or no tokenizer",
        7: "the tokenizer is not JSON",
        8: "the tokenizer is not JSON",
        9: "the vocabulary has a lone surrogate",
        10: "the tokenizer has 1,000,000 characters",
    }
    said = warned()
    assert len(said) == len(expected)
    for partition, reason in expected.items():
        start = f"vocabulary: left out node {grid.node(partition)}: {reason}"
        [line] = [line for line in said if line.startswith(start)]
        assert len(line) < 600
        assert line.isprintable()


def test_without_a_majority_the_vocabularies_are_refused(warned: Any) -> None:
    grid = Answers(*(speaking(f"of {vocab}", vocab) for vocab in "xxyz"))
    with pytest.raises(VocabularyMismatch, match=r"of of [yz] .* differs from that of of x"):
        ask_vocabulary(grid, Settings())


def test_if_nobody_tells_a_vocabulary_every_client_is_named(warned: Any) -> None:
    grid = Answers(lambda query: None, refusing("data: no text"))
    with pytest.raises(DataError, match="and no client told its vocabulary") as caught:
        ask_vocabulary(grid, Settings())
    assert f"node {grid.node(0)}: no answer in time" in str(caught.value)
    assert f"node {grid.node(1)}: data: no text" in str(caught.value)


def test_two_vocabularies_are_refused_with_the_difference() -> None:
    grid = Answers(speaking("left", "abc"), speaking("right", "abd"))
    with pytest.raises(
        VocabularyMismatch,
        match=r"of (left|right) .* differs from that of .* first: '[cd]'; only in the second",
    ):
        ask_vocabulary(grid, Settings())


def test_a_client_without_a_directory_of_its_own_is_named() -> None:
    node = {"partition-id": 0, "num-partitions": 2}
    refusal = lambda query: client_app(query, Context(1, 2, node, RecordDict(), {}))  # noqa: E731
    with pytest.raises(DataError, match="failed with DataError"):
        ask_vocabulary(Answers(refusal, refusal), Settings())


def test_the_first_round_waits_for_as_many_clients_as_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    joined: list[int] = []

    class Joining(Answers):
        def get_node_ids(self) -> Iterable[int]:
            return list(joined)

    monkeypatch.setattr(time, "sleep", lambda _: joined.append(10 - len(joined)))
    with caplog.at_level(logging.INFO, logger="flwr"):
        assert wait_for_clients(Joining(), 3) == [8, 9, 10]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"waiting for clients: {count} connected, min-clients is 3" for count in range(3)
    ]


def test_a_prompt_outside_the_vocabulary_is_named_with_its_character() -> None:
    with pytest.raises(SettingsError, match=r"sample-prompt is 'abX': .*'X'"):
        sample_prompt(Settings(sample_prompt="abX"), CharTokenizer("ab"))


def test_the_default_prompt_fits_every_text() -> None:
    assert sample_prompt(Settings(), CharTokenizer("\nab")) == "\n"
    assert sample_prompt(Settings(), CharTokenizer("ab")) == "a"


def test_the_settings_of_the_rounds_reach_the_strategy() -> None:
    average = strategy(Settings(fraction_train=0.5, fraction_evaluate=0.25, min_clients=4))
    assert (average.fraction_train, average.fraction_evaluate) == (0.5, 0.25)
    assert average.min_available_nodes == 4


def test_an_unknown_codec_is_refused_with_its_setting() -> None:
    with pytest.raises(SettingsError, match=r"uplink is '3-bit'.*should be one of fp32, bf16"):
        compression(Settings(uplink="3-bit"))
