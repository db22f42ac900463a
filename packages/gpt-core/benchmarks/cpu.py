"""Measure gpt-core on this CPU against simple references, `transformers` and matrix products.

    nox -s measure                       # run all jobs except loss
    nox -s measure -- optimizers --rows 16
    nox -s measure -- loss --text FILE   # train two models for 100 steps, about 10 minutes

The model is nanoGPT's baby GPT: 6 layers, 6 heads, 384 channels, a block of 256 tokens and dropout
0.2. A batch has 64 rows, or 16 rows in the job "loss". The candidates take turns in one process,
and the script prints medians. `transformers` is measured if it is installed.
"""

import argparse
import itertools
import math
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from plain import PlainGPT, eager_step
from torch import Tensor, nn

from gpt_core import (
    GPT,
    Decoder,
    GPTConfig,
    KVCache,
    Runtime,
    build_optimizer,
    evaluate,
    from_pretrained,
    generate,
    int8_weights,
    learning_rate_at,
    save_pretrained,
    to_hf_gpt2,
    train_steps,
)
from gpt_core.runtime import has_bf16

CONFIG = GPTConfig()
ROWS = 64
THEIRS = 240  # tokens after a prompt of 16, because `transformers` stops at 256 positions
Step = Callable[[], object]


def seconds(step: Step) -> float:
    """Measure how many seconds one call of the function takes."""
    start = perf_counter()
    step()
    return perf_counter() - start


def take_turns(sides: dict[str, Step], rounds: int) -> dict[str, float]:
    """Measure each candidate in turns, and return its median seconds after one warm-up turn."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, step in sides.items():
            spent = seconds(step)
            if turn:
                taken[name].append(spent)
    return {name: median(values) for name, values in taken.items()}


def batch(rows: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randint(CONFIG.vocab_size, (2, rows, CONFIG.block_size))
    return x, y


def our_step(x: Tensor, y: Tensor, runtime: Runtime, optimizer_name: str = "adamw") -> Step:
    model = runtime.prepare(GPT(CONFIG))
    optimizer = build_optimizer(model, optimizer_name, learning_rate=1e-3)
    source = itertools.repeat((x, y))
    return lambda: train_steps(model, source, optimizer, steps=1, runtime=runtime)


def plain_step(x: Tensor, y: Tensor) -> Step:
    model = PlainGPT(CONFIG, dropout=0.2)
    return eager_step(model, lambda: model(x, y)[1])


def hugging_face(model: GPT, dropout: float) -> Any:
    """Convert the model to `transformers`, and use the given rate for every kind of dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    state_dict, config = to_hf_gpt2(model)
    config |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    theirs = GPT2LMHeadModel(GPT2Config(**config))
    theirs.load_state_dict(state_dict)
    return theirs


def has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("transformers is not installed, so it is not measured")
        return False
    return True


def products(rows: int, runtime: Runtime) -> Step:
    """Return a function that computes only the matrix products of one training step.

    These are the products in the linear layers and the head, but not the products in attention.
    """
    sliced = math.gcd(rows, max(1, runtime.micro_batch_tokens // CONFIG.block_size))
    C, N = CONFIG.n_embd, sliced * CONFIG.block_size
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * CONFIG.n_layer
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    shapes.append((C, CONFIG.vocab_size))
    operands = {
        (i, o): [torch.randn(shape, dtype=dtype) for shape in ((N, i), (o, i), (N, o))]
        for i, o in set(shapes)
    }

    def step() -> None:
        for _ in range(rows // sliced):
            for shape in shapes:
                x, weight, grad = operands[shape]
                F.linear(x, weight)
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)

    return step


def training(options: argparse.Namespace) -> None:
    """Print the time of one training step for each candidate."""
    x, y = batch(options.rows)
    runtime = options.runtime
    print(f"training step: {options.rows} rows, {runtime}, {torch.get_num_threads()} threads")
    sides = {
        "plain, fp32, dropout everywhere": plain_step(x, y),
        "ours": our_step(x, y, runtime),
        "matrix products alone": products(options.rows, runtime),
    }
    rows = dict.fromkeys(sides, options.rows)
    if has_transformers():
        model = hugging_face(GPT(CONFIG), dropout=0.2).train()
        name = "transformers GPT2LMHeadModel, fp32"
        sides[name] = eager_step(model, lambda: model(x, labels=x).loss)
        rows[name] = options.rows
        few = options.rows if has_bf16(torch.device("cpu")) else 2  # emulated bf16 takes minutes

        def in_bf16() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                loss: Tensor = model(x[:few], labels=x[:few]).loss
            return loss

        name = f"transformers GPT2LMHeadModel, bf16 autocast ({few} rows)"
        sides[name], rows[name] = eager_step(model, in_bf16), few
    found = take_turns(sides, options.rounds)
    plain = found["plain, fp32, dropout everywhere"]
    for name, spent in found.items():
        rate = rows[name] * CONFIG.block_size / spent
        times = plain * rows[name] / options.rows / spent
        print(f"  {name:<58} {spent:8.2f} s {rate:9,.0f} tokens/s {times:6.2f}x")
    share = found["matrix products alone"] / found["ours"]
    print(f"  share of the limit that matrix products set: {share:.0%}")


def peak_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # because `getrusage` may include the parent process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of a training step. Each model is measured in a new process."""
    if options.side:  # this process was started to measure one model
        before = peak_mib()
        x, y = batch(options.rows)
        step = plain_step(x, y) if options.side == "plain" else our_step(x, y, options.runtime)
        step()
        found = f"{peak_mib():7,.0f} MiB, of which {before:,.0f} MiB before the model"
        print(f"  {options.side:<6} {found}")
        return
    print("peak resident memory of a process that takes one training step:", flush=True)
    for side in ("plain", "ours"):
        given = ["--rows", str(options.rows), "--precision", options.runtime.precision]
        subprocess.run([sys.executable, __file__, "memory", "--side", side, *given], check=True)


PARTS = {
    "aten::mm": "matrix products of linear layers",
    "aten::bmm": "attention's products",
    "aten::baddbmm": "attention's products",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "fused attention",
    "aten::_softmax": "softmax",
    "aten::gelu": "GELU",
    "aten::native_layer_norm": "layer norm",
    "aten::random": "random numbers",
    "aten::bernoulli": "random numbers",
    "aten::copy": "copies",
    "aten::cat": "copies",
    "aten::fill": "copies",
    "aten::linalg_vector_norm": "gradient clipping",
    "aten::mul": "products and sums by element",
    "aten::add": "products and sums by element",
    "aten::div": "products and sums by element",
    "aten::sub": "products and sums by element",
    "aten::masked_fill": "products and sums by element",
    "aten::ge": "products and sums by element",
}


def part_of(event: Any) -> str:
    """Return the kind of operation to which an event of the profiler belongs."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return "optimizer"
        parent = parent.cpu_parent
    name = event.name.removesuffix("_data").removesuffix("_backward").removesuffix("_")
    return PARTS.get(name, "the rest")


def profile(options: argparse.Namespace) -> None:
    """Print how much time of a training step each kind of operation takes."""
    x, y = batch(options.rows)
    sides = {"plain, AdamW, fp32": plain_step(x, y)}
    for name in ("adamw", "muon"):
        sides[f"ours, {name}, {options.runtime.precision}"] = our_step(x, y, options.runtime, name)
    for name, step in sides.items():
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            step()
        spent: Counter[str] = Counter()
        for event in found.events():
            spent[part_of(event)] += event.self_cpu_time_total / 1e6
        total = sum(spent.values())
        print(f"profile of one training step with {options.rows} rows, {name}: {total:.2f} s")
        for part, value in spent.most_common():
            print(f"  {part:<34} {value:7.3f} s {value / total:6.1%}")


def optimizers(options: argparse.Namespace) -> None:
    """Print the time of the optimizer alone, beside a training step without it.

    `--precision` changes the step alone. Muon takes bf16 wherever the hardware has it.
    """
    x, y = batch(options.rows)
    runtime = options.runtime
    sides: dict[str, Step] = {}
    model = runtime.prepare(GPT(CONFIG))
    source = itertools.repeat((x, y))
    nothing = torch.optim.SGD(model.parameters(), lr=0.0)
    sides["a step without optimizer"] = lambda: train_steps(
        model, source, nothing, steps=1, runtime=runtime
    )
    for name in ("adamw", "muon"):
        candidate = GPT(CONFIG)
        for parameter in candidate.parameters():
            parameter.grad = torch.randn_like(parameter)
        sides[f"ours, {name}"] = build_optimizer(candidate, name, learning_rate=1e-3).step
    matrices = [p for n, p in candidate.named_parameters() if p.dim() == 2 and ".h." in n]
    sides["torch.optim.Muon, matrices alone"] = torch.optim.Muon(matrices, lr=1e-3).step
    print(f"optimizers: {options.rows} rows, {runtime}, {torch.get_num_threads()} threads")
    found = take_turns(sides, options.rounds)
    rest = found["a step without optimizer"]
    for name, spent in found.items():
        share = "" if spent is rest else f" {spent / (spent + rest):6.1%} of a step"
        print(f"  {name:<34} {spent:7.3f} s{share}")


def load_text(path: Path) -> Tensor:
    """Encode each character of a text as an id, with at most 65 different ids.

    If the text has more than 65 different characters, the 64 most frequent characters get their own
    ids, and all other characters share one id.
    """
    text = path.read_text(encoding="utf-8")
    frequent = [character for character, _ in Counter(text).most_common(64)]
    if len(set(text)) == 65:
        frequent = sorted(set(text))
    index = {character: i for i, character in enumerate(frequent)}
    return torch.tensor([index.get(character, 64) for character in text])


def windows(ids: Tensor, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw random batches of windows, without end."""
    generator = torch.Generator().manual_seed(seed)
    T = CONFIG.block_size
    while True:
        starts = torch.randint(len(ids) - T, (rows,), generator=generator)
        taken = torch.stack([ids[start : start + T + 1] for start in starts])
        yield taken[:, :-1], taken[:, 1:]


def copy_weights(plain: PlainGPT, model: GPT) -> None:
    """Copy the weights of the GPT into the plain model."""
    given = model.state_dict()
    own = {}
    for name in plain.state_dict():
        if name.endswith("mask"):
            continue
        source = name.replace("blocks.", "transformer.h.")
        source = source.replace(".mlp.0.", ".mlp.c_fc.").replace(".mlp.2.", ".mlp.c_proj.")
        for part in ("c_attn", "c_proj"):
            if f".{part}." in source and ".mlp." not in source:
                source = source.replace(f".{part}.", f".attn.{part}.")
        own[name] = given[source if source.startswith("transformer.") else f"transformer.{source}"]
    missing = plain.load_state_dict(own, strict=False)
    assert all(name.endswith("mask") for name in missing.missing_keys)


def loss(options: argparse.Namespace) -> None:
    """Train the plain model and gpt-core from the same initial weights, and print both losses."""
    ids = load_text(options.text)
    train, val = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    fixed = list(itertools.islice(windows(val, 16, seed=1), 4))
    exact = Runtime.resolve(device="cpu", precision="fp32", micro_batch_tokens=0)
    torch.manual_seed(0)
    model = GPT(CONFIG)
    plain = PlainGPT(CONFIG, dropout=0.2)
    copy_weights(plain, model)
    sides: dict[str, tuple[nn.Module, Runtime]] = {
        "plain": (plain, exact),
        "ours": (model, options.runtime),
    }
    curves = {}
    print("step, training loss of the last ten steps, validation loss")
    for name, (side, runtime) in sides.items():
        torch.manual_seed(0)
        optimizer = build_optimizer(side, "adamw", learning_rate=1e-3)
        source = windows(train, options.rows, seed=0)
        curve = []
        for start in range(0, options.steps, 10):
            taken = train_steps(
                side,
                source,
                optimizer,
                steps=10,
                runtime=runtime,
                learning_rate=lambda step, done=start: learning_rate_at(
                    done + step, peak=1e-3, warmup_steps=20
                ),
            )
            train_loss, val_loss = taken.loss, evaluate(side, fixed, runtime=exact)
            curve.append((train_loss, val_loss))
            print(f"  {name} {start + 10:4}  {train_loss:.4f}  {val_loss:.4f}", flush=True)
        curves[name] = curve
    for i, what in enumerate(("training", "validation")):
        difference = curves["ours"][-1][i] - curves["plain"][-1][i]
        print(f"final {what} loss, ours minus plain: {difference:+.4f}")
    if options.save:
        save_pretrained(model, options.save)


def cached_perplexity(model: GPT, x: Tensor, y: Tensor) -> float:
    """Compute the perplexity on windows (B, T), one token at a time, with the cache."""
    total = 0.0
    with torch.inference_mode():
        cache = KVCache(model.config, len(x), like=model.transformer.wte.weight)
        decoder = Decoder(model, cache)
        for t in range(x.size(1)):
            total += F.cross_entropy(decoder(x[:, t]).float(), y[:, t]).item()
    return math.exp(total / x.size(1))


def generation(options: argparse.Namespace) -> None:
    """Print the time that each candidate needs to generate 256 and 2,000 tokens."""
    model = from_pretrained(options.model) if options.model else GPT(CONFIG).eval()
    quantized = int8_weights(model)
    prompt = torch.zeros(1, 16, dtype=torch.int64)
    for count, rounds in ((256, options.rounds + 2), (2000, 1)):
        sides: dict[str, Step] = {
            "GPT.generate, no cache": lambda n=count: model.generate(prompt, n),
            "ours, fp32": lambda n=count: generate(model, prompt, n),
            "ours, int8 weights": lambda n=count: generate(quantized, prompt, n),
        }
        if count == 256 and has_transformers():
            theirs = hugging_face(model, dropout=0.0).eval()
            sides[f"transformers generate with its cache ({THEIRS} tokens)"] = partial(
                theirs.generate,
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                max_new_tokens=THEIRS,
                pad_token_id=0,
            )
        found = take_turns(sides, rounds)
        naive_each = found["GPT.generate, no cache"] / count
        print(f"{count:,} tokens after 16, batch 1, {torch.get_num_threads()} threads:")
        for name, spent in found.items():
            each = spent / (THEIRS if name.startswith("transformers") else count)
            times = naive_each / each
            print(f"  {name:<52} {spent:8.2f} s {each * 1e3:7.2f} ms a token {times:6.1f}x")
    if options.text and options.model:
        ids = load_text(options.text)
        x, y = next(windows(ids[len(ids) * 9 // 10 :], 16, seed=2))
        exact, rounded = (cached_perplexity(m, x, y) for m in (model, quantized))
        change = f"{rounded / exact - 1:+.2%}"
        print(
            f"perplexity of {x.numel():,} tokens: fp32 {exact:.4f}, int8 {rounded:.4f} ({change})"
        )


JOBS = {
    "training": training,
    "memory": memory,
    "profile": profile,
    "optimizers": optimizers,
    "generation": generation,
    "loss": loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "jobs", nargs="*", metavar="job", help=f"any of {', '.join(JOBS)}; default: all but loss"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of turns to take the median of"
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps of loss")
    parser.add_argument("--rows", type=int, help="batch size; default: 64, and 16 for loss")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--text", type=Path, help="text file; loss needs it")
    parser.add_argument("--save", type=Path, help="directory for the model that loss trains")
    parser.add_argument(
        "--model",
        type=Path,
        help="directory of a saved model for generation; with --text, compares perplexities",
    )
    parser.add_argument("--side", choices=["plain", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted({*options.jobs} - {*JOBS})
    if unknown:
        parser.error(f"unknown job {unknown[0]!r}; allowed are {', '.join(JOBS)}")
    if "loss" in options.jobs and options.text is None:
        parser.error("loss needs --text FILE")
    options.runtime = Runtime.resolve(device="cpu", precision=options.precision)
    rows = options.rows
    for job in options.jobs or [name for name in JOBS if name != "loss"]:
        options.rows = rows or (16 if job == "loss" else ROWS)
        torch.manual_seed(0)
        JOBS[job](options)


if __name__ == "__main__":
    main()
