"""Functions that the client and the server share, so that both use the settings in the same way."""

import zlib
from typing import Any

from flower_adapter import CodecError, Compression
from gpt_core import GPTConfig, Runtime
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import SCHEMES, CharTokenizer, Corpus, DataError, Partition, partition

NO_CORPUS = "none"  # value of `corpus` if the server has no text
VOCABULARY = "vocabulary"  # the query for the vocabulary of a client's own text

# The types of a partition scheme's options, and the option that a value without a name sets.
_OPTION_TYPES: dict[str, type] = {"alpha": float, "window": int, "by": str}
_FIRST_OPTION = {"iid": "window", "dirichlet": "alpha", "quantity-skew": "alpha"}


def model_config(settings: Settings, vocab_size: int) -> GPTConfig:
    """Return the configuration of the model: its shape and its dropout rate."""
    return GPTConfig(
        vocab_size=vocab_size,
        block_size=settings.block_size,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        dropout=settings.dropout,
    )


def runtime(settings: Settings) -> Runtime:
    """Choose the device and the precision of this process, and whether it compiles the model."""
    return Runtime.resolve(
        device=settings.device, precision=settings.precision, compile=settings.compile
    )


def compression(settings: Settings) -> Compression:
    """Return the codecs for the messages from clients and for the messages to clients.

    Raises:
        SettingsError: the value of `uplink` or `downlink` is not the name of a codec.
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
    """Divide the corpus among the clients with the scheme in the setting `partition`.

    A window and its targets need `block-size` + 1 characters. Each part has at least this many
    characters for training, and at least this many for validation.

    Raises:
        SettingsError: the value of `partition` is not a scheme with its options.
        DataError: the corpus is too small for this number of clients.
    """
    scheme, options = partition_scheme(settings)
    needed = settings.block_size + 1
    try:
        return partition(
            corpus,
            num_clients,
            scheme,
            settings.seed,
            tokenizer=tokenizer,
            min_characters=needed,
            **options,
        )
    except DataError as error:
        if "min_characters" not in str(error):  # the text is not too small
            raise
        raise DataError(
            f"block-size {settings.block_size} needs at least {needed} characters of each client "
            f"to train and to validate: {error}"
        ) from error


def partition_scheme(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Return the scheme and the options in the setting `partition`.

    "dirichlet:0.5" and "dirichlet:alpha=0.5,by=speaker" are examples.

    Raises:
        SettingsError: the scheme or an option does not exist, or the value of an option has the
            wrong type.
    """
    scheme, _, given = settings.partition.partition(":")
    options: dict[str, Any] = {}
    problem = "" if scheme in SCHEMES else f"the scheme must be one of {', '.join(SCHEMES)}"
    for option in given.split(",") if given else []:
        name, equals, value = option.partition("=")
        if not equals:
            name, value = _FIRST_OPTION.get(scheme, ""), option
        try:
            options[name] = _OPTION_TYPES[name](value)
        except (KeyError, ValueError):
            allowed = ", ".join(f"{name} ({kind.__name__})" for name, kind in _OPTION_TYPES.items())
            problem = problem or f"{option!r} must set one of the options {allowed}"
    if problem:
        raise SettingsError(f"partition is {settings.partition!r}; {problem}")
    return scheme, options


def validation_text(settings: Settings, corpus: Corpus) -> str:
    """Return the text on which the server evaluates: the validation side of all clients together.

    No client trains on any of it, whatever the partition scheme.
    """
    scheme, _ = partition_scheme(settings)
    at_the_end = scheme in ("contiguous", "iid", "quantity-skew")
    return corpus.split(by="end" if at_the_end else "speech")[1]


class VocabularyMismatch(ValueError):
    """The error for a run in which two texts or models have different vocabularies."""


def check_vocabulary(name: str, own: CharTokenizer, other_name: str, other: CharTokenizer) -> None:
    """Check that two vocabularies are equal.

    Raises:
        VocabularyMismatch: the vocabularies differ. The message names the owner of each vocabulary
            and lists the characters that only one vocabulary has.
    """
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
    """Return the text with which a sample starts if the user gives no prompt.

    This is a line break if the vocabulary has one. Otherwise it is the first character of the
    vocabulary.
    """
    return "\n" if "\n" in tokenizer.vocab else tokenizer.vocab[0]


def sample_prompt(settings: Settings, tokenizer: CharTokenizer) -> str:
    """Return the setting `sample-prompt`. If it is empty, return the default prompt.

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
    """Return the seed of one client for one round.

    The seed differs between clients, and it differs between the rounds of one client.
    """
    return [settings.seed, zlib.crc32(label.encode()), server_round]
