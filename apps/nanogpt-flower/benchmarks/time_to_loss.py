"""Measure the time to a validation loss of 2.52 of the baby GPT, here and on a plain path.

    nox -s reach                         # about 90 minutes, most of them for the plain path
    nox -s reach -- --loss 4 --steps 5   # a first impression

One side is `nanogpt-flower run fast`. Its time is the wall time of the whole command, from the
start of the process to the last result of the run.

The other side is the plain path: Flower's example as one would write it. It has two clients with
half of the text each, 50 steps of 64 windows in a round, a model in eager fp32 with dropout in
attention too, and a new AdamW in each round. It runs in one process without Flower, so that no
start-up counts against it. Its time ends with the first validation loss that is low enough.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt_core import GPTConfig, Runtime, evaluate, train_steps
from shakespeare_data import (
    Batches,
    CharTokenizer,
    load_corpus,
    partition,
    sequential_batches,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "packages" / "gpt-core" / "benchmarks"))
from plain import PlainGPT

CLIENTS, ROWS, LEARNING_RATE, DROPOUT = 2, 64, 1e-3, 0.2


def fast_run(loss: float, seed: int) -> float:
    """Run the preset `fast`, and return the seconds of the whole command."""
    program = Path(sys.executable).with_name("nanogpt-flower")
    with tempfile.TemporaryDirectory() as room:
        settings = [f"output-dir={room}", "run-name=fast", f"seed={seed}"]
        started = time.monotonic()
        subprocess.run([program, "run", "fast", *settings], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        lines = Path(room, "fast", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    reached = json.loads(lines[-1])["val_loss"]
    print(f"preset fast, seed {seed}: loss {reached:.4f} after {seconds:.0f} s", flush=True)
    if reached > loss:
        sys.exit(f"the preset fast ended above {loss}")
    return seconds


def plain_path(loss: float, seed: int, steps: int) -> float:
    """Train on the plain path until the loss is low enough, and return the seconds."""
    started = time.monotonic()
    corpus = load_corpus("tiny-shakespeare")
    tokenizer = CharTokenizer.from_text(corpus.text)
    parts = partition(corpus, CLIENTS, tokenizer=tokenizer)
    config = GPTConfig(tokenizer.vocab_size)
    validation = tokenizer.encode(corpus.split()[1])
    runtime = Runtime.resolve(device="cpu", precision="fp32", micro_batch_tokens=0)
    torch.manual_seed(seed)
    model = PlainGPT(config, dropout=DROPOUT)
    server_round = 0
    while True:
        server_round += 1
        sent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in sent.items()}
        for client, part in enumerate(parts):
            model.load_state_dict(sent)
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
            batches = Batches(
                part.train, ROWS, config.block_size, seed=[seed, client, server_round]
            )
            train_steps(model, batches, optimizer, steps=steps, runtime=runtime)
            for name, tensor in model.state_dict().items():
                mean[name] += tensor / CLIENTS
        model.load_state_dict(mean)
        windows = sequential_batches(validation, 16, config.block_size)
        reached = evaluate(model, windows, runtime=runtime)
        seconds = time.monotonic() - started
        print(
            f"plain path, round {server_round}: loss {reached:.4f} after {seconds:.0f} s",
            flush=True,
        )
        if reached <= loss:
            return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", type=float, default=2.52)
    parser.add_argument("--steps", type=int, default=50, help="steps in a round of the plain path")
    parser.add_argument("--seed", type=int, default=1337)
    options = parser.parse_args()
    print(f"{Runtime.resolve(device='cpu')}, {torch.get_num_threads()} threads", flush=True)
    before = fast_run(options.loss, options.seed)
    plain = plain_path(options.loss, options.seed, options.steps)
    after = fast_run(options.loss, options.seed)
    fast = (before + after) / 2
    print(f"plain path {plain:.0f} s, preset fast {fast:.0f} s: {plain / fast:.1f} times faster")


if __name__ == "__main__":
    main()
