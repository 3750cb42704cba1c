"""loop.py: a loop by itself, runs of both systems that end at any moment and go on, and a step that
is the same, however it is cut."""
import itertools
import multiprocessing
import os
import shutil
import signal
import textwrap

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import d2it.train
import loop
import losses
import train
from config import Optim
from d2it import presets
from helpers import (
    SMALL, SMALL_D2IT, folder_of, interrupt_at, program, ranks, refused, rows, same_content,
    train_shapes, when_logged, without_times)
from loop import Loop, make_ema, new_optimizer
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing import run as run_folder

pytestmark = pytest.mark.usefixtures("quick")
also = pytest.mark.faults  # another case of a promise that `make test` holds by its first one

PHASES = {"train": ("base", "grow-4", "grow-6", "finetune", "ar", "maskgit",
                    "flow_decoder"),
          "d2it.train": ("dvae", "grain", "content")}
FILES = {"train": ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt", "flow-decoder.pt"),
         "d2it.train": ("dvae.pt", "grain.pt", "content.pt")}
FLAGS = {"train": SMALL, "d2it.train": SMALL_D2IT}


def train_codes(folder, data, *flags) -> None:
    """d2it.train in this process."""
    words = [*SMALL_D2IT, "--run", str(folder), "--data", data, *flags]
    d2it.train.main(presets.parse_run("", words))


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
        if checkpoint.exists(one / file) or checkpoint.exists(other / file):
            a, b = (without_times(checkpoint.load(folder / file)) for folder in (one, other))
            assert same_content(a, b), file


def steps(folder, phase=None) -> list:
    return [(row["phase"], row["step"]) for row in rows(folder)
            if "learning_rate" in row and phase in (None, row["phase"])]


def without_clock(folder) -> list[dict]:
    quick = ("seconds", "per_second", "peak_mb")
    return [{k: v for k, v in row.items() if k not in quick} for row in rows(folder)]


# ------------------------------------------------------------------------------------------------
# a loop by itself, as in a notebook

def endless(rows_each: int = 8):
    noise = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(rows_each, 3, generator=noise)
        yield x, x.sum(1, keepdim=True)


def fit(batches=None, steps: int = 12, factor=lambda step: 1.0, **options):
    """A line, fitted -> the model, the rows of the log. The loss is multiplied by factor(step)."""
    torch.manual_seed(0)
    model, logged = nn.Linear(3, 1), []
    optim = Optim(8, steps, 0.1, 0.01, 1, 0.99, 0.0)
    alone = Loop(model, make_ema(model), new_optimizer(model, "adamw", 0.0, 0.99), optim,
                 on_log=logged.append, **options)
    for x, y in alone.over(batches or endless()):
        loss = mse_loss(alone.model(x), y) * factor(alone.step)
        alone.backward(loss, {})
    return model, logged


def test_the_example_at_the_head_of_the_file_learns():
    example = loop.__doc__.split("anybody's program:\n\n")[1].split("\n\nStage")[0]
    logged = []
    exec(textwrap.dedent(example), {**vars(loop), "mse": mse_loss, "batches": endless(64),
                                    "print": logged.append})
    assert [row["step"] for row in logged] == list(range(50, 1001, 50))
    assert logged[-1]["mse"] < 0.01 * logged[0]["mse"]
    assert {"loss", "grad_norm", "learning_rate", "per_second", "peak_mb"} <= set(logged[-1])


def test_batches_that_end_before_the_steps_do_are_a_user_error():
    refused(fit, itertools.islice(endless(), 4), names=["ended after 4 of 12 steps", "endless"])
    fit(itertools.islice(endless(), 12))


@pytest.mark.parametrize("one, other", [
    (dict(grad_clip=0.0), dict(grad_clip=1e9)),            # 0 is no limit
    (dict(log_every=1), dict(log_every=5))])
def test_the_weights_are_the_same_to_the_bit_with(one, other):
    limited = fit(factor=lambda step: 10.0 ** step, grad_clip=0.1)[0].state_dict()
    free = fit(factor=lambda step: 10.0 ** step, grad_clip=0.0)[0].state_dict()
    assert not same_content(limited, free), "a limit shows"
    assert same_content(fit(**one)[0].state_dict(), fit(**other)[0].state_dict())


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run():
    nan = float("nan")
    model, logged = fit(factor=lambda step: nan if step == 3 else 1.0, log_every=2)
    assert [row.get("skipped", 0) for row in logged] == [0, 1, 0, 0, 0, 0]
    assert all(row["loss"] > 0 for row in logged)
    refused(lambda: fit(factor=lambda step: nan), names=["step 10", "not finite in 10 steps"])


def test_a_term_that_some_micro_batches_lack_is_averaged_over_those_that_have_it():
    model, logged = nn.Linear(3, 1), []
    cut = Loop(model, None, new_optimizer(model, "adamw", 0.0, 0.99),
               Optim(8, 3, 0.1, 0.1, 1, 0.99, 0.0), accumulate=4, log_every=1,
               on_log=logged.append)
    for number, (x, y) in enumerate(cut.over(endless())):
        terms = {"some": torch.tensor(2.0)} if number % 4 == 3 else {}
        cut.backward(mse_loss(model(x), y), terms)
    assert [row["some"] for row in logged] == [2.0] * 3


def test_an_optimizer_that_has_made_no_step_can_be_gone_on_from():
    """As when each step so far was skipped: not finite."""
    net = nn.Linear(4, 4)
    fresh = new_optimizer(net, "adamw", 0.1, 0.99)
    state = new_optimizer(net, "adamw", 0.1, 0.99).state_dict()
    checkpoint.load_optimizer(fresh, state, "it")
    refused(checkpoint.load_optimizer, fresh, {**state, "state": {}}, "it", names=["0 parameters"])


def test_the_average_follows_what_learns_and_does_not_touch_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = make_ema(model)
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[1].weight += 1
    before, frozen = ema[1].weight.clone(), ema[0].weight._version
    loop.update_ema(ema, model, 0.9, 1000)
    torch.testing.assert_close(ema[1].weight, before + 0.1)
    assert ema[0].weight._version == frozen


def test_the_learning_rate_rises_falls_and_ends_where_it_should():
    rates = [loop.learning_rate(step, 100, 1.0, 0.1, 10) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == 0.1 and max(rates) == 1.0 and 0.1 <= rates[-1] < 0.101
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


# ------------------------------------------------------------------------------------------------
# stopped at any moment

class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def stop(patch, phase: str, moment: str) -> None:
    """See to it that the run ends in this phase, at this moment."""
    if moment == "before the first step":
        def stopped(self, batches, original=Loop.over):
            if self.name == phase:
                signal.raise_signal(signal.SIGTERM)
            return original(self, batches)
        patch.setattr(Loop, "over", stopped)
    elif moment == "a signal":
        interrupt_at(patch, phase, 2)
    elif moment == "killed":
        when_logged(patch, phase, 3, kill)
    else:
        when_logged(patch, phase, None, kill)


# In each phase another moment; four such runs have every moment in every phase.
MOMENTS = ("a signal", "killed", "before the first step", "killed before results are saved")
# A picture at each step, so pictures leave the weights alone too; no checkpoint before the kill.
MORE = {"a signal": ("--sample_every", "1"), "killed": ("--save_every", "1000")}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("first", [0, *(pytest.param(k, marks=also) for k in (1, 2, 3))])
def test_stopped_in_every_phase_a_run_goes_on_to_the_same_bits(whole, data, tmp_path, name, first):
    for number, phase in enumerate(PHASES[name]):
        moment = MOMENTS[(first + number) % 4]
        with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, Killed)) as left:
            stop(patch, phase, moment)
            PROGRAMS[name](tmp_path, data, *MORE.get(moment, ()))
        assert left.type is Killed or left.value.code == loop.INTERRUPTED
    PROGRAMS[name](tmp_path, data)
    need_same_weights(name, tmp_path, whole[name])
    assert without_clock(tmp_path) == without_clock(whole[name]), "each line once, and the same"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_finished_run_is_left_as_it_is(whole, data, name):
    folder = whole[name]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before[folder / ".lock"] == b"", "nobody writes there any more"
    PROGRAMS[name](folder, data)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_quantizer_begins_on_time_when_the_step_in_question_was_skipped_and_saved(
        data, tmp_path):
    """SMALL quantizes after step 3; that step is not finite, and the run is stopped there."""
    def broken_at(number):
        calls = iter(range(1, 100))

        def once(recon, images, original=losses.reconstruction):
            return original(recon, images) * (float("nan") if next(calls) == number else 1)
        return once

    def run(folder, stopped: bool) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "reconstruction", broken_at(3))
            if stopped:
                interrupt_at(patch, "base", 3)
            train_shapes(folder, data, "--stage", "1")
    run(tmp_path / "whole", False)
    logged = [row for row in rows(tmp_path / "whole") if "learning_rate" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[2]["skipped"] == 1 and "loss" not in logged[2]
    assert logged[1]["commitment"] == 0 == logged[3]["commitment"]
    assert all(row["commitment"] > 0 for row in logged[4:])
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", True)
    assert checkpoint.load(tmp_path / "parts" / "tokenizer.pt")["bypass"]
    train_shapes(tmp_path / "parts", data, "--stage", "1")
    need_same_weights("train", tmp_path / "parts", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------
# images that fail

def torn_after(patch, folder, phase: str, step: int) -> dict:
    """All files of `folder` are torn as soon as that line of the log is written -> what they were.

    Images that this process has read are remembered, so the first bad one comes somewhat later.
    """
    files = {path: (path.read_bytes(), path.stat()) for path in folder.rglob("*.png")}

    def tear():
        for file, (content, _) in files.items():
            file.write_bytes(b"x" * len(content))
    when_logged(patch, phase, step, tear)
    return files


def mend(files: dict) -> None:
    for path, (content, was) in files.items():
        path.write_bytes(content)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("name, phase, step, flags", [
    ("train", "base", 2, ()),                                          # the next batch
    pytest.param("train", "base", 2, ("--sample_every", "2"), marks=also),        # a picture
    pytest.param("train", "base", 6, ("--sample_every", "9"), marks=also),        # the judgement
    ("d2it.train", "dvae", 5, ("--sample_every", "9"))])
def test_images_that_fail_in_mid_training_lose_no_step(tmp_path, name, phase, step, flags):
    pictures, run = folder_of(tmp_path / "pictures", 60, size=32), tmp_path / "run"
    more = ["--stage", "1", "--save_every", "1000", "--no-flip", *flags]
    with pytest.MonkeyPatch.context() as patch:
        files = torn_after(patch, pictures, phase, step)
        said = refused(PROGRAMS[name], run, str(pictures), *more, names=["is saved"])
    assert ".png" in said
    done = steps(run, phase)[-1][1]
    assert done == step or not flags
    saved = checkpoint.load(run / FILES[name][0])
    assert saved["phase"] == phase and saved["step"] == done >= step
    mend(files)
    PROGRAMS[name](run, str(pictures), *more)
    PROGRAMS[name](tmp_path / "whole", str(pictures), *more)
    need_same_weights(name, run, tmp_path / "whole")
    assert steps(run) == steps(tmp_path / "whole")


def test_a_data_worker_that_is_killed_loses_no_step(whole, data, tmp_path):
    def kill_worker():
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with pytest.MonkeyPatch.context() as patch:
        when_logged(patch, "dvae", 2, kill_worker)
        refused(train_codes, tmp_path, data, "--workers", "1", "--save_every", "1000",
                names=["a data worker died", "step 2 of dvae is saved"])
    train_codes(tmp_path, data)
    need_same_weights("d2it.train", tmp_path, whole["d2it.train"])


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


@pytest.mark.parametrize("name, read, step", [
    ("train", 12, 3), pytest.param("d2it.train", 8, 2, marks=also)])
def test_images_that_fail_on_one_of_two_processes_lose_no_step(data, tmp_path, name, read, step):
    """4 images a step and process."""
    flags = [*FLAGS[name], "--run", tmp_path, "--data", data, "--stage", 1, "--save_every", 1000]
    for rank in ranks(2, "-c", ONE_FAILS % read, name, *flags):
        assert rank.returncode == 2, rank.stderr
        last = rank.stderr.replace("\r", "\n").splitlines()[-1:]
        assert not last or (last[0].startswith("error: dog/7.png") and "is saved" in last[0])
    assert checkpoint.load(tmp_path / FILES[name][0])["step"] == step
    PROGRAMS[name](tmp_path, data, "--stage", "1", "--save_every", "1000")


# ------------------------------------------------------------------------------------------------
# a step, however it is cut

def to_be_repeated(folder, copy, names, accumulate: int) -> None:
    """A copy of a run without some of its checkpoints, as if trained with so many micro-batches."""
    shutil.copytree(folder, copy)
    (copy / "log.jsonl").unlink()
    for file in copy.glob("*.pt"):
        if file.name.startswith(names):
            file.unlink()
        else:
            saved = checkpoint.load(file)
            saved["settings"] |= {"accumulate": accumulate, "optimizer": "adamw"}
            checkpoint.save(file, saved)


@pytest.mark.parametrize("name, missing, phases", [
    ("train", ("generator", "flow"), ("ar", "maskgit", "flow_decoder")),
    ("d2it.train", ("dvae", "grain", "content"), ("dvae",)),
    ("d2it.train", ("grain", "content"), ("grain", "content"))])
def test_two_processes_with_micro_batches_take_the_steps_of_one(
        whole, data, tmp_path, name, missing, phases):
    """Where masks, times and noise are the same: tests/same_noise.py sees to that. The phases of
    the tokenizer, which has no such noise: test_train.py."""
    flags = [*FLAGS[name], "--data", data, "--save_every", 1000, "--sample_every", 1000,
             "--optimizer", "adamw"]
    if name == "train":
        flags += ["--generator_dropout", 0]
    if phases == ("dvae",):
        flags += ["--stage", 1, "--kl_weight", 10]             # else nobody would notice it
    for folder, accumulate in (("one", 1), ("two", 2)):
        to_be_repeated(whole[name], tmp_path / folder, missing, accumulate)
        command = ["tests/same_noise.py", name, *flags, "--run", tmp_path / folder,
                   "--accumulate", accumulate]
        for done in [program(*command)] if folder == "one" else ranks(2, *command):
            assert done.returncode == 0, done.stderr[-3000:]
    for phase in phases:
        one, two = ([row for row in rows(tmp_path / folder) if row["phase"] == phase
                     and "grad_norm" in row] for folder in ("one", "two"))
        assert len(one) == len(two) == 5
        for a, b in zip(one, two):
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-5), phase


def test_only_the_forward_of_the_model_runs_under_autocast(data, tmp_path, monkeypatch):
    seen = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, watched)
    for owner, name in ((NativeTok, "forward"), (train, "show_reconstructions"),
                        (train, "evaluate"), (checkpoint, "save"), (train, "update_codebook"),
                        (Loop, "backward"), (run_folder.Run, "grid")):
        watch(owner, name)
    flags = ("--precision", "bf16", "--save_every", "2", "--sample_every", "2")
    train_shapes(tmp_path / "a", data, *flags, "--stage", "1")
    train_codes(tmp_path / "b", data, *flags, "--dvae_steps", "3", "--grain_steps", "3",
                "--content_steps", "3")
    assert seen.pop("forward") == {True}
    assert len(seen) == 6 and set(map(frozenset, seen.values())) == {frozenset({False})}, seen


def test_timeout_reaches_the_data_workers_of_d2it_too(data, tmp_path, monkeypatch):
    seen = []

    class Stream(run_folder.ImageStream):
        def __iter__(self):
            seen.append(self.timeout)
            return super().__iter__()
    monkeypatch.setattr(run_folder, "ImageStream", Stream)
    train_codes(tmp_path, data, "--stage", "1", "--timeout", "77")
    assert seen == [77]
