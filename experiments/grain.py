"""Is it worth deciding where the codes go? D²iT's maps against others, under equal budgets.

Stage 1, the same autoencoder trained under each map:
    coarse, fine          no cell fine, all cells fine: the ends
    entropy               the paper: cells above a threshold, half of them
    static                as many fine cells an image, where the data set has detail on average
    random, inverted      as many, anywhere; as many, where there is least detail
    error                 as many, where the arm coarse fails
    coarse10              no cell fine, and codes of 10 numbers: as many numbers as entropy
    fine2, fine3          all cells fine, and codes of 2 and 3 numbers
    r25, r75              entropy with a quarter and three quarters of the cells fine
Stage 2, the content transformer on the codes of one of these arms:
    dit-fine, dit-coarse10                DiT with patches of 2, 6 blocks, on the fixed grids
    d2it-6+0, d2it-4+2, d2it-3+3          6 blocks, of which RefineNet has none, 2, 3
    d2it-slot             4+2, and a coarse code counts four times in the loss
    d2it-static           4+2 on static's codes
    d2it-all              4+2, and RefineNet looks at the codes of all cells
    d2it-r0 -r25 -r75 -r100               4+2 on coarse, r25, r75, fine: the sweep of r

What was expected stands in LOG.md. Samples and reconstructions are judged by one TinyCNN for all
arms of a data set; the distance is not FID. d2it-4+2 draws under predicted, true and random maps.

Run      python -m experiments.grain --preset tiny --seeds 0 1 2        the shapes, on a CPU
         python -m experiments.grain --preset tiny --quick              does it run?
         python -m experiments.grain --preset cifar-cpu --data DIR --val_data DIR --seeds 0 1
         Repeat a command to go on: finished arms are skipped, a broken-off one goes on where it was
         saved; another --out starts anew
Makes    OUT/ARM-SEED.json, real.json, tinycnn.pt, the judge; OUT/runs/, what was trained; tables
         and a figure by grain_table.py
Exit     0 finished, 1 failure, 2 something to mend, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import os
import shlex
import shutil
import sys

import numpy as np
import torch

from d2it import train
from d2it.dvae import DVAE
from d2it.model import D2iT
from d2it.presets import parse_run, settings
from experiments.grain_arms import ARMS, BASE, EXTRA, PLANS, fine_where_it_fails
from experiments.grain_measure import half_limit, measure_codes, measure_images, real_images
from experiments.grain_table import write_tables
from experiments.order import Judge, check_settings, handlers_of_its_own
from experiments.order_table import costs
from plumbing import checkpoint
from plumbing.datasets import train_and_val
from plumbing.flags import DEVICES, Parser, as_flags, choose, need, need_seed
from plumbing.outputs import need_places
from plumbing.processes import Processes, provenance

HELD_OUT = 2000  # images that arms are judged by, at most


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace. Raises UserError for wrong use."""
    parser = Parser(prog="grain.py", description=__doc__)
    add = parser.add_argument
    add("--preset", choices=("tiny", "cifar-cpu"), default="tiny", help="sizes and steps "
        "(default: tiny)")
    add("--data", default="shapes", help="training images (default: the built-in shapes)")
    add("--val_data", default="", help="held-out images; not needed for the shapes")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N",
        help="of weights, order of images and samples (default: 0)")
    add("--arms", nargs="+", metavar="ARM", default=[arm for arm in ARMS if arm not in EXTRA],
        help=f"only these (default: all but {', '.join(EXTRA)})")
    add("--out", metavar="DIR", help="results (default: runs/grain-PRESET, or runs/grain-quick)")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--quick", action="store_true", help="hardly any steps, to see that everything runs")
    add("--table", action="store_true",
        help="train nothing; make tables and figure anew from the results that are there")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = "python -m experiments.grain " + shlex.join(words)
    name = "quick" if args.quick else args.preset
    args.plan, args.out = PLANS[name], args.out or os.path.join("runs", f"grain-{name}")
    for seed in args.seeds:
        need_seed(seed, "seeds")
    for arm in args.arms:
        choose("arm", arm, ARMS)
    own = args.data != "shapes"
    need(args.table or own or name != "cifar-cpu",
         f"--preset {name} needs images: give --data and --val_data")
    # Held-out images cut from --data would differ between seeds, and so would their judge.
    need(args.table or args.val_data or not own, f"--data {args.data} needs --val_data, by which "
         "all seeds are judged")
    return args


# ------------------------------------------------------------------------------------------------
# training

def flags_of(arm: str, seed: int, args) -> list[str]:
    """The command line of d2it.train for this arm; of its codes it says what their own arm says."""
    this, plan = ARMS[arm], args.plan
    of_codes = ARMS[this.codes].settings if this.codes else {}
    return ["--preset", plan.preset, "--run", os.path.join(args.out, "runs", f"{arm}-{seed}"),
            "--data", args.data, "--val_data", args.val_data, "--seed", str(seed),
            "--device", args.device, *as_flags({**plan.sizes, **of_codes, **this.settings})]


def train_stage(flags: list[str], stage: int, **changes) -> str:
    """A stage of d2it.train in this process, unless it is finished; -> the run's folder.

    Exits with 3 when interrupted, as d2it.train does.
    """
    with handlers_of_its_own():
        args = parse_run("", [*flags, "--stage", str(stage)])
        train.main(args, **changes)
    return args.run


def own_maps(arm: str, seed: int, args, limit: float, device: torch.device) -> dict:
    """Of the arm "error" the function that train.main wants; {} for all others.

    The checkpoint does not know these maps: it is for this experiment only.
    """
    if arm != "error":
        return {}
    folder = train_stage(flags_of("coarse", seed, args), 1)
    coarse = DVAE.load(os.path.join(folder, "dvae.pt")).to(device)
    maps = fine_where_it_fails(coarse, limit)

    def change(dvae: DVAE) -> DVAE:
        dvae.own_maps = maps
        return dvae
    return {"change_dvae": change}


def train_content(arm: str, seed: int, args) -> tuple[str, str]:
    """Stages 1 and 2 in the folder of the codes' arm, stage 3 in a folder of its own, with copies.

    -> both folders
    """
    source_flags, flags = flags_of(ARMS[arm].codes, seed, args), flags_of(arm, seed, args)
    train_stage(source_flags, 1)
    source = train_stage(source_flags, 2)
    folder = parse_run("", flags).run
    os.makedirs(folder, exist_ok=True)
    for name in ("dvae.pt", "grain.pt"):
        with open(os.path.join(source, name), "rb") as made:
            with checkpoint.replacing(os.path.join(folder, name)) as copy:
                shutil.copyfileobj(made, copy)

    def change(content):
        if ARMS[arm].everywhere:
            content.refine.everywhere = True
        return content
    return source, train_stage(flags, 3, change_content=change)


# ------------------------------------------------------------------------------------------------
# results

class Shared:
    """What all arms of a data set share: images, the judge, and whose cells are called fine."""

    def __init__(self, args):
        self.procs = Processes(args.device)
        self.data, val = train_and_val(args.data, args.val_data, 0, 0)
        need(val.classes == self.data.classes and len(val.classes) > 1,
             f"{args.data} and {args.val_data} need the same classes, two or more")
        self.val = val.subset(np.random.default_rng(0).permutation(len(val))[:HELD_OUT])
        run = parse_run("", flags_of(BASE, 0, args))
        self.size, cell, flip = run.dvae.image_size, run.dvae.cell_size, run.train.flip
        self.judge = Judge(os.path.join(args.out, "tinycnn.pt"), self.size, flip,
                           args.plan.judge_steps, 0, self.data, self.val, self.procs)
        self.limit = half_limit(self.data, self.size, cell)


def settings_of(arm: str, seed: int, args, shared: Shared) -> dict:
    """Everything that the result of an arm depends on, as it comes back from a file."""
    run, plan, kept, more = parse_run("", flags_of(arm, seed, args)), args.plan, {}, {}
    for stage in (1, 2, 3) if ARMS[arm].codes else (1,):
        kept |= settings(stage, run.dvae, run.content, run.train)
    if ARMS[arm].codes:
        more = {"num_samples": plan.num_samples, "sampling_steps": plan.sampling_steps}
    return {"preset": plan.preset, **kept, **more, "judge_steps": plan.judge_steps,
            "images": shared.data.fingerprint, "held_out": shared.val.fingerprint}


def make_result(arm: str, seed: int, args, shared: Shared) -> None:
    """Train and measure one arm with one seed and write its result, unless that has been done."""
    path = os.path.join(args.out, f"{arm}-{seed}.json")
    recorded = settings_of(arm, seed, args, shared)
    if os.path.exists(path):
        check_settings(path, recorded)
        print(f"{arm}, seed {seed}: finished before")
        return
    print(f"\n--- {arm}, seed {seed}", flush=True)
    flags, device = flags_of(arm, seed, args), shared.procs.device
    if ARMS[arm].codes:
        source, folder = train_content(arm, seed, args)
        model = D2iT.of_run(folder, device)
        if ARMS[arm].everywhere:
            model.content.refine.everywhere = True
        found = measure_images(arm, folder, source, model, shared.judge, args.plan, seed)
    else:
        changes = own_maps(arm, seed, args, shared.limit, device)
        folder = train_stage(flags, 1, **changes)
        dvae = DVAE.load(os.path.join(folder, "dvae.pt")).to(device)
        for change in changes.values():
            dvae = change(dvae)
        found = measure_codes(dvae, shared.judge, shared.limit)
    checkpoint.write_json(path, {
        "arm": arm, "seed": seed, **provenance(args.command, device),
        "run_command": "python -m d2it.train " + shlex.join(flags), "settings": recorded, **found,
        "costs": costs(folder, parse_run("", flags).train)})
    print(f"written: {path}")


def make_real(args, shared: Shared) -> None:
    """real.json: as many training images as are drawn, the floor of every distance."""
    path = os.path.join(args.out, "real.json")
    if not os.path.exists(path):
        row = real_images(shared.judge, shared.data, shared.size, args.plan.num_samples)
        checkpoint.write_json(path, {**provenance(args.command, shared.procs.device), "seed": 0,
                                     "judge_accuracy": shared.judge.accuracy, **row})


def main(args) -> None:
    if not args.table:
        need_places(folders={"--out": os.path.join(args.out, "runs")})
        shared = Shared(args)
        make_real(args, shared)
        for seed in args.seeds:  # a whole table first, then its spread
            for arm in args.arms:
                make_result(arm, seed, args, shared)
    print("\n" + write_tables(args.out))


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
