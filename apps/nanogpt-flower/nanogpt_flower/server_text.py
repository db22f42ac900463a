"""Wait for the clients, and learn their vocabulary if the server has no text of its own."""

import logging
import time
from collections import Counter

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flower_adapter.printable import shown
from flower_adapter.server.record import LONGEST_LABEL, LONGEST_REASON
from flower_adapter.server.replies import receive
from nanogpt_flower.composition import (
    NO_CORPUS,
    VOCABULARY,
    VocabularyMismatch,
    check_vocabulary,
)
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, DataError

REMIND_SECONDS = 30.0  # time between two log lines about missing clients
VOCABULARY_SECONDS = 600.0  # longest wait for the vocabularies if there is no `round-timeout`

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
    """Ask the clients for the vocabulary of their texts, and return that of most clients.

    A client that reports an error, gives no vocabulary, another one, or no answer in time is logged
    with its node and the reason.

    Raises:
        DataError: no client tells its vocabulary. The message says why.
        VocabularyMismatch: no vocabulary is that of more than half of the clients that told one.
            The message names two clients and the difference.
    """
    nodes = wait_for_clients(grid, settings.min_clients)
    queries = [Message(RecordDict(), node, f"query.{VOCABULARY}") for node in nodes]
    found: dict[int, tuple[str, CharTokenizer]] = {}  # by node: the client's label and vocabulary
    faults = dict.fromkeys(nodes, "no answer in time")
    for node, reply in receive(grid, queries, settings.round_timeout or VOCABULARY_SECONDS):
        try:
            found[node] = _vocabulary(reply)
            faults.pop(node, None)
        except DataError as error:
            faults[node] = shown(str(error), LONGEST_REASON)
    for node, fault in sorted(faults.items()):
        logger.warning("vocabulary: left out node %d: %s", node, fault)
    if not found:
        reasons = "; ".join(f"node {node}: {fault}" for node, fault in sorted(faults.items()))
        raise DataError(f"corpus is {NO_CORPUS!r}, and no client told its vocabulary: {reasons}")
    [(vocab, count)] = Counter(tokenizer.vocab for _, tokenizer in found.values()).most_common(1)
    most = next(client for client in found.values() if client[1].vocab == vocab)
    for node, client in sorted(found.items()):
        try:
            check_vocabulary(*client, *most)
        except VocabularyMismatch as error:
            reason = shown(str(error), LONGEST_REASON)
            if 2 * count <= len(found):
                raise VocabularyMismatch(reason) from None
            logger.warning("vocabulary: left out node %d: %s", node, reason)
    return most[1]


def _vocabulary(reply: Message | Exception) -> tuple[str, CharTokenizer]:
    """Return the label and the vocabulary in the answer of a client.

    Raises:
        DataError: the answer has none.
    """
    if isinstance(reply, Exception):
        raise DataError(f"its answer cannot be read: {type(reply).__name__}") from reply
    if reply.has_error():
        raise DataError(reply.error.reason or f"error code {reply.error.code}")
    answer = reply.content.config_records.get("client", ConfigRecord())
    label, tokenizer = answer.get("label"), answer.get("tokenizer")
    if not isinstance(label, str) or not isinstance(tokenizer, str):
        raise DataError("its answer has no label, or no tokenizer")
    return shown(label, LONGEST_LABEL), CharTokenizer.from_json(tokenizer)
