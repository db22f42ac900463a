"""Read the text of a client.

While a client handles one message, its text is needed several times. `read_part` and `load_corpus`
keep the texts that they have read, so one process does not read an unchanged file twice.
"""

from functools import lru_cache

from flwr.app import ConfigRecord, Context

from flower_adapter import Refusal
from nanogpt_flower.client_node import is_simulated, label_from, secret, text_name
from nanogpt_flower.composition import (
    NO_CORPUS,
    VocabularyMismatch,
    check_vocabulary,
    parts,
)
from nanogpt_flower.settings import Settings
from shakespeare_data import (
    CORPORA,
    CharTokenizer,
    Corpus,
    DataError,
    Part,
    Partition,
    load_corpus,
    read_part,
)


def label(context: Context) -> str:
    """Return this client's name, which is the same in every run.

    A simulated client is named after its partition. The name of any other client depends on its
    text and its secret, and not on the location of the text.
    """
    if is_simulated():
        return text_name(context)
    has_text = "data-path" in context.node_config
    text = directory_part(context).fingerprint if has_text else text_name(context)
    return label_from(secret(context), text)


def client_part(settings: Settings, config: ConfigRecord, context: Context) -> Part:
    """Return this client's text, and check that it has the same vocabulary as the model.

    Raises:
        Refusal: the client has no text, the text cannot be read, the text is too small, the
            client's copy of the corpus differs from the server's copy, or the vocabulary of the
            text differs from the vocabulary of the model. The details are in the cause.
    """
    tokenizer = model_tokenizer(config)
    try:
        if "data-path" in context.node_config:
            part = directory_part(context, block_size=settings.block_size)
        else:
            part = _corpus_part(settings, config, context, tokenizer)
        check_vocabulary(text_name(context), part.tokenizer, "the server's model", tokenizer)
    except VocabularyMismatch as error:
        raise Refusal("vocabulary", "the text has other characters than the model") from error
    except (DataError, OSError) as error:
        raise Refusal("data", "this client cannot train on its text with these settings") from error
    return part


def model_tokenizer(config: ConfigRecord) -> CharTokenizer:
    """Read the vocabulary of the model from a message.

    Raises:
        Refusal: the message holds no vocabulary.
    """
    try:
        return CharTokenizer.from_json(str(config.get("tokenizer", "")))
    except DataError as error:
        raise Refusal("message", "tokenizer is not the JSON of a tokenizer") from error


def directory_part(context: Context, *, block_size: int = 1) -> Part:
    """Read the text of a client that has a data directory.

    Raises:
        DataError: the client has no data directory, or the directory cannot be read.
    """
    name = text_name(context)
    if "data-path" not in context.node_config:
        raise DataError(f"{name} has no data-path, so it has no text of its own")
    return read_part(name, block_size=block_size)


def _corpus_part(
    settings: Settings, config: ConfigRecord, context: Context, tokenizer: CharTokenizer
) -> Part:
    """Return this client's partition of the server's corpus."""
    node, name = context.node_config, text_name(context)
    corpus_name = str(config.get("corpus", ""))
    if corpus_name == NO_CORPUS:
        raise DataError(f"the server has no corpus, so {name} needs a data-path of its own")
    if corpus_name not in CORPORA and not is_simulated():
        # A path in a message must not decide which file this client opens.
        if "corpus-path" not in node:
            raise DataError(
                f"the server's corpus {corpus_name!r} is not built in; if {name} has a copy, give "
                "the SuperNode \"corpus-path='…'\""
            )
        corpus_name = str(node["corpus-path"])
    corpus = load_corpus(corpus_name)
    if corpus.sha256 != config.get("corpus-sha256"):
        raise DataError(
            f"the corpus {corpus.name!r} of {name} has SHA-256 {corpus.sha256}, the server's has "
            f"{config.get('corpus-sha256')!s}"
        )
    everyone = _partition(settings, corpus, tokenizer, int(node["num-partitions"]))
    return everyone[int(node["partition-id"])]


@lru_cache(maxsize=1)
def _partition(
    settings: Settings, corpus: Corpus, tokenizer: CharTokenizer, num_clients: int
) -> Partition:
    """Divide the corpus, once for all clients that one process simulates in a run."""
    return parts(settings, corpus, tokenizer, num_clients)
