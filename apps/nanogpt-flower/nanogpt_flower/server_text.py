"""Wait for the clients, and learn their vocabulary if the server has no text of its own."""

import logging
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from nanogpt_flower.composition import NO_CORPUS, VOCABULARY, check_vocabulary
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, DataError

REMIND_SECONDS = 30.0  # time between two log lines about missing clients

logger = logging.getLogger("flwr.nanogpt_flower")


def wait_for_clients(grid: Grid, least: int) -> list[int]:
    """Wait until at least `least` nodes are connected, and return all connected nodes.

    While the function waits, it logs the number of connected nodes from time to time.
    """
    last_log, last_count = -float("inf"), -1
    while len(nodes := sorted(grid.get_node_ids())) < least:
        if len(nodes) != last_count or time.monotonic() - last_log > REMIND_SECONDS:
            last_log, last_count = time.monotonic(), len(nodes)
            logger.info("waiting for clients: %d connected, min-clients is %d", len(nodes), least)
        time.sleep(1)
    return nodes


def ask_vocabulary(grid: Grid, settings: Settings) -> CharTokenizer:
    """Ask the clients for the vocabulary of their texts.

    Raises:
        DataError: no client answers, or a client reports an error, for example that it has no text.
        VocabularyMismatch: two clients have different vocabularies. The message names both clients.
    """
    nodes = wait_for_clients(grid, settings.min_clients)
    queries = [Message(RecordDict(), node, f"query.{VOCABULARY}") for node in nodes]
    shared: tuple[str, CharTokenizer] | None = None
    for reply in grid.send_and_receive(queries):
        if reply.has_error():
            raise DataError(f"corpus is {NO_CORPUS!r}, and a client refused: {reply.error.reason}")
        answer = reply.content.config_records["client"]
        client = str(answer["label"]), CharTokenizer.from_json(str(answer["tokenizer"]))
        shared = shared or client
        check_vocabulary(*client, *shared)
    if shared is None:
        raise DataError(f"corpus is {NO_CORPUS!r}, and no client told its vocabulary")
    return shared[1]
