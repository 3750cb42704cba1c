"""experiments/trials.py, photos.py and record.py: trials differ in one thing, pictures are as mixed as they claim, records say where they come from."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import train
from experiments import photos, trials
from helpers import some_shapes
from mocet import MoCET
from plumbing.datasets import open_images
from plumbing.flags import as_dict, as_flags
from quantizer import VectorQuantizer

ROOT = Path(__file__).parent.parent


def call(name: str, *flags) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"experiments.{name}", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------------------------
# trials.py

@pytest.mark.parametrize("name", trials.TRIALS)
def test_a_trial_is_a_run_that_train_would_take(name):
    run = config.parse_run("", ["--preset", "cifar", "--data", "x", *as_flags({**trials.BASE, **trials.TRIALS[name]})])
    values = as_dict(run.tok, run.gen, run.train)
    for field, value in {**trials.BASE, **trials.TRIALS[name]}.items():
        assert values[field] == (list(value) if isinstance(value, tuple) else value)
    assert sum(phase.steps for phase in train.phases(run.tok, run.train)) == trials.BASE["base_steps"], "all learn from as many images"


@pytest.mark.parametrize("patched", (False, True))
def test_the_patch_and_only_the_patch_stops_the_gradient_between_experts(patched):
    """What the last expert says depends on the first one's head through the token it leaves, or, under the patch, is deaf to it."""
    cfg = config.TokenizerConfig(expert_width=16, expert_heads=2, token_schedule=(2,), codebook_size=8, code_dim=4)
    torch.manual_seed(0)
    if patched:
        with trials.without_prefix_gradient():
            mocet = MoCET(cfg)
    else:
        mocet = MoCET(cfg)
    z_q, _, _ = mocet(torch.randn(3, 4, 16), VectorQuantizer(cfg))
    (z_q[:, 1] * torch.randn(3, 4)).sum().backward()
    reached = mocet.groups[0].head.grad[0].abs().sum() > 0
    assert bool(reached) != patched


def test_a_trial_leaves_a_row_that_says_everything_and_is_not_run_twice(tmp_path):
    data = some_shapes(tmp_path / "shapes.npz", 60)
    flags = ["--data", data, "--val_data", data, "--out", tmp_path / "out", "--steps", 8, "--trials", "base"]
    done = call("trials", *flags)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "out" / "trials.json").read_bytes()
    row, = json.loads(first)["rows"]
    assert row["trial"] == "base" and row["psnr"] > 5 and 0 < row["ar_bits"] < 16 * 11 and row["commit"] and row["device"] and "--steps 8" in row["command"]
    again = call("trials", *flags)
    assert again.returncode == 0 and "--- base" not in again.stdout and (tmp_path / "out" / "trials.json").read_bytes() == first
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
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ------------------------------------------------------------------------------------------------
# photos.py

def test_pictures_are_of_every_kind_and_show_what_was_put_in(tmp_path):
    """200 pictures hold every size, format and mode; read as train.py reads them, each is the image it was made of, transparent ones aside."""
    done = call("photos", "--data", some_shapes(tmp_path / "shapes.npz", 200), "--per_class", 40, "--out", tmp_path / "photos")
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "photos").rglob("*") if path.is_file()]
    opened = [Image.open(path) for path in files]
    assert {image.mode for image in opened} >= {"L", "P", "RGB", "RGBA", "CMYK"} and {image.format for image in opened} == {"JPEG", "PNG", "WEBP", "GIF"}
    assert any(image.getexif().get(photos.ORIENTATION) == photos.TURNED for image in opened)
    assert {image.size for image in opened} >= set(photos.SIZES)
    made, originals = open_images(str(tmp_path / "photos")), open_images(str(tmp_path / "shapes.npz"))
    assert len(made) == len(files) > 100
    for label, name in enumerate(made.classes):
        wanted = np.flatnonzero(originals.labels == originals.classes.index(name))
        for found in np.flatnonzero(made.labels == label):
            number = int(Path(made.keys[found]["name"]).stem.split()[1])
            if number % 7 == 0 and number // 7 % 5 in (0, 2):                 # gray, transparent
                continue
            picture = np.asarray(Image.fromarray(made.load(found)).resize((32, 32)), float)
            assert np.abs(picture - originals.load(wanted[number])).mean() < 14, made.keys[found]


# ------------------------------------------------------------------------------------------------
# record.py

def test_a_record_holds_the_last_words_of_each_phase_and_their_origin(small_run, tmp_path):
    done = call("record", "--run", small_run, "--by", "make something", "--out", tmp_path / "record.json")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["command"] == "make something" and {"commit", "seed", "device", "torch", "settings"} <= set(made)
    logged = [row for row in map(json.loads, (Path(small_run) / "log.jsonl").read_text().splitlines()) if "seconds" in row]
    assert [(row["phase"], row["steps"], row.get("psnr")) for row in made["phases"]] == [(row["phase"], row["step"], row.get("psnr")) for row in logged] != []
    assert all(row["loss_by_tenth"] for row in made["phases"])
