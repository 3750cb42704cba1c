"""How fast? Both sides of each comparison in one process and in turn, the median of several.

Ratios compare two ways on the same machine, so they carry over to other machines better than
seconds do. "of peak" is the rate of a plain matrix product on this machine in the same precision,
given where products dominate. The floor of a sampling step at batch 1 is the time to read every
weight once, at the rate of a plain matrix-vector product.

Run      python -m experiments.bench                             all rows, ten minutes on 2 cores
         python -m experiments.bench --rows query_block grow     some of them
Makes    a line for each value; --json FILE: the same as name, value, unit, target, met (null: no
         target)
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from config import TokenizerConfig, load_preset
from experiments.timing import Bench, in_child
from generator import ARGenerator, Generator, MaskGITGenerator
from layers import count_parameters
from loop import new_optimizer
from losses import reconstruction
from mit import MIT
from mocet import MoCET
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.batches import ImageStream
from plumbing.datasets import open_images
from plumbing.flags import DEVICES, Parser, choose, need
from plumbing.images import to_float
from plumbing.processes import peak_memory, provenance
from plumbing.tokens import TokenStream
from quantizer import VectorQuantizer
from titok import TiTok
from train import PARTS, freeze

GIB = 2 ** 30


# ------------------------------------------------------------------------------------------------
# the tokenizer

def tokenizer_config(**changes) -> TokenizerConfig:
    return replace(load_preset("imagenet-128")[0], **changes)


def experts(L: int, form: str, bench: Bench) -> tuple[MoCET, VectorQuantizer]:
    cfg = tokenizer_config(token_schedule=(L,), expert=form)
    torch.manual_seed(0)
    return MoCET(cfg).to(bench.device), VectorQuantizer(cfg).to(bench.device).eval()


@torch.no_grad()
def forward(mocet: MoCET, way: Callable, x: Tensor, quantizer: VectorQuantizer) -> Tensor:
    """way: MoCET.forward or MoCET.forward_loop -> ids (B, L)."""
    return way(mocet, x, quantizer)[1]


def forward_backward(mocet: MoCET, way: Callable, x: Tensor, quantizer: VectorQuantizer) -> None:
    z_q, _, losses = way(mocet, x, quantizer)
    (z_q.sum() + losses["codebook"]).backward()
    mocet.zero_grad(set_to_none=True)


def query_against_block(bench: Bench) -> None:
    x = torch.randn(4, 256, 256, device=bench.device)
    for L in (32, 128):
        query, quantizer = experts(L, "query", bench)
        block, _ = experts(L, "block", bench)
        # Each repeat of 128 block experts costs half a minute; their times vary little.
        repeats = 1 if L == 128 else None
        forward_macs = L * 2 * (256 + L / 2) * 12 * 256 ** 2 * 4
        for what, call, target, macs in (
                ("forward", forward, 12, forward_macs),
                ("forward+backward", forward_backward, 8, 3 * forward_macs)):
            fast, slow = bench.seconds(partial(call, query, MoCET.forward, x, quantizer),
                                       partial(call, block, MoCET.forward, x, quantizer),
                                       repeats=repeats)
            bench.row(f"query against block, {L} experts, {what}", slow / fast, "x", target,
                      note=f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f}; "
                           f"block at {bench.of_peak(macs, slow)}")


def query_against_loop(bench: Bench) -> None:
    x = torch.randn(4, 256, 256, device=bench.device)
    for L in (32, 128):
        mocet, quantizer = experts(L, "query", bench)
        same = torch.equal(forward(mocet, MoCET.forward, x, quantizer),
                           forward(mocet, MoCET.forward_loop, x, quantizer))
        for what, call, target, repeats in (
                ("forward", forward, 3, None), ("forward+backward", forward_backward, 2, 1)):
            fast, slow = bench.seconds(partial(call, mocet, MoCET.forward, x, quantizer),
                                       partial(call, mocet, MoCET.forward_loop, x, quantizer),
                                       repeats=repeats)
            bench.row(f"query against its loop, {L} experts, {what}", slow / fast, "x", target,
                      note=f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f}; same ids: {same}")


def encode(images: Tensor, mit: MIT, mocet: MoCET, quantizer: VectorQuantizer) -> Tensor:
    return mocet(mit(images), quantizer)[1]


def encoder_against_titok(bench: Bench) -> None:
    images = torch.rand(4, 3, 256, 256, device=bench.device) * 2 - 1
    for L, target in ((32, 1.05), (64, 1.0), (128, 0.9)):
        cfg = tokenizer_config(token_schedule=(L,))
        mit, (mocet, quantizer) = MIT(cfg).to(bench.device), experts(L, "query", bench)
        titok = TiTok(replace(cfg, tokenizer="titok")).to(bench.device)
        with torch.no_grad():
            ours, theirs = bench.seconds(partial(encode, images, mit, mocet, quantizer),
                                         partial(titok, images, quantizer))
        macs = 4 * (256 + L) * count_parameters(titok.blocks)
        bench.row(f"whole encoder against TiTok-B, {L} tokens", ours / theirs, "x", target,
                  least=False, note=f"{ours / 4 * 1e3:.0f} ms against {theirs / 4 * 1e3:.0f} "
                                    f"an image; TiTok at {bench.of_peak(macs, theirs)}")


def training_step(kind: str, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step, peak memory in GiB; for the child that growth() starts."""
    torch.manual_seed(0)
    model = NativeTok(tokenizer_config(token_schedule=(64, 128))).to(device)
    model.grow(128)
    freeze(model, PARTS if kind == "joint" else ("new experts", "decoder"))
    images = torch.rand(2, 3, 256, 256, device=device) * 2 - 1
    step = learner(model, partial(tokenizer_loss, model), beta2=0.999)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        step(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), peak_memory(device) / GIB


def growth(bench: Bench) -> None:
    grow_s, grow_gib = in_child(bench, "experiments.bench", "grow")
    joint_s, joint_gib = in_child(bench, "experiments.bench", "joint")
    bench.row("growth step against joint step, time", grow_s / joint_s, "x", 0.6, least=False,
              note=f"{grow_s:.2f} s against {joint_s:.2f}")
    bench.row("growth step against joint step, peak memory", grow_gib / joint_gib, "x", 0.6,
              least=False, note=f"{grow_gib:.1f} GiB against {joint_gib:.1f}")


# ------------------------------------------------------------------------------------------------
# the generators

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
    newest = partial(model.newest, caches=model.new_caches(2 * len(labels)))
    for t in steps:
        model.guided(labels, ids[:, :t], 2.0, newest if use_cache else None)


def cache_against_recomputing(bench: Bench) -> None:
    model = generator_of(ARGenerator, bench)
    # Recomputing 128 steps of 16 samples takes many minutes on a CPU, so every 16th step stands
    # for its neighbours.
    steps = range(8, 128, 16)
    for batch in (1, 16):
        labels, ids = zeros(bench, batch), zeros(bench, batch, 128)
        slow, fast = bench.seconds(*(partial(guided_steps, model, labels, ids, steps, use_cache)
                                     for use_cache in (False, True)),
                                   repeats=1 if batch == 16 else None)
        bench.row(f"AR with KV cache against recomputing, batch {batch}", slow / fast, "x", 5,
                  note=f"{fast / len(steps) * 1e3:.0f} ms a step "
                       f"against {slow / len(steps) * 1e3:.0f}")


def step_against_floor(bench: Bench) -> None:
    model, labels = generator_of(ARGenerator, bench), zeros(bench, 1)
    weights = count_parameters(model.blocks) + count_parameters(model.head)
    lowest = weights * 4 / bench.bandwidth
    (took,) = bench.seconds(partial(model.sample, labels, cfg_scale=2.0))
    step = took / model.num_tokens
    target = 1.1 if bench.device.type == "cpu" else 1.5
    bench.row("AR, a step at batch 1 against its floor", step / lowest, "x", target, least=False,
              note=f"{step * 1e3:.1f} ms against {lowest * 1e3:.1f} "
                   f"at {bench.bandwidth / 1e9:.1f} GB/s")


def bf16_against_float32(bench: Bench) -> None:
    model, labels = generator_of(ARGenerator, bench), zeros(bench, 16)
    half = generator_of(ARGenerator, bench).to(torch.bfloat16)
    slow, fast = bench.seconds(partial(model.sample, labels, cfg_scale=2.0),
                               partial(half.sample, labels, cfg_scale=2.0), repeats=1)
    gain = bench.peak[torch.bfloat16] / bench.peak[torch.float32]
    # The target is for machines that have units for bf16.
    target = 2 if bench.device.type == "cuda" or gain > 1.5 else None
    bench.row("AR, batch 16, bf16 against float32", slow / fast, "x", target,
              note=f"{16 / fast:.2f} samples a second against {16 / slow:.2f}; "
                   f"matrix peak in bf16 is {gain:.1f} times that in float32")


@torch.no_grad()
def bare_passes(model: MaskGITGenerator, labels: Tensor, ids: Tensor, passes: int) -> None:
    for _ in range(passes):
        model(labels, ids)


def maskgit_against_passes(bench: Bench) -> None:
    model, labels = generator_of(MaskGITGenerator, bench), zeros(bench, 4)
    # guidance asks twice: with the class and without it
    both, ids = zeros(bench, 8), zeros(bench, 8, 128)
    sampling, passes = bench.seconds(partial(model.sample, labels, steps=8, cfg_scale=3.0),
                                     partial(bare_passes, model, both, ids, 8))
    macs = 8 * 8 * 129 * count_parameters(model.blocks)
    bench.row("MaskGIT, samples a second against bare passes", passes / sampling, "x", 0.95,
              note=f"{sampling / 4:.2f} s a sample; {bench.of_peak(macs, passes)}")


# ------------------------------------------------------------------------------------------------
# data

def waiting(stream: Iterator, step: Callable, steps: int) -> tuple[float, float]:
    """Share of the time of `steps` steps that went by in next(stream), and seconds a step.

    The first three batches are not counted.
    """
    for _ in range(3):
        step(next(stream))
    worked, began = 0.0, time.perf_counter()
    for _ in range(steps):
        batch = next(stream)
        step_began = time.perf_counter()
        step(batch)
        worked += time.perf_counter() - step_began
    total = time.perf_counter() - began
    return 1 - worked / total, total / steps


def learner(model: nn.Module, loss: Callable[..., Tensor], beta2: float) -> Callable:
    """-> a function of a batch: one training step of the model on loss(batch)."""
    optimizer = new_optimizer(model, "adamw", 1e-4, beta2)
    model.train()

    def step(batch):
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def tokenizer_loss(model: NativeTok, images: Tensor) -> Tensor:
    recon, _, losses = model(images)
    return reconstruction(recon, images) + losses["codebook"] + 0.25 * losses["commitment"]


def waiting_for_tokens(bench: Bench) -> None:
    tok, gen, train = load_preset("cifar")
    rng, n = np.random.default_rng(0), 50000
    ids = rng.integers(0, tok.codebook_size, (n, 2, tok.num_tokens)).astype(np.uint16)
    labels = rng.integers(0, 10, n)
    model = ARGenerator(gen, tok.num_tokens, tok.codebook_size, 10).to(bench.device)

    def loss(batch):
        return model.loss(*(part.to(bench.device) for part in batch))[0]
    stream = iter(TokenStream(ids, labels, train.generator_batch_size, 0))
    share, seconds = waiting(stream, learner(model, loss, train.generator_beta2), 20)
    bench.row("stage 3, waiting for data", share * 100, "%", 2, least=False,
              note=f"of {seconds * 1e3:.0f} ms a step")


def write_jpegs(folder: str, n: int) -> None:
    """n pictures of noise, 32 x 32, dealt to ten class folders."""
    rng = np.random.default_rng(0)
    for k in range(n):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        os.makedirs(os.path.join(folder, str(k % 10)), exist_ok=True)
        Image.fromarray(pixels).save(os.path.join(folder, str(k % 10), f"{k}.jpg"), quality=90)


def waiting_for_images(bench: Bench) -> None:
    tok, _, train = load_preset("cifar")
    model = NativeTok(tok).to(bench.device)

    def loss(batch):
        return tokenizer_loss(model, to_float(batch[0].to(bench.device)))
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(folder, 2000)
        stream = iter(ImageStream(open_images(folder), tok.image_size, train.batch_size, 0,
                                  flip=True, workers=2))
        share, seconds = waiting(stream, learner(model, loss, train.beta2), 30)
        del stream  # ends its workers before the folder goes
    bench.row("stage 1, waiting for JPEGs, 2 workers", share * 100, "%", 10, least=False,
              note=f"of {seconds * 1e3:.0f} ms a step, on {os.cpu_count()} cores")


# ------------------------------------------------------------------------------------------------
# the rows

# name: (function, what it compares)
ROWS = {
    "query_block": (query_against_block, "MoCET, query experts against block experts, depth 2, "
                                         "width 256, 256 patches, batch 4"),
    "query_loop": (query_against_loop, "MoCET, query experts against their own plain loop, "
                                       "the same sizes"),
    "encoder": (encoder_against_titok, "MIT-B and query experts against a TiTok-B encoder, "
                                       "256 patches, batch 4"),
    "grow": (growth, "a growth step 64 -> 128 against a joint step at 128, imagenet-128, batch 2"),
    "cache": (cache_against_recomputing, "AR sampling with a KV cache against recomputing, "
                                         "LlamaGen-B size, 128 tokens, guidance"),
    "floor": (step_against_floor, "a step of AR sampling, batch 1, guidance, against its floor"),
    "bf16": (bf16_against_float32, "AR sampling, batch 16, bf16 against float32"),
    "maskgit": (maskgit_against_passes, "MaskGIT, 8 steps, guidance, against as many bare passes "
                                        "of its transformer, batch 4"),
    "tokens": (waiting_for_tokens, "stage 3: share of a step spent waiting for the token cache, "
                                   "cifar"),
    "images": (waiting_for_images, "stage 1: share of a step spent waiting for a folder of JPEGs, "
                                   "cifar, 2 workers"),
}


def parse(argv=None) -> argparse.Namespace:
    rows = "; ".join(f"{name}: {text}" for name, (_, text) in ROWS.items())
    parser = Parser(prog="bench.py", description=__doc__, epilog=f"Rows: {rows}")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW",
                        help="only these rows")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--threads", type=int, default=0,
                        help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="where to compute")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    # what growth() measures in a process of its own, for its peak memory
    parser.add_argument("--child", choices=("joint", "grow"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in args.rows:
        choose("row", name, ROWS)
    need(args.repeats >= 1, "repeats must be at least 1")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    bench = Bench(args)
    if args.child:
        print(json.dumps(training_step(args.child, bench.device)))
        return
    command = " ".join(["python -m experiments.bench", *(sys.argv[1:] if argv is None else argv)])
    cuda = bench.device.type == "cuda"
    print(f"{bench.device.type} {torch.cuda.get_device_name() if cuda else platform.machine()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {command}")
    gflops = {"float32": 2 * bench.peak[torch.float32] / 1e9,
              "bf16": 2 * bench.peak[torch.bfloat16] / 1e9}
    print(f"matrix peak {gflops['float32']:.0f} GFLOP/s in float32, {gflops['bf16']:.0f} in bf16; "
          f"matrix-vector {bench.bandwidth / 1e9:.1f} GB/s; "
          f"rows are float32 unless they say otherwise\n", flush=True)

    began = time.time()
    for name in args.rows:
        measure, _ = ROWS[name]
        measure(bench)
    seconds, missed = time.time() - began, sum(row["met"] is False for row in bench.rows)
    print(f"\n{len(bench.rows)} rows in {seconds:.0f} s, {missed} below their target")
    if args.json:
        checkpoint.write_json(args.json, {
            **provenance(command, bench.device), "seconds": round(seconds), "gflops": gflops,
            "gb_per_s": bench.bandwidth / 1e9, "rows": bench.rows})


if __name__ == "__main__":
    main_with_user_errors(main)
