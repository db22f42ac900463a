"""Fit the block size and the number of steps to a text that is too small for the preset."""

from collections.abc import Mapping
from typing import Any

from nanogpt_flower.client_app import num_steps
from nanogpt_flower.composition import parts
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, Corpus, DataError, Partition

SMALLEST_BLOCK = 8  # a model that sees fewer characters learns almost nothing
MANY_PASSES = 30  # with more, a note is shown
PASSES = 10  # a small text is seen at most about so many times in a round


def fit(
    run_config: Mapping[str, Any], corpus: Corpus, num_clients: int, chosen: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that must change so that the text is large enough, and notes about them.

    Args:
        run_config: the settings of the run.
        corpus: the text that is divided among the clients.
        num_clients: the number of clients.
        chosen: the keys that the user has set. They are not changed.

    Raises:
        DataError: the text is too small even for the smallest block size, or the user has chosen a
            block size for which the text is too small.
    """
    settings = Settings.from_run_config(run_config)
    tokenizer = CharTokenizer.from_text(corpus.text)

    def divided(block_size: int) -> Partition:
        changed = Settings.from_run_config({**run_config, "block-size": block_size})
        return parts(changed, corpus, tokenizer, num_clients)

    def fits(block_size: int) -> bool:
        try:
            divided(block_size)
        except DataError:
            return False
        return True

    try:
        shortest = min(divided(settings.block_size), key=lambda part: len(part.train))
    except DataError:
        if "block-size" in chosen:
            raise
    else:
        steps = num_steps(settings, shortest)
        passes = steps * settings.batch_size * settings.block_size / len(shortest.train)
        if passes <= MANY_PASSES or "max-steps" in chosen:
            return {}, []
        steps = max(1, round(steps * PASSES / passes))
        return {}, [
            f"the smallest text of a client is read {passes:.0f} times a round, so the model may "
            f"learn it by heart; max-steps={steps} would read it about {PASSES} times"
        ]
    divided(SMALLEST_BLOCK)  # if the text is too small, this raises the error that says why
    fitting, too_large = SMALLEST_BLOCK, settings.block_size
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    changes: dict[str, Any] = {"block-size": fitting}
    notes = [
        f"{corpus.name} has {len(corpus.text):,} characters, too few for {num_clients} clients "
        f"with block-size {settings.block_size}: block-size is {fitting} in this run"
    ]
    smallest_part = min(len(part.train) for part in divided(fitting))
    steps = max(1, PASSES * smallest_part // (settings.batch_size * fitting))
    if "max-steps" not in chosen and not 0 < settings.max_steps <= steps:
        changes["max-steps"] = steps
        notes.append(
            f"max-steps is {steps} in this run, about {PASSES} passes over a client's text a round"
        )
    return changes, notes
