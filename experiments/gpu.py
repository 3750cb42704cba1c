"""imagenet-128 on one GPU: milliseconds of a training step, images a second, memory, samples.

Each phase of training is timed as it is (eager) and with --cuda_graph (graph): the same losses,
optimizer and averages as train.py's, random images that lie on the GPU already. "of peak" is the
rate of a large bf16 matrix product, measured in the same call.

Run      python -m experiments.gpu --json gpu.json               on a CUDA GPU, a few minutes
         python -m experiments.gpu --phases base ar --batch_size 64
Makes    a line for each phase and way; --json FILE: the same with provenance
Exit     0 finished, 2 something to mend
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import gc
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import train
from config import load_preset
from experiments.timing import GIB, flops_of
from generator import GENERATORS
from loop import LossOf, frozen_copy, new_optimizer, update_ema
from losses import reconstruction
from nativetok import NativeTok, sample_batch
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, choose, number
from plumbing.outputs import JSON, need_places
from plumbing.processes import Processes, need_one_process, provenance

CLASSES = 1000
WAYS = {"eager": False, "graph": True}  # -> cuda_graph


def parse(argv=None):
    parser = Parser(prog="gpu.py", description=__doc__)
    add = parser.add_argument
    add("--preset", default="imagenet-128", help="whose sizes (default: imagenet-128)")
    add("--phases", nargs="+", metavar="PHASE", help="only these (default: all of training, and "
        "sample-ar, sample-maskgit)")
    add("--batch_size", type=number(int, 1), default=32, help="of a step (default: 32)")
    add("--repeats", type=number(int, 1), default=5,
        help="steps that are timed, after 3 (default: 5)")
    add("--ways", nargs="+", default=["eager", "graph"], metavar="WAY",
        help=f"{', '.join(WAYS)} (default: eager graph); samples know the first two only")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    args.tok, args.gen, args.train = load_preset(args.preset)
    args.plan = {phase.name: phase for phase in train.phases(args.tok, args.train)}
    known = [*args.plan, *GENERATORS, *(f"sample-{kind}" for kind in GENERATORS)]
    args.phases = args.phases or known
    for name in args.phases:
        choose("phase", name, known)
    for way in args.ways:
        choose("way", way, WAYS)
    need_places({"--json": (args.json, JSON)})
    return args


# ------------------------------------------------------------------------------------------------
# what is timed: functions without arguments

def learner(model: nn.Module, loss: Callable[[], Tensor], args, procs: Processes) -> Callable:
    """A training step as loop.py takes it."""
    optimizer = new_optimizer(model, args.train.optimizer, 1e-4, 0.999)
    ema = frozen_copy(model)
    learns = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step() -> None:
        with procs.autocast(args.train.precision):
            total = loss()
        total.backward()
        if nn.utils.clip_grad_norm_(learns, 1.0).isfinite():  # which makes the CPU wait, as there
            optimizer.step()
            update_ema(ema, model, args.train.ema_decay, 0)
        optimizer.zero_grad()
    return step


def tokenizer_step(name: str, args, procs: Processes, way: str) -> Callable:
    phase = args.plan[name]
    model = NativeTok(args.tok).grow_to(phase.num_tokens).to(procs.device)
    train.freeze(model, phase.learns)
    size = args.tok.image_size
    images = torch.rand(args.batch_size, 3, size, size, device=procs.device) * 2 - 1
    wrapped = procs.wrap(model.train(), WAYS[way])

    def loss() -> Tensor:
        recon, _, terms = wrapped(images)
        return (reconstruction(recon, images) + terms["codebook"] + args.tok.entropy_weight *
                terms.get("entropy", 0) + args.tok.commitment_weight * terms["commitment"])
    return learner(model, loss, args, procs)


def new_generator(kind: str, args, device: torch.device) -> nn.Module:
    return GENERATORS[kind](args.gen, args.tok.num_tokens, args.tok.codebook_size,
                            CLASSES).to(device)


def generator_step(kind: str, args, procs: Processes, way: str) -> Callable:
    model = LossOf(new_generator(kind, args, procs.device))
    shape = args.batch_size, args.tok.num_tokens
    ids = torch.randint(args.tok.codebook_size, shape, device=procs.device)
    labels = torch.randint(CLASSES, shape[:1], device=procs.device)
    wrapped = procs.wrap(model.train(), WAYS[way])
    return learner(model, lambda: wrapped(ids, labels)[0], args, procs)


def sampler(kind: str, args, procs: Processes, way: str) -> Callable:
    """Images of a batch, guided, drawn and decoded as sample.py does."""
    model = new_generator(kind, args, procs.device).eval()
    tokenizer = NativeTok(args.tok).grow_to(args.tok.num_tokens).to(procs.device).eval()
    labels = torch.arange(args.batch_size, device=procs.device) % CLASSES
    options = dict(cfg_scale=2.0)
    return partial(sample_batch, model, tokenizer, labels, options, 0, 0)


# ------------------------------------------------------------------------------------------------

def timed(way: Callable, device: torch.device) -> float:
    began = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_peak(device: torch.device) -> float:
    """Operations a second of a large bf16 product."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    times = [timed(lambda: [a @ a for _ in range(10)], device) for _ in range(4)]
    return 10 * 2 * side ** 3 / min(times[1:])


def measure(name: str, way: str, args, procs: Processes) -> dict:
    """One row."""
    device = procs.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch.manual_seed(0)
    began = time.perf_counter()
    if name in args.plan:
        step = tokenizer_step(name, args, procs, way)
    elif name in GENERATORS:
        step = generator_step(name, args, procs, way)
    else:
        step = sampler(name.removeprefix("sample-"), args, procs, way)
    step()
    first = time.perf_counter() - began
    row = {"phase": name, "way": way, "batch_size": args.batch_size, "first_step_s": first}
    # Counted in the eager form: the others make the same products.
    row["gflop"] = flops_of(step) / 1e9 if way == "eager" else None
    timed(step, device)
    seconds = statistics.median(timed(step, device) for _ in range(args.repeats))
    # Reserved, not allocated: what a recording writes to is no tensor's any more.
    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    return row | {"ms": seconds * 1e3, "per_second": args.batch_size / seconds,
                  "gib": reserved / GIB}


def table(made: dict) -> str:
    """Phases in Markdown, from what --json writes: eager against recorded."""
    lines = ["| phase | eager, ms | `--cuda_graph`, ms | | images a second | of peak | GiB |",
             "|---|---|---|---|---|---|---|"]
    rows = {(row["phase"], row["way"]): row for row in made["rows"]}
    for (name, way), eager in rows.items():
        if way == "eager":
            best = rows.get((name, "graph"), eager)
            share = eager["gflop"] / best["ms"] / made["tflops"]
            ms, times = ((f"{best['ms']:.1f}", f"{eager['ms'] / best['ms']:.1f}×")
                         if best is not eager else ("-", "-"))
            lines.append(f"| {name} | {eager['ms']:.1f} | {ms} | {times} | "
                         f"{best['per_second']:,.0f} | {share:.1%} | {best['gib']:.1f} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    args = parse(argv)
    need_one_process("experiments.gpu")
    procs = Processes(args.device)
    words = sys.argv[1:] if argv is None else argv
    made = {**provenance(shlex.join(["python", "-m", "experiments.gpu", *words]), procs.device),
            "seed": 0, "tflops": matrix_peak(procs.device) / 1e12, "rows": []}
    print(f"{made['device']}, torch {made['torch']}, {os.cpu_count()} cores, "
          f"{procs.precision(args.train.precision)}; matrix peak {made['tflops']:.1f} TFLOP/s\n"
          f"{'phase':16}{'way':10}{'first, s':>9}{'ms':>9}{'images/s':>10}{'GiB':>7}", flush=True)
    for name in args.phases:
        for way in args.ways:
            if name.startswith("sample-") and WAYS[way][1]:
                continue  # samplers are not recorded
            row = measure(name, way, args, procs)
            made["rows"].append(row)
            print(f"{name:16}{way:10}{row['first_step_s']:9.1f}{row['ms']:9.1f}"
                  f"{row['per_second']:10.1f}{row['gib']:7.1f}", flush=True)
            if args.json:
                checkpoint.write_json(args.json, made)
    print("\n" + table(made))


if __name__ == "__main__":
    main_with_user_errors(main)
