"""plumbing/run.py: what belongs to a run folder, who may write there, what is refused and how."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import config
import loop
import train
from config import CONFIGS
from helpers import (
    ROOT, SMALL, contents, encoded, folder_of, held_shapes, noise, program, refused,
    some_shapes, start_program, train_shapes)
from plumbing import checkpoint, run
from plumbing.flags import as_dict

pytestmark = pytest.mark.usefixtures("quick")

# ------------------------------------------------------------------------------------------------
# what belongs to a run


def test_changed_settings_and_changed_images_are_refused_with_the_difference(finished, data):
    """And a refused command changes nothing."""
    before = contents(finished)
    for flags, change in ((("--seed", "5"), "seed: 0 -> 5"), (("--holdout", "3"), "changed"),
                          (("--base_steps", "7"), "base_steps: 6 -> 7"),
                          (("--generator_width", "48"), "generator_width: 32 -> 48"),
                          (("--generator_steps", "6", "--stage", "3"), "generator_steps: 5 -> 6")):
        refused(train_shapes, finished, data, *flags, names=[change])
    refused(train_shapes, finished, "shapes", names=["data changed"])
    whole = Path(data).read_bytes()
    some_shapes(data, 59)  # other images under the same name
    try:
        refused(train_shapes, finished, data, names=["images"])
    finally:
        Path(data).write_bytes(whole)
    assert contents(finished) == before


def test_a_run_from_before_a_setting_became_a_constant_goes_on(finished, data, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for file in folder.glob("*.pt"):
        saved = checkpoint.load(file)
        saved["settings"]["generator_beta2"] = 0.95
        checkpoint.save(file, saved)
    train_shapes(folder, data)


def test_moved_images_are_the_same_images(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    moved = shutil.copy(data, tmp_path / "elsewhere.npz")
    train_shapes(tmp_path / "run", str(moved))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(moved)


def test_other_held_out_images_than_before_are_told_once(small_run, tmp_path, capsys):
    folder = shutil.copytree(small_run, tmp_path / "run")
    places = json.loads((folder / "config.json").read_text())
    train_shapes(folder, places["data"], "--val_data", places["val_data"])
    moved = str(shutil.copy(places["val_data"], tmp_path / "elsewhere.npz"))
    train_shapes(folder, places["data"], "--val_data", moved)
    assert "held out" not in capsys.readouterr().err
    train_shapes(folder, places["data"], "--val_data", held_shapes(tmp_path / "others.npz", 59))
    assert capsys.readouterr().err.count("other images were held out than the 59 of others") == 1
    run.open_run(str(folder), CONFIGS)
    assert capsys.readouterr().err.count("other images were held out than the 59 of others") == 1


def test_a_folder_has_one_writer(data, tmp_path):
    """The second program is turned away at its start; what the first writes stays its own."""
    command = ["train.py", *SMALL, "--run", tmp_path / "run", "--data", data]
    first = start_program(*command, "--base_steps", 2000)
    try:
        while not (tmp_path / "run" / "config.json").exists() and first.is_alive():
            time.sleep(0.05)
        second = program(*command, "--seed", 1)
        assert second.returncode == 2 and str(first.pid) in second.stderr, second.stderr
        assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    finally:
        first.kill()


@pytest.mark.parametrize("lengths", [(2, 4, 6), (4,)])
def test_a_tokenizer_is_unfinished_until_the_last_phase_of_its_plan(lengths, capsys):
    words = ["--token_schedule", *map(str, lengths)]
    args = config.parse_run("", [*SMALL, *words])
    plan, settings = train.phases(args.tok, args.train), as_dict(args.tok, args.train)
    for k, phase in enumerate(plan):
        saved = {"phase": phase.name, "settings": settings, "step": 1,
                 "results": {p.name: {} for p in plan[:k]}}
        told = f"{phase.name}: step 1 of {phase.steps}"
        assert run.unfinished(saved, "a/tokenizer.pt").startswith(told)
        assert f"note: a/tokenizer.pt is unfinished, {told}" in capsys.readouterr().err
        saved["results"][phase.name] = {}
        assert bool(run.unfinished({**saved, "step": phase.steps}, "x")) == (k + 1 < len(plan))


def test_a_closed_pipe_saves_and_stops(data, tmp_path):
    command = [sys.executable, "train.py", *SMALL, "--run", str(tmp_path), "--data", data,
               "--base_steps", "2000", "--save_every", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=100) == loop.INTERRUPTED
    assert checkpoint.load(tmp_path / "tokenizer.pt")["step"] >= 1


# ------------------------------------------------------------------------------------------------
# wrong use


@pytest.mark.parametrize("flags, message", [
    (["--data", "no/such/folder"], "no such file or folder"),
    (["--stage", "3"], "stage 3 needs a tokenizer"),
    (["--stage", "2"], "stage 2 needs stage 1"),
    (["--image_size", "64", "--data", "shapes"], "32x32")])
def test_what_cannot_work_is_said_in_one_line(data, tmp_path, flags, message):
    refused(train_shapes, tmp_path / "run", data, *flags, names=[message])


def test_a_run_from_before_a_setting_goes_on_with_its_default(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.pt"
    saved = checkpoint.load(path)
    assert saved["settings"].pop("expert") == "query"
    checkpoint.save(path, saved)
    train_shapes(tmp_path / "run", data)
    refused(train_shapes, tmp_path / "run", data, "--expert", "block",
            names=["expert: query -> block"])


def test_a_run_folder_that_cannot_be_made_is_said_before_the_first_step(data, tmp_path):
    (tmp_path / "file").write_text("")
    refused(train_shapes, tmp_path / "file" / "run", data, names=["choose another folder"])


@pytest.mark.parametrize("program, makes, other", (
    ("train.py", "tokenizer.pt", "-m d2it.train"), ("-m d2it.train", "dvae.pt", "train.py")))
def test_a_run_of_the_other_system_is_called_one(tmp_path, program, makes, other):
    told = f"has no {makes}; train it: python {program} --run"
    refused(run.need_parts, str(tmp_path), (makes,), program, names=[told])
    (tmp_path / run.SYSTEMS[other]).touch()
    told = f"is a run of python {other}, the other system"
    refused(run.need_parts, str(tmp_path), (makes,), program, names=[told])
    (tmp_path / makes).touch()
    run.need_parts(str(tmp_path), (makes,), program)


def test_a_file_that_turned_bad_between_two_commands_is_told_and_loses_nothing(tmp_path, capsys):
    """The other images are the same, so what was learned goes on; another picture is refused."""
    pictures, folder = folder_of(tmp_path / "pictures", 40, size=32), tmp_path / "run"
    train_shapes(folder, str(pictures), "--stage", "1")
    path = next(pictures.rglob("*.png"))
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    refused(train_shapes, folder, str(pictures), "--stage", "2", names=["is saved"])
    assert f"{path.name} cannot be read any more" in capsys.readouterr().err
    path.write_bytes(good)
    train_shapes(folder, str(pictures), "--stage", "2")
    assert set(checkpoint.load(folder / "tokenizer.pt")["results"]) > {"base"}
    path.write_bytes(encoded(Image.fromarray(noise(99, 32, 32)), "PNG"))
    refused(train_shapes, folder, str(pictures), "--stage", "3", names=["data changed"])
