"""experiments/trials.py, photos.py and record.py: trials differ in one thing, pictures are as mixed
as they claim, records say where they come from."""
import inspect
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import train
from experiments import photos, trials
from helpers import ROOT, held_shapes, program, some_shapes
from nativetok import NativeTok
from plumbing.datasets import open_images
from plumbing.flags import as_dict, as_flags



def call(name: str, *flags):
    return program("-m", f"experiments.{name}", *flags)


# ------------------------------------------------------------------------------------------------
# trials.py

@pytest.mark.parametrize("name", trials.TRIALS)
def test_a_trial_is_a_run_that_train_would_take(name):
    wanted = {**trials.BASE, **trials.TRIALS[name]}
    args = config.parse_run("", ["--preset", "cifar", "--data", "x", *as_flags(wanted)])
    values = as_dict(args.tok, args.gen, args.train)
    for field, value in wanted.items():
        assert values[field] == (list(value) if isinstance(value, tuple) else value)
    steps = sum(phase.steps for phase in train.phases(args.tok, args.train))
    assert steps == trials.BASE["base_steps"], "all learn from as many images"


@pytest.mark.parametrize("detached", (False, True))
def test_the_trial_and_only_the_trial_stops_the_gradient_between_experts(detached):
    """What the last expert says depends on the first one's head through the token it leaves, or,
    in that trial, is deaf to it."""
    cfg = config.TokenizerConfig(image_size=32, encoder_width=16, encoder_heads=2, encoder_depth=1,
                                 decoder_width=16, decoder_heads=2, decoder_depth=1,
                                 expert_width=16, expert_heads=2, token_schedule=(2,),
                                 codebook_size=8, code_dim=4)
    torch.manual_seed(0)
    model = NativeTok(cfg)
    if detached:
        model = trials.detach_prior(model)
    z_q, _, _ = model.mocet(torch.randn(3, 4, 16), model.quantizer)
    (z_q[:, 1] * torch.randn(3, 4)).sum().backward()
    reached = model.mocet.groups[0].head.grad[0].abs().sum() > 0
    assert bool(reached) != detached


@pytest.mark.parametrize("name", ("base", trials.DETACHED))
def test_the_change_reaches_the_model_that_is_trained(name, tmp_path, monkeypatch):
    """train_stages is handed the change in that trial only, and train.py applies it."""
    handed = []

    def train_nothing(flags, *stages, **changes):
        handed.append(changes)
        raise KeyboardInterrupt
    monkeypatch.setattr(trials, "train_stages", train_nothing)
    args = Namespace(out=str(tmp_path), data="x", val_data="x", sizes={})
    with pytest.raises(KeyboardInterrupt):
        trials.run_trial(name, 0, args)
    wanted = {"change_model": trials.detach_prior} if name == trials.DETACHED else {}
    assert handed == [wanted]
    assert inspect.signature(train.main).parameters.keys() >= wanted.keys()


def test_a_trial_leaves_a_row_that_says_everything_and_is_not_run_twice(tmp_path):
    data, val = some_shapes(tmp_path / "shapes.npz", 60), held_shapes(tmp_path / "held.npz")
    flags = ["--data", data, "--val_data", val, "--out", tmp_path / "out", "--steps", 8,
             "--trials", "base"]
    done = call("trials", *flags)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "out" / "trials.json").read_bytes()
    row, = json.loads(first)["rows"]
    assert row["trial"] == "base" and row["psnr"] > 5 and 0 < row["ar_bits"] < 16 * 11
    assert row["commit"] and row["device"] and "--steps 8" in row["command"]
    again = call("trials", *flags)
    assert again.returncode == 0 and "--- base" not in again.stdout
    assert (tmp_path / "out" / "trials.json").read_bytes() == first
    assert "| base | 1 | " in (tmp_path / "out" / "trials.md").read_text()


@pytest.mark.parametrize("file, wrong, says", [
    ("trials", ("--data", "x", "--val_data", "x", "--trials", "bass"), "bass"),
    ("trials", ("--data", "nowhere", "--val_data", "nowhere"), "nowhere"),
    ("photos", ("--data", "nowhere", "--out", "new"), "nowhere"),
    ("photos", ("--out", str(ROOT / "tests")), "there already"),
    ("photos", ("--classes", "dodo", "--out", "new"), "dodo"),
    ("record", ("--run", "nowhere", "--by", "me", "--out", "x.json"), "nowhere"),
])
def test_wrong_use_gets_one_line(file, wrong, says):
    done = call(file, *wrong)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ------------------------------------------------------------------------------------------------
# photos.py

def test_pictures_are_of_every_kind_and_show_what_was_put_in(tmp_path):
    """200 pictures hold every size, format and mode; read as train.py reads them, each is the image
    it was made of, transparent ones aside."""
    done = call("photos", "--data", some_shapes(tmp_path / "shapes.npz", 200), "--per_class", 40,
                "--out", tmp_path / "photos")
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "photos").rglob("*") if path.is_file()]
    opened = [Image.open(path) for path in files]
    assert {image.mode for image in opened} >= {"L", "P", "RGB", "RGBA", "CMYK"}
    assert {image.format for image in opened} == {"JPEG", "PNG", "WEBP", "GIF"}
    assert any(image.getexif().get(photos.ORIENTATION) == photos.TURNED for image in opened)
    assert {image.size for image in opened} >= set(photos.SIZES)
    made = open_images(str(tmp_path / "photos"))
    originals = open_images(str(tmp_path / "shapes.npz"))
    assert len(made) == len(files) > 100
    for label, name in enumerate(made.classes):
        wanted = np.flatnonzero(originals.labels == originals.classes.index(name))
        for i in np.flatnonzero(made.labels == label):
            number = int(Path(made.keys[i]["name"]).stem.split()[1])
            if number % 7 == 0 and number // 7 % 5 in (0, 2):                 # gray, transparent
                continue
            picture = np.asarray(Image.fromarray(made.load(i)).resize((32, 32)), float)
            assert np.abs(picture - originals.load(wanted[number])).mean() < 14, made.keys[i]


# ------------------------------------------------------------------------------------------------
# record.py

def test_a_record_holds_the_last_words_of_each_phase_and_their_origin(small_run, tmp_path):
    path, run = tmp_path / "record.json", tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "explain").mkdir()
    (run / "explain" / "answers.json").write_text('{"images": 250}')
    done = call("record", "--run", run, "--by", "make something", "--out", path)
    assert done.returncode == 0, done.stderr
    made = json.loads(path.read_text())
    assert made["command"] == "make something" and made["intervention"] == {"images": 250}
    assert {"commit", "seed", "device", "torch", "settings"} <= set(made)
    assert made["settings"]["preset"] == "tiny" and made["settings"]["base_steps"] == 6
    assert not any(str(value).startswith("/") for value in made["settings"].values())
    lines = (Path(small_run) / "log.jsonl").read_text().splitlines()
    logged = [row for row in map(json.loads, lines) if "seconds" in row]
    recorded = [(row["phase"], row["steps"], row.get("psnr")) for row in made["phases"]]
    assert recorded == [(row["phase"], row["step"], row.get("psnr")) for row in logged] != []
    assert all(row["loss_by_tenth"] for row in made["phases"])
