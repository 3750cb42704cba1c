"""experiments/speedrun.py: it removes what a speed run has left, and nothing else."""
import json
import shutil
from types import SimpleNamespace

import pytest

from experiments import speedrun
from experiments.order import handlers_of_its_own
from helpers import contents, refused, some_shapes
from plumbing import run


def arguments(*words):
    return speedrun.parse(list(map(str, words)))


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """A speed run of three steps, which misses its target."""
    folder = tmp_path_factory.mktemp("raced")
    data = some_shapes(folder / "shapes.npz", 40)
    words = ["--data", data, "--val_data", data, "--steps", "3", "--out", folder / "run", "--",
             "--continuous_steps", "1", "--batch_size", "8", "--encoder_width", "32",
             "--decoder_width", "32", "--device", "cpu"]
    before = run.EVAL_IMAGES
    with pytest.raises(SystemExit), handlers_of_its_own():
        speedrun.main(arguments(*words))
    run.EVAL_IMAGES = before
    return SimpleNamespace(folder=folder / "run", data=data, words=words)


def test_a_folder_that_is_no_speed_runs_stays_as_it_is(small_run, raced, tmp_path):
    mine = shutil.copytree(small_run, tmp_path / "mine")
    before = contents(mine)
    data = ("--data", raced.data, "--val_data", raced.data)
    refused(speedrun.main, arguments(*data, "--out", mine), names=["mine", "no speed run's folder"])
    # its mark alone proves nothing about what else is there
    (mine / "speedrun.json").write_text(json.dumps({"command": "python -m experiments.speedrun"}))
    refused(speedrun.main, arguments(*data, "--out", mine), names=["flow-decoder.pt"])
    (mine / "speedrun.json").write_text(json.dumps({"command": "mine"}))
    refused(speedrun.main, arguments(*data, "--out", mine), names=["was not written by"])
    (mine / "speedrun.json").unlink()
    assert contents(mine) == before


def test_nothing_is_removed_before_all_arguments_have_been_looked_at(raced):
    before = contents(raced.folder)
    words = raced.words[:]
    words[1] = "typo"
    refused(speedrun.main, arguments(*words), names=["typo"])
    for more in (("--run", "elsewhere"), ("--codebook_size", "4096"), ("--beta2", "1")):
        refused(speedrun.main, arguments(*raced.words, *more))
    (raced.folder / "samples" / "mine.png").write_text("a picture")
    (raced.folder / "notes").mkdir()
    refused(speedrun.main, arguments(*raced.words), names=["notes, samples/mine.png"])
    (raced.folder / "samples" / "mine.png").unlink()
    (raced.folder / "notes").rmdir()
    assert contents(raced.folder) == before


def test_the_same_command_starts_anew_in_its_own_folder(raced, quick):
    (raced.folder / ".tokenizer.pt.tmp-999999999").write_text("left by a kill")
    with pytest.raises(SystemExit):
        speedrun.main(arguments(*raced.words))
    assert json.loads((raced.folder / "speedrun.json").read_text())["steps"] == 3
    assert not list(raced.folder.glob(".tokenizer*"))
