"""How the cost of encoding grows with the number of tokens and of patches: a table, fitted exponents, one picture.

Run      python -m experiments.scaling --out pictures/scaling.png --json scaling.json        (needs matplotlib; a few minutes on 2 CPU cores)
How      the encoder of imagenet-128 (MIT-B and query experts) at 4 images, each point in a process of its own, since a peak of
         memory is that of a process; memory is the growth of that peak while encoding
"""
import argparse
import json
import shlex
import statistics
import sys
import time

import numpy as np
import torch

from experiments.bench import Bench, in_child, peak_gib, tokenizer_config
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import UserError, main_with_user_errors
from plumbing.processes import provenance

TOKENS, PATCHES = (16, 32, 64, 128, 256), (64, 144, 256, 576, 1024)


def encode_once(num_tokens: int, patches: int, device) -> tuple[float, float]:
    """Seconds and GiB of encoding 4 images, for the child process."""
    cfg = tokenizer_config(token_schedule=(num_tokens,), image_size=int(patches ** 0.5) * 16)
    torch.manual_seed(0)
    model, images = NativeTok(cfg).to(device).eval(), torch.rand(4, 3, cfg.image_size, cfg.image_size, device=device) * 2 - 1
    before, times = peak_gib(device), []
    for _ in range(4):
        began = time.perf_counter()
        model.encode(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), peak_gib(device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="scaling.png", help="the picture")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    bench = Bench(argparse.Namespace(repeats=3, device=args.device, threads=args.threads))
    if args.child:
        return print(json.dumps(encode_once(*args.child, bench.device)))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("the picture takes matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    made = provenance("python -m experiments.scaling " + shlex.join(sys.argv[1:]), bench.device)
    for axis, what, points in ((axes[0], "tokens", [(L, 256) for L in TOKENS]), (axes[1], "patches", [(64, N) for N in PATCHES])):
        x = [point[what == "patches"] for point in points]
        found = [in_child(bench, "experiments.scaling", *point) for point in points]
        slopes = [np.polyfit(np.log(x), np.log([max(value[k], 1e-9) for value in found]), 1)[0] for k in (0, 1)]
        for value, (s, gib) in zip(x, found):
            print(f"{value:5} {what:8}{s / 4 * 1e3:9.1f} ms an image{gib * 1024:9.0f} MiB for the batch of 4", flush=True)
        made[what] = {"points": x, "ms_an_image": [s / 4 * 1e3 for s, _ in found], "mib": [gib * 1024 for _, gib in found], "exponents": {"time": slopes[0], "memory": slopes[1]}}
        print(f"      time grows like {what}^{slopes[0]:.2f}, memory like {what}^{slopes[1]:.2f}")
        axis.loglog(x, [s / 4 * 1e3 for s, _ in found], "o-", label=f"ms an image, exponent {slopes[0]:.2f}")
        axis.loglog(x, [gib * 1024 for _, gib in found], "s--", label=f"MiB of activations, batch 4, exponent {slopes[1]:.2f}")
        axis.set_xlabel(f"{what}  ({'256 patches' if what == 'tokens' else '64 tokens'})")
        axis.set_xticks(x, x), axis.minorticks_off(), axis.legend(), axis.grid(alpha=0.3)
    with checkpoint.replacing(args.out) as file:
        figure.savefig(file, format="png", dpi=110)
    if args.json:
        checkpoint.write_json(args.json, made)


if __name__ == "__main__":
    main_with_user_errors(main)
