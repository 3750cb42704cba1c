"""A run folder: configurations, processes, images, log, checkpoints and pictures of one training run.

In       the command line of a training program
Out      Run: what all stages share
"""
import os

import torch
from torch import Tensor

from plumbing import checkpoint
from plumbing.datasets import train_and_val
from plumbing.flags import UserError, as_dict, need
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
