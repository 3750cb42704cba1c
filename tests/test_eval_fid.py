"""Promises of eval_fid.py and judging.py: numbers repeat, notice faults, bear their names."""
import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_fid
import sample
from evaluation import judging
from evaluation.judging import Batching, FeatureNet, FeatureStats, Reference, extract
from evaluation.tinycnn import random_twin, train_judge
from helpers import folder_of, ranks, train_shapes
from plumbing import checkpoint
from plumbing.start import main_with_user_errors
from plumbing.datasets import open_images, train_and_val
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
    *notes, last = err.splitlines()
    assert code == 2 and last.startswith("error: "), err
    assert all(line.startswith("note: ") for line in notes), err
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
        assert row["class_accuracy"] * row["n"] == pytest.approx(
            round(row["class_accuracy"] * row["n"]), abs=0.01), "a share of n"
    floor, *worse = summary["rows"]
    for row in worse:  # after six steps anything is far from real
        assert 0 < 2 * floor[trained] < row[trained] and row["precision"] < floor["precision"]
    assert "to_come" not in summary and not any("unfinished" in row for row in summary["rows"])
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
# labels count where they mean something, and else it is said why they do not

@pytest.mark.parametrize("arrays, says", [
    ({}, "no labels (an array arr_1)"),
    ({"arr_1": np.arange(20) % 9 + 1}, "its labels arr_1 have no names (an array classes)"),
    ({"arr_1": np.arange(20) % 2, "classes": np.array(["disc", "dish"])},
     "and 4 more; only there: dish) or in another order"),
    ({"arr_1": np.arange(20) % 10, "classes": "CLASSES"}, "")])
def test_class_accuracy_is_counted_where_the_classes_are_those_of_the_judge(run, tmp_path, arrays,
                                                                             says):
    if "classes" in arrays and isinstance(arrays["classes"], str):
        arrays = {**arrays, "classes": np.array(open_images("shapes").classes)}
    images = np.stack([open_images("shapes").load(i) for i in range(20)])
    np.savez(tmp_path / "s.npz", arr_0=images, **arrays)
    code, out, err = command("--run", run, "--images", tmp_path / "s.npz")
    assert code == 0, err
    assert ("class_accuracy" in out) == (not says)
    assert ("note: class_accuracy of s.npz is left out: " in err) == bool(says) and says in err


def test_images_in_one_folder_have_no_classes_and_that_is_said(run, tmp_path):
    folder_of(tmp_path / "flat", 6, classes=("",), size=32)
    code, out, err = command("--run", run, "--data", tmp_path / "flat", "--generator", "ar",
                             "--num_samples", 20)
    assert code == 0 and "class_accuracy of flat is left out: its images lie in one folder" in err
    (line,) = [line for line in out.splitlines() if line.startswith("reconstruction")]
    assert line.split()[-1] == "-"


# ------------------------------------------------------------------------------------------------
# a judge's file

def test_the_judge_of_a_run_judges_on_its_data_whatever_was_cut_from_them(tmp_path):
    folder_of(tmp_path / "photos", 40, size=16)
    data, cut, path = str(tmp_path / "photos"), (3, 5), str(tmp_path / "judge.pt")
    learned, held_out = train_and_val(data, "", *cut)
    train_judge(path, learned, held_out, 16, False, 2, torch.device("cpu"), cut=cut)
    words = ["--judge", path, "--data", data, "--images", data, "--json", tmp_path / "o.json"]
    code, _, err = command(*words)
    assert code == 0, err
    assert json.loads((tmp_path / "o.json").read_text())["reference"]["n"] == 3
    # The same for whoever says once more that it should learn; but nothing makes way for another.
    before = Path(path).read_bytes()
    assert command(*words, "--train_features", 2)[0] == 0
    refused(*words, "--train_features", 3, says=("a classifier already", "these images", "--judge"))
    refused(*words, "--val_data", data, says=("a part of", "leave out --val_data"))
    folder_of(tmp_path / "others", 30, size=16)
    words[3] = tmp_path / "others"
    refused(*words, "--train_features", 2, says=("a classifier already", "other images", "--judge"))
    refused(*words, says=("other images", "--judge", "new file"))
    assert Path(path).read_bytes() == before


def test_a_judge_that_learned_from_all_images_asks_for_the_held_out_ones(tmp_path):
    photos, val = (str(folder_of(tmp_path / name, n, size=16)) for name, n in (("p", 20), ("v", 6)))
    path = str(tmp_path / "judge.pt")
    train_judge(path, open_images(photos), open_images(val), 16, False, 2, torch.device("cpu"))
    words = ["--judge", path, "--data", photos, "--images", photos]
    refused(*words, says=("all of", "--val_data"))
    code, out, err = command(*words, "--val_data", val)
    assert code == 0 and "is right on" in out, err
    other = folder_of(tmp_path / "w", 8, size=16)
    code, out, err = command(*words, "--val_data", other)
    assert code == 0 and "is right on" not in out and "other images were held out" in err


def test_a_run_trains_its_judge_anew_but_no_others(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    path, before = run / "tinycnn.pt", (run / "tinycnn.pt").read_bytes()
    flags = ("--run", run, "--num_samples", 20, "--generator", "ar", "--train_features")
    code, _, err = command(*flags, 5)
    assert code == 0 and "is kept" in err and path.read_bytes() == before
    code, _, err = command(*flags, 3)
    assert code == 0 and "trained anew" in err, err
    assert (run / "tinycnn.prev.pt").read_bytes() == before != path.read_bytes()
    shapes = open_images("shapes").subset(np.arange(50))
    train_judge(str(path), shapes, shapes, 32, False, 2, torch.device("cpu"))
    refused(*flags, 3, says=("a classifier already", "other images", "move it away"))
    refused(*flags[:-1], says=("other images", "move it away"))
    shutil.copy(run / "tokenizer.pt", path)
    refused(*flags, 3, says=("checkpoint of another kind",))


# ------------------------------------------------------------------------------------------------
# what is not at its end is not shown as if it were

def test_an_unfinished_training_is_told_and_written_beside_its_numbers(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    saved = checkpoint.load(run / "generator-ar.pt")
    checkpoint.save(run / "generator-ar.pt", {**saved, "phase": "ar", "step": 2})
    code, out, err = command("--run", run, "--num_samples", 20)
    assert code == 0 and f"note: {run}/generator-ar.pt is unfinished, ar: step 2 of 5" in err
    assert "warning: ar is of an unfinished training, ar: step 2 of 5" in out
    found = json.loads((run / "summary.json").read_text())
    unfinished = {row["name"]: row["unfinished"] for row in found["rows"] if "unfinished" in row}
    assert unfinished == {"ar": "ar: step 2 of 5"} == found["unfinished"]
    # and beside the samples, wherever they go
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        words = ["--run", str(run), "--npz", str(tmp_path / "s.npz"), "--num_samples", "20"]
        sample.main(sample.parse([*words, "--device", "cpu"]))
    code, out, err = command("--run", run, "--images", tmp_path / "s.npz", "--json",
                             tmp_path / "o.json")
    assert code == 0 and "s.npz was drawn from an unfinished network, ar: step 2 of 5" in err
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert row["unfinished"] == "ar: step 2 of 5"


# ------------------------------------------------------------------------------------------------
# images of any size

@pytest.mark.parametrize("size", (1, 8, 11))
def test_small_images_are_judged_and_have_an_ssim_from_11_pixels_on(tmp_path, quick, size):
    data = str(folder_of(tmp_path / "photos", 40, size=16))
    run, sizes = tmp_path / "run", ["--image_size", size, "--patch_size", size]
    train_shapes(run, data, *map(str, sizes), "--decoder_overlap", "0")
    code, out, err = command("--run", run, "--train_features", 2, "--num_samples", 20, "--controls")
    assert code == 0, err
    row = {row["name"]: row for row in json.loads((run / "summary.json").read_text())["rows"]}
    assert ("ssim" in row["reconstruction"]) == (size >= 11) and "psnr" in row["reconstruction"]
    assert ("ssim of reconstruction is left out" in err) == (size < 11)


def test_a_single_held_out_image_is_refused_with_a_way_out(tmp_path, quick):
    train_shapes(tmp_path / "run", str(folder_of(tmp_path / "photos", 6, size=32)))
    refused("--run", tmp_path / "run", "--train_features", 2, says=("single image", "--data"))


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
    floor, *worse = rows(run, tmp_path, "--features", "inception").values()
    assert [row["name"] for row in worse] == ["reconstruction", "ar", "maskgit"]
    for row in worse:
        assert row["fid"] > 5 * floor["fid"] > 0
        assert row["precision"] < 0.5 < floor["precision"]
        assert row["recall"] < 0.5 < floor["recall"]
    for row in (floor, *worse):  # the fake one's logits are equal: it is never sure of anything
        assert row["inception_score"] == pytest.approx(1)
        assert row["inception_score_10_splits"] == pytest.approx([1, 0])
        assert "class_accuracy" not in row, "Inception's 1008 classes are not the run's"


def test_statistics_of_two_networks_are_never_compared(run, tmp_path, fake_inception):
    path = tmp_path / "fid.npz"
    code, _, err = command("--run", run, "--num_samples", 20, "--save_stats", path,
                           "--features", "inception")
    assert code == 0, err
    refused("--run", run, "--reference", path,
            says=("statistics of fid", "cannot be compared", "--features inception"))


@pytest.fixture
def grays(tmp_path, monkeypatch):
    """200 images, sorted by ten classes: shades of gray. A network that sees shades says which."""
    shades = np.repeat(np.arange(10) * 25, 20)                                # (200,)
    x = np.random.default_rng(0).integers(0, 6, (200, 16, 16, 3)) + shades[:, None, None, None]
    np.savez(tmp_path / "grays.npz", x=x.astype(np.uint8), y=shades // 25)

    def network(images):
        level = images.float().mean(dim=(1, 2))                               # (B, 3)
        said = F.one_hot((level.mean(dim=1) / 25).long(), 1008)
        return level, 20.0 * said
    net = FeatureNet("fid", "FID (fake)", network, 3)
    monkeypatch.setattr(eval_fid, "inception_net", lambda path, device: net)
    return tmp_path / "grays.npz", net


def test_precision_and_recall_know_all_classes_of_a_reference_that_is_sorted(grays, tmp_path,
                                                                             monkeypatch):
    def judged(kept):
        monkeypatch.setattr(judging, "KEPT", kept)
        code, _, err = command("--images", grays[0], "--data", grays[0], "--features", "inception",
                               "--json", tmp_path / "o.json")
        assert code == 0, err
        (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
        return row
    everything, some = judged(10_000), judged(112)
    # The same images on both sides, of which about half are kept: of all classes, so that there
    # is one of the reference close to nearly every image, and the other way round.
    assert everything["precision"] == everything["recall"] == 1
    assert some["precision"] > 0.8 and some["recall"] > 0.8


def test_each_split_of_the_inception_score_has_all_classes(grays):
    """Also that of reconstructions, which come in the order of the reference images."""
    path, net = grays
    args = eval_fid.parse(["--images", str(path), "--data", str(path), "--features", "inception"])
    how, procs = Batching(16), Processes("cpu")
    originals = eval_fid.reference_images(args, eval_fid.open_given(args, procs), how)
    (stat,), quality = extract(judging.reconstruction(Perfect(), originals, procs.device), [net],
                               how, procs)
    whole, mean, _ = stat.score.scores()
    assert quality["psnr"] > 60
    assert whole == pytest.approx(10, rel=0.01), "ten classes, equally often, each beyond doubt"
    assert mean > 7, "20 images a split hold 8.8 of 10 classes, drawn blindly"


class Perfect:
    """A tokenizer that loses nothing."""
    num_tokens = 1

    def encode(self, images):
        return images

    def decode(self, ids):
        return ids


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
