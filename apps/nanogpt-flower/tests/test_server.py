import logging
import time
from collections.abc import Callable, Iterable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

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


class Answers:
    """A grid whose nodes answer a query with a record or an error."""

    def __init__(self, *answers: Callable[[Message], Message]) -> None:
        self.answers = answers

    def get_node_ids(self) -> Iterable[int]:
        return range(len(self.answers))

    def send_and_receive(self, messages: Iterable[Message]) -> Iterable[Message]:
        return [answer(query) for answer, query in zip(self.answers, messages, strict=True)]


def speaking(label: str, vocab: str) -> Callable[[Message], Message]:
    record = ConfigRecord({"label": label, "tokenizer": CharTokenizer(vocab).to_json()})
    return lambda query: Message(RecordDict({"client": record}), reply_to=query)


def test_a_vocabulary_that_all_clients_share_is_taken() -> None:
    grid = Answers(speaking("left", "abc"), speaking("right", "abc"))
    assert ask_vocabulary(grid, Settings()) == CharTokenizer("abc")


def test_two_vocabularies_are_refused_with_the_difference() -> None:
    grid = Answers(speaking("left", "abc"), speaking("right", "abd"))
    with pytest.raises(
        VocabularyMismatch,
        match=r"of right .* differs from that of left .* first: 'd'; only in the second: 'c'",
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
