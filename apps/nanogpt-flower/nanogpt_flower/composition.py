"""What more than one part of the app builds from the settings: alike, since from here."""

import zlib

from gpt_core import GPTConfig, Runtime
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, Corpus, DataError, Partition, partition

NO_CORPUS = "none"  # the corpus of a server that has no text
VOCABULARY = "vocabulary"  # the query by which it asks its clients for theirs


def model_config(settings: Settings, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        block_size=settings.block_size,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        dropout=settings.dropout,
    )


def runtime(settings: Settings) -> Runtime:
    return Runtime.resolve(
        device=settings.device, precision=settings.precision, compile=settings.compile
    )


def parts(
    settings: Settings, corpus: Corpus, tokenizer: CharTokenizer, num_clients: int
) -> Partition:
    """The corpus in equal parts, each of which holds a window and its targets."""
    needed = settings.block_size + 1
    try:
        return partition(corpus, num_clients, tokenizer=tokenizer, min_characters=needed)
    except DataError as error:
        raise DataError(
            f"block-size {settings.block_size} needs at least {needed} characters of each client "
            f"to train and to validate: {error}"
        ) from error


class VocabularyMismatch(ValueError):
    """Two parties of one run do not have the same characters."""


def check_vocabulary(name: str, own: CharTokenizer, other_name: str, other: CharTokenizer) -> None:
    """Refuse two vocabularies that differ, naming both and how."""
    if own == other:
        return

    def only(one: CharTokenizer, another: CharTokenizer) -> str:
        characters = "".join(sorted(set(one.vocab) - set(another.vocab)))
        return repr(characters) if characters else "none"

    raise VocabularyMismatch(
        f"the vocabulary of {name} ({own.vocab_size} characters, fingerprint {own.fingerprint}) is "
        f"not that of {other_name} ({other.vocab_size} characters, fingerprint "
        f"{other.fingerprint}); only in the first: {only(own, other)}; only in the second: "
        f"{only(other, own)}. Write all parts from one corpus, and give the server the same."
    )


def sample_start(tokenizer: CharTokenizer) -> str:
    """What a sample without a prompt goes on from: a line break where the text has one."""
    return "\n" if "\n" in tokenizer.vocab else tokenizer.vocab[0]


def sample_prompt(settings: Settings, tokenizer: CharTokenizer) -> str:
    """What the sample goes on from: the setting, checked, else `sample_start`."""
    if not settings.sample_prompt:
        return sample_start(tokenizer)
    try:
        tokenizer.encode(settings.sample_prompt)
    except DataError as error:
        raise SettingsError(f"sample-prompt is {settings.sample_prompt!r}: {error}") from error
    return settings.sample_prompt


def seed_for(settings: Settings, label: str, server_round: int) -> list[int]:
    """Entropy of one client in one round: reproducible, and different for every pair."""
    return [settings.seed, zlib.crc32(label.encode()), server_round]
