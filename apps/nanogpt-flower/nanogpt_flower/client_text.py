"""Read the text of a client.

While a client handles one message, its text is needed several times. `read_part` and `load_corpus`
keep the texts that they have read, so one process does not read an unchanged file twice.
"""

from flwr.app import ConfigRecord, Context

from nanogpt_flower.composition import NO_CORPUS, check_vocabulary, parts
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, DataError, Part, load_corpus, read_part


def text_name(context: Context) -> str:
    """Return the name of this client's data directory, or the name of its partition.

    Raises:
        DataError: the node config names neither a data directory nor a partition.
    """
    node = context.node_config
    if "data-path" in node:
        return str(node["data-path"])
    if "partition-id" in node and "num-partitions" in node:
        return f"partition {int(node['partition-id']):04d} of {int(node['num-partitions'])}"
    raise DataError(
        f"the node config {dict(node)} names no data; give the SuperNode \"data-path='…'\", or "
        '"partition-id=0 num-partitions=2"'
    )


def label(context: Context) -> str:
    """Return this client's name, which is the same in every run.

    If the client has a data directory, its name depends on the text and not on the location of the
    directory. Otherwise the client is named after its partition.
    """
    if "data-path" in context.node_config:
        return f"text {directory_part(context).fingerprint}"
    return text_name(context)


def client_part(settings: Settings, config: ConfigRecord, context: Context) -> Part:
    """Return this client's text, and check that it has the same vocabulary as the model.

    Raises:
        DataError: the client has no text, the text cannot be read, the text is too small, or the
            client's copy of the corpus differs from the server's copy.
        VocabularyMismatch: the vocabulary of the text differs from the vocabulary of the model.
    """
    tokenizer = CharTokenizer.from_json(str(config["tokenizer"]))
    if "data-path" in context.node_config:
        part = directory_part(context, block_size=settings.block_size)
    else:
        part = _corpus_part(settings, config, context, tokenizer)
    check_vocabulary(text_name(context), part.tokenizer, "the server's model", tokenizer)
    return part


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
    if config["corpus"] == NO_CORPUS:
        raise DataError(f"the server has no corpus, so {name} needs a data-path of its own")
    corpus = load_corpus(str(config["corpus"]))
    if corpus.sha256 != config["corpus-sha256"]:
        raise DataError(
            f"the corpus {corpus.name!r} of {name} has SHA-256 {corpus.sha256}, the server's has "
            f"{config['corpus-sha256']!s}"
        )
    everyone = parts(settings, corpus, tokenizer, int(node["num-partitions"]))
    return everyone[int(node["partition-id"])]
