"""Measure how much of a client's text a malicious server reads from the client's updates.

    python benchmarks/extraction.py

The attacker is the server. It chooses the run config and the weights that it sends, and it
subtracts them from the weights in the client's reply. The difference is the update. The attacker
knows the code of the client, the vocabulary, and a text in the same language, but not the client's
text. The client runs the app's own training. There are two attacks.

- `single_window` needs an update of one window and one step. In a model whose blocks write nothing,
  the update of the position embedding t depends on the characters t and t + 1 of the window only.
- `gates` reads single windows from an update of many windows and many steps. The attacker sends no
  trained model. It sends a circuit that is written into the weights:
    1. Each token embedding has its own length. The first layer norm divides the gradient of a small
       channel of a position embedding by this length. So the gradient tells the character at that
       position.
    2. Attention computes a number from all characters of the window, a hash, at the last position.
    3. Each slot has one channel of the position embeddings and one gate in the first MLP. A gate is
       open if the hash is between two thresholds. If it is closed, the slot's gradient is 0.
    4. A slot in whose interval exactly one window fell holds the characters of this window.
    5. A very large channel before the last layer norm makes all these gradients much smaller than
       AdamW's eps, 1e-8. AdamW then adds up gradients, and the circuit does not change in training.

A guess is compared with each window that the client drew. Chance is the share of the most frequent
character. The baseline is the best of two guesses without any update, each compared with the window
that it fits best: the most frequent character everywhere, and a text in which each character is
followed by its most frequent successor.
"""

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from flower_adapter import to_arrays
from flower_adapter.arrays import npy
from flower_adapter.arrays.deltas import encode
from gpt_core import GPT
from nanogpt_flower import client_app
from nanogpt_flower.composition import model_config
from nanogpt_flower.settings import Settings
from shakespeare_data import Part, load_corpus, partition

Ids = NDArray[np.int64]
Weights = dict[str, Tensor]

POSITIONS = "transformer.wpe.weight"
TOKENS = "transformer.wte.weight"

# The settings of the attacker. Some rows of the table change some of them.
ATTACKER = {
    "device": "cpu",
    "precision": "fp32",
    "n-layer": 2,
    "n-head": 1,
    "n-embd": 256,
    "block-size": 64,
    "batch-size": 16,
    "max-steps": 20,
    "dropout": 0.0,
    "learning-rate": 1e-5,
    "warmup-steps": 0,
}


# The client: its own code, and a record of the windows that it drew.


@dataclass(frozen=True)
class Round:
    """The result of one round of one client."""

    update: Tensor  # (block_size, n_embd), of the position embeddings, after the codec
    windows: Ids  # (N, block_size + 1), which the attacker does not see
    loss: float


def train_client(
    settings: Settings, weights: Weights, part: Part, *, server_round: int = 1
) -> Round:
    """Train on `part` with the app's own code."""
    model = GPT(model_config(settings, part.tokenizer.vocab_size))
    model.load_state_dict(weights)
    sent = to_arrays(model)
    drawn: list[Tensor] = []

    class RecordedBatches(client_app.Batches):
        def __next__(self) -> Any:
            x, y = super().__next__()
            drawn.append(torch.cat([x, y[:, -1:]], dim=1))
            return x, y

    context = Context(1, 2, {}, RecordDict(), settings.to_run_config())
    with patch.object(client_app, "Batches", RecordedBatches):
        metrics = client_app.train_part(
            model, part, context, client="client", server_round=server_round
        )
    reply = encode(to_arrays(model), sent, settings.uplink).decoded
    update = positions(reply) - positions(sent)
    return Round(update, torch.cat(drawn).numpy(), metrics["train-loss"])


def positions(arrays: ArrayRecord) -> Tensor:
    return npy.array_view(arrays[POSITIONS]).double()


# The attack on one window.

SMALL = 1e-8


def single_window_weights(settings: Settings, vocab_size: int) -> Weights:
    """Return random token embeddings, a small gain in the last layer norm, and zeros elsewhere.

    Because of the small gain, gradients are far below AdamW's eps, so that its first step is in
    proportion to the gradient. The logits are almost 0.
    """
    weights = empty_weights(settings, vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = 0.2 * torch.randn(vocab_size, settings.n_embd, generator=generator)
    weights[TOKENS] = weights["lm_head.weight"] = tokens
    weights["transformer.ln_f.weight"][:] = SMALL
    return weights


def read_single_window(update: Tensor, weights: Weights) -> Ids:
    """Return the window (block_size + 1,) whose update would be most like `update`.

    The function computes the update for each pair of a character and its successor, and finds the
    chain of pairs whose updates fit best (Viterbi).
    """
    tokens = weights[TOKENS].double()
    size = len(tokens)
    x = tokens.repeat_interleave(size, dim=0).requires_grad_()  # (V V, C)
    logits = SMALL * torch.nn.functional.layer_norm(x, x.shape[1:]) @ tokens.T
    targets = torch.arange(size).repeat(size)
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    directions = torch.nn.functional.normalize(-x.grad, eps=0.0)
    fits = (update / update.norm(dim=1, keepdim=True)) @ directions.T  # (T, V V)
    fits = fits.view(-1, size, size)
    total, steps = torch.zeros(size, dtype=torch.float64), []
    for fit in fits:
        total, before = (total[:, None] + fit).max(dim=0)
        steps.append(before)
    window = [int(total.argmax())]
    for before in reversed(steps):
        window.append(int(before[window[-1]]))
    return np.array(window[::-1])


# The attack on many windows.

# Channels of the circuit. The second of each pair holds the negative value, so that the mean over
# the channels, which a layer norm subtracts, stays 0.
LENGTH, HASH, ONE, LAST, OUTPUT, SUM, LARGE, LARGER = ((2 * k, 2 * k + 1) for k in range(8))
SILENT = 16  # a channel like that of a slot, but without a gate
FIRST_SLOT = 17
LENGTH_RATIO = 1.05  # between the lengths of two token embeddings
FLAT = -0.75179  # gelu has its minimum here, so its slope is 0


@dataclass(frozen=True)
class Code:
    """For each token the length of its embedding, and its contribution to the hash."""

    lengths: NDArray[np.float64]  # (V,)
    hashes: NDArray[np.float64]  # (V,)

    @classmethod
    def of(cls, vocab_size: int) -> "Code":
        rng = np.random.default_rng(0)
        # The distances are unequal, so that only the right scale fits all characters of a window.
        steps = np.arange(vocab_size) + rng.uniform(0.0, 0.3, vocab_size)
        return cls(2.0 * LENGTH_RATIO**steps, rng.uniform(-0.4, 0.4, vocab_size))


def gate_weights(settings: Settings, code: Code, known_text: Ids, *, num_windows: int) -> Weights:
    """Return the circuit of the attack `gates`.

    Args:
        settings: the settings of the run.
        code: the lengths and the hashes of the tokens.
        known_text: ids of a text like the client's. Its hashes give the thresholds of the gates.
        num_windows: the number of windows that the client will draw. If there are more windows than
            slots, the gates cover a part of all hashes only, with one window for each gate.
    """
    weights = empty_weights(settings, len(code.lengths))
    width, block = settings.n_embd, settings.block_size
    num_slots = width - FIRST_SLOT
    tokens, place = weights[TOKENS], weights[POSITIONS]
    head = np.random.default_rng(1).uniform(-0.5, 0.5, len(code.lengths))
    rest = (1 - code.hashes**2) * code.lengths**2 - 2.0 - head**2  # 2: the channels ONE and LAST
    for pair, values in (
        (LENGTH, np.sqrt(rest)),
        (HASH, code.hashes * code.lengths),
        (OUTPUT, head),
    ):
        set_pair(tokens.T, pair, torch.from_numpy(values).float())
    set_pair(place.T, ONE, 1.0)
    set_pair(place.T, LAST, torch.where(torch.arange(block) == block - 1, 1.0, -1.0))

    gate, amplifier = "transformer.h.0.", "transformer.h.1."
    for name in (f"{gate}ln_1", f"{gate}ln_2", f"{amplifier}ln_2"):
        weights[f"{name}.weight"][:] = 1.0
    weights["transformer.ln_f.weight"][list(OUTPUT)] = 1.0

    # Attention. Queries and keys are 0, so each position takes the mean over all earlier positions.
    values = weights[f"{gate}attn.c_attn.weight"][2 * width :]
    project = weights[f"{gate}attn.c_proj.weight"]
    set_pair(values[SUM[0]], HASH, 0.5)
    set_pair(project.T[SUM[0]], SUM, 1.0)
    slots = torch.arange(FIRST_SLOT, width)
    read_by_gate = slots.roll(-1)  # another channel, so that the residual path does not add to it
    values[slots, slots] = values[SILENT, SILENT] = 1.0
    project[read_by_gate, slots] = project[SILENT, SILENT] = 1.0

    # Two hidden units for each gate. Their slopes differ only between the two thresholds.
    thresholds = gate_thresholds(settings, code, known_text, num_windows)
    sharpness = 8.0 * code.lengths.max() / np.median(np.diff(thresholds))
    hidden, out = weights[f"{gate}mlp.c_fc.weight"], weights[f"{gate}mlp.c_proj.weight"]
    for slot in range(num_slots):
        for unit, threshold, sign in (
            (2 * slot, thresholds[slot], 1.0),
            (2 * slot + 1, thresholds[slot + 1], -1.0),
        ):
            set_pair(hidden[unit], SUM, sharpness)
            set_pair(hidden[unit], ONE, -sharpness * (threshold + 10.0))
            set_pair(hidden[unit], LAST, sharpness * 10.0)  # closed at all positions but the last
            hidden[unit, read_by_gate[slot]] = 1.0
            set_pair(out.T[unit], OUTPUT, sign)

    # The large channels. They are constant, so no gradient flows through them.
    set_pair(hidden[2 * num_slots], ONE, 1.0)
    set_pair(out.T[2 * num_slots], LARGE, 1e6)
    set_pair(weights[f"{amplifier}mlp.c_fc.weight"][0], LARGE, FLAT / math.sqrt(2 * width))
    set_pair(weights[f"{amplifier}mlp.c_proj.weight"].T[0], LARGER, 1e16)
    weights["lm_head.weight"] = tokens
    return weights


def gate_thresholds(
    settings: Settings, code: Code, known_text: Ids, num_windows: int
) -> NDArray[np.float64]:
    """Return the limits of the intervals, one more than there are slots."""
    num_slots = settings.n_embd - FIRST_SLOT
    windows = np.lib.stride_tricks.sliding_window_view(known_text, settings.block_size)
    hashes = code.hashes[windows].mean(axis=1) * math.sqrt(settings.n_embd / 2)
    covered = min(1.0, num_slots / num_windows)
    limits = np.linspace(0.5 - covered / 2, 0.5 + covered / 2, num_slots + 1)
    return np.quantile(hashes, limits)


def read_gates(update: Tensor, code: Code) -> list[Ids]:
    """Return the windows (block_size - 1,) of all slots that hold one window."""
    values = update.numpy()
    slots = (values[:-1, FIRST_SLOT:] - values[:-1, [SILENT]]).T  # (S, T - 1)
    return [window for slot in slots if (window := read_slot(slot, code)) is not None]


def read_slot(slot: NDArray[np.float64], code: Code) -> Ids | None:
    """Return the window of a slot, or None if no single window can have given these values.

    The values are scale / length of the token. The scale is unknown, so each token is tried as the
    first character.
    """
    if not ((slot > 0).all() or (slot < 0).all()):
        return None
    lengths = np.log(code.lengths)
    relative = np.log(slot[0] / slot)  # log of length / length of the first token
    found = lengths[:, None] + relative  # (V, T - 1)
    ids = np.abs(found[..., None] - lengths).argmin(axis=-1)
    errors = np.abs(found - lengths[ids]).max(axis=1)
    best = int(errors.argmin())
    return ids[best] if errors[best] < math.log(LENGTH_RATIO) / 8 else None


def empty_weights(settings: Settings, vocab_size: int) -> Weights:
    state = GPT(model_config(settings, vocab_size)).state_dict()
    return {name: torch.zeros_like(values) for name, values in state.items()}


def set_pair(rows: Tensor, pair: tuple[int, int], value: Any) -> None:
    rows[pair[0]], rows[pair[1]] = value, -value


# The measurement.


@dataclass(frozen=True)
class Score:
    """How well guesses fit the windows that a client drew."""

    windows: int
    exact: int  # guesses that are a window, character by character
    share: float  # of the characters that are right, in the best guess at the best window
    run: int  # the longest run of right characters in this window
    text_share: float  # of the client's text that is in the exact guesses


def score(guesses: Sequence[Ids], windows: Ids, text: NDArray[np.uint16]) -> Score:
    """Compare each guess with each window."""
    exact, share, run = 0, 0.0, 0
    known = np.zeros(len(text), bool)
    encoded = text.astype("<u2").tobytes()
    for guess in guesses:
        right = windows[:, : len(guess)] == guess  # (N, T)
        best = int(right.sum(axis=1).argmax())
        share = max(share, float(right[best].mean()))
        run = max(run, longest_run(right[best]))
        if right[best].all():
            exact += 1
            start = encoded.find(guess.astype("<u2").tobytes()) // 2
            known[start : start + len(guess)] = True
    return Score(len(windows), exact, share, run, float(known.mean()))


def longest_run(right: NDArray[np.bool_]) -> int:
    ends = np.flatnonzero(np.concatenate([[True], ~right, [True]]))
    return int(np.diff(ends).max()) - 1


def blind_guesses(known_text: Ids, length: int) -> list[Ids]:
    """Return two guesses that need no update."""
    vocab_size = int(known_text.max()) + 1
    successors = np.zeros((vocab_size, vocab_size), np.int64)
    np.add.at(successors, (known_text[:-1], known_text[1:]), 1)
    commonest = int(np.bincount(known_text).argmax())
    chain = [commonest]
    while len(chain) < length:
        chain.append(int(successors[chain[-1]].argmax()))
    return [np.full(length, commonest), np.array(chain)]


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    score: Score
    chance: float
    baseline: float
    loss: float


def attack(name: str, settings: Settings, part: Part, known_text: Ids, rounds: int = 1) -> Result:
    """Run one attack for some rounds, and compare the guesses with the client's windows."""
    code = Code.of(part.tokenizer.vocab_size)
    expected = settings.batch_size * settings.max_steps
    if name == "gates":
        weights = gate_weights(settings, code, known_text, num_windows=expected)
    else:
        weights = single_window_weights(settings, part.tokenizer.vocab_size)
    guesses: list[Ids] = []
    trained = []
    for server_round in range(1, rounds + 1):
        trained.append(train_client(settings, weights, part, server_round=server_round))
        update = trained[-1].update
        guesses += (
            read_gates(update, code) if name == "gates" else [read_single_window(update, weights)]
        )
    windows = np.concatenate([one.windows for one in trained])
    blind = score(blind_guesses(known_text, settings.block_size), windows, part.train)
    chance = np.bincount(part.train).max() / len(part.train)
    return Result(score(guesses, windows, part.train), chance, blind.share, trained[0].loss)


def rows() -> Iterator[tuple[str, str, dict[str, Any], int, int]]:
    """Yield a title, an attack, settings, a number of rounds, and a length of the text."""
    one = {"block-size": 400, "max-steps": 1, "n-layer": 1, "n-embd": 64, "learning-rate": 1e-3}
    few, quick = {"block-size": 256, "batch-size": 8, "max-steps": 10}, {"batch-size": 12}
    quick |= {"max-steps": 200}
    preset = quick | {"optimizer": "muon", "learning-rate": 0.004, "warmup-steps": 20}
    yield "without a policy: 1 window", "single_window", one | {"batch-size": 1}, 1, 0
    for size in (2, 8, 64):
        yield f"{size} windows, 1 step", "single_window", one | {"batch-size": size}, 1, 0
    yield "8 windows, 20 steps", "single_window", one | {"batch-size": 8, "max-steps": 20}, 1, 0
    yield "20,480 tokens in 80 windows", "gates", few, 1, 0
    yield "20,480 tokens in 320 windows", "gates", {}, 1, 0
    yield "the same, 4 rounds", "gates", {}, 4, 0
    yield "the same, a text of 5,000 characters", "gates", {}, 4, 5000
    yield "the same, muon", "gates", {"optimizer": "muon"}, 1, 0
    yield "the same, warm-up 1,000, rate 0.1", "gates", {"warmup-steps": 1000} | rate(0.1), 1, 0
    for value in (1e-3, 1e-2, 1e-1):
        yield f"the same, rate {value:g}", "gates", rate(value), 1, 0
    yield "the same, dropout 0.05", "gates", {"dropout": 0.05}, 1, 0
    for codec in ("bf16", "int8", "2-bit"):
        yield f"the same, uplink {codec}", "gates", {"uplink": codec}, 1, 0
    yield "the same, precision bf16", "gates", {"precision": "bf16"}, 1, 0
    yield "quick's 2,400 windows", "gates", quick, 1, 0
    yield "quick's 2,400 windows, rate 0.001", "gates", quick | rate(1e-3), 1, 0
    yield "quick's 2,400 windows, quick's optimizer", "gates", preset, 1, 0


def rate(value: float) -> dict[str, Any]:
    return {"learning-rate": value}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    client, known = partition(load_corpus("auto"), 2)
    header = ("attack and settings", "windows", "exact", "best", "run", "of text", "chance")
    print("{:44}{:>8}{:>7}{:>8}{:>6}{:>9}{:>8}{:>10}{:>7}".format(*header, "baseline", "loss"))
    for title, name, changed, rounds, length in rows():
        settings = Settings.from_run_config(ATTACKER | changed)
        part = shortened(client, length) if length else client
        result = attack(name, settings, part, known.train.astype(np.int64), rounds)
        found = result.score
        print(
            f"{name + ': ' + title:44}{found.windows:8,}{found.exact:7,}{found.share:8.1%}"
            f"{found.run:6}{found.text_share:9.2%}{result.chance:8.1%}{result.baseline:10.1%}"
            f"{result.loss:7.2f}",
            flush=True,
        )


def shortened(part: Part, length: int) -> Part:
    return Part(part.train[:length], part.val, part.tokenizer, part.name, part.meta)


if __name__ == "__main__":
    main()
