"""Builders that client and server share, so that both build the same from the settings."""

import zlib

from flower_adapter import CodecError, Compression
from gpt_core import GPTConfig, Runtime
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, Corpus, DataError, Partition, partition

NO_CORPUS = "none"  # the corpus of a server that has no text
VOCABULARY = "vocabulary"  # the query for the vocabulary of a client's own text


def model_config(settings: Settings, vocab_size: int) -> GPTConfig:
    """Return the shape of the model."""
    return GPTConfig(
        vocab_size=vocab_size,
        block_size=settings.block_size,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        dropout=settings.dropout,
    )


def runtime(settings: Settings) -> Runtime:
    """Return device, precision and compilation for this process."""
    return Runtime.resolve(
        device=settings.device, precision=settings.precision, compile=settings.compile
    )


def compression(settings: Settings) -> Compression:
    """Return the codecs of both directions.

    Raises:
        SettingsError: `uplink` or `downlink` names no codec.
    """
    try:
        return Compression(uplink=settings.uplink, downlink=settings.downlink)
    except CodecError as error:
        raise SettingsError(
            f"uplink is {settings.uplink!r} and downlink is {settings.downlink!r}: {error}"
        ) from error


def parts(
    settings: Settings, corpus: Corpus, tokenizer: CharTokenizer, num_clients: int
) -> Partition:
    """Divide the corpus into equal parts. Each part holds at least one window and its targets.

    Raises:
        DataError: the corpus is too small for so many clients.
    """
    needed = settings.block_size + 1
    try:
        return partition(corpus, num_clients, tokenizer=tokenizer, min_characters=needed)
    except DataError as error:
        raise DataError(
            f"block-size {settings.block_size} needs at least {needed} characters of each client "
            f"to train and to validate: {error}"
        ) from error


class VocabularyMismatch(ValueError):
    """Two parties of one run have different characters."""


def check_vocabulary(name: str, own: CharTokenizer, other_name: str, other: CharTokenizer) -> None:
    """Refuse two different vocabularies. The text names both and their difference."""
    if own == other:
        return

    def only(one: CharTokenizer, another: CharTokenizer) -> str:
        characters = "".join(sorted(set(one.vocab) - set(another.vocab)))
        return repr(characters) if characters else "none"

    raise VocabularyMismatch(
        f"the vocabulary of {name} ({own.vocab_size} characters, fingerprint {own.fingerprint}) "
        f"differs from that of {other_name} ({other.vocab_size} characters, fingerprint "
        f"{other.fingerprint}); only in the first: {only(own, other)}; only in the second: "
        f"{only(other, own)}. Write all parts from one corpus, and give the server the same corpus."
    )


def default_prompt(tokenizer: CharTokenizer) -> str:
    """Return the start of a sample without a prompt: a line break if the text has one."""
    return "\n" if "\n" in tokenizer.vocab else tokenizer.vocab[0]


def sample_prompt(settings: Settings, tokenizer: CharTokenizer) -> str:
    """Return the start of the sample: the setting if it is given, else `default_prompt`.

    Raises:
        SettingsError: the setting has a character that the corpus does not have.
    """
    if not settings.sample_prompt:
        return default_prompt(tokenizer)
    try:
        tokenizer.encode(settings.sample_prompt)
    except DataError as error:
        raise SettingsError(f"sample-prompt is {settings.sample_prompt!r}: {error}") from error
    return settings.sample_prompt


def client_seed(settings: Settings, label: str, server_round: int) -> list[int]:
    """Return the seed of one client in one round. Each pair of client and round has its own."""
    return [settings.seed, zlib.crc32(label.encode()), server_round]
