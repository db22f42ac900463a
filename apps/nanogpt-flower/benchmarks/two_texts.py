"""Measure the loss of one model on two texts, which are Tiny Shakespeare and the nine plays.

    python benchmarks/two_texts.py runs/<run id>/model

The app uses the nine plays if Tiny Shakespeare is not available. This script reads Tiny Shakespeare
from the cache. If it is not in the cache, it is downloaded.
"""

import sys
from pathlib import Path

from gpt_core import Runtime, evaluate, from_pretrained
from shakespeare_data import CharTokenizer, load_corpus, sequential_batches

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    model, runtime = from_pretrained(directory), Runtime.resolve()
    tokenizer = CharTokenizer.load(directory / "tokenizer.json")
    for name in ("tiny-shakespeare", "nine-plays"):
        for side, text in zip(("train", "val"), load_corpus(name).split(), strict=True):
            tokens = tokenizer.encode(text[-111_540:])  # the same length for each text
            batches = sequential_batches(tokens, 16, model.config.block_size)
            loss = evaluate(runtime.prepare(model), batches, runtime=runtime)
            print(f"{name} {side}: {loss:.4f}", flush=True)
