"""Promises of all programs that read a run: they ask its checkpoint, lose no work, ignore no flag.

eval_fid.py, explain.py and sample.py are called here with what goes wrong on other people's disks.
"""
import contextlib
import io
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
from helpers import encoded, folder_of, noise, put, refused, some_shapes
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.datasets import open_images
from plumbing.run import open_run
from plumbing.start import main_with_user_errors

PROGRAMS = {"eval_fid": eval_fid, "explain": explain, "sample": sample}


def command(program: str, *flags) -> tuple[int, str, str]:
    """A program in this process, on the CPU -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    module, words = PROGRAMS[program], [*map(str, flags), "--device", "cpu"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main_with_user_errors(lambda: module.main(module.parse(words)))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def is_refused(program: str, *flags, says=()) -> None:
    code, _, err = command(program, *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for text in says:
        assert text in err, err


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
    assert now.configs[0] == before.configs[0] and now.configs[2].seed == before.configs[2].seed
    assert now.configs[2].holdout == before.configs[2].holdout and not now.configs[2].flip
    assert now.configs[2].workers == 3, "how to run is not what was learned"


@pytest.mark.parametrize("program", ["eval_fid", "explain"])
def test_images_that_have_changed_since_are_refused(run, tmp_path, program):
    change_config(run, data=some_shapes(tmp_path / "more.npz", 61, first=200))
    is_refused(program, "--run", run, says=("data changed", "tokenizer.pt"))


@pytest.mark.parametrize("program", ["eval_fid", "explain"])
def test_images_that_are_gone_are_looked_for_where_config_json_says(run, program):
    change_config(run, data="gone/photos")
    is_refused(program, "--run", run, says=("gone/photos", "config.json"))


def test_the_same_images_may_lie_elsewhere(run, tmp_path):
    data = some_shapes(tmp_path / "moved.npz", 60)
    change_config(run, data=data)
    assert open_run(str(run), CONFIGS).data.name == "moved.npz"


def test_images_of_the_run_that_are_given_as_others_are_told(run, tmp_path):
    words = ("eval_fid", "--run", run, "--num_samples", 20, "--generator", "ar", "--json",
             tmp_path / "x.json", "--data")
    code, _, err = command(*words, some_shapes(tmp_path / "mixed.npz", 40, first=30))
    assert code == 0 and "30 of 40 images that were looked for are also in the data of" in err, err
    code, _, err = command(*words, some_shapes(tmp_path / "new.npz", 40, first=200))
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
    code, out, err = command("eval_fid", "--run", flat_run, "--num_samples", 20, "--generator",
                             "ar", "--train_features", 2, "--json", tmp_path / "x.json")
    assert code == 0 and "is right on" not in out, err
    results = json.loads((tmp_path / "x.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert "class_accuracy" not in rows["reconstruction"] and "class_accuracy" in rows["ar"]
    assert "classifier_on_real" not in results["class_accuracy"]
    opened = open_run(str(flat_run), CONFIGS)
    assert load_judge(str(flat_run / "tinycnn.pt"), opened.data, opened.val)[1] is None


def test_a_classifier_from_before_tells_no_accuracy_of_other_labels(flat_run):
    """The one in the folder was judged on held-out images that had labels."""
    code, out, err = command("eval_fid", "--run", flat_run, "--num_samples", 20)
    assert code == 0 and "is right on" not in out, err


def test_bits_given_the_class_are_left_out_without_labels(flat_run, tmp_path):
    code, _, err = command("explain", "--run", flat_run, "--out", tmp_path / "page", "--images", 2)
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
    code, out, err = command("eval_fid", "--run", run, "--num_samples", 20, "--json", path)
    assert code == 130 and path.exists() and "Traceback" not in err


def test_results_are_written_before_they_are_told(run, tmp_path, monkeypatch):
    def table(rows, nets):
        raise BrokenPipeError
    monkeypatch.setattr(eval_fid, "table", table)
    with pytest.raises(BrokenPipeError):
        command("eval_fid", "--run", run, "--num_samples", 20, "--json", tmp_path / "x.json")
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 4


@pytest.mark.parametrize("flags, says", [
    (("--json", "PLACE/none/x.json"), ("no folder", "none")),
    (("--json", "PLACE"), ("is a folder",)),
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
    monkeypatch.setattr(eval_fid, "judge", too_late)
    monkeypatch.setattr(eval_fid, "extract", too_late)
    monkeypatch.setattr(eval_fid, "train_judge", too_late)
    flags = [flag.replace("PLACE", str(tmp_path)) for flag in flags]
    is_refused("eval_fid", "--run", run, "--train_features", 5, *flags, says=says)


def test_statistics_that_cannot_be_written_cost_no_results(run, tmp_path):
    code, out, err = command("eval_fid", "--run", run, "--num_samples", 20,
                             "--save_stats", tmp_path / "none" / "s.npz")
    assert "there is no folder" in err.splitlines()[0], "told at the start"
    assert code == 2 and re.search("^real", out, flags=re.M) and "cannot write" in err
    assert err.splitlines()[-1].startswith("error: "), "the person's line comes last"


@pytest.mark.parametrize("log", [None, '{"phase": "base", "step": 1, "loss": 1.5}\n{"phase": "ba'])
def test_a_log_that_is_missing_or_torn_costs_nothing(run, tmp_path, log):
    (run / "log.jsonl").unlink()
    if log:
        (run / "log.jsonl").write_text(log)
    code, _, err = command("eval_fid", "--run", run, "--num_samples", 20)
    assert code == 0 and (run / "summary.json").exists(), err
    code, _, err = command("explain", "--run", run, "--images", 2)
    assert code == 0 and "Training" in (run / "explain" / "index.html").read_text(), err


def test_the_page_is_there_after_each_picture(run, tmp_path, monkeypatch):
    def swaps(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(explain, "swaps", swaps)
    assert command("explain", "--run", run, "--out", tmp_path, "--images", 2)[0] == 130
    assert "tokens.png" in (tmp_path / "index.html").read_text()


def test_a_class_whose_name_is_no_text_costs_no_page(run, tmp_path):
    path = run / "generator-ar.pt"
    saved = checkpoint.load(path)
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    checkpoint.save(path, {**saved, "classes": [name, *saved["classes"][1:]]})
    code, _, err = command("explain", "--run", run, "--out", tmp_path, "--images", 2)
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
    monkeypatch.setattr("plumbing.run.eval_batches", watched)
    explain.held_out(open_run(str(run), CONFIGS))
    monkeypatch.setattr("evaluation.judging.eval_batches", watched)
    monkeypatch.setattr("evaluation.tinycnn.eval_batches", watched)
    code, _, err = command("eval_fid", "--run", run, "--num_samples", 20, "--train_features", 1)
    assert code == 0 and len(asked) >= 4 and all(asked), err


# ------------------------------------------------------------------------------------------------
# options

@pytest.mark.parametrize("flags, says", [
    (("--cfg_scale", "nan"), ("--cfg_scale",)),
    (("--cfg_scale", "-1"), ("--cfg_scale",)),
    (("--cfg_scale", "1e38"), ("--cfg_scale",)),
    (("--temperature", "inf"), ("--temperature",)),
    (("--top_p", "1.5"), ("--top_p",)),
    (("--randomize_temperature", "-3"), ("--randomize_temperature",)),
    (("--seed", "99999999999999999999"), ("--seed",)),
    (("--image_size", "-4"), ("--image_size",)),
    (("--image_size", "0"), ("--image_size",)),
    (("--batch_size", "0"), ("--batch_size",)),
    (("--generator", "ar", "--steps", "4"), ("does not read steps",)),
    (("--generator", "maskgit", "--sweep", "top_k=1"), ("does not read top_k",)),
    (("--sweep", "cfg_scale=1", "cfg_scale=2"), ("twice",)),
    (("--sweep", "cfg_scale=1,nan"), ("nan",)),
    (("--sweep", "top_p=0"), ("top_p",)),
    (("--cfg_scale", "2", "--sweep", "cfg_scale=1,2"), ("one of them",)),
    (("--inception", "x"), ("--inception",)),
    (("--images", "x.npz", "--generator", "ar"), ("--generator",)),
    (("--images", "x.npz", "--cfg_scale", "2"), ("--cfg_scale",)),
    (("--images", "x.npz", "--seed", "1"), ("--seed",)),
    (("--reference", "x.npz", "--num_reference", "9"), ("--num_reference",)),
])
def test_eval_refuses_what_is_out_of_range_or_would_not_be_read(run, flags, says):
    is_refused("eval_fid", "--run", run, *flags, says=says)


def test_an_option_that_no_generator_of_the_run_reads_is_refused(run):
    for file in run.glob("generator-maskgit*"):
        file.unlink()
    is_refused("eval_fid", "--run", run, "--steps", 2, says=("steps", "no generator"))


def test_statistics_that_are_no_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    refused(read_reference, str(tmp_path / "nan.npz"), names=("not finite",))
    refused(read_reference, str(tmp_path / "shape.npz"), names=("do not fit",))


# ------------------------------------------------------------------------------------------------
# several processes, and numbers that are none

@pytest.mark.parametrize("program", ["sample", "explain"])
def test_programs_of_one_process_refuse_several(run, monkeypatch, program):
    launcher = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29999")
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    is_refused(program, "--run", run, says=("without torchrun",))


def spoil(path, key: str, number: float) -> None:
    """One number of the averaged weights becomes another, past what checkpoint.save refuses."""
    saved = torch.load(path, weights_only=True)
    saved["ema"][key].view(-1)[0] = number
    torch.save(saved, path)


def test_a_weight_that_is_not_finite_is_named_when_it_is_read(run, tmp_path):
    photo = put(tmp_path / "a.png", encoded(Image.fromarray(noise(0, 32, 32)), "PNG"))
    spoil(run / "generator-ar.pt", "head.weight", float("nan"))
    is_refused("sample", "--run", run, says=("head.weight", "not finite"))
    spoil(run / "tokenizer.pt", "quantizer.codebook", float("inf"))
    is_refused("sample", "--run", run, "--reconstruct", photo, says=("quantizer.codebook",))


def test_logits_and_pictures_that_are_not_finite_are_named(run):
    """Finite weights that are absurdly large."""
    model = NativeTok.load(run / "tokenizer.pt")
    ids = torch.zeros(1, model.num_tokens, dtype=torch.long)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(1e30)
    refused(model.decode, ids, names=("decoded images",))
    refused(model.encode, torch.full((1, 3, 32, 32), torch.nan), names=("images to encode",))
    ar = sample.Generator.load(run / "generator-ar.pt")
    with torch.no_grad():
        ar.head.weight.fill_(3e38)
    refused(ar.sample, torch.zeros(1, dtype=torch.long), names=("logits",))


def test_reconstructing_what_is_no_picture_says_what_to_give(run, tmp_path):
    for path in (tmp_path, tmp_path / "gone.jpg"):
        is_refused("sample", "--run", run, "--reconstruct", path, says=(str(path), "image file"))


def test_the_npz_tells_how_many_classes_it_really_holds(run, tmp_path):
    _, out, _ = command("sample", "--run", run, "--classes", "disc", "disc", "ring",
                        "--npz", tmp_path / "x.npz", "--num_samples", 2)
    assert "1 classes" in out
