"""How fast? Both sides of each comparison in one process and in turn, the median of several.

Ratios compare two ways on the same machine, so they carry over to other machines better than
seconds do. Beside each value stands its floor, what counted operations alone would take (of a
speed-up: the most that they allow), or, of a sampling step at batch 1, the time to read every
weight once. Where a row has no older target, it is a tenth from the floor. "of peak" is the rate of
a plain matrix product on this machine in the same precision.

Run      python -m experiments.bench                             all rows, ten minutes on 2 cores
         python -m experiments.bench --rows query_block grow     some of them
Makes    a line for each value; --json FILE: the same as name, value, unit, floor, target, met
         (null: none)
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import json
import platform
import shlex
import sys
import time

import torch

from experiments import bench_rows as rows
from experiments import bench_sampling as sampling
from experiments.timing import Bench
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, choose, number
from plumbing.outputs import JSON, need_places
from plumbing.processes import need_one_process, provenance

# name: (function, what it compares)
ROWS = {
    "query_block": (rows.query_against_block, "MoCET, query experts against block experts, depth "
                    "2, width 256, 256 patches, batch 4"),
    "query_loop": (rows.query_against_loop, "MoCET, query experts against their own plain loop, "
                   "the same sizes"),
    "encoder": (rows.encoder_against_titok, "MIT-B and query experts against a TiTok-B encoder, "
                "256 patches, batch 16"),
    "grow": (rows.growth, "a growth step 64 -> 128 against a joint step at 128, imagenet-128, "
             "batch 2"),
    "muon": (rows.muon_against_adamw, "a training step with Muon against one with AdamW, cifar"),
    "cache": (sampling.cache_against_recomputing, "AR sampling with a KV cache against "
              "recomputing, LlamaGen-B size, 128 tokens, guidance"),
    "floor": (sampling.step_against_floor, "a step of AR sampling, batch 1, guidance"),
    "bf16": (sampling.bf16_against_float32, "AR sampling, batch 16, bf16 against float32"),
    "maskgit": (sampling.maskgit_against_passes, "MaskGIT, 8 steps, guidance, against as many bare "
                "passes of its transformer, batch 2"),
    "tokens": (rows.waiting_for_tokens, "stage 3: share of a step spent waiting for the token "
               "cache, cifar"),
    "images": (rows.waiting_for_images, "stage 1: share of a step spent waiting for a folder of "
               "JPEGs, cifar, 2 workers"),
    "gpu": (rows.gpu_on_paper, "imagenet-128 with 32 images on a GPU, on paper: starting kernels "
            "against computing"),
}


def table(measured: list[dict]) -> str:
    """The rows as a table of Markdown, for README.md."""
    lines = ["| row | value | floor | target | |", "|---|---|---|---|---|"]
    for row in measured:
        unit = {"x": "×", "%": "%"}.get(row["unit"], f" {row['unit']}")
        value, floor = (f"{number:.3g}{unit}" if number is not None else "-"
                        for number in (row["value"], row.get("floor")))
        target = (row["target"] or "-").replace(">=", "≥").replace("<=", "≤")
        verdict = {None: "", True: "met", False: "**not met**"}[row["met"]]
        notes = "; ".join(filter(None, (verdict, row["note"])))
        lines.append(f"| {row['name']} | {value} | {floor} | {target} | {notes} |")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    names = "; ".join(f"{name}: {text}" for name, (_, text) in ROWS.items())
    parser = Parser(prog="bench.py", description=__doc__, epilog=f"Rows: {names}")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW",
                        help="only these rows")
    parser.add_argument("--repeats", type=number(int, 1), default=3,
                        help="of each measurement (default: 3)")
    parser.add_argument("--threads", type=number(int, 0, 4096), default=0,
                        help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="where to compute")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    # what growth() measures in a process of its own, for its peak memory
    parser.add_argument("--child", choices=("joint", "grow"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in args.rows:
        choose("row", name, ROWS)
    need_places({"--json": (args.json, JSON)})
    return args


def main(argv=None) -> None:
    args = parse(argv)
    need_one_process("experiments.bench")
    bench = Bench(args)
    if args.child:
        print(json.dumps(rows.training_step(args.child, bench.device)))
        return
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "experiments.bench", *words])
    cuda = bench.device.type == "cuda"
    print(f"{bench.device.type} {torch.cuda.get_device_name() if cuda else platform.machine()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {command}")
    gflops = {"float32": bench.peak[torch.float32] / 1e9,
              "bf16": bench.peak[torch.bfloat16] / 1e9}
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
