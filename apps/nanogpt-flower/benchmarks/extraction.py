"""Measure how much of a client's text a malicious server reads from the client's updates.

    python benchmarks/extraction.py

The attacker is the server. It chooses the run config and the weights that it sends, and it
subtracts them from the weights in the client's reply. The difference is the update. The attacker
knows the code of the client, the vocabulary, and a text in the same language, but not the client's
text. The client is the app's own ClientApp, with a data directory. The table says whether it has
the default policy or a policy that allows everything. There are two attacks.

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
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from flower_adapter import protocol, to_arrays
from flower_adapter.arrays import npy
from flower_adapter.arrays.deltas import decode
from flower_adapter.testing import LocalGrid
from gpt_core import GPT
from nanogpt_flower import client_app
from nanogpt_flower.client_app import app
from nanogpt_flower.composition import model_config
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, load_corpus, partition

Ids = NDArray[np.int64]
Weights = dict[str, Tensor]

POSITIONS = "transformer.wpe.weight"
TOKENS = "transformer.wte.weight"

# The settings of the attacker. The default policy of a client allows them. The sum of the learning
# rates of all steps is just above the least one that the policy allows.
ATTACKER = {
    "device": "cpu",
    "precision": "fp32",
    "n-layer": 2,
    "n-head": 1,
    "n-embd": 256,
    "block-size": 32,
    "batch-size": 104,
    "max-steps": 20,
    "dropout": 0.0,
    "learning-rate": 1.6e-3,
    "warmup-steps": 0,
}
# The settings of an attacker whose client allows everything.
ONE_WINDOW = {
    "n-layer": 1,
    "n-embd": 64,
    "block-size": 400,
    "batch-size": 1,
    "max-steps": 1,
    "learning-rate": 1e-3,
    "warmup-steps": 0,
}
# A policy that allows everything of this page.
NO_POLICY = """
[run-config]
batch-size = { min = 1 }
block-size = { min = 1 }
[limits]
characters = { min = 0 }
steps = { min = 0 }
windows = { min = 0 }
tokens = { min = 0 }
learning-rate-sum = { min = 0 }
"""


# The client: its own code, and a record of the windows that it drew.


@dataclass(frozen=True)
class Client:
    """A client of a deployment: its data directory, its text, and its policy file, if any."""

    directory: Path
    text: NDArray[np.uint16]
    tokenizer: CharTokenizer
    policy: Path | None = None


@dataclass(frozen=True)
class Round:
    """The result of one round of one client."""

    update: Tensor  # (block_size, n_embd), of the position embeddings, after the codec
    windows: Ids  # (N, block_size + 1), which the attacker does not see
    loss: float


class Refused(Exception):
    """The client has answered with an error. The message is the reason."""


def train_client(
    settings: Settings, weights: Weights, client: Client, *, server_round: int = 1
) -> Round:
    """Send one train message to the app, in a new run, and return what comes back.

    Raises:
        Refused: the client does not train.
    """
    LocalGrid(app, 0)  # lets this process make messages, as a ServerApp does
    model = GPT(model_config(settings, client.tokenizer.vocab_size))
    model.load_state_dict(weights)
    sent = to_arrays(model)
    config = {
        "tokenizer": client.tokenizer.to_json(),
        "server-round": server_round,
        protocol.MIN_REPLIES: 2,  # an attacker can say this
    }
    content = RecordDict({"arrays": sent, "config": ConfigRecord(config)})
    if settings.uplink != "fp32":
        header = protocol.CompressionHeader("fp32", settings.uplink, base="", version="")
        content[protocol.COMPRESSION] = header.to_record()
    node = {"data-path": str(client.directory)}
    if client.policy is not None:
        node["policy"] = str(client.policy)
    context = Context(1, 2, dict(node), RecordDict(), settings.to_run_config())

    drawn: list[Tensor] = []

    class RecordedBatches(client_app.Batches):
        def __next__(self) -> Any:
            x, y = super().__next__()
            drawn.append(torch.cat([x, y[:, -1:]], dim=1))
            return x, y

    with patch.object(client_app, "Batches", RecordedBatches):
        reply = app(Message(content, 2, "train"), context)
    if reply.has_error():
        raise Refused(reply.error.reason)
    arrays = decode(reply.content["arrays"], sent)
    update = positions(arrays) - positions(sent)
    loss = reply.content["metrics"]["train-loss"]
    return Round(update, torch.cat(drawn).numpy(), float(loss))


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
    set_pair(weights[f"{amplifier}mlp.c_proj.weight"].T[0], LARGER, 1e18)
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


def attack(
    name: str, settings: Settings, client: Client, known_text: Ids, rounds: int = 1
) -> Result:
    """Run one attack for some rounds, and compare the guesses with the client's windows.

    Raises:
        Refused: the client does not train.
    """
    code = Code.of(client.tokenizer.vocab_size)
    expected = settings.batch_size * settings.max_steps
    if name == "gates":
        weights = gate_weights(settings, code, known_text, num_windows=expected)
    else:
        weights = single_window_weights(settings, client.tokenizer.vocab_size)
    guesses: list[Ids] = []
    trained = []
    for server_round in range(1, rounds + 1):
        trained.append(train_client(settings, weights, client, server_round=server_round))
        update = trained[-1].update
        guesses += (
            read_gates(update, code) if name == "gates" else [read_single_window(update, weights)]
        )
    windows = np.concatenate([one.windows for one in trained])
    blind = score(blind_guesses(known_text, settings.block_size), windows, client.text)
    chance = np.bincount(client.text).max() / len(client.text)
    return Result(score(guesses, windows, client.text), chance, blind.share, trained[0].loss)


@dataclass(frozen=True)
class Row:
    """A row of the table: its title, and an attack."""

    title: str
    changed: dict[str, Any]
    name: str = "gates"
    client: str = "default"  # "default", "no policy" or "short"
    rounds: int = 1


def table() -> Iterator[Row]:
    """Yield the rows. All but the first are within the default policy, or refused by it."""
    yield Row("no policy, 1 window", ONE_WINDOW, "single_window", "no policy")
    yield Row("no policy, 8 windows in 1 step", ONE_WINDOW | batch(8), "single_window", "no policy")
    yield Row("default policy, 1 window", ONE_WINDOW, "single_window")
    yield Row("default policy, 2,080 windows", {"n-embd": 64}, "single_window")
    yield Row("2,080 windows of 32", {})
    yield Row("  in 4 rounds", {}, rounds=4)
    yield Row("  in 4 rounds, a text of 5,000 characters", {}, client="short", rounds=4)
    yield Row("  384 channels, windows of 64", {"n-embd": 384, "block-size": 64})
    yield Row("  384 channels, windows of 256", {"n-embd": 384, "block-size": 256})
    yield Row("  muon", {"optimizer": "muon"})
    yield Row("  200 steps of 12 windows", batch(12) | {"max-steps": 200})
    yield Row("  rate 1e-4, warm-up of 1,000 steps", {"learning-rate": 1e-4, "warmup-steps": 1000})
    for rate in (1e-2, 1e-1):
        yield Row(f"  rate {rate:g}", {"learning-rate": rate})
    yield Row("  dropout 0.01", {"dropout": 0.01})
    for codec in ("bf16", "int8", "2-bit"):
        yield Row(f"  uplink {codec}", {"uplink": codec})
    yield Row("  precision bf16", {"precision": "bf16"})


def batch(size: int) -> dict[str, Any]:
    return {"batch-size": size}


def clients(directory: Path) -> tuple[dict[str, Client], Ids]:
    """Write the data directories. Return the clients, and the text that the attacker knows."""
    corpus = load_corpus("auto")
    tokenizer = CharTokenizer.from_text(corpus.text)
    short = directory / "short.txt"
    short.write_text(corpus.text[:11_200], encoding="utf-8")
    everything = directory / "policy.toml"
    everything.write_text(NO_POLICY, encoding="utf-8")
    found = {}
    for name, source in (("default", corpus), ("short", load_corpus(str(short)))):
        parts = partition(source, 2, tokenizer=tokenizer)
        path = parts.write(directory / name)[0]
        found[name] = Client(path, parts[0].train, tokenizer)
    found["no policy"] = replace(found["default"], policy=everything)
    return found, partition(corpus, 2)[1].train.astype(np.int64)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    print(
        f"{'attack and settings':48}{'windows':>8}{'exact':>7}{'best':>8}{'run':>5}{'of text':>9}"
        f"{'chance':>8}{'baseline':>10}{'loss':>7}"
    )
    with tempfile.TemporaryDirectory() as directory:
        found, known_text = clients(Path(directory))
        for row in table():
            settings = Settings.from_run_config(ATTACKER | row.changed)
            title = row.title if row.title.startswith(" ") else f"{row.name}: {row.title}"
            try:
                result = attack(row.name, settings, found[row.client], known_text, row.rounds)
            except Refused as reason:
                print(f"{title:48}  {reason}", flush=True)
                continue
            got = result.score
            print(
                f"{title:48}{got.windows:8,}{got.exact:7,}{got.share:8.1%}{got.run:5}"
                f"{got.text_share:9.2%}{result.chance:8.1%}{result.baseline:10.1%}"
                f"{result.loss:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
