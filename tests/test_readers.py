"""Promises of all programs that read a run: they ask its checkpoint, lose no work, ignore no flag.

eval_fid.py, explain.py and sample.py are called here with what goes wrong on other people's disks.
"""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
import explain
import plumbing.run
import sample
from config import CONFIGS
from evaluation.judging import Batching, read_reference, real
from evaluation.tinycnn import load_judge, train_judge
from generator import Generator
from helpers import (
    called, encoded, folder_of, good, noise, put, refused, some_shapes, turned_away)
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.datasets import open_images
from plumbing.run import open_run

FEW = ("--num_samples", 20, "--generator", "ar")


@pytest.fixture(scope="module")
def judged_run(small_run, tmp_path_factory):
    """A run of 60 shapes with a classifier."""
    folder = shutil.copytree(small_run, tmp_path_factory.mktemp("readers") / "run")
    run = open_run(str(folder), CONFIGS)
    train_judge(str(folder / "tinycnn.pt"), run.data, run.val, 32, False, 2, torch.device("cpu"))
    return folder


@pytest.fixture
def run(judged_run, tmp_path):
    """The same, to be spoilt."""
    return shutil.copytree(judged_run, tmp_path / "run")


def change_config(run, **values) -> None:
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------------
# a run is what its checkpoint says

def test_settings_are_those_of_the_checkpoint_whatever_config_json_says_now(run):
    before = open_run(str(run), CONFIGS)
    change_config(run, seed=5, holdout=7, flip=True, encoder_width=64, workers=3)
    now = open_run(str(run), CONFIGS)
    assert now.configs[0] == before.configs[0] and now.configs[-1].seed == before.configs[-1].seed
    assert now.configs[-1].holdout == before.configs[-1].holdout and not now.configs[-1].flip
    assert now.configs[-1].workers == 3, "how to run is not what was learned"


@pytest.mark.parametrize("program", [eval_fid, explain])
def test_images_that_have_changed_since_are_refused(run, tmp_path, program):
    change_config(run, data=some_shapes(tmp_path / "more.npz", 61, first=200))
    turned_away(program, "--run", run, says=("data changed", "tokenizer.pt"))


def test_images_that_are_gone_are_looked_for_where_config_json_says(run, tmp_path):
    change_config(run, data="gone/photos")
    for program in (eval_fid, explain):
        turned_away(program, "--run", run, says=("gone/photos", "config.json"))
    change_config(run, data=some_shapes(tmp_path / "moved.npz", 60))  # the same images
    assert open_run(str(run), CONFIGS).data.name == "moved.npz"


def test_images_of_the_run_that_are_given_as_others_are_told(run, tmp_path):
    words = ("--run", run, *FEW, "--json", tmp_path / "x.json", "--data")
    code, _, err = called(eval_fid, *words, some_shapes(tmp_path / "mixed.npz", 40, first=30))
    assert code == 0 and "30 of 40 images that were looked for are also in the data of" in err, err
    code, _, err = called(eval_fid, *words, some_shapes(tmp_path / "new.npz", 40, first=200))
    assert code == 0 and "looked for" not in err, err


# ------------------------------------------------------------------------------------------------
# labels that mean nothing

@pytest.fixture
def flat_run(run, tmp_path):
    """Its held-out images have no classes, as in a flat folder."""
    shapes = open_images("shapes")
    np.savez(tmp_path / "flat.npz", x=np.stack([shapes.load(i) for i in range(60, 120)]))
    change_config(run, val_data=str(tmp_path / "flat.npz"))
    return run


def test_no_accuracy_is_told_without_labels(flat_run, tmp_path):
    # The classifier in the folder was judged on held-out images that had labels.
    for more in ((), ("--train_features", 3)):
        code, out, err = called(eval_fid, "--run", flat_run, *FEW, *more, "--json",
                                tmp_path / "x.json")
        assert code == 0 and "is right on" not in out, err
    results = json.loads((tmp_path / "x.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert "class_accuracy" not in rows["reconstruction"] and "class_accuracy" in rows["ar"]
    assert "classifier_on_real" not in results["class_accuracy"]
    opened = open_run(str(flat_run), CONFIGS)
    assert load_judge(str(flat_run / "tinycnn.pt"), opened.data, opened.val)[1] is None


def test_bits_given_the_class_are_left_out_without_labels(flat_run, tmp_path):
    code, _, err = called(explain, "--run", flat_run, "--out", tmp_path / "page", "--images", 2)
    text = (tmp_path / "page" / "index.html").read_text()
    assert code == 0 and "Left out" in text and "under the AR model" not in text, err


# ------------------------------------------------------------------------------------------------
# work is kept

def test_rows_are_on_the_disk_before_the_next_one_is_judged(run, tmp_path, monkeypatch):
    original, path = eval_fid.judge, tmp_path / "x.json"

    def judge(source, *rest):
        if source.name == "ar":
            written = json.loads(path.read_text())
            assert [row["name"] for row in written["rows"]] == ["real", "reconstruction"]
            assert written["to_come"] == ["ar", "maskgit"]
            raise KeyboardInterrupt
        return original(source, *rest)
    monkeypatch.setattr(eval_fid, "judge", judge)
    code, out, err = called(eval_fid, "--run", run, "--num_samples", 20, "--json", path)
    assert code == 130 and path.exists() and "Traceback" not in err


def test_results_are_written_before_they_are_told(run, tmp_path, monkeypatch):
    def table(rows, nets):
        raise BrokenPipeError
    monkeypatch.setattr(eval_fid, "table", table)
    with pytest.raises(BrokenPipeError):
        called(eval_fid, "--run", run, *FEW, "--json", tmp_path / "x.json")
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 3


@pytest.mark.parametrize("flags, says", [
    (("--save_stats", "PLACE"), ("is a folder",)),
    (("--steps", "99"), ("steps 99", "1 to 6")),
    (("--sweep", "steps=2,99"), ("steps 99",)),
    (("--reference", "PLACE/none.npz"), ("no such file",)),
    (("--reference", "PLACE/run/config.json"), ("not an .npz",)),
    (("--image_size", "8"), ("--image_size 8", "32 pixels")),
])
def test_what_can_be_known_at_the_start_is_refused_at_the_start(run, tmp_path, monkeypatch, flags,
                                                                says):
    def too_late(*arguments):
        raise AssertionError("images were looked at first")
    for work in ("judge", "extract", "train_judge"):
        monkeypatch.setattr(eval_fid, work, too_late)
    flags = [flag.replace("PLACE", str(tmp_path)) for flag in flags]
    turned_away(eval_fid, "--run", run, "--train_features", 5, *flags, says=says)


def test_statistics_cost_no_results(run, tmp_path):
    path = tmp_path / "none" / "s.npz"
    code, out, err = called(eval_fid, "--run", run, *FEW, "--save_stats", path)
    assert code == 2 and re.search("^real", out, flags=re.M) and "cannot write" in err
    assert "warning: --save_stats" in err and not path.parent.exists(), "told early, and not made"
    path.parent.mkdir()
    good(eval_fid, "--run", run, *FEW, "--save_stats", path)
    assert path.exists()


def test_a_log_that_is_torn_or_missing_costs_nothing(run):
    (run / "log.jsonl").write_text('{"phase": "base", "step": 1, "loss": 1.5}\n{"phase": "ba')
    code, _, err = called(eval_fid, "--run", run, *FEW)
    assert code == 0 and (run / "summary.json").exists(), err
    (run / "log.jsonl").unlink()
    code, _, err = called(explain, "--run", run, "--images", 2)
    assert code == 0 and "Training" in (run / "explain" / "index.html").read_text(), err


def test_the_page_is_there_after_each_picture(run, tmp_path, monkeypatch):
    def swaps(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(explain, "swaps", swaps)
    assert called(explain, "--run", run, "--out", tmp_path, "--images", 2)[0] == 130
    assert "<h2>Token by token</h2>" in (tmp_path / "index.html").read_text()


def test_a_class_whose_name_is_no_text_costs_no_page(run, tmp_path):
    path = run / "generator-ar.pt"
    saved = checkpoint.load(path)
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    checkpoint.save(path, {**saved, "classes": [name, *saved["classes"][1:]]})
    code, _, err = called(explain, "--run", run, "--out", tmp_path, "--images", 2)
    assert code == 0 and "caf" in (tmp_path / "index.html").read_text(), err


# ------------------------------------------------------------------------------------------------
# --skip_bad

@pytest.fixture
def one_broken(tmp_path):
    """Twenty images, the fourth of which is none."""
    root = folder_of(tmp_path / "photos", 20, size=32)
    put(sorted(root.rglob("*.png"))[3], b"broken")
    return open_images(str(root))


def test_judging_passes_over_what_the_run_passed_over(one_broken, tmp_path):
    indices = np.arange(20)
    source = real("real", one_broken, indices, 32, Batching(batch_size=8, skip_bad=True))
    assert sum(len(images) for images, _, _ in source.batches([0, 1, 2])) == 20
    strict = real("real", one_broken, indices, 32, Batching(batch_size=8))
    refused(strict.batches, [0, 1, 2], names=("cat",))
    cpu, path = torch.device("cpu"), str(tmp_path / "x.pt")
    train_judge(path, one_broken, one_broken, 32, False, 2, cpu, skip_bad=True)
    refused(train_judge, path, one_broken, one_broken, 32, False, 2, cpu, names=("cat",))


def test_both_programs_take_skip_bad_from_the_run(run, monkeypatch):
    change_config(run, skip_bad=True)
    asked = []
    original = plumbing.run.eval_batches

    def watched(*arguments, skip_bad=False, **options):
        asked.append(skip_bad)
        return original(*arguments, skip_bad=skip_bad, **options)
    for module in ("plumbing.run", "evaluation.judging", "evaluation.tinycnn"):
        monkeypatch.setattr(f"{module}.eval_batches", watched)
    explain.held_out(open_run(str(run), CONFIGS))
    code, _, err = called(eval_fid, "--run", run, *FEW, "--train_features", 1)
    assert code == 0 and len(asked) >= 4 and all(asked), err


# ------------------------------------------------------------------------------------------------
# numbers that are none, and pictures

def test_statistics_that_are_no_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    refused(read_reference, str(tmp_path / "nan.npz"), names=("not finite",))
    refused(read_reference, str(tmp_path / "shape.npz"), names=("do not fit",))


def spoil(path, key: str, number: float) -> None:
    """One number of the averaged weights becomes another, past what checkpoint.save refuses."""
    saved = torch.load(path, weights_only=True)
    saved["ema"][key].view(-1)[0] = number
    torch.save(saved, path)


def test_a_weight_that_is_not_finite_is_named_when_it_is_read(run, tmp_path):
    photo = put(tmp_path / "a.png", encoded(Image.fromarray(noise(0, 32, 32)), "PNG"))
    spoil(run / "generator-ar.pt", "head.weight", float("nan"))
    turned_away(sample, "--run", run, says=("head.weight", "not finite"))
    spoil(run / "tokenizer.pt", "quantizer.codebook", float("inf"))
    turned_away(sample, "--run", run, "--reconstruct", photo, says=("quantizer.codebook",))


def test_logits_and_pictures_that_are_not_finite_are_named(judged_run):
    """Finite weights that are absurdly large."""
    model = NativeTok.load(judged_run / "tokenizer.pt")
    ids = torch.zeros(1, model.num_tokens, dtype=torch.long)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(1e30)
    refused(model.decode, ids, names=("decoded images",))
    refused(model.encode, torch.full((1, 3, 32, 32), torch.nan), names=("images to encode",))
    ar = Generator.load(judged_run / "generator-ar.pt")
    with torch.no_grad():
        ar.head.weight.fill_(3e38)
    refused(ar.sample, torch.zeros(1, dtype=torch.long), names=("logits",))
