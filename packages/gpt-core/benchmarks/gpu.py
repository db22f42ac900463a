"""Measure training on a GPU: tokens per second, model FLOPs utilisation and peak memory.

    python packages/gpt-core/benchmarks/gpu.py             # print the table
    python packages/gpt-core/benchmarks/gpu.py --dry-run   # try every path with tiny models

The script needs torch, numpy and safetensors. It imports gpt-core from the source directory.
"plain" is the model in plain.py: eager fp32 without TF32, and PyTorch's default AdamW. "ours" is
gpt-core with `Runtime.resolve(compile="on")`: bf16, one compiled graph, flash attention and fused
AdamW. The FLOPs utilisation (MFU) is computed with `GPT.flops_per_token`.
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

# FLOP/s for dense bf16 products, from the manufacturers' data sheets
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
MODELS = {
    "baby GPT": (GPTConfig(), 64),
    "GPT-2 124M": (GPTConfig(50304, 1024, 12, 12, 768, dropout=0.0), 16),
}
STEPS_PER_CALL = 10  # training steps in one call of `train_steps`
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
    return lambda: train_steps(model, source, optimizer, steps=STEPS_PER_CALL, runtime=runtime)


def measure(
    step: Step, steps_per_call: int, rounds: int, device: torch.device
) -> tuple[float, float]:
    """Return the median seconds of one training step and the peak memory in GiB."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step()  # the first call compiles
    seconds = []
    for _ in range(rounds):
        start = perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((perf_counter() - start) / steps_per_call)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return median(seconds), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="try tiny models, for two rounds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of calls to take the median of"
    )
    options = parser.parse_args()
    device = Runtime.resolve(device=options.device).device
    if device.type != "cuda" and not options.dry_run:
        parser.error(f"the device is {device}; without a GPU only --dry-run is allowed")
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
            "ours, not compiled": (partial(our_step, config, rows, device, "off"), STEPS_PER_CALL),
            "ours": (partial(our_step, config, rows, device, "on"), STEPS_PER_CALL),
        }
        for path, (build, steps_per_call) in paths.items():
            torch.manual_seed(0)
            torch.set_float32_matmul_precision("highest")  # `Runtime.prepare` has allowed TF32
            rounds = 2 if options.dry_run else options.rounds
            seconds, memory = measure(build(), steps_per_call, rounds, device)
            rate = rows * config.block_size / seconds
            mfu = f"{rate * flops / peak_flops:.1%}" if peak_flops else "-"
            figures = f"{seconds * 1e3:>9.1f} {rate:>12,.0f} {mfu:>6} {memory:>6.2f}"
            print(f"{label:<12} {path:<22} {figures}", flush=True)


if __name__ == "__main__":
    main()
