"""A run folder: configurations, processes, images, log, checkpoints and pictures of one training run.

In       the command line of a training program
Out      Run: what all stages share
"""
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from plumbing import checkpoint
from plumbing.datasets import ImageSet, train_and_val
from plumbing.flags import UserError, as_dict, build, need, read_run
from plumbing.images import save_grid, to_uint8
from plumbing.processes import Processes

EVAL_IMAGES = 2000  # held-out images by which a phase is judged


class Run:
    """What all stages share: the configurations, the processes, the images, the folder and its log."""

    def __init__(self, args):
        self.tok, self.gen, self.train, self.folder = args.tok, args.gen, args.train, args.run
        self.procs = Processes(args.device, self.train.timeout)
        need(self.train.data != "shapes" or self.tok.image_size == 32,
             f"the built-in shapes are 32x32 pixels, not {self.tok.image_size}; give --data or --image_size 32")
        for turn in (True, False):  # the main process first: it may unpack an archive
            if self.procs.main == turn:
                self.data, self.val = train_and_val(self.train.data, self.train.val_data, self.train.holdout, self.train.seed, self.folder)
            self.procs.barrier()
        if self.procs.main:
            try:
                os.makedirs(self.path("samples"), exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {self.folder}: {error.strerror}; choose another folder with --run") from error
            checkpoint.sweep(self.folder)
            checkpoint.write_json(self.path("config.json"), {"preset": args.preset, **as_dict(self.tok, self.gen, self.train)})
        self.procs.catch_signals()
        everything = torch.randperm(len(self.val), generator=torch.Generator().manual_seed(0))
        self.eval_indices = everything[:EVAL_IMAGES].sort().values.numpy()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def say(self, text: str) -> None:
        if self.procs.main:
            print(text, flush=True)

    def log(self, **row) -> None:
        if self.procs.main:
            checkpoint.append_jsonl(self.path("log.jsonl"), row)

    def resume(self, path: str, fixed: dict, data: str, needs: tuple[str, ...] = ()) -> dict | None:
        """The checkpoint at `path` if there is one; it must belong to these settings and images and hold what is needed."""
        if not checkpoint.exists(path):
            return None
        saved = checkpoint.load(path, needs=("settings", "data", "phase", "step", "model", "ema", "optimizer", "random", *needs))
        checkpoint.check_same(saved["settings"], fixed, f"{path}: settings")
        checkpoint.check_same({"images": saved["data"]}, {"images": data}, f"{path}: data")
        if self.procs.main:  # rows after the checkpoint will be written again
            checkpoint.trim_jsonl(self.path("log.jsonl"), lambda row: row["phase"] != saved["phase"] or row["step"] <= saved["step"])
        return saved

    def seed(self, states: list | None, number: int) -> None:
        """Go on with the saved random numbers; with none, or those of another number of processes, seed anew."""
        if states and len(states) == self.procs.world:
            checkpoint.set_random_state(states[self.procs.rank])
        else:
            torch.manual_seed(self.train.seed * 1_000_003 + number * 1009 + self.procs.rank)

    def save(self, path: str, **content) -> None:
        random = self.procs.gather(checkpoint.random_state())
        if self.procs.main:
            checkpoint.save(path, {"random": random, "data": self.data.fingerprint, "classes": self.data.classes, **content})
        self.procs.barrier()  # or another process would look for it too early

    def grid(self, name: str, rows: list[Tensor]) -> None:
        """Write samples/NAME.png from rows of float images (n, 3, H, W), all with the same n."""
        images = torch.cat([to_uint8(row.cpu()) for row in rows])
        save_grid(images, self.path(f"samples/{name}.png"), columns=len(rows[0]), scale=max(1, 64 // self.tok.image_size))


# ------------------------------------------------------------------------------------------------
# for programs that read a finished run

@dataclass(frozen=True)
class OpenRun:
    """A run as its tokenizer's checkpoint knows it: configurations, images, the checkpoint itself."""
    folder: str
    configs: tuple     # one instance of each dataclass that open_run was given
    data: ImageSet     # what the tokenizer has learned from
    val: ImageSet      # what was held out
    saved: dict        # the content of tokenizer.pt


def open_run(folder: str, configs: tuple[type, ...]) -> OpenRun:
    """Open a run to look at it: the settings are those that the checkpoint was made with.

    config.json tells only where the images lie now and what may differ (workers, skip_bad ...).
    Raises UserError when there is no checkpoint, and when the images are no longer those that it
    has learned from: a folder that grew would hold out others, which may have been trained on.
    """
    path = os.path.join(folder, "tokenizer.pt")
    values = read_run(folder)
    need(checkpoint.exists(path),
         f"{folder} has no tokenizer.pt; train one: python train.py --run {folder}")
    saved = checkpoint.load(path, needs=("settings", "data"))
    del values["preset"]
    learned = {k: v for k, v in saved["settings"].items() if k not in ("data", "val_data")}
    values |= learned
    try:
        data, val = train_and_val(values["data"], values["val_data"], values["holdout"],
                                  values["seed"], folder)
    except UserError as error:
        raise UserError(f"{error} (data and val_data of {folder}/config.json)") from error
    checkpoint.check_same({"images": saved["data"]}, {"images": data.fingerprint}, f"{path}: data")
    return OpenRun(folder, build(configs, values), data, val, saved)
