"""How does the cost of encoding grow with tokens and with patches? A table, exponents, a picture.

Measured is the encoder of imagenet-128 (MIT-B and query experts) at 4 images, each point in a
process of its own, since a peak of memory is that of a process; memory is the growth of that peak
while encoding.

Run      python -m experiments.scaling --out pictures/scaling.png --json scaling.json
         (needs matplotlib; a few minutes on 2 CPU cores)
Makes    the picture, and with --json the numbers in it
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import json
import shlex
import statistics
import sys
import time

import numpy as np
import torch

from experiments.bench_rows import tokenizer_config
from experiments.timing import GIB, Bench, in_child
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, UserError
from plumbing.processes import peak_memory, provenance

TOKENS, PATCHES = (16, 32, 64, 128, 256), (64, 144, 256, 576, 1024)
AXES = {  # what varies: (its values, points (tokens, patches), what stays)
    "tokens": (TOKENS, [(L, 256) for L in TOKENS], "256 patches"),
    "patches": (PATCHES, [(64, N) for N in PATCHES], "64 tokens"),
}
BATCH = 4


def encode_once(num_tokens: int, patches: int, device: torch.device) -> tuple[float, float]:
    """Seconds and GiB of encoding a batch, for the child process."""
    cfg = tokenizer_config(token_schedule=(num_tokens,), image_size=int(patches ** 0.5) * 16)
    torch.manual_seed(0)
    model = NativeTok(cfg).to(device).eval()
    images = torch.rand(BATCH, 3, cfg.image_size, cfg.image_size, device=device) * 2 - 1
    before, times = peak_memory(device), []
    for _ in range(4):
        began = time.perf_counter()
        model.encode(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), (peak_memory(device) - before) / GIB


def exponent(x: list[int], y: list[float]) -> float:
    """Of the power law y = c x^exponent that fits best."""
    return np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0]


def measure(what: str, bench: Bench) -> dict:
    """The points of one axis, as they are printed and written."""
    values, points, _ = AXES[what]
    milliseconds, mib = [], []
    for value, point in zip(values, points):
        seconds, gib = in_child(bench, "experiments.scaling", *point)
        milliseconds.append(seconds / BATCH * 1e3)
        mib.append(gib * 1024)
        print(f"{value:5} {what:8}{milliseconds[-1]:9.1f} ms an image{mib[-1]:9.0f} MiB "
              f"for the batch of {BATCH}", flush=True)
    exponents = {"time": exponent(values, milliseconds), "memory": exponent(values, mib)}
    print(f"      time grows like {what}^{exponents['time']:.2f}, "
          f"memory like {what}^{exponents['memory']:.2f}")
    return {"points": list(values), "ms_an_image": milliseconds, "mib": mib,
            "exponents": exponents}


def draw(axis, what: str, measured: dict) -> None:
    x, exponents = measured["points"], measured["exponents"]
    axis.loglog(x, measured["ms_an_image"], "o-",
                label=f"ms an image, exponent {exponents['time']:.2f}")
    axis.loglog(x, measured["mib"], "s--",
                label=f"MiB of activations, batch {BATCH}, exponent {exponents['memory']:.2f}")
    axis.set_xlabel(f"{what}  ({AXES[what][2]})")
    axis.set_xticks(x, x)
    axis.minorticks_off()
    axis.legend()
    axis.grid(alpha=0.3)


def parse() -> argparse.Namespace:
    parser = Parser(prog="scaling.py", description=__doc__)
    parser.add_argument("--out", default="scaling.png", help="the picture")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="where to compute")
    parser.add_argument("--threads", type=int, default=0,
                        help="CPU threads (default: torch's choice)")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    bench = Bench(argparse.Namespace(repeats=3, device=args.device, threads=args.threads))
    if args.child:
        print(json.dumps(encode_once(*args.child, bench.device)))
        return
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("the picture takes matplotlib: pip install matplotlib") from None
    command = "python -m experiments.scaling " + shlex.join(sys.argv[1:])
    made = provenance(command, bench.device)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, what in zip(axes, AXES):
        made[what] = measure(what, bench)
        draw(axis, what, made[what])
    with checkpoint.replacing(args.out) as file:
        figure.savefig(file, format="png", dpi=110)
    if args.json:
        checkpoint.write_json(args.json, made)


if __name__ == "__main__":
    main_with_user_errors(main)
