"""What the client and the server build alike from the settings."""

import zlib

from gpt_core import GPTConfig, Runtime
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer

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


class VocabularyMismatch(ValueError):
    """A client's part and the server's model do not speak the same characters."""


def check_vocabulary(part: str, own: CharTokenizer, model: CharTokenizer) -> None:
    """Refuse a part whose characters are not those of the model, naming both."""
    if own == model:
        return

    def only(one: CharTokenizer, other: CharTokenizer) -> str:
        return repr("".join(sorted(set(one.vocab) - set(other.vocab)))) or "none"

    raise VocabularyMismatch(
        f"the vocabulary of {part} ({own.vocab_size} characters, fingerprint {own.fingerprint}) is "
        f"not that of the server's model ({model.vocab_size} characters, fingerprint "
        f"{model.fingerprint}); only in the part: {only(own, model)}; only in the model: "
        f"{only(model, own)}. Partition all parts from one corpus, and run the server on the same."
    )


def seed_for(settings: Settings, label: str, server_round: int) -> list[int]:
    """Entropy of one client in one round: reproducible, and different for every pair."""
    return [settings.seed, zlib.crc32(label.encode()), server_round]
