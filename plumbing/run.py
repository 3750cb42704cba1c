"""A run folder: who may write there, what belongs to it, its log, checkpoints and pictures.

In       the command line of a training program
Out      Run: what all stages of one training run share
Differs  A checkpoint says what it learned from, config.json only repeats it for people. So a
         command is compared with the checkpoints first, and config.json is written afterwards
"""
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from plumbing import checkpoint
from plumbing.archives import note
from plumbing.batches import ImageStream, eval_batches
from plumbing.datasets import ImageSet, some_of, train_and_val
from plumbing.flags import UserError, as_dict, as_flags, build, need, read_run, without_constants
from plumbing.images import save_grid, to_uint8
from plumbing.processes import Processes, forget_holder, lock_folder

EVAL_IMAGES = 2000  # held-out images by which a phase is judged
BUILT_IN = ("", "shapes", "shapes:val")  # values of --data that name no place on a disk
PLACES = ("data", "val_data")
SYSTEMS = {"train.py": "tokenizer.pt", "-m d2it.train": "dvae.pt"}  # what each makes first


class Run:
    """The processes, the images, the folder and its log.

    args       .run folder, .preset, .device, and .train: the TrainConfig that says how to run
    configs    all settings of the run, as config.json shows them
    data, val  what is learned from, and what is held out; eval_indices: which of val are judged
    Raises UserError for a folder that cannot be written or that another process writes.
    """

    def __init__(self, args, configs: tuple):
        self.folder, self.preset, self.train = args.run, args.preset, args.train
        self.configs = configs
        self.told = False  # that other images are held out than before
        self.procs = Processes(args.device, self.train.timeout)
        if self.procs.main:
            self.lock = self.take_folder()
        self.data, self.val = train_and_val(self.train.data, self.train.val_data,
                                            self.train.holdout, self.train.seed)
        everything = torch.randperm(len(self.val), generator=torch.Generator().manual_seed(0))
        self.eval_indices = everything[:EVAL_IMAGES].sort().values.numpy()

    def take_folder(self):
        try:
            os.makedirs(self.path("samples"), exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}; "
                            "choose another folder with --run") from error
        return lock_folder(self.folder)

    def begin(self) -> None:
        """Write config.json and listen for signals: the command has been found to belong here."""
        if self.procs.main:
            checkpoint.sweep(self.folder)
            values = as_dict(*self.configs)
            # Another folder may be the working one when somebody reads this.
            places = {name: os.path.abspath(values[name]) for name in ("data", "val_data")
                      if values[name] not in BUILT_IN}
            content = {"preset": self.preset, **values, **places}
            path = self.path("config.json")
            if not os.path.exists(path) or checkpoint.read_json(path) != content:
                checkpoint.write_json(path, content)
        self.procs.catch_signals()

    def end(self) -> None:
        self.procs.end()
        if self.procs.main:
            forget_holder(self.lock)
            self.lock.close()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    # --------------------------------------------------------------------------------------------
    # checkpoints

    def compare(self, path: str, fixed: dict) -> dict | None:
        """The checkpoint at `path`, None if there is none.

        Raises UserError unless it was trained with these settings, as far as `fixed` names them,
        and on these images.
        """
        if not checkpoint.exists(path):
            return None
        saved = checkpoint.load(path, needs=("settings", "data"))
        # A setting that is newer than the checkpoint had its default's effect.
        defaults = as_dict(*build(tuple(map(type, self.configs)), {}))
        was = {name: defaults[name] for name in fixed if name in defaults}
        was |= without_constants(saved["settings"])
        old = as_flags({name: tuple(value) if isinstance(value, list) else value
                        for name, value in was.items() if fixed.get(name) != value})
        checkpoint.check_same(was, fixed, f"{path}: settings", "start anew in another --run "
                              f"folder, or go on with {' '.join(old) or 'the version of then'}")
        self.data = same_images(path, saved, self.data)
        self.told = self.told or tell_other_held_out(path, saved, self.val)
        return saved

    def resume(self, path: str, fixed: dict, needs: tuple[str, ...] = ()) -> dict | None:
        """compare(), and all that it takes to go on must be there."""
        saved = self.compare(path, fixed)
        if saved is None:
            return None
        expected = ("settings", "data", "phase", "step", "model", "ema", "optimizer", "random")
        missing = [name for name in (*expected, *needs) if name not in saved]
        need(not missing, f"{path} has no {', '.join(missing)}")
        return saved

    def stream(self, batch_size: int, step: int) -> ImageStream:
        """Training images, as pixels and labels, from that step on."""
        train, procs = self.train, self.procs
        return ImageStream(self.data, self.configs[0].image_size, batch_size, seed=train.seed,
                           flip=train.flip, random_crop=train.random_crop, rank=procs.rank,
                           world=procs.world, start_step=step, workers=train.workers,
                           skip_bad=train.skip_bad, timeout=train.timeout)

    def seed(self, states: list | None, number: int) -> None:
        """Go on with saved random numbers; with none, or those of another world, seed anew."""
        if states and len(states) == self.procs.world:
            checkpoint.set_random_state(states[self.procs.rank])
        else:
            torch.manual_seed(self.train.seed * 1_000_003 + number * 1009 + self.procs.rank)

    def save(self, path: str, **content) -> None:
        random = self.procs.gather(checkpoint.random_state())
        if self.procs.main:
            images = {"data": self.data.fingerprint, "images": len(self.data),
                      "classes": self.data.classes, "held_out": self.val.fingerprint}
            if self.data.prints:  # to tell files that have turned bad from other images
                images |= {"listing": self.data.prints.listing,
                           "content": torch.from_numpy(self.data.prints.content)}
            checkpoint.save(path, {"random": random, **images, **content})
        self.procs.barrier()  # or another process would look for it too early

    # --------------------------------------------------------------------------------------------
    # what a person sees

    def say(self, text: str) -> None:
        if self.procs.main:
            print(text, flush=True)

    def trim_log(self, phase: str, step: int) -> None:
        """Before a phase goes on from `step`, 0 without a checkpoint: drop what is written again.

        These are the lines of later steps, and one of results, whose checkpoint was never made.
        """
        if self.procs.main:
            checkpoint.trim_jsonl(self.path("log.jsonl"), lambda row: row["phase"] != phase
                                  or (row["step"] <= step and "learning_rate" in row))

    def log(self, **row) -> None:
        if self.procs.main:
            checkpoint.append_jsonl(self.path("log.jsonl"), row)

    def some_held_out(self, n: int) -> Tensor:
        """n held-out images, spread over all of them: uint8 (n, S, S, 3)."""
        chosen = self.eval_indices[::max(1, len(self.eval_indices) // n)]
        size = self.configs[0].image_size
        batches = eval_batches(self.val, size, n, chosen, skip_bad=self.train.skip_bad)
        return next(batches)[0]

    def grid(self, name: str, rows: list[Tensor]) -> None:
        """Write samples/NAME.png from rows of float images (n, 3, H, W), all with the same n."""
        images = torch.cat([to_uint8(row.cpu()) for row in rows])
        save_grid(images, self.path(f"samples/{name}.png"), columns=len(rows[0]),
                  scale=max(1, 64 // images.shape[1]))


def same_images(path: str, saved: dict, data: ImageSet) -> ImageSet:
    """-> the images, under the fingerprint by which the checkpoint `saved` knows them.

    Raises UserError unless it has learned from these very images. Files that have turned bad since
    then are told and let pass: whoever reads them will stop, and what was learned is kept.
    """
    if saved["data"] == data.fingerprint:
        return data
    first = os.path.join(os.path.dirname(path), SYSTEMS["-m d2it.train"])
    program = "-m d2it.train" if checkpoint.exists(first) else "train.py"
    content = np.asarray(saved.get("content", torch.zeros(0)), np.int64)
    broken = data.broken_since(saved.get("listing", ""), content)
    need(broken,
         f"{path}: data changed: it learned from {saved.get('images', 'other')} images, and "
         f"{data.name} has {len(data)} to learn from, not the same; give python {program} --data "
         "as it was (it may lie elsewhere), or start anew in another --run folder")
    note(f"{path}: {some_of(broken)} cannot be read any more; the other images are as they were")
    return replace(data, fingerprint=saved["data"], prints=data.prints._replace(content=content))


def tell_other_held_out(path: str, saved: dict, val: ImageSet) -> bool:
    """Has the checkpoint `saved` been judged by other images? They may change, with a note."""
    changed = saved.get("held_out", val.fingerprint) != val.fingerprint
    if changed:
        note(f"{path}: other images were held out than the {len(val):,} of {val.name}; what is "
             "told of those must not be compared with what is told of these")
    return changed


# ------------------------------------------------------------------------------------------------
# for programs that read a finished run

@dataclass(frozen=True)
class OpenRun:
    """A run as its checkpoint knows it: configurations, images, the checkpoint itself."""
    folder: str
    configs: tuple     # one instance of each dataclass that open_run was given
    data: ImageSet     # what it has learned from
    val: ImageSet      # what was held out
    saved: dict        # the content of the checkpoint


def unfinished(saved: dict, path: str) -> str:
    """How far training had come that was not at its end: "ar: step 10 of 1,000"; else "".

    saved   the checkpoint at `path`, of any network of either system
    It is also told on stderr: what such a network makes looks like any other picture or number.
    """
    phase, settings = saved.get("phase", "finished"), saved.get("settings", {})
    if phase == "finished":
        return ""
    more = ""
    if "results" in saved:  # a tokenizer, whose phases come one after the other
        last = "finetune" if len(settings["token_schedule"]) > 1 else "base"
        if last in saved["results"]:
            return ""
        more = f", and it goes on up to {last}" if phase != last else ""
    kind = "generator" if phase in ("ar", "maskgit") else phase.partition("-")[0]
    text = f"{phase}: step {saved['step']:,} of {settings[f'{kind}_steps']:,}{more}"
    note(f"{path} is unfinished, {text}")
    return text


def need_parts(folder: str, names: tuple[str, ...], program: str) -> None:
    """Raise UserError unless the run has the checkpoints `names` that `program` makes."""
    def has(name):
        return checkpoint.exists(os.path.join(folder, name))
    missing = [name for name in names if not has(name)]
    made_by = [other for other, part in SYSTEMS.items() if other != program and has(part)]
    need(not missing or not made_by, f"{folder} is a run of python {' and '.join(made_by)}, the "
         f"other system; give one of python {program}")
    need(not missing, f"{folder} has no {' and no '.join(missing)}; train it: "
         f"python {program} --run {folder}")


def open_run(folder: str, configs: tuple[type, ...], name: str = "tokenizer.pt",
             program: str = "train.py") -> OpenRun:
    """Open a run to look at it: the settings are those that the checkpoint `name` was made with.

    config.json tells only where the images lie now and what may differ (workers, skip_bad ...).
    Raises UserError when there is no checkpoint, and when the images are no longer those that it
    has learned from: a folder that grew would hold out others, which may have been trained on.
    """
    path = os.path.join(folder, name)
    values = read_run(folder)
    need_parts(folder, (name,), program)
    saved = checkpoint.load(path, needs=("settings", "data"))
    del values["preset"]
    values |= {name: value for name, value in saved["settings"].items() if name not in PLACES}
    try:
        data, val = train_and_val(values["data"], values["val_data"], values["holdout"],
                                  values["seed"])
    except UserError as error:
        raise UserError(f"{error} (data and val_data of {folder}/config.json)") from error
    data = same_images(path, saved, data)
    tell_other_held_out(path, saved, val)
    return OpenRun(folder, build(configs, values), data, val, saved)


def need_same_held_out(run: OpenRun, other: OpenRun) -> None:
    """Raise UserError unless both runs hold out the same images, which two measures side by side
    ask for: what one of them has learned from, it knows better."""
    need(other.val.fingerprint == run.val.fingerprint, f"{other.folder} holds out other images "
         f"than {run.folder}, so it may have learned from those that are shown; train both on the "
         "same --data and --val_data, with the same --seed and --holdout")


def held_out(run: OpenRun, limit: int = 1000) -> tuple[Tensor, Tensor]:
    """-> some of the run's held-out images, uint8 (n, H, W, 3), and their labels (n,)."""
    indices = np.random.default_rng(0).permutation(len(run.val))[:limit]
    batches = list(eval_batches(run.val, run.configs[0].image_size, 250, indices,
                                skip_bad=run.configs[-1].skip_bad))
    return (torch.cat([images for images, _ in batches]),
            torch.cat([labels for _, labels in batches]))
