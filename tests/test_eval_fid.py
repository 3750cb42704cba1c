"""Promises of eval_fid.py and judging.py: numbers repeat, notice faults, bear their names."""
import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_fid
import sample
from evaluation import judging
from evaluation.judging import Batching, FeatureNet, FeatureStats, Reference, extract
from evaluation.tinycnn import random_twin
from helpers import ranks
from plumbing.start import main_with_user_errors
from plumbing.datasets import open_images
from plumbing.processes import Processes



@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    """A complete run with a classifier."""
    folder = shutil.copytree(small_run, tmp_path_factory.mktemp("eval") / "run")
    assert command("--run", folder, "--train_features", 5, "--num_samples", 20)[0] == 0
    return folder


def command(*flags) -> tuple[int, str, str]:
    """eval_fid.py in this process -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            words = [*map(str, flags), "--device", "cpu", "--batch_size", "16"]
            main_with_user_errors(lambda: eval_fid.main(eval_fid.parse(words)))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def rows(run, tmp_path, *flags) -> dict:
    """-> {name: row} of the JSON that the command writes."""
    path = tmp_path / "out.json"
    code, out, err = command("--run", run, "--num_samples", 20, "--json", path, *flags)
    assert code == 0, err
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def refused(*flags, says=()):
    code, _, err = command(*flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for text in says:
        assert text in err, err


# ------------------------------------------------------------------------------------------------
# what is written

def test_summary_holds_what_the_readme_promises(run):
    summary = json.loads((run / "summary.json").read_text())
    origin = {"command", "commit", "torch", "device", "seed"}
    assert origin <= set(summary), "a number says where it comes from"
    assert set(summary["psnr_by_tokens"]) == set(summary["codebook_used"]) == {"2", "4", "6"}
    assert set(summary["class_accuracy"]) == {"ar", "maskgit", "classifier_on_real"}
    phases = {"base", "grow-4", "grow-6", "finetune", "ar", "maskgit", "eval"}
    assert phases <= set(summary["seconds"])
    assert summary["reference"] == {"name": "held.npz", "n": 60}
    assert [row["name"] for row in summary["rows"]] == ["real", "reconstruction", "ar", "maskgit"]
    (trained,) = (key for key in summary["rows"][0] if key.startswith("fd_tinycnn_"))
    assert len(trained) == len("fd_tinycnn_") + 8
    for row in summary["rows"]:
        assert row["n"] > 0 and row[trained] >= 0
        assert 0 <= row["precision"] <= 1 and 0 <= row["class_accuracy"] <= 1
    ar, maskgit = summary["rows"][2:]
    assert ar["settings"]["seed"] == 0 and maskgit["settings"]["steps"] == 6


def test_it_is_never_called_fid_and_small_n_is_warned_of(run):
    out = command("--run", run, "--num_samples", 20)[1]
    assert "not FID" in out and "reference" in out
    assert "warning: not more images than the 128 features" in out
    assert "fid" not in out.lower().replace("not fid", "").split()


def test_the_same_command_gives_the_same_numbers(run, tmp_path):
    assert rows(run, tmp_path) == rows(run, tmp_path)


def test_psnr_of_reconstructions_is_that_of_training(run, tmp_path):
    row = rows(run, tmp_path)["reconstruction"]
    in_training = json.loads((run / "summary.json").read_text())["psnr_by_tokens"]["6"]
    # other ones of the 60 held-out images, rounded to bytes
    assert row["psnr"] == pytest.approx(in_training, abs=1.5)
    assert 0 < row["ssim"] < 1


# ------------------------------------------------------------------------------------------------
# the same by another way

def test_saved_statistics_stand_in_for_the_images(run, tmp_path):
    path = tmp_path / "stats.npz"
    code, _, err = command("--run", run, "--num_samples", 20, "--save_stats", path)
    assert code == 0, err
    direct, saved = rows(run, tmp_path), rows(run, tmp_path, "--reference", path)
    (key,) = (key for key in direct["ar"] if key.startswith("fd_tinycnn_"))
    for name in ("real", "ar", "maskgit"):
        assert saved[name][key] == pytest.approx(direct[name][key], rel=1e-3)
    assert "reconstruction" not in saved, "statistics hold no images that could be reconstructed"


def test_samples_in_an_npz_are_judged_like_the_run_that_made_them(run, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        words = ["--run", str(run), "--generator", "ar", "--npz", str(tmp_path / "s.npz"),
                 "--num_samples", "20", "--batch_size", "16", "--device", "cpu"]
        sample.main(sample.parse(words))
    direct = rows(run, tmp_path)["ar"]
    file = rows(run, tmp_path, "--images", tmp_path / "s.npz")["s.npz"]
    keys = [key for key in direct if key.startswith("fd_")]
    assert len(keys) == 2
    for key in keys:
        assert file[key] == pytest.approx(direct[key], rel=1e-3)


def test_fewer_images_than_a_folder_holds_are_drawn_from_all_classes(run, tmp_path):
    by_class = np.argsort(open_images("shapes").labels, kind="stable")
    shapes = open_images("shapes").subset(by_class[:2000])
    images = np.stack([shapes.load(i) for i in range(0, 2000, 5)])
    np.savez(tmp_path / "sorted.npz", x=images, y=shapes.labels[::5])
    some = rows(run, tmp_path, "--images", tmp_path / "sorted.npz")["sorted.npz"]
    first = rows(run, tmp_path, "--images", some_first(tmp_path, shapes))["first.npz"]
    (key,) = (key for key in some if key.startswith("fd_random_"))
    assert some["n"] == first["n"] == 20 and some[key] < first[key]


def some_first(tmp_path, shapes) -> Path:
    """What taking the first 20 would have given: one class only."""
    images = np.stack([shapes.load(i) for i in range(20)])
    np.savez(tmp_path / "first.npz", x=images, y=shapes.labels[:20])
    return tmp_path / "first.npz"


def test_two_processes_give_the_numbers_of_one(run, tmp_path):
    one = rows(run, tmp_path)
    flags = ["--run", run, "--num_samples", 20, "--json", tmp_path / "two.json",
             "--device", "cpu", "--batch_size", 16]
    for rank in ranks(2, "eval_fid.py", *flags):
        assert rank.returncode == 0, rank.stderr
    two = {row["name"]: row for row in json.loads((tmp_path / "two.json").read_text())["rows"]}
    assert list(one) == list(two)
    for name, row in one.items():
        for key, value in row.items():
            expected = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            assert two[name][key] == expected, (name, key)


def test_features_beyond_the_kept_ones_still_count_in_the_distance(run, tmp_path, monkeypatch):
    everything = rows(run, tmp_path)
    monkeypatch.setattr(judging, "KEPT", 16)
    some = rows(run, tmp_path)
    for name in everything:
        for key in everything[name]:
            if key.startswith("fd_"):
                assert some[name][key] == pytest.approx(everything[name][key], rel=1e-3)


def test_controls_leave_out_classes_without_images(tmp_path):
    x = np.zeros((8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=[1, 3] * 4, classes=["cat", "dog", "emu", "owl"])
    data = open_images(str(tmp_path / "a.npz"))
    made = {source.name: source for source in judging.controls(data, 8, 8, judging.Batching())}
    for name in ("real, half of the classes", "real, one class"):
        (_, labels, _), = made[name].batches([0])
        assert labels.tolist() == [1] * 4


# ------------------------------------------------------------------------------------------------
# does it notice?

def test_images_made_worse_come_out_further_away():
    """With the random net, which needs no training: more so than images that were left alone."""
    cnn, val, data = random_twin(10), open_images("shapes:val"), open_images("shapes")
    how, procs = Batching(), Processes("cpu")

    def network(images):
        logits, features = cnn(judging.to_float(images))
        return features, logits
    net = FeatureNet("fd_random", "", network, 128)
    originals = judging.real("reference", val, np.arange(500), 32, how)
    reference = Reference.of("val", 500, [net], extract(originals, [net], how, procs)[0])
    chosen = np.random.default_rng(0).permutation(4000)[:400]
    sources = [judging.real("real", data, chosen, 32, how), *judging.controls(data, 400, 32, how)]
    rows = [judging.judge(source, [net], reference, how, procs) for source in sources]
    floor, *worse = rows
    assert [row["name"] for row in worse] == ["real, blurred", "real, with noise",
                                              "real, half of the classes", "real, one class"]
    for row in worse:
        assert row["fd_random"] > 1.5 * floor["fd_random"], row
    assert worse[3]["recall"] < worse[2]["recall"] < floor["recall"]


# ------------------------------------------------------------------------------------------------
# FID

@pytest.fixture
def fake_inception(monkeypatch):
    """Inception's place is taken by 6 numbers an image, so that its way takes a second."""
    def network(images):
        x = images.float()
        features = torch.stack([x.mean(dim=(1, 2)), x.std(dim=(1, 2))], dim=1).flatten(1)
        return features, torch.zeros(len(images), 1008)
    net = FeatureNet("fid", "FID (fake)", network, 6)
    monkeypatch.setattr(eval_fid, "inception_net", lambda path, device: net)
    return network


def test_adms_file_is_taken_at_its_word_and_its_images_are_not_looked_at(run, tmp_path,
                                                                         fake_inception):
    images = torch.from_numpy(np.stack([open_images("shapes").load(i) for i in range(50)]))
    seen = FeatureStats(FeatureNet("fid", "", fake_inception, 6), 50)
    seen.statistics.add(fake_inception(images)[0].numpy())
    np.savez(tmp_path / "adm.npz", mu=seen.statistics.mu, sigma=seen.statistics.sigma,
             mu_s=np.zeros(3), arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "same.npz", arr_0=images.numpy())
    code, out, err = command("--images", tmp_path / "same.npz", "--reference", tmp_path / "adm.npz",
                             "--features", "inception", "--json", tmp_path / "o.json")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert abs(row["fid"]) < 1e-6 * np.trace(seen.statistics.sigma)
    assert row["inception_score"] == pytest.approx(1)
    assert "adm.npz, n unknown" in out and "FID (fake)" in out
    assert not (tmp_path / "summary.json").exists()


def test_a_run_gets_rfid_gfid_and_inception_score(run, tmp_path, fake_inception):
    measured = {"fid", "inception_score", "inception_score_10_splits", "precision", "recall"}
    for name, row in rows(run, tmp_path, "--features", "inception").items():
        assert measured <= set(row), name
        assert "class_accuracy" not in row, "Inception's 1008 classes are not the run's"


def test_statistics_of_two_networks_are_never_compared(run, tmp_path, fake_inception):
    path = tmp_path / "fid.npz"
    code, _, err = command("--run", run, "--num_samples", 20, "--save_stats", path,
                           "--features", "inception")
    assert code == 0, err
    refused("--run", run, "--reference", path,
            says=("statistics of fid", "cannot be compared", "--features inception"))


# ------------------------------------------------------------------------------------------------
# sweeps

def test_a_sweep_tries_every_combination_that_a_generator_reads(run, tmp_path):
    code, out, err = command("--run", run, "--num_samples", 20, "--json", tmp_path / "o.json",
                             "--sweep", "cfg_scale=1,2.5", "steps=1,3")
    assert code == 0, err
    found = json.loads((tmp_path / "o.json").read_text())
    swept = [(row["name"], row.get("swept")) for row in found["rows"][2:]]
    of_ar = [("ar", {"cfg_scale": scale}) for scale in (1.0, 2.5)]
    of_maskgit = [("maskgit", {"cfg_scale": scale, "steps": steps})
                  for scale in (1.0, 2.5) for steps in (1, 3)]
    assert swept == of_ar + of_maskgit
    for row in found["rows"][2:]:
        assert row["swept"].items() <= row["settings"].items()
    assert "maskgit cfg_scale=2.5 steps=3" in out
    assert "ar" not in found["class_accuracy"], "the best of a sweep is not the run's accuracy"


# ------------------------------------------------------------------------------------------------
# wrong use

@pytest.mark.parametrize("flags, says", [
    ((), ("--run",)),
    (("--run", "RUN", "--data", "shapes", "--reference", "x.npz"), ("two references",)),
    (("--images", "shapes", "--reference", "x.npz"), ("TinyCNN", "--features inception")),
    (("--images", "shapes", "--features", "inception"), ("--reference",)),
    (("--run", "RUN", "--sweep", "seed=1,2"), ("seed", "cfg_scale")),
    (("--run", "RUN", "--sweep", "cfg_scale=1;2"), ("1;2",)),
    (("--run", "RUN", "--num_samples", "1"), ("num_samples",)),
    (("--run", "RUN", "--inception", "nowhere.pth", "--features", "inception"), ("nowhere.pth",)),
    (("--run", "RUN", "--reference", "nowhere.npz"), ("nowhere.npz",)),
    (("--run", "RUN", "--images", "nowhere"), ("nowhere",)),
    (("--run", "nowhere"), ("nowhere", "not a run")),
    (("--run", "RUN", "--nonsense"), ("--nonsense",)),
    (("--run", "RUN", "--features", "inception", "--train_features"), ("--train_features",)),
])
def test_wrong_use_gets_one_line(run, flags, says):
    refused(*(str(run) if flag == "RUN" else flag for flag in flags), says=says)


def test_without_a_classifier_one_line_says_how_to_get_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "tinycnn.pt").unlink()
    refused("--run", tmp_path / "run", says=("no classifier", "--train_features"))
