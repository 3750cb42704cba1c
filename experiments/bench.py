"""How fast: what this program exists for, measured, both sides in one process and in turn, the median of several.

Run      python -m experiments.bench                                 all rows, under ten minutes on 2 CPU cores
         python -m experiments.bench --rows query_block help         some of them
         python -m experiments.bench --json bench.json               rows with name, value, unit, target, met (null: no target)
Ratios   compare two ways on the same machine, so they carry over to other machines better than seconds do
Peak     the rate of a plain matrix product on this machine, in the same precision; "of peak" stands where products dominate
Floor    of a sampling step at batch 1: reading every weight once, at the rate of a plain matrix-vector product
"""
import argparse
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from config import TokenizerConfig, load_preset
from generator import ARGenerator, MaskGITGenerator
from layers import count_parameters
from loop import new_optimizer
from losses import reconstruction
from mit import MIT
from mocet import MoCET
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.batches import ImageStream
from plumbing.datasets import open_images
from plumbing.flags import Parser, choose, main_with_user_errors, need
from plumbing.images import to_float
from plumbing.processes import Processes, provenance
from plumbing.tokens import TokenStream
from quantizer import VectorQuantizer
from titok import TiTok
from train import PARTS, freeze

ROWS = {  # name: (what it compares, target as text)
    "query_block": "MoCET, query experts against block experts, depth 2, width 256, 256 patches, batch 4",
    "query_loop": "MoCET, query experts against their own plain loop, the same sizes",
    "encoder": "MIT-B and query experts against a TiTok-B encoder, 256 patches, batch 4",
    "grow": "a growth step 64 -> 128 against a joint step at 128, imagenet-128, batch 2",
    "cache": "AR sampling with a KV cache against recomputing, LlamaGen-B size, 128 tokens, guidance",
    "floor": "a step of AR sampling, batch 1, guidance, against its floor",
    "bf16": "AR sampling, batch 16, bf16 against float32",
    "maskgit": "MaskGIT, 8 steps, guidance, against as many bare passes of its transformer, batch 4",
    "tokens": "stage 3: share of a step spent waiting for the token cache, cifar",
    "images": "stage 1: share of a step spent waiting for a folder of JPEGs, cifar, 2 workers",
    "help": "python sample.py --help",
}


def parse() -> argparse.Namespace:
    parser = Parser(prog="bench.py", description=__doc__, epilog="Rows: " + "; ".join(f"{name}: {text}" for name, text in ROWS.items()))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="only these rows")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    # measured in a process of its own, for its peak memory
    parser.add_argument("--child", choices=("joint", "grow"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.rows:
        choose("row", name, ROWS)
    need(args.repeats >= 1, "repeats must be at least 1")
    return args


# ------------------------------------------------------------------------------------------------
# measuring

class Bench:
    def __init__(self, args):
        self.repeats, self.device, self.threads = args.repeats, Processes(args.device).device, args.threads
        if args.threads:
            torch.set_num_threads(args.threads)
        self.rows = []

    def seconds(self, *ways, repeats: int | None = None) -> list[float]:
        """Median seconds of each of `ways`, functions without arguments, measured in turn after one round to warm up."""
        times = [[] for _ in ways]
        for turn in range(1 + (repeats or self.repeats)):
            for way, found in zip(ways, times):
                began = time.perf_counter()
                way()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    found.append(time.perf_counter() - began)
        return [statistics.median(found) for found in times]

    def row(self, name: str, value: float, unit: str, target: float | None = None, least: bool = True, note: str = "") -> None:
        """least: the value must be at least the target; else at most."""
        met = None if target is None else bool(value >= target if least else value <= target)
        self.rows.append({"name": name, "value": round(value, 4), "unit": unit, "target": None if target is None else f"{'>=' if least else '<='} {target:g}",
                          "met": met, "note": note})
        print(f"{name:58}{value:>9.3g} {unit:9}{self.rows[-1]['target'] or '-':>9}  {'' if met is None else 'met' if met else 'NOT MET':8}{note}", flush=True)

    @functools.cached_property
    def peak(self) -> dict[torch.dtype, float]:
        """Multiply-adds per second of a 2048 x 2048 product, by dtype."""
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(2048, 2048, device=self.device, dtype=dtype)
            found[dtype] = 2048 ** 3 / self.seconds(lambda: a @ a, repeats=5)[0]
        return found

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second at which a matrix far larger than any cache is read by a matrix-vector product."""
        a, x = torch.randn(8192, 8192, device=self.device), torch.randn(8192, device=self.device)
        return a.numel() * 4 / self.seconds(lambda: a @ x, repeats=7)[0]


def tokenizer_config(**changes) -> TokenizerConfig:
    return replace(load_preset("imagenet-128")[0], **changes)


# ------------------------------------------------------------------------------------------------
# the tokenizer

def experts(L: int, form: str, bench: Bench) -> tuple:
    cfg = tokenizer_config(token_schedule=(L,), expert=form)
    torch.manual_seed(0)
    return MoCET(cfg).to(bench.device), VectorQuantizer(cfg).to(bench.device).eval()


def forward(mocet, x_latent, quantizer, way="forward"):
    with torch.no_grad():
        return getattr(mocet, way)(x_latent, quantizer)


def forward_backward(mocet, x_latent, quantizer, way="forward"):
    z_q, _, losses = getattr(mocet, way)(x_latent, quantizer)
    (z_q.sum() + losses["codebook"]).backward()
    mocet.zero_grad(set_to_none=True)


def query_block(bench: Bench) -> None:
    x = torch.randn(4, 256, 256, device=bench.device)
    for L in (32, 128):
        (query, quantizer), (block, _) = experts(L, "query", bench), experts(L, "block", bench)
        for what, run, target in (("forward", forward, 12), ("forward+backward", forward_backward, 8)):
            # Each extra repeat of 128 block experts costs half a minute; their times vary little.
            fast, slow = bench.seconds(lambda: run(query, x, quantizer), lambda: run(block, x, quantizer), repeats=1 if L == 128 else None)
            macs = L * 2 * (256 + L / 2) * 12 * 256 ** 2 * 4 * (3 if run is forward_backward else 1)
            bench.row(f"query against block, {L} experts, {what}", slow / fast, "x", target,
                      note=f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f}; block at {macs / slow / bench.peak[torch.float32]:.0%} of peak")


def query_loop(bench: Bench) -> None:
    x = torch.randn(4, 256, 256, device=bench.device)
    for L in (32, 128):
        mocet, quantizer = experts(L, "query", bench)
        same = torch.equal(forward(mocet, x, quantizer)[1], forward(mocet, x, quantizer, "forward_loop")[1])
        for what, run, target in (("forward", forward, 3), ("forward+backward", forward_backward, 2)):
            fast, slow = bench.seconds(lambda: run(mocet, x, quantizer), lambda: run(mocet, x, quantizer, "forward_loop"),
                                       repeats=1 if run is forward_backward else None)
            bench.row(f"query against its loop, {L} experts, {what}", slow / fast, "x", target, note=f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f}; same ids: {same}")


def encoder(bench: Bench) -> None:
    images = torch.rand(4, 3, 256, 256, device=bench.device) * 2 - 1
    for L, target in ((32, 1.05), (64, 1.0), (128, 0.9)):
        cfg = tokenizer_config(token_schedule=(L,))
        mit, (mocet, quantizer), titok = MIT(cfg).to(bench.device), experts(L, "query", bench), TiTok(replace(cfg, tokenizer="titok")).to(bench.device)
        with torch.no_grad():
            ours, theirs = bench.seconds(lambda: mocet(mit(images), quantizer), lambda: titok(images, quantizer))
        macs = 4 * (256 + L) * count_parameters(titok.blocks)
        bench.row(f"whole encoder against TiTok-B, {L} tokens", ours / theirs, "x", target, least=False,
                  note=f"{ours / 4 * 1e3:.0f} ms against {theirs / 4 * 1e3:.0f} an image; TiTok at {macs / theirs / bench.peak[torch.float32]:.0%} of peak")


def step_of(kind: str, device) -> tuple[float, float]:
    """Seconds of one training step and peak memory in GiB, for the child process that grow() starts."""
    torch.manual_seed(0)
    model = NativeTok(tokenizer_config(token_schedule=(64, 128))).to(device)
    model.grow(128)
    freeze(model, PARTS if kind == "joint" else ("new experts", "decoder"))
    model.train()
    optimizer, images = new_optimizer(model, 1e-4, 0.999), torch.rand(2, 3, 256, 256, device=device) * 2 - 1

    def step():
        recon, _, losses = model(images)
        (reconstruction(recon, images) + losses["codebook"] + 0.25 * losses["commitment"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), peak_gib(device)


def peak_gib(device) -> float:
    """Most memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    # TRAP: a child's ru_maxrss starts at what its parent had, so on Linux ask for this program's own high-water mark.
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30  # a Mac counts in bytes


def in_child(bench: Bench, module: str, *what) -> list[float]:
    """-> seconds, GiB that `module --child what` finds, since a peak of memory is that of a whole process."""
    threads = ["--threads", str(bench.threads)] if bench.threads else []
    command = [sys.executable, "-m", module, "--device", bench.device.type, *threads, "--child", *map(str, what)]
    done = subprocess.run(command, capture_output=True, text=True)
    need(done.returncode == 0, f"{' '.join(map(str, what))} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def grow(bench: Bench) -> None:
    (grow_s, grow_gib), (joint_s, joint_gib) = in_child(bench, "experiments.bench", "grow"), in_child(bench, "experiments.bench", "joint")
    bench.row("growth step against joint step, time", grow_s / joint_s, "x", 0.6, least=False, note=f"{grow_s:.2f} s against {joint_s:.2f}")
    bench.row("growth step against joint step, peak memory", grow_gib / joint_gib, "x", 0.6, least=False, note=f"{grow_gib:.1f} GiB against {joint_gib:.1f}")


# ------------------------------------------------------------------------------------------------
# the generators

def generator_of(Kind, bench: Bench):
    torch.manual_seed(0)
    tok, gen, _ = load_preset("imagenet-128")
    return Kind(gen, tok.num_tokens, tok.codebook_size, 1000).to(bench.device).eval()


def cache(bench: Bench) -> None:
    model = generator_of(ARGenerator, bench)
    for batch in (1, 16):
        labels, ids = torch.zeros(batch, dtype=torch.int64, device=bench.device), torch.zeros(batch, 128, dtype=torch.int64, device=bench.device)
        # Recomputing 128 steps of 16 samples takes many minutes on a CPU, so every 16th step stands for its neighbours.
        steps = range(8, 128, 16)

        def recompute():
            for t in steps:
                model.guided(labels, ids[:, :t], 2.0)

        def cached():
            for t in steps:
                caches = model.new_caches(2 * batch)
                for c in caches:
                    c.length = t
                model.guided(labels, ids[:, :t], 2.0, caches)
        with torch.no_grad():
            slow, fast = bench.seconds(recompute, cached, repeats=1 if batch == 16 else None)
        bench.row(f"AR with KV cache against recomputing, batch {batch}", slow / fast, "x", 5, note=f"{fast / len(steps) * 1e3:.0f} ms a step against {slow / len(steps) * 1e3:.0f}")


def floor(bench: Bench) -> None:
    model = generator_of(ARGenerator, bench)
    labels = torch.zeros(1, dtype=torch.int64, device=bench.device)
    weights = sum(p.numel() for p in (*model.blocks.parameters(), *model.head.parameters()))
    lowest = weights * 4 / bench.bandwidth
    (took,) = bench.seconds(lambda: model.sample(labels, cfg_scale=2.0))
    step = took / model.num_tokens
    bench.row("AR, a step at batch 1 against its floor", step / lowest, "x", 1.1 if bench.device.type == "cpu" else 1.5, least=False,
              note=f"{step * 1e3:.1f} ms against {lowest * 1e3:.1f} at {bench.bandwidth / 1e9:.1f} GB/s")


def bf16(bench: Bench) -> None:
    model, labels = generator_of(ARGenerator, bench), torch.zeros(16, dtype=torch.int64, device=bench.device)
    half = generator_of(ARGenerator, bench).to(torch.bfloat16)
    slow, fast = bench.seconds(lambda: model.sample(labels, cfg_scale=2.0), lambda: half.sample(labels, cfg_scale=2.0), repeats=1)
    units = bench.device.type == "cuda" or bench.peak[torch.bfloat16] > 1.5 * bench.peak[torch.float32]
    bench.row("AR, batch 16, bf16 against float32", slow / fast, "x", 2 if units else None,
              note=f"{16 / fast:.2f} samples a second against {16 / slow:.2f}; matrix peak in bf16 is {bench.peak[torch.bfloat16] / bench.peak[torch.float32]:.1f} times that in float32")


def maskgit(bench: Bench) -> None:
    model, labels = generator_of(MaskGITGenerator, bench), torch.zeros(4, dtype=torch.int64, device=bench.device)
    both, ids = torch.zeros(8, dtype=torch.int64, device=bench.device), torch.zeros(8, 128, dtype=torch.int64, device=bench.device)

    def bare():
        with torch.no_grad():
            for _ in range(8):
                model(both, ids)
    sampling, passes = bench.seconds(lambda: model.sample(labels, steps=8, cfg_scale=3.0), bare)
    macs = 8 * 8 * 129 * count_parameters(model.blocks)
    bench.row("MaskGIT, samples a second against bare passes", passes / sampling, "x", 0.95,
              note=f"{sampling / 4:.2f} s a sample; {macs / passes / bench.peak[torch.float32]:.0%} of peak")


# ------------------------------------------------------------------------------------------------
# data

def waiting(stream, step, steps: int) -> tuple[float, float]:
    """Share of the time of `steps` steps that went by in next(stream), and seconds a step; the first batches are not counted."""
    worked = 0.0
    for number, batch in zip(range(steps + 3), stream):
        step_began = time.perf_counter()
        step(batch)
        worked += (time.perf_counter() - step_began) * (number >= 3)
        if number == 2:
            began = time.perf_counter()
    total = time.perf_counter() - began
    return 1 - worked / total, total / steps


def learner(model: nn.Module, loss, beta2: float):
    optimizer = new_optimizer(model, 1e-4, beta2)
    model.train()

    def step(batch):
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def tokens(bench: Bench) -> None:
    tok, gen, train = load_preset("cifar")
    rng, n = np.random.default_rng(0), 50000
    ids, labels = rng.integers(0, tok.codebook_size, (n, 2, tok.num_tokens)).astype(np.uint16), rng.integers(0, 10, n)
    model = ARGenerator(gen, tok.num_tokens, tok.codebook_size, 10).to(bench.device)
    step = learner(model, lambda batch: model.loss(*(part.to(bench.device) for part in batch))[0], train.generator_beta2)
    share, seconds = waiting(iter(TokenStream(ids, labels, train.generator_batch_size, 0)), step, 20)
    bench.row("stage 3, waiting for data", share * 100, "%", 2, least=False, note=f"of {seconds * 1e3:.0f} ms a step")


def images(bench: Bench) -> None:
    tok, _, train = load_preset("cifar")
    model = NativeTok(tok).to(bench.device)

    def loss(batch):
        x = to_float(batch[0].to(bench.device))
        recon, _, losses = model(x)
        return reconstruction(recon, x) + losses["codebook"] + 0.25 * losses["commitment"]
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for k in range(2000):
            os.makedirs(os.path.join(folder, str(k % 10)), exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(os.path.join(folder, str(k % 10), f"{k}.jpg"), quality=90)
        stream = iter(ImageStream(open_images(folder), tok.image_size, train.batch_size, 0, flip=True, workers=2))
        share, seconds = waiting(stream, learner(model, loss, train.beta2), 30)
        del stream
    bench.row("stage 1, waiting for JPEGs, 2 workers", share * 100, "%", 10, least=False, note=f"of {seconds * 1e3:.0f} ms a step, on {os.cpu_count()} cores")


def help(bench: Bench) -> None:
    command = [sys.executable, "sample.py", "--help"]
    (took,) = bench.seconds(lambda: subprocess.run(command, capture_output=True, check=True), repeats=5)
    bench.row("python sample.py --help", took, "s", 0.3, least=False)


# ------------------------------------------------------------------------------------------------

def main(args) -> None:
    bench = Bench(args)
    if args.child:
        return print(json.dumps(step_of(args.child, bench.device)))
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.machine()
    print(f"{bench.device.type} {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, python -m experiments.bench {' '.join(sys.argv[1:])}")
    peak = bench.peak
    print(f"matrix peak {2 * peak[torch.float32] / 1e9:.0f} GFLOP/s in float32, {2 * peak[torch.bfloat16] / 1e9:.0f} in bf16; "
          f"matrix-vector {bench.bandwidth / 1e9:.1f} GB/s; rows are float32 unless they say otherwise\n", flush=True)
    began = time.time()
    for row in args.rows:
        globals()[row](bench)
    missed = sum(row["met"] is False for row in bench.rows)
    print(f"\n{len(bench.rows)} rows in {time.time() - began:.0f} s, {missed} below their target")
    if args.json:
        checkpoint.write_json(args.json, {**provenance("python -m experiments.bench " + " ".join(sys.argv[1:]), bench.device), "seconds": round(time.time() - began),
                                          "gflops": {"float32": 2 * peak[torch.float32] / 1e9, "bf16": 2 * peak[torch.bfloat16] / 1e9},
                                          "gb_per_s": bench.bandwidth / 1e9, "rows": bench.rows})


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
