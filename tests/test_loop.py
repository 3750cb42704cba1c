"""loop.py: runs of both systems that end at any moment and go on; a step, however it is cut."""
import multiprocessing
import os
import shutil
import signal

import pytest
import torch

import d2it.train
import loop
import losses
import train
from d2it import presets
from d2it.diffusion import loss as diffusion_loss
from helpers import (
    SMALL,
    folder_of,
    interrupt_at,
    program,
    ranks,
    refused,
    rows,
    same_content,
    train_shapes,
    without_times,
)
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing import run as run_folder
from plumbing.batches import ImagesFailed

pytestmark = pytest.mark.usefixtures("quick")

# d2it.train's flags for a run of a second.
D2IT = ("--preset d2it-tiny --dvae_width 8 --content_width 32 --content_depth 1 --refine_depth 1 "
        "--content_heads 2 --grain_width 32 --grain_depth 1 --grain_heads 2 --batch_size 8 "
        "--dvae_steps 5 --grain_steps 5 --content_steps 5 --save_every 1000 --log_every 1 "
        "--sample_every 1000 --device cpu").split()
FILES = {"train": ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt"),
         "d2it.train": ("dvae.pt", "grain.pt", "content.pt")}


def train_codes(folder, data, *flags) -> None:
    """d2it.train in this process."""
    d2it.train.main(presets.parse_run("", [*D2IT, "--run", str(folder), "--data", data, *flags]))


PROGRAMS = {"train": train_shapes, "d2it.train": train_codes}


@pytest.fixture(scope="module")
def whole(finished, data, tmp_path_factory):
    """Of each program a run that nothing happened to."""
    folder, patch = tmp_path_factory.mktemp("whole"), pytest.MonkeyPatch()
    patch.setattr(run_folder, "EVAL_IMAGES", 20)
    train_codes(folder, data)
    patch.undo()
    return {"train": finished, "d2it.train": folder}


def need_same_weights(name: str, one, other) -> None:
    for file in FILES[name]:
        a, b = (without_times(checkpoint.load(folder / file)) for folder in (one, other))
        assert same_content(a, b), file


def steps(folder, phase=None) -> list:
    return [(row["phase"], row["step"]) for row in rows(folder)
            if "learning_rate" in row and phase in (None, row["phase"])]


# ------------------------------------------------------------------------------------------------
# stopped at any moment

@pytest.mark.parametrize("name, phases", [
    ("train", ("base", "grow-4", "finetune", "ar", "maskgit")),
    ("d2it.train", ("dvae", "grain", "content"))])
def test_stopped_before_the_first_step_of_each_stage_it_goes_on_to_the_same_bits(
        whole, data, tmp_path, name, phases):
    def stopped(self, batches, original=loop.Loop.over):
        if self.name == phase:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batches)
    for phase in phases:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(loop.Loop, "over", stopped)
            PROGRAMS[name](tmp_path, data)
        assert left.value.code == loop.INTERRUPTED
        assert phase not in {row["phase"] for row in rows(tmp_path)} if (
            tmp_path / "log.jsonl").exists() else phase == phases[0]
    PROGRAMS[name](tmp_path, data)
    need_same_weights(name, tmp_path, whole[name])
    assert steps(tmp_path) == steps(whole[name])


def test_an_optimizer_that_has_made_no_step_can_be_gone_on_from():
    """As when each step so far was skipped: not finite."""
    net = torch.nn.Linear(4, 4)
    fresh = loop.new_optimizer(net, "adamw", 0.1, 0.99)
    state = loop.new_optimizer(net, "adamw", 0.1, 0.99).state_dict()
    checkpoint.load_optimizer(fresh, state, "it")
    refused(checkpoint.load_optimizer, fresh, {**state, "state": {}}, "it", names=["0 parameters"])


@pytest.mark.parametrize("name, phase, step", [
    ("train", "base", 4), ("train", "grow-4", 2), ("train", "ar", 3),
    ("d2it.train", "dvae", 3), ("d2it.train", "content", 4)])
def test_killed_before_the_first_checkpoint_each_step_is_logged_once(
        whole, data, tmp_path, monkeypatch, name, phase, step):
    class Killed(BaseException):
        pass
    write = checkpoint.append_jsonl

    def write_and_die(path, row):
        write(path, row)
        if (row["phase"], row["step"]) == (phase, step):
            raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "append_jsonl", write_and_die)
        PROGRAMS[name](tmp_path, data, "--save_every", "1000")
    assert (phase, step) in steps(tmp_path)
    PROGRAMS[name](tmp_path, data)
    assert steps(tmp_path) == steps(whole[name])
    need_same_weights(name, tmp_path, whole[name])


@pytest.mark.parametrize("name, phase", [("train", "base"), ("d2it.train", "grain")])
def test_killed_between_the_results_and_their_checkpoint_these_are_logged_once(
        whole, data, tmp_path, monkeypatch, name, phase):
    class Killed(BaseException):
        pass
    write = checkpoint.append_jsonl

    def write_and_die(path, row):
        write(path, row)
        if row["phase"] == phase and "learning_rate" not in row:
            raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "append_jsonl", write_and_die)
        PROGRAMS[name](tmp_path, data)
    PROGRAMS[name](tmp_path, data)
    results = [row["phase"] for row in rows(tmp_path) if "learning_rate" not in row]
    assert results.count(phase) == 1 and len(results) == len(set(results))


# ------------------------------------------------------------------------------------------------
# images that fail

def torn_after(monkeypatch, folder, phase: str, step: int) -> dict:
    """All files of `folder` are torn as soon as that line of the log is written -> what they were.

    Images that this process has read are remembered, so the first bad one comes somewhat later.
    """
    files = {path: (path.read_bytes(), path.stat()) for path in folder.rglob("*.png")}
    write = checkpoint.append_jsonl

    def write_and_tear(path, row):
        write(path, row)
        if (row["phase"], row["step"]) == (phase, step):
            for file, (content, _) in files.items():
                file.write_bytes(b"x" * len(content))
    monkeypatch.setattr(checkpoint, "append_jsonl", write_and_tear)
    return files


def mend(files: dict) -> None:
    for path, (content, was) in files.items():
        path.write_bytes(content)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("name, phase, step, flags", [
    ("train", "base", 2, ()),                           # the next batch
    ("train", "base", 2, ("--sample_every", "2")),      # the held-out images of a picture
    ("train", "base", 6, ("--sample_every", "9")),      # those that the phase is judged by
    ("d2it.train", "dvae", 5, ())])
def test_images_that_fail_in_mid_training_lose_no_step(tmp_path, name, phase, step, flags):
    pictures, run = folder_of(tmp_path / "pictures", 60, size=32), tmp_path / "run"
    more = ["--log_every", "1", "--save_every", "1000", "--no-flip", *flags]
    with pytest.MonkeyPatch.context() as patch:
        files = torn_after(patch, pictures, phase, step)
        said = refused(PROGRAMS[name], run, str(pictures), *more, names=["is saved"])
    assert ".png" in said
    done = steps(run, phase)[-1][1]
    assert done == step or not flags
    file = next(f for f in FILES[name] if checkpoint.exists(run / f)
                and checkpoint.load(run / f)["phase"] == phase)
    assert checkpoint.load(run / file)["step"] == done >= step
    mend(files)
    PROGRAMS[name](run, str(pictures), *more)
    PROGRAMS[name](tmp_path / "whole", str(pictures), *more)
    need_same_weights(name, run, tmp_path / "whole")
    assert steps(run) == steps(tmp_path / "whole")


@pytest.mark.parametrize("name, phase", [("train", "base"), ("d2it.train", "dvae")])
def test_a_data_worker_that_is_killed_loses_no_step(whole, data, tmp_path, name, phase):
    write = checkpoint.append_jsonl

    def write_and_kill(path, row):
        write(path, row)
        if (row["phase"], row["step"]) == (phase, 2):
            worker = multiprocessing.active_children()[0]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "append_jsonl", write_and_kill)
        refused(PROGRAMS[name], tmp_path, data, "--workers", "1", "--save_every", "1000",
                names=["a data worker died", f"step 2 of {phase} is saved"])
    PROGRAMS[name](tmp_path, data)
    need_same_weights(name, tmp_path, whole[name])


ONE_FAILS = """
import os, sys
import config, d2it.train, loop, train
from d2it import presets
from plumbing import datasets, run
from plumbing.flags import UserError
from plumbing.start import main_with_user_errors
run.EVAL_IMAGES, seen, load, over = 20, [], datasets.ImageSet.load, loop.Loop.over
def from_now_on(self, batches):  # images are read before, to know them again and to calibrate
    datasets.ImageSet.load = fail
    return over(self, batches)
def fail(self, *args):
    seen.append(1)
    if os.environ["RANK"] == "1" and len(seen) > %d:
        raise UserError("dog/7.png: torn")
    return load(self, *args)
loop.Loop.over = from_now_on
if sys.argv[1] == "train":
    main_with_user_errors(lambda: train.main(config.parse_run("", sys.argv[2:])))
else:
    main_with_user_errors(lambda: d2it.train.main(presets.parse_run("", sys.argv[2:])))
"""


@pytest.mark.parametrize("name, read, step", [("train", 12, 3), ("d2it.train", 8, 2)])
def test_images_that_fail_on_one_of_two_processes_lose_no_step(data, tmp_path, name, read, step):
    """4 images a step and process."""
    flags = [*(SMALL if name == "train" else D2IT), "--run", tmp_path, "--data", data,
             "--stage", 1, "--save_every", 1000]
    for rank in ranks(2, "-c", ONE_FAILS % read, name, *flags):
        assert rank.returncode == 2, rank.stderr
        last = rank.stderr.replace("\r", "\n").splitlines()[-1:]
        assert not last or (last[0].startswith("error: dog/7.png") and "is saved" in last[0])
    assert checkpoint.load(tmp_path / FILES[name][0])["step"] == step
    assert program(f"{name}.py" if name == "train" else "-m", *([] if name == "train" else [name]),
                   *flags).returncode == 0


# ------------------------------------------------------------------------------------------------
# a step, however it is cut

def same_but_for_accumulate(folder, copy, names, accumulate: int) -> None:
    """A copy of a run without some of its checkpoints, as if trained with so many micro-batches."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*.pt"):
        if file.name.startswith(names):
            file.unlink()
        else:
            saved = checkpoint.load(file)
            saved["settings"]["accumulate"] = accumulate
            checkpoint.save(file, saved)


@pytest.mark.parametrize("name, missing, phases", [
    ("train", ("generator",), ("ar", "maskgit")),
    ("d2it.train", ("dvae", "grain", "content"), ("dvae",)),
    ("d2it.train", ("grain", "content"), ("grain", "content"))])
def test_two_processes_with_micro_batches_take_the_steps_of_one(
        whole, data, tmp_path, name, missing, phases):
    """Where masks, times and noise are the same: tests/same_noise.py sees to that."""
    flags = [*(SMALL if name == "train" else D2IT), "--data", data, "--label_dropout", 0,
             "--log_every", 1, "--save_every", 1000, "--sample_every", 1000, "--optimizer",
             "adamw"] + (["--generator_dropout", 0] if name == "train" else [])
    if phases == ("dvae",):
        flags += ["--stage", 1, "--kl_weight", 10]             # else nobody would notice it
    for folder, accumulate, count in (("one", 1, 1), ("two", 2, 2)):
        same_but_for_accumulate(whole[name], tmp_path / folder, missing, accumulate)
        (tmp_path / folder / "log.jsonl").unlink()
        for file in (tmp_path / folder).glob("*.pt"):          # other settings than those it had
            saved = checkpoint.load(file)
            saved["settings"] |= {"optimizer": "adamw"}
            checkpoint.save(file, saved)
        command = ["tests/same_noise.py", name, *flags, "--run", tmp_path / folder,
                   "--accumulate", accumulate]
        for done in [program(*command)] if count == 1 else ranks(2, *command):
            assert done.returncode == 0, done.stderr[-3000:]
    for phase in phases:
        one, two = ([row for row in rows(tmp_path / folder) if row["phase"] == phase
                     and "grad_norm" in row] for folder in ("one", "two"))
        assert len(one) == len(two) == 5
        for a, b in zip(one, two):
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-5), phase


def test_a_term_that_some_micro_batches_lack_is_averaged_over_those_that_have_it(
        data, tmp_path, monkeypatch):
    calls = []

    def some_have_it(*args, **kwargs):
        loss, logs = diffusion_loss(*args, **kwargs)
        calls.append(1)
        return loss, {"fine": torch.tensor(2.0)} if len(calls) % 4 == 0 else {}
    monkeypatch.setattr(d2it.train.diffusion, "loss", some_have_it)
    train_codes(tmp_path, data, "--accumulate", "4")
    logged = [row for row in rows(tmp_path) if row["phase"] == "content" and "grad_norm" in row]
    assert [row["fine"] for row in logged] == [2.0] * 5


def test_only_the_forward_of_the_model_runs_under_autocast(data, tmp_path, monkeypatch):
    seen = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, watched)
    watch(NativeTok, "forward")
    for owner, name in ((train, "show_reconstructions"), (train, "evaluate"),
                        (checkpoint, "save"), (losses.Adversary, "learn"),
                        (losses.Adversary, "judge"), (train, "update_codebook"),
                        (loop.Loop, "backward"), (run_folder.Run, "grid")):
        watch(owner, name)
    train_shapes(tmp_path / "a", data, "--stage", "1", "--precision", "bf16", "--save_every", "2",
                 "--sample_every", "2", "--adversarial_weight", "0.1", "--adversarial_start", "4",
                 "--adversarial_warmup", "3")
    train_codes(tmp_path / "b", data, "--precision", "bf16", "--save_every", "2",
                "--sample_every", "2")
    assert seen.pop("forward") == {True}
    assert len(seen) == 8 and set(map(frozenset, seen.values())) == {frozenset({False})}, seen


def test_the_quantizer_begins_on_time_when_the_step_in_question_was_skipped_and_saved(
        data, tmp_path):
    """SMALL quantizes after step 3; that step is not finite, and the run is stopped there."""
    def broken_at(number):
        calls = iter(range(1, 100))

        def once(recon, images, original=losses.reconstruction):
            return original(recon, images) * (float("nan") if next(calls) == number else 1)
        return once
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "parts", 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "reconstruction", broken_at(3))
            if stop:
                interrupt_at(patch, "base", stop)
                with pytest.raises(SystemExit):
                    train_shapes(folder, data, "--stage", "1")
            else:
                train_shapes(folder, data, "--stage", "1")
    assert checkpoint.load(tmp_path / "parts" / "tokenizer.pt")["bypass"]
    train_shapes(tmp_path / "parts", data, "--stage", "1")
    saved = [without_times(checkpoint.load(tmp_path / f / "tokenizer.pt")) for f in
             ("whole", "parts")]
    assert same_content(*saved)


def test_muon_without_a_matrix_says_so_in_one_line(data, tmp_path, capsys):
    train_codes(tmp_path, data)
    told = [line for line in capsys.readouterr().out.splitlines() if "--optimizer muon" in line]
    assert len(told) == 1 and told[0].startswith("dvae: no hidden matrices")


def test_d2it_gives_its_timeout_to_the_data_workers(data, tmp_path, monkeypatch):
    seen = []

    class Stream(run_folder.ImageStream):
        def __iter__(self):
            seen.append(self.timeout)
            return super().__iter__()
    monkeypatch.setattr(run_folder, "ImageStream", Stream)
    train_codes(tmp_path, data, "--timeout", "77")
    assert seen == [77] * 3


def test_images_failed_is_what_a_stream_of_bad_images_raises(tmp_path):
    from plumbing.batches import ImageStream
    from plumbing.datasets import open_images
    pictures = folder_of(tmp_path, 8)
    next(pictures.rglob("*.png")).write_bytes(b"x")
    with pytest.raises(ImagesFailed):
        list(zip(range(9), ImageStream(open_images(str(pictures)), 8, 2, seed=0)))
