"""What bench.py measures of sampling: one function per comparison.

In       a Bench (timing.py)
Out      its rows: name, value, unit, floor, target, met, note
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import load_preset
from experiments.timing import Bench
from generator import ARGenerator, Generator, MaskGITGenerator


def generator_of(Kind: type[Generator], bench: Bench) -> Generator:
    torch.manual_seed(0)
    tok, gen, _ = load_preset("imagenet-128")
    return Kind(gen, tok.num_tokens, tok.codebook_size, 1000).to(bench.device).eval()


def zeros(bench: Bench, *shape: int) -> Tensor:
    """Labels or ids: which ones makes no difference to the time."""
    return torch.zeros(shape, dtype=torch.int64, device=bench.device)


@torch.no_grad()
def guided_steps(model: ARGenerator, labels: Tensor, ids: Tensor, steps: range, use_cache: bool):
    """Steps t of guided sampling, each after t tokens: from a cache that long, or recomputed."""
    _, newest = model.begin(labels, cfg_scale=2.0)
    for t in steps:
        model.guided(labels, ids[:, :t], 2.0, newest if use_cache else None)


def cache_against_recomputing(bench: Bench) -> None:
    model = generator_of(ARGenerator, bench)
    for batch, every in ((1, 16), (16, 32)):
        # Recomputing 128 steps of 16 samples takes many minutes on a CPU, so some steps stand for
        # their neighbours.
        steps = range(every // 2, 128, every)
        labels, ids = zeros(bench, batch), zeros(bench, batch, 128)
        slow, fast = bench.seconds(*(partial(guided_steps, model, labels, ids, steps, use_cache)
                                     for use_cache in (False, True)),
                                   repeats=1 if batch == 16 else None)
        bench.row(f"AR with KV cache against recomputing, batch {batch}", slow / fast, "x", 5,
                  floor=bench.flops[0] / bench.flops[1],
                  note=f"{fast / len(steps) * 1e3:.0f} ms a step "
                       f"against {slow / len(steps) * 1e3:.0f}")


def step_against_floor(bench: Bench) -> None:
    model, labels = generator_of(ARGenerator, bench), zeros(bench, 1)
    # The floor: every weight is read once, as fast as a matrix-vector product reads it. Both sides
    # in turn, as the rate at which memory is read changes from minute to minute.
    took, reading = bench.seconds(partial(model.sample, labels, cfg_scale=2.0),
                                  partial(products_with_one_row, model, 32))
    weights = sum(module.weight.numel() for module in matrices(model))
    bench.row("AR, a step at batch 1", took / model.num_tokens * 1e3, "ms", least=False,
              floor=reading / 32 * 1e3,
              note=f"{weights / 1e6:.0f} M weights at {weights * 4 * 32 / reading / 1e9:.1f} GB/s")


def matrices(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def products_with_one_row(model: ARGenerator, times: int) -> None:
    """The matrix products of so many steps, for one row, and nothing else."""
    for _ in range(times):
        for module in matrices(model):
            torch.mv(module.weight, module.weight[0])


@torch.no_grad()
def products(model: ARGenerator, rows: int) -> None:
    """The matrix products of a step and nothing else."""
    for module in matrices(model):
        F.linear(module.weight.new_ones(rows, module.in_features), module.weight)


def bf16_against_float32(bench: Bench) -> None:
    model, labels = generator_of(ARGenerator, bench), zeros(bench, 16)
    half = generator_of(ARGenerator, bench).to(torch.bfloat16)
    steps, ids = range(2, 128, 4), zeros(bench, 16, 128)  # one step stands for its neighbours
    slow, fast = bench.seconds(*(partial(guided_steps, which, labels, ids, steps, True)
                                 for which in (model, half)))
    slow, fast = slow / len(steps), fast / len(steps)
    # Both count the same operations; what bf16 can gain is what it gains in the products alone.
    products32, products16 = bench.seconds(partial(products, model, 32),
                                           partial(products, half, 32))
    gain = bench.peak[torch.bfloat16] / bench.peak[torch.float32]
    bench.row("AR, batch 16, bf16 against float32", slow / fast, "x",
              floor=products32 / products16,
              note=f"{fast * 1e3:.0f} ms a step against {slow * 1e3:.0f}; products take "
                   f"{products16 / fast:.0%} of it, {products32 / slow:.0%} in "
                   f"float32; matrix peak in bf16 is {gain:.1f} times that in float32")


@torch.no_grad()
def bare_passes(model: MaskGITGenerator, labels: Tensor, ids: Tensor, passes: int) -> None:
    for _ in range(passes):
        model(labels, ids)


def maskgit_against_passes(bench: Bench) -> None:
    model, labels = generator_of(MaskGITGenerator, bench), zeros(bench, 2)
    # guidance asks twice: with the class and without it
    both, ids = zeros(bench, 4), zeros(bench, 4, 128)
    sampling, passes = bench.seconds(partial(model.sample, labels, steps=8, cfg_scale=3.0),
                                     partial(bare_passes, model, both, ids, 8))
    bench.row("MaskGIT, samples a second against bare passes", passes / sampling, "x", 0.95,
              floor=1, note=f"{sampling / 2:.2f} s a sample; "
                            f"{bench.of_peak(bench.flops[1], passes)}")
