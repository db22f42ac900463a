"""Training on a GPU: tokens a second, model FLOPs utilisation and peak memory.

    python packages/gpt-core/benchmarks/gpu.py             # the table
    python packages/gpt-core/benchmarks/gpu.py --dry-run   # every path once, tiny, on any device

It needs torch, numpy and safetensors; gpt-core is taken from the source directory. "plain" is the
model in plain.py in fp32 (no TF32), eager, with PyTorch's default AdamW; "ours" is what
`Runtime.resolve(compile="on")` gives: bf16, one compiled graph, flash attention, fused AdamW.
The model's FLOPs are `GPT.flops_per_token`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from plain import PlainGPT, eager_step

from gpt_core import GPT, GPTConfig, Runtime, build_optimizer, train_steps

# dense bf16 FLOP/s, from the makers' data sheets
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
MODELS = {
    "baby GPT": (GPTConfig(), 64),
    "GPT-2 124M": (GPTConfig(50304, 1024, 12, 12, 768, dropout=0.0), 16),
}
OURS = 10  # steps that one call of `train_steps` takes
Step = Callable[[], object]


def batches(config: GPTConfig, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        tokens = torch.randint(config.vocab_size, (rows, config.block_size + 1))
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def plain_step(config: GPTConfig, rows: int, device: torch.device) -> Step:
    model = PlainGPT(config, config.dropout).to(device)
    source = batches(config, rows)
    return eager_step(model, lambda: model(*(part.to(device) for part in next(source)))[1], 1e-4)


def our_step(config: GPTConfig, rows: int, device: torch.device, compile: str) -> Step:
    runtime = Runtime.resolve(device=str(device), compile=compile)
    model = runtime.prepare(GPT(config))
    optimizer = build_optimizer(model, learning_rate=1e-4)
    source = batches(config, rows)
    return lambda: train_steps(model, source, optimizer, steps=OURS, runtime=runtime)


def measure(step: Step, steps_each: int, rounds: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one training step (median) and peak memory in GiB."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step()  # compiles
    seconds = []
    for _ in range(rounds):
        start = perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((perf_counter() - start) / steps_each)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return median(seconds), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny models, two rounds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    options = parser.parse_args()
    device = Runtime.resolve(device=options.device).device
    if device.type != "cuda" and not options.dry_run:
        parser.error(f"the device is {device}; --dry-run tries every path without a GPU")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak_flops = next((PEAK[key] for key in PEAK if key in name.replace("-", " ").split()), None)
    print(f"{name}, torch {torch.__version__}")
    print(f"{'model':<12} {'path':<22} {'ms/step':>9} {'tokens/s':>12} {'MFU':>6} {'GiB':>6}")
    for label, (config, rows) in MODELS.items():
        if options.dry_run:
            small = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 65}
            config, rows = dataclasses.replace(config, **small), 4
        flops = GPT(config).flops_per_token()
        paths: dict[str, tuple[Callable[[], Step], int]] = {
            "plain fp32": (partial(plain_step, config, rows, device), 1),
            "ours, not compiled": (partial(our_step, config, rows, device, "off"), OURS),
            "ours": (partial(our_step, config, rows, device, "on"), OURS),
        }
        for path, (build, steps_each) in paths.items():
            torch.manual_seed(0)
            torch.set_float32_matmul_precision("highest")  # `prepare` allows TF32 for ours
            rounds = 2 if options.dry_run else options.rounds
            seconds, memory = measure(build(), steps_each, rounds, device)
            rate = rows * config.block_size / seconds
            mfu = f"{rate * flops / peak_flops:.1%}" if peak_flops else "-"
            figures = f"{seconds * 1e3:>9.1f} {rate:>12,.0f} {mfu:>6} {memory:>6.2f}"
            print(f"{label:<12} {path:<22} {figures}", flush=True)


if __name__ == "__main__":
    main()
