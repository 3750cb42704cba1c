"""How do time and memory grow with tokens, patches and the experts' width? A table and a picture.

Measured are encoding and a training step (AdamW, everything learns) of imagenet-128's MIT-B, query
experts and decoder, 2 images at a time; each point in a process of its own, since a peak of memory
is that of a process. Memory is what comes on top of the weights: activations, and for a training
step gradients and moments.

Run      python -m experiments.scaling --json scaling.json --out scaling.png
         (ten minutes on 2 CPU cores; the picture takes matplotlib)
Makes    a line for each point; --json FILE: the same, with exponents; --out FILE: the picture
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from experiments.bench_rows import learner, tokenizer_config, tokenizer_loss
from experiments.timing import GIB, Bench, in_child
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.outputs import JSON, PNG, need_places
from plumbing.processes import need_one_process, peak_memory, provenance, reset_peak_memory

TOKENS, PATCHES, WIDTHS = (16, 32, 64, 128, 256), (64, 144, 256, 576, 1024), (64, 128, 256, 512)
AXES = {  # what varies: (its values, points (tokens, patches, experts' width), what stays)
    "tokens": (TOKENS, [(L, 256, 256) for L in TOKENS], "256 patches, experts of 256"),
    "patches": (PATCHES, [(64, N, 256) for N in PATCHES], "64 tokens, experts of 256"),
    "width": (WIDTHS, [(64, 256, E) for E in WIDTHS], "64 tokens, 256 patches"),
}
WORK = ("encoding", "training step")
BATCH = 2


def measured(call: Callable[[], object], device: torch.device, before: int,
             repeats: int) -> tuple[float, float]:
    """-> seconds, the median after one call to warm up, and the peak in GiB above `before`."""
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), (peak_memory(device) - before) / GIB


def point(num_tokens: int, patches: int, width: int, device: torch.device) -> list[float]:
    """Seconds and GiB of encoding, then of a training step; for the child process."""
    cfg = tokenizer_config(token_schedule=(num_tokens,), image_size=int(patches ** 0.5) * 16,
                           expert_width=width)
    torch.manual_seed(0)
    model = NativeTok(cfg).to(device).eval()
    images = torch.rand(BATCH, 3, cfg.image_size, cfg.image_size, device=device) * 2 - 1
    reset_peak_memory(device)
    before = peak_memory(device)
    encoding = measured(lambda: model.encode(images), device, before, 3)
    step = learner(model, partial(tokenizer_loss, model), "adamw", 0.999)
    return [*encoding, *measured(lambda: step(images), device, before, 1)]


def exponents(x: list[int], y: list[float]) -> dict[str, float]:
    """Of y = c x^exponent: the one that fits best, and that between the last two points."""
    x, y = np.log(x), np.log(np.maximum(y, 1e-9))
    return {"fit": round(np.polyfit(x, y, 1)[0], 3),
            "end": round((y[-1] - y[-2]) / (x[-1] - x[-2]), 3)}


def measure(what: str, bench: Bench) -> dict:
    """The points of one axis, as they are printed and written."""
    values, points, _ = AXES[what]
    found = {name: {"ms_an_image": [], "mib": []} for name in WORK}
    for value, place in zip(values, points):
        numbers = in_child(bench, "experiments.scaling", *place)
        for name, seconds, gib in zip(WORK, numbers[::2], numbers[1::2]):
            found[name]["ms_an_image"].append(round(seconds / BATCH * 1e3, 1))
            found[name]["mib"].append(round(gib * 1024))
            print(f"{value:5} {what:8}{name:14}{seconds / BATCH * 1e3:9.1f} ms an image"
                  f"{gib * 1024:9.0f} MiB for the batch of {BATCH}", flush=True)
    for made in found.values():
        made["exponents"] = {unit: exponents(values, made[unit]) for unit in ("ms_an_image", "mib")}
    return {"points": list(values), **found}


def table(made: dict) -> str:
    """What scaling.json holds as a table of Markdown, for README.md."""
    lines = ["| | | ms an image | exponent (at the end) | MiB | exponent (at the end) |",
             "|---|---|---|---|---|---|"]
    for what, (values, _, stays) in AXES.items():
        for name in WORK:
            cells = []
            for unit in ("ms_an_image", "mib"):
                numbers, grows = made[what][name][unit], made[what][name]["exponents"][unit]
                cells += [f"{numbers[0]:,.0f} to {numbers[-1]:,.0f}",
                          f"{grows['fit']:.2f} ({grows['end']:.2f})"]
            lines.append(f"| {what}, {values[0]} to {values[-1]} ({stays}) | {name} | "
                         f"{' | '.join(cells)} |")
    return "\n".join(lines)


def draw(made: dict, path: str) -> None:
    """Time above memory, a column for each axis; what a line means stands below all of them."""
    import matplotlib  # parse() has looked for it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, len(AXES), figsize=(10, 5.4), sharex="col",
                                constrained_layout=True)
    for column, (what, (values, _, stays)) in enumerate(AXES.items()):
        for row, (unit, label) in enumerate((("ms_an_image", "ms an image"),
                                             ("mib", f"MiB, batch {BATCH}"))):
            axis = axes[row][column]
            for name, style in zip(WORK, ("o-", "s--")):
                axis.loglog(values, made[what][name][unit], style, label=name)
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[1][column].set_xlabel(f"{what}\n({stays})")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with checkpoint.replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(prog="scaling.py", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--out", metavar="FILE", help="draw the picture there")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="where to compute")
    parser.add_argument("--threads", type=number(int, 0, 4096), default=0,
                        help="CPU threads (default: torch's choice)")
    parser.add_argument("--child", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    need_places({"--json": (args.json, JSON), "--out": (args.out, PNG)})
    need(not args.out or importlib.util.find_spec("matplotlib"),  # now, not after all numbers
         "the picture takes matplotlib: pip install matplotlib, or leave out --out")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    need_one_process("experiments.scaling")
    bench = Bench(argparse.Namespace(repeats=1, device=args.device, threads=args.threads))
    if args.child:
        print(json.dumps(point(*args.child, bench.device)))
        return
    words = sys.argv[1:] if argv is None else argv
    made = provenance(shlex.join(["python", "-m", "experiments.scaling", *words]), bench.device)
    began = time.time()
    made |= {what: measure(what, bench) for what in AXES}
    made |= {"seed": 0, "seconds": round(time.time() - began)}
    if args.json:
        checkpoint.write_json(args.json, made)
    print(table(made))
    if args.out:
        draw(made, args.out)


if __name__ == "__main__":
    main_with_user_errors(main)
