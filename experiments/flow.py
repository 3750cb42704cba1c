"""Does a drawn image beat the mean of all images that have its tokens? One run, both decoders.

Of a finished run with a flow decoder, each row by both decoders, against the run's held-out images:

    reconstruction   from all tokens, by 4, 8, 12, 24 and 48 steps; from 1, 2, 4 ... tokens
    ar, maskgit      samples, at each guidance of --scales; with --best_of 4 also the best of four,
                     the one in which --chooser sees the class most

PSNR and SSIM compare an image with itself: the mean must win there. The distances, precision and
recall compare two sets of images: a blur must lose there.

Run      python -m experiments.flow --run runs/NAME --judge runs/judge.pt --out FILE
         repeat the command to go on: rows that FILE has are not made again
         python -m experiments.flow --run runs/NAME --pictures DIR
In       the judge: of experiments/judge.py for photographs, else runs/NAME/tinycnn.pt
Makes    FILE, a JSON with the command, the commit and a row per line above
         DIR/flow-prefixes.png   an image, its mean, drawn from 1, 2, 4 ... tokens
         DIR/flow-draws.png      an image, its mean, and four draws from all of its tokens
Exit     0 finished, 1 failure, 2 user error
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os
import time

import numpy as np
import torch

from config import CONFIGS, SAMPLING
from evaluation.best_of import BestOf, class_seen
from evaluation.judging import (
    Batching, ImageSource, Reference, extract, generated, judge, real, reconstruction, tinycnn_nets)
from evaluation.tinycnn import load_judge
from experiments.order_table import fd_key
from flow_decoder import STEPS, Decoding, FlowDecoder
from generator import GENERATORS, Generator
from nativetok import doubling, from_checkpoint
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.images import save_grid, to_float, to_uint8
from plumbing.outputs import JSON, need_places
from plumbing.processes import Processes, need_one_process, provenance
from plumbing.run import held_out, open_run


def table(rows: list[dict]) -> str:
    """Markdown: what was decoded, by which decoder, then a column for each number.

    Of samples only each generator's best guidance by each decoder, by the distance in the trained
    classifier: rows[0], real images, says which key that is.
    """
    fd = fd_key(rows[0])
    fd_random = next(key for key in rows[0] if key.startswith("fd_random"))
    keys = {"PSNR": "psnr", "SSIM": "ssim", "FD": fd, "FD, random net": fd_random,
            "precision": "precision", "recall": "recall", "class seen": "class_accuracy"}
    best = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("name", "decoder", "best_of"))
        if row["name"] in GENERATORS and row[fd] <= best.get(key, row)[fd]:
            best[key] = row
    lines = ["| what | decoder | " + " | ".join(keys) + " |", "|---" * (2 + len(keys)) + "|"]
    for row in sorted(rows, key=lambda row: (
            row["name"] in GENERATORS, row["name"] != "real", -row.get("num_tokens", 0),
            row.get("decoder") == "flow", row.get("flow_steps", 0))):
        if row["name"] in GENERATORS and row not in best.values():
            continue
        what = row["name"]
        if "num_tokens" in row:
            what += f", {row['num_tokens']} token{'s' * (row['num_tokens'] > 1)}"
        if row["name"] in GENERATORS:
            what += f", guidance {row['cfg_scale']:g}"
        if "best_of" in row:
            what += f", best of {row['best_of']}"
        how = row.get("decoder", "-")
        if how == "flow":
            how += f", {row['flow_steps']} steps"
        cells = [format(row[key], ".2f" if key == "psnr" else ".3f") if key in row else "-"
                 for key in keys.values()]
        lines.append(f"| {what} | {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_pictures(folder: str, flow: FlowDecoder, pixels: torch.Tensor, seed: int) -> None:
    """pixels uint8 (n, H, W, 3): two pictures, a row for each image."""
    device = flow.tokenizer.quantizer.codebook.device
    images = to_float(pixels).to(device)
    ids = flow.tokenizer.encode(images)
    L, scale = ids.shape[1], max(1, 64 // images.shape[-1])

    def drawn(k: int, seed: int) -> torch.Tensor:
        return flow.decode(ids[:, :k], generator=torch.Generator().manual_seed(seed))
    start = [images, flow.tokenizer.decode(ids)]
    columns = {"flow-prefixes": [drawn(k, seed) for k in doubling(L)],
               "flow-draws": [drawn(L, seed + j) for j in range(4)]}
    for name, more in columns.items():
        rows = torch.stack([*start, *more], dim=1).flatten(0, 1)        # (n * columns, 3, H, W)
        path = os.path.join(folder, f"{name}.png")
        save_grid(to_uint8(rows.cpu()), path, columns=2 + len(more), scale=scale)
        print(f"{path}: images, their mean, then {len(more)} draws")


def main() -> None:
    parser = Parser(prog="python -m experiments.flow", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of a run with a flow decoder")
    add("--pictures", metavar="DIR", help="only pictures, of eight held-out images")
    add("--judge", metavar="FILE", help="a classifier of the run's images")
    add("--num_samples", type=number(int, 2), default=2000, help="images of each row")
    add("--scales", type=number(float), nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    add("--decoders", nargs="+", choices=("mean", "flow"), default=["mean", "flow"])
    add("--kinds", nargs="*", choices=tuple(GENERATORS), default=list(GENERATORS))
    add("--best_of", type=number(int, 2), nargs="*", default=[], metavar="N",
        help="draw N samples in place of each and keep the best")
    add("--chooser", metavar="FILE", help="the classifier that says which is best; not the judge, "
        "which would praise its own choice")
    add("--brief", action="store_true", help="no other numbers of steps or tokens")
    add("--seed", type=number(int), default=0, help="of all noise")
    add("--device", choices=DEVICES, default="auto")
    add("--out", metavar="FILE", help="the JSON to write")
    args = parser.parse_args()
    need(args.pictures or args.judge and args.out, "give --judge and --out, or --pictures")
    need(bool(args.best_of) == bool(args.chooser), "--best_of and --chooser go together; give both")
    need_one_process("experiments.flow")
    need_places({"--out": (args.out, JSON)}, {"--pictures": args.pictures},
                reads={"--run": args.run, "--judge": args.judge, "--chooser": args.chooser})
    procs = Processes(args.device)

    # 1. The run, the judge, and the held-out images through its eyes.
    run = open_run(args.run, CONFIGS)
    tok, train = run.configs[0], run.configs[-1]
    tokenizer = from_checkpoint(run.saved, os.path.join(args.run, "tokenizer.pt"))
    tokenizer = tokenizer.to(procs.device)
    flow = FlowDecoder.of_run(args.run, tokenizer)
    if args.pictures:
        draw_pictures(args.pictures, flow, held_out(run, 8)[0], args.seed)
        return
    nets, accuracy = tinycnn_nets(args.judge, run.data, procs.device, run.val)
    if args.chooser:
        chooser = load_judge(args.chooser, run.data)[0].to(procs.device)
    how = Batching(seed=args.seed, skip_bad=train.skip_bad)
    everything = real("held out", run.val, np.arange(len(run.val)), tok.image_size, how)
    stats, _ = extract(everything, nets, how, procs)
    reference = Reference.of(run.val.name, everything.n, nets, stats)

    # 2. Rows, each on the disk before the next one is made.
    made = {**provenance(args.command, procs.device),
            "seed": args.seed, "judge_accuracy": round(accuracy, 4), "held_out": reference.n,
            "nets": {net.key: net.title for net in nets}}
    old = checkpoint.read_json(args.out) if os.path.exists(args.out) else {"rows": []}
    rows = old["rows"] if old.get("nets") == made["nets"] else []

    def add_row(source: ImageSource) -> None:
        named = {"name": source.name, "n": source.n, **source.settings}
        if any(named.items() <= row.items() for row in rows):
            return
        began = time.time()
        row = judge(source, nets, reference, how, procs)
        row.pop("swept", None)
        row.pop("settings", None)
        ms = round(1000 * (time.time() - began) / source.n, 1)
        rows.append({**named, **row, "ms_per_image": ms})
        checkpoint.write_json(args.out, {**made, "rows": rows})
        print({name: value for name, value in rows[-1].items() if name not in SAMPLING or
               name == "cfg_scale"}, flush=True)

    some = np.random.default_rng(0).permutation(len(run.val))[:args.num_samples]
    originals = real("reference", run.val, some, tok.image_size, how)
    chosen = np.random.default_rng(0).permutation(len(run.data))[:args.num_samples]
    add_row(real("real", run.data, chosen, tok.image_size, how))
    decodings = {"mean": Decoding(tokenizer), "flow": Decoding(tokenizer, flow, STEPS)}
    decodings = [decodings[name] for name in args.decoders]
    for decode in decodings:
        add_row(reconstruction(decode, originals, how, procs.device))
    for kind in args.kinds:
        model = Generator.of_run(args.run, kind, tokenizer, procs.device)
        for decode in decodings:
            for scale in args.scales:
                options = {name: SAMPLING[name].default for name in model.options}
                add_row(generated(kind, model, decode, args.num_samples, options,
                                  {"cfg_scale": scale}, how, procs.device))
                for n in args.best_of:
                    best = BestOf(model, class_seen(tokenizer, chooser), n)
                    source = generated(kind, best, decode, args.num_samples, options,
                                       {"cfg_scale": scale}, how, procs.device)
                    source.settings["best_of"] = n
                    add_row(source)
    if args.brief:
        return
    for steps in (4, 8, 24, 48):
        add_row(reconstruction(Decoding(tokenizer, flow, steps), originals, how, procs.device))
    for k in doubling(tokenizer.num_tokens)[:-1]:
        for decode in decodings:
            add_row(reconstruction(decode, originals, how, procs.device, k))


if __name__ == "__main__":
    main_with_user_errors(main)
