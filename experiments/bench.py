"""How long does one wait? Each row beside its floor: what no change of this program could beat.

Floors come from the same call: operations that PyTorch counts, at the rate of a plain matrix
product on this machine (the peak); or the matrix products of a step and nothing else; or the import
of torch. Where two ways are compared both run in one process and in turn. Medians count.

Run      python -m experiments.bench                       all rows, some minutes on 2 cores
         python -m experiments.bench --rows encode ar      some of them
         python -m experiments.bench --device cuda         a GPU's rows, some minutes
         python -m experiments.bench --quick               tiny models: does every row run?
Makes    a line for each value; --json FILE: the same as name, value, unit, floor, target, met
         (null: none), note
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import gc
import itertools
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train
from config import Optim, load_preset
from flow_decoder import Decoding
from generator import GENERATORS, ARGenerator, Generator
from loop import Loop, make_ema, new_optimizer
from losses import reconstruction
from mocet import MoCET
from nativetok import NativeTok, sample_batch
from plumbing import checkpoint
from plumbing.datasets import open_images
from plumbing.flags import DEVICES, Parser, choose, need
from plumbing.outputs import JSON, need_places
from plumbing.processes import Processes, need_one_process, provenance
from plumbing.start import ROOT
from quantizer import VectorQuantizer

GIB = 2 ** 30
CLASSES = 1000
FP32, BF16 = torch.float32, torch.bfloat16
# --quick: what makes a preset so small that every row takes no time.
TINY = (dict(image_size=32, patch_size=8, encoder_width=32, encoder_depth=1, encoder_heads=2,
             decoder_width=32, decoder_depth=1, decoder_heads=2, expert_width=32, expert_heads=2,
             token_schedule=(4, 8), codebook_size=16),
        dict(generator_width=32, generator_depth=1, generator_heads=2))


def shown(number: float | None) -> str:
    """Counts are exact, all else has three digits."""
    if number is None:
        return "-"
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"


class Bench:
    """The rows so far, and how they are measured; flops: of each way that seconds() took last."""

    def __init__(self, device: str = "cpu", quick: bool = False):
        self.procs, self.repeats, self.quick = Processes(device), 1 if quick else 3, quick
        self.device, self.rows, self.peaks = self.procs.device, [], {}
        self.procs.main = False  # or loops would draw their bars between the rows

    def preset(self, name: str) -> tuple:
        """-> TokenizerConfig, GeneratorConfig, TrainConfig"""
        tok, gen, _, settings = load_preset(name)
        tiny = TINY if self.quick else ({}, {})
        return replace(tok, **tiny[0]), replace(gen, **tiny[1]), settings

    def batch(self, size: int) -> int:
        return min(size, 2) if self.quick else size

    def once(self, way: Callable[[], object]) -> float:
        began = time.perf_counter()
        way()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def seconds(self, *ways: Callable[[], object], repeats: int | None = None) -> list[float]:
        """Median seconds of each way, measured in turn; a first round warms up, and counts."""
        self.flops = [flops_of(way) for way in ways]
        rounds = [[self.once(way) for way in ways] for _ in range(repeats or self.repeats)]
        return [statistics.median(times) for times in zip(*rounds)]

    def row(self, name: str, value: float, unit: str, target: float | None = None,
            least: bool = False, floor: float | None = None, note: str = "") -> None:
        """Print and keep a row; least: the value must be at least the target, else at most."""
        met = wanted = None
        if target is not None:
            met = bool(value >= target if least else value <= target)
            wanted = f"{'>=' if least else '<='} {shown(target)}"
        value, floor = (number if number is None or isinstance(number, int)
                        else float(f"{number:.4g}") for number in (value, floor))
        self.rows.append({"name": name, "value": value, "unit": unit, "floor": floor,
                          "target": wanted, "met": met, "note": note})
        verdict = {None: "", True: "met", False: "NOT MET"}[met]
        print(f"{name:52}{shown(value):>9} {unit:5}{shown(floor):>9}{wanted or '-':>12}  "
              f"{verdict:8}{note}", flush=True)

    def against_peak(self, name: str, seconds: float, within: float) -> None:
        """A row for the first of the ways just measured; the target is so many times the floor."""
        floor = self.flops[0] / self.peak(FP32)
        self.row(name, seconds, "s", within * floor, floor=floor)

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second of a large square product, 2 of each multiply-add."""
        if dtype not in self.peaks:
            side = 128 if self.quick else 8192 if self.device.type == "cuda" else 2048
            a = torch.randn(side, side, device=self.device, dtype=dtype)
            times = [self.once(partial(torch.matmul, a, a)) for _ in range(8)]
            self.peaks[dtype] = 2 * side ** 3 / statistics.median(times[3:])
        return self.peaks[dtype]


def flops_of(way: Callable[[], object]) -> int:
    """Call it once -> the floating-point operations of its products, gradients included."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute, the same on every machine: .count, .products of them.

    One is a call that reaches a device's own code, after autograd has taken functions apart. Not
    counted: what hands out its input's memory (a view), only makes room, or asks for a type.
    """
    FREE = ("detach", "_unsafe_view", "_reshape_alias", "lift_fresh", "promote_types")

    def __init__(self):
        super().__init__()
        self.count = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty")) or name in self.FREE):
            self.count += 1
            self.products += "mm" in name or "attention" in name
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------
# what is timed: functions without arguments, of models with random weights

def tokenizer(bench: Bench, preset: str, num_tokens: int) -> NativeTok:
    torch.manual_seed(0)
    return NativeTok(bench.preset(preset)[0]).grow_to(num_tokens).to(bench.device).eval()


def generator(bench: Bench, kind: str) -> Generator:  # of imagenet-128
    tok, gen, _ = bench.preset("imagenet-128")
    torch.manual_seed(0)
    return GENERATORS[kind](gen, tok.num_tokens, tok.codebook_size, CLASSES).to(bench.device).eval()


def images(bench: Bench, preset: str, batch: int) -> Tensor:
    size = bench.preset(preset)[0].image_size
    return torch.rand(batch, 3, size, size, device=bench.device) * 2 - 1


def zeros(bench: Bench, *shape: int) -> Tensor:  # labels or ids
    return torch.zeros(shape, dtype=torch.int64, device=bench.device)


def training_step(bench: Bench, preset: str, phase: str, batch: int, kind: str | None = None,
                  record: bool = False) -> Callable[[], None]:
    """The steps of loop.py, one a call, in a phase of train.py; recorded as with --cuda_graph."""
    tok, _, settings = bench.preset(preset)
    if phase in GENERATORS:
        model = generator(bench, phase)
        call, inputs = model.loss, (zeros(bench, batch, tok.num_tokens), zeros(bench, batch))
    else:
        plan = {phase.name: phase for phase in train.phases(tok, settings)}[phase]
        model = tokenizer(bench, preset, plan.num_tokens)
        train.freeze(model, plan.learns)
        call, inputs = model, (images(bench, preset, batch),)
    optimizer = new_optimizer(model, kind or settings.optimizer, 0.1, settings.beta2)
    optim = Optim(batch * bench.procs.world, 10 ** 9, 1e-4, 1e-4, 1, settings.beta2, 0.1)
    loop = Loop(model, make_ema(model), optimizer, optim, call=call, procs=bench.procs,
                precision=settings.precision, cuda_graph=record)
    turns = loop.over(itertools.repeat(inputs))

    def step() -> None:
        parts = next(turns)
        with loop.autocast():
            made, *_, terms = loop.model(*parts)
        if phase in GENERATORS:
            loop.backward(made, {})  # it is its loss
        else:
            loop.backward(reconstruction(made, *parts) + sum(terms.values()), {})
    return step


def operations_of_a_step(*schedule: int) -> tuple[Operations, Operations]:
    """Of a joint step of imagenet-128, grown by this schedule, counted: forward, backward.

    They follow from depths and numbers of tokens, so widths are small here.
    """
    sizes = dict(image_size=32, encoder_width=16, encoder_heads=2, expert_width=16, expert_heads=2,
                 decoder_width=16, decoder_heads=2, codebook_size=16)
    cfg = replace(load_preset("imagenet-128")[0], token_schedule=schedule, **sizes)
    model, pixels = NativeTok(cfg).grow_to(cfg.num_tokens).train(), torch.rand(2, 3, 32, 32)
    with Operations() as forward:
        made, _, terms = model(pixels)
        loss = reconstruction(made, pixels) + sum(terms.values())
    with Operations() as backward:
        loss.backward()
    return forward, backward


def half(rank: int, port: int, quick: bool, path: str) -> None:
    """One of two processes of one thread: they write to `path` the seconds of a step of cifar, of
    the first alone, and of both with half of the images each."""
    torch.set_num_threads(1)
    alone = Bench("cpu", quick)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    both, batch = Bench("cpu", quick), alone.batch(64)
    one, two = (training_step(bench, "cifar", "finetune", batch // bench.procs.world)
                for bench in (alone, both))

    def first_alone() -> None:
        if rank == 0:
            one()
        both.procs.barrier()
    seconds = both.seconds(first_alone, two, repeats=4 * both.repeats)
    if rank == 0:
        checkpoint.write_json(path, seconds)
    both.procs.end()


def halves(bench: Bench) -> list[float]:
    """-> seconds of a step of one process, and of two."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, path = free.getsockname()[1], os.path.join(folder, "seconds.json")
        free.close()
        torch.multiprocessing.spawn(half, (port, bench.quick, path), nprocs=2)
        with open(path) as file:
            return json.load(file)


@torch.no_grad()
def ar_steps(model: ARGenerator, labels: Tensor, steps: range) -> None:
    """Steps t of guided sampling, each after t tokens, from a cache that long."""
    ids = labels[:, None].expand(-1, model.num_tokens)
    _, newest = model.begin(labels, cfg_scale=2.0)
    for t in steps:
        model.guided(labels, ids[:, :t], 2.0, newest)


@torch.no_grad()
def products(model: nn.Module, rows: int, times: int) -> None:
    """The matrix products of so many steps of sampling and nothing else."""
    for module in [part for part in model.modules() if isinstance(part, nn.Linear)] * times:
        F.linear(module.weight.new_ones(rows, module.in_features), module.weight)


def start(*words: str) -> None:
    """`python WORDS...` in the project's root, to its end."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    last_words = done.stderr.strip().splitlines()[-1:]
    need(done.returncode == 0, f"{shlex.join(words)} failed: {' '.join(last_words)}")


# ------------------------------------------------------------------------------------------------
# the rows of a CPU

def training(bench: Bench) -> None:
    batch = bench.batch(64)
    muon, adamw = bench.seconds(*(training_step(bench, "cifar", "finetune", batch, kind)
                                  for kind in ("muon", "adamw")), repeats=2 * bench.repeats)
    # Muon's own products run nearer to the peak than others: its share can lie below the floor.
    share, floor = (100 * (1 - other / all) for other, all in
                    ((adamw, muon), (bench.flops[1], bench.flops[0])))
    bench.against_peak(f"training step of cifar, {batch} images", muon, 3)
    bench.row("Muon's share of it", share, "%", 30, floor=floor,
              note=f"with AdamW {adamw * 1e3:.0f} ms")
    took, = bench.seconds(training_step(bench, "imagenet-128", "finetune", 2))
    bench.against_peak("training step of imagenet-128, 2 images", took, 3)


def operations(bench: Bench) -> None:
    forward, backward = operations_of_a_step(*load_preset("imagenet-128")[0].token_schedule)
    bench.row("operations of a joint step of imagenet-128", forward.count + backward.count, "",
              10_000, floor=forward.products + backward.products,
              note=f"forward {forward.count:,}, backward {backward.count:,}; the same on every "
                   "machine; floor: matrix products")


def two_processes(bench: Bench) -> None:
    one, two = halves(bench)
    bench.row("step of cifar, two processes against one", one / two, "x", 1.6, least=True, floor=2,
              note=f"{two * 1e3:.0f} ms against {one * 1e3:.0f}, a thread each, gloo")


def encoding(bench: Bench) -> None:
    batch, model = bench.batch(16), tokenizer(bench, "imagenet-128", 128)
    took, = bench.seconds(partial(model.encode, images(bench, "imagenet-128", batch)))
    bench.against_peak(f"encoding {batch} images of imagenet-128", took, 2)


def first_sample(bench: Bench) -> None:
    """From the command to the picture, with a model of `tiny` that has taken hardly a step."""
    with tempfile.TemporaryDirectory() as folder:
        run, data = os.path.join(folder, "run"), os.path.join(folder, "shapes.npz")
        shapes = open_images("shapes")
        np.savez(data, x=np.stack([shapes.load(i) for i in range(60)]), y=shapes.labels[:60],
                 classes=np.array(shapes.classes))
        steps = {"base": 2, "continuous": 1, "grow": 1, "finetune": 1, "generator": 1}
        start("train.py", "--run", run, "--data", data, "--generators", "ar", "--batch_size", "8",
              *(word for name, n in steps.items() for word in (f"--{name}_steps", str(n))))
        took, importing = bench.seconds(
            lambda: start("sample.py", "--run", run, "--classes", "disc", "--per_class", "1"),
            lambda: start("-c", "import torch"))
    bench.row("first sample, from the command to the picture", took, "s", importing + 2,
              floor=importing, note="floor: the import of torch")


def ar_sampling(bench: Bench) -> None:
    full, half = generator(bench, "ar"), generator(bench, "ar").to(BF16)
    steps = range(0, full.num_tokens, 8)  # they stand for their neighbours
    for batch in (1, bench.batch(16)):
        ways = [partial(ar_steps, model, zeros(bench, batch), steps) for model in (full, half)]
        ways += [partial(products, model, 2 * batch, len(steps)) for model in (full, half)]
        fp32, bf16, floor32, floor16 = (1e3 * s / len(steps) for s in bench.seconds(*ways))
        bench.row(f"a step of AR sampling, guided, batch {batch}", fp32, "ms", 2 * floor32,
                  floor=floor32, note="floor: its matrix products")
    bench.row(f"the same with weights in bf16, batch {batch}", fp32 / bf16, "x",
              floor32 / floor16 / 1.3, least=True, floor=floor32 / floor16,
              note="floor: what the products gain")


def maskgit_sampling(bench: Bench) -> None:
    model = generator(bench, "maskgit")
    for batch in (1, bench.batch(16)):  # many take long: once
        way = partial(model.sample, zeros(bench, batch), steps=8, cfg_scale=3)
        took = bench.seconds(way)[0] if batch == 1 else bench.once(way)
        bench.flops = [bench.flops[0] * batch]
        bench.against_peak(f"MaskGIT, 8 steps, guided, batch {batch}", took, 1.5)


def experts(bench: Bench) -> None:
    """32 query experts of imagenet-128 in training, against other ways to do as much."""
    tok = replace(bench.preset("imagenet-128")[0], token_schedule=(bench.batch(32),))
    patches = (tok.image_size // tok.patch_size) ** 2
    x = torch.randn(bench.batch(4), patches, tok.expert_width, device=bench.device)
    quantizer = VectorQuantizer(tok).to(bench.device).eval()
    query, block = (MoCET(replace(tok, expert=form)).to(bench.device)
                    for form in ("query", "block"))

    def step(mocet: MoCET, way: Callable) -> None:
        way(mocet, x, quantizer)[0].sum().backward()
        mocet.zero_grad(set_to_none=True)
    for name, other, way, target in (("block experts", block, MoCET.forward, 8),
                                     ("their plain loop", query, MoCET.forward_loop, 2)):
        fast, slow = bench.seconds(partial(step, query, MoCET.forward), partial(step, other, way))
        bench.row(f"{tok.num_tokens} query experts against {name}", slow / fast, "x", target,
                  least=True, floor=bench.flops[1] / bench.flops[0],
                  note=f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f}")


CPU_ROWS = {
    "training": (training, "a training step of cifar and of imagenet-128, and Muon's share"),
    "operations": (operations, "of a joint step of imagenet-128, counted"),
    "processes": (two_processes, "a step of cifar on two processes of one thread against one"),
    "encode": (encoding, "images to ids at the size of imagenet-128"),
    "first": (first_sample, "from sample.py's start to its picture"),
    "ar": (ar_sampling, "AR sampling at the size of imagenet-128, and in bf16"),
    "maskgit": (maskgit_sampling, "the same for MaskGIT"),
    "experts": (experts, "query experts against block experts, and against their plain loop"),
}


# ------------------------------------------------------------------------------------------------
# the rows of a GPU: imagenet-128 in bf16, a batch of 32

GPU_BATCH = 32


def gpu_row(bench: Bench, name: str, new_way: Callable[[], Callable], target: float | None,
            flops: int | None = None) -> tuple[float, int]:
    """Images a second of a way, made here, after the one before is gone, and operations of a call,
    which cannot be counted in a recording."""
    cuda, batch = bench.device.type == "cuda", bench.batch(GPU_BATCH)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    way = new_way()
    first = bench.once(way)  # kernels are loaded, or recorded
    flops = flops or flops_of(way)
    took = statistics.median([bench.once(way) for _ in range(2 + bench.repeats)][2:])
    rate, best = batch / took, batch * bench.peak(BF16) / flops
    # Reserved, not allocated: what a recording writes to is no tensor's any more.
    gib = torch.cuda.max_memory_reserved() / GIB if cuda else 0
    bench.row(name, rate, "/s", target, least=True, floor=best,
              note=f"{took * 1e3:.1f} ms, {rate / best:.1%} of peak, {gib:.1f} GiB; the first "
                   f"took {first:.1f} s")
    return rate, flops


def phases(bench: Bench) -> None:
    """Each phase as it is and recorded (--cuda_graph), where there is a GPU to record."""
    tok, _, settings = bench.preset("imagenet-128")
    for name in [*(phase.name for phase in train.phases(tok, settings)), *GENERATORS]:
        step = partial(training_step, bench, "imagenet-128", name, bench.batch(GPU_BATCH))
        rate, flops = gpu_row(bench, f"{name}, eager, images", step, None)
        if bench.device.type == "cuda":
            gpu_row(bench, f"{name}, recorded, images", partial(step, record=True), 2.5 * rate,
                    flops)


def samples(bench: Bench) -> None:
    """Of a batch, drawn and decoded as sample.py does."""
    for kind in GENERATORS:
        gpu_row(bench, f"samples of {kind}, guided", lambda kind=kind: partial(
            sample_batch, generator(bench, kind), Decoding(tokenizer(bench, "imagenet-128", 128)),
            zeros(bench, bench.batch(GPU_BATCH)), dict(cfg_scale=2.0), 0, 0), 20)


GPU_ROWS = {
    "phases": (phases, "a training step of each phase of imagenet-128, eager and recorded"),
    "samples": (samples, "samples of both generators, decoded"),
}
ROWS = CPU_ROWS | GPU_ROWS


def table(measured: list[dict]) -> str:
    """The rows as a table of Markdown, for README.md."""
    lines = ["| row | value | floor | target | |", "|---|---|---|---|---|"]
    for row in measured:
        unit = {"x": "×", "%": "%", "": ""}.get(row["unit"], f" {row['unit']}")
        value, floor = (shown(number) + unit if number is not None else "-"
                        for number in (row["value"], row["floor"]))
        target = (row["target"] or "-").replace(">=", "≥").replace("<=", "≤")
        verdict = {None: "", True: "met", False: "**not met**"}[row["met"]]
        notes = "; ".join(filter(None, (verdict, row["note"])))
        lines.append(f"| {row['name']} | {value} | {floor} | {target} | {notes} |")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    names = "; ".join(f"{name}: {text}" for name, (_, text) in ROWS.items())
    parser = Parser(prog="python -m experiments.bench", description=__doc__,
                    epilog=f"Rows: {names}")
    add = parser.add_argument
    add("--rows", nargs="+", metavar="ROW", help="only these (default: all of a CPU, or of a GPU)")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--quick", action="store_true", help="tiny models, once, to see that every row runs")
    add("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    for name in args.rows or ():
        choose("row", name, ROWS)
    need_places({"--json": (args.json, JSON)})
    return args


def main(argv=None) -> None:
    args = parse(argv)
    need_one_process("experiments.bench")
    bench = Bench(args.device, args.quick)
    origin = provenance(args.command, bench.device)
    made = origin | {"seed": 0, "gflops": {"float32": bench.peak(FP32) / 1e9,
                                           "bf16": bench.peak(BF16) / 1e9}}
    print(f"{made['device']}, torch {made['torch']}, {made['command']}\nmatrix peak "
          f"{made['gflops']['float32']:,.0f} GFLOP/s in float32, {made['gflops']['bf16']:,.0f} in "
          f"bf16\n\n{'':52}{'value':>9}{'floor':>15}{'target':>12}", flush=True)
    began = time.time()
    for name in args.rows or (GPU_ROWS if bench.device.type == "cuda" else CPU_ROWS):
        ROWS[name][0](bench)
    seconds, missed = round(time.time() - began), sum(row["met"] is False for row in bench.rows)
    print(f"\n{len(bench.rows)} rows in {seconds} s, {missed} beside their target")
    if args.json:
        checkpoint.write_json(args.json, {**made, "seconds": seconds, "rows": bench.rows})


if __name__ == "__main__":
    main_with_user_errors(main)
