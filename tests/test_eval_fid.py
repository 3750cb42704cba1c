"""Promises of eval_fid.py and judging.py: numbers repeat, notice faults, bear their names."""
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
from flow_decoder import Decoding
from helpers import called, folder_of, good, ranks, some_shapes, train_shapes, turned_away
from plumbing import checkpoint
from plumbing.datasets import open_images, train_and_val
from plumbing.processes import Processes

FEW = ("--batch_size", 16, "--num_samples", 20)


@pytest.fixture(scope="module")
def first(small_run, tmp_path_factory):
    """A complete run with a classifier -> its folder, what the first judging said and wrote."""
    folder = shutil.copytree(small_run, tmp_path_factory.mktemp("eval") / "run")
    said = good(eval_fid, "--run", folder, "--train_features", 5, *FEW)
    return folder, said, json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def run(first):
    return first[0]


@pytest.fixture(scope="module")
def direct(first):
    return by_name(first[2])


def by_name(results: dict) -> dict:
    return {row["name"]: row for row in results["rows"]}


def rows(tmp_path, *flags) -> dict:
    """-> {name: row} of the JSON that the command writes."""
    good(eval_fid, "--json", tmp_path / "out.json", *FEW, *flags)
    return by_name(json.loads((tmp_path / "out.json").read_text()))


def distances(row: dict) -> list[str]:
    return [key for key in row if key.startswith("fd_")]


# ------------------------------------------------------------------------------------------------
# what is written

def test_summary_holds_what_the_readme_promises(first):
    _, said, summary = first
    assert {"command", "commit", "torch", "device", "seed"} <= set(summary), "where it comes from"
    assert set(summary["psnr_by_tokens"]) == set(summary["codebook_used"]) == {"2", "4", "6"}
    assert set(summary["class_accuracy"]) == {"ar", "maskgit", "classifier_on_real"}
    phases = {"base", "grow-4", "grow-6", "finetune", "ar", "maskgit", "eval"}
    assert phases <= set(summary["seconds"])
    assert summary["reference"] == {"name": "held.npz", "n": 60}
    assert [row["name"] for row in summary["rows"]] == ["real", "reconstruction", "ar", "maskgit"]
    (trained,) = (key for key in summary["rows"][0] if key.startswith("fd_tinycnn_"))
    assert len(trained) == len("fd_tinycnn_") + 8
    floor, *worse = summary["rows"]
    for row in worse:  # after six steps anything is far from real
        assert 0 < 2 * floor[trained] < row[trained] and row["precision"] < floor["precision"]
    assert "to_come" not in summary and not any("unfinished" in row for row in summary["rows"])
    rebuilt, ar, maskgit = worse
    assert ar["settings"]["seed"] == 0 and maskgit["settings"]["steps"] == 6
    # other ones of the 60 held-out images than in training, rounded to bytes
    assert rebuilt["psnr"] == pytest.approx(summary["psnr_by_tokens"]["6"], abs=1.5)
    assert 0 < rebuilt["ssim"] < 1
    # never called FID, and small n is warned of
    assert "not FID" in said and "warning: not more images than the 128 features" in said
    assert "fid" not in said.lower().replace("not fid", "").split()


def test_the_same_command_gives_the_same_numbers(run, direct, tmp_path):
    assert rows(tmp_path, "--run", run) == direct


# ------------------------------------------------------------------------------------------------
# the same by another way

def test_saved_statistics_stand_in_for_the_images(run, direct, tmp_path):
    path = tmp_path / "stats.npz"
    good(eval_fid, "--run", run, *FEW, "--generator", "ar", "--save_stats", path)
    saved = rows(tmp_path, "--run", run, "--reference", path)
    (key,) = (key for key in direct["ar"] if key.startswith("fd_tinycnn_"))
    for name in ("real", "ar", "maskgit"):
        assert saved[name][key] == pytest.approx(direct[name][key], rel=1e-3)
    assert "reconstruction" not in saved, "statistics hold no images that could be reconstructed"


def test_samples_in_an_npz_are_judged_like_the_run_that_made_them(run, direct, tmp_path):
    good(sample, "--run", run, "--npz", tmp_path / "s.npz", *FEW)
    file = rows(tmp_path, "--run", run, "--images", tmp_path / "s.npz")["s.npz"]
    assert len(distances(file)) == 2
    for key in distances(file):
        assert file[key] == pytest.approx(direct["ar"][key], rel=1e-3)


def test_two_processes_give_the_numbers_of_one(run, direct, tmp_path):
    for rank in ranks(2, "eval_fid.py", "--run", run, *FEW, "--json", tmp_path / "two.json",
                      "--device", "cpu"):
        assert rank.returncode == 0, rank.stderr
    two = by_name(json.loads((tmp_path / "two.json").read_text()))
    assert list(direct) == list(two)
    for name, row in direct.items():
        for key, value in row.items():
            expected = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            assert two[name][key] == expected, (name, key)


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
    originals = judging.real("reference", val, np.arange(300), 32, how)
    reference = Reference.of("val", 300, [net], extract(originals, [net], how, procs)[0])
    chosen = np.random.default_rng(0).permutation(4000)[:250]
    sources = [judging.real("real", data, chosen, 32, how), *judging.controls(data, 250, 32, how)]
    floor, *worse = (judging.judge(source, [net], reference, how, procs) for source in sources)
    assert [row["name"] for row in worse] == ["real, blurred", "real, with noise",
                                              "real, half of the classes", "real, one class"]
    for row in worse:
        assert row["fd_random"] > 1.5 * floor["fd_random"], row
    assert worse[3]["recall"] < worse[2]["recall"] < floor["recall"]


def test_controls_leave_out_classes_without_images(tmp_path):
    x = np.zeros((8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=[1, 3] * 4, classes=["cat", "dog", "emu", "owl"])
    data = open_images(str(tmp_path / "a.npz"))
    made = {source.name: source for source in judging.controls(data, 8, 8, judging.Batching())}
    for name in ("real, half of the classes", "real, one class"):
        (_, labels, _), = made[name].batches([0])
        assert labels.tolist() == [1] * 4


# ------------------------------------------------------------------------------------------------
# labels count where they mean something, and else it is said why they do not

@pytest.mark.parametrize("arrays, says", [
    ({}, "no labels (an array arr_1)"),
    ({"arr_1": np.arange(20) % 9 + 1}, "its labels arr_1 have no names (an array classes)"),
    ({"arr_1": np.arange(20) % 2, "classes": np.array(["disc", "dish"])},
     "and 4 more; only there: dish) or in another order"),
    ({"arr_1": np.arange(20) % 10, "classes": open_images("shapes").classes}, "")])
def test_class_accuracy_is_counted_where_the_classes_are_those_of_the_judge(run, tmp_path, arrays,
                                                                             says):
    images = np.stack([open_images("shapes").load(i) for i in range(20)])
    np.savez(tmp_path / "s.npz", arr_0=images, **arrays)
    code, out, err = called(eval_fid, "--run", run, "--images", tmp_path / "s.npz")
    assert code == 0, err
    assert ("class_accuracy" in out) == (not says)
    assert ("note: class_accuracy of s.npz is left out: " in err) == bool(says) and says in err


def test_images_in_one_folder_have_no_classes_and_that_is_said(run, tmp_path):
    folder_of(tmp_path / "flat", 6, classes=("",), size=32)
    code, out, err = called(eval_fid, "--run", run, "--data", tmp_path / "flat", "--generator",
                            "ar", *FEW)
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
    good(eval_fid, *words)
    assert json.loads((tmp_path / "o.json").read_text())["reference"]["n"] == 3
    # The same for whoever says once more that it should learn; but nothing makes way for another.
    before = Path(path).read_bytes()
    good(eval_fid, *words, "--train_features", 2)
    for flags, says in ((("--train_features", 3), ("a classifier already", "these images")),
                        (("--val_data", data), ("a part of", "leave out --val_data"))):
        turned_away(eval_fid, *words, *flags, says=says)
    words[3] = folder_of(tmp_path / "others", 30, size=16)
    turned_away(eval_fid, *words, "--train_features", 2,
                says=("a classifier already", "other images", "--judge"))
    turned_away(eval_fid, *words, says=("other images", "--judge", "new file"))
    assert Path(path).read_bytes() == before


def test_a_judge_that_learned_from_all_images_asks_for_the_held_out_ones(tmp_path):
    photos, val = (str(folder_of(tmp_path / name, n, size=16)) for name, n in (("p", 20), ("v", 6)))
    path = str(tmp_path / "judge.pt")
    train_judge(path, open_images(photos), open_images(val), 16, False, 2, torch.device("cpu"))
    words = ["--judge", path, "--data", photos, "--images", photos]
    turned_away(eval_fid, *words, says=("all of", "--val_data"))
    assert "is right on" in good(eval_fid, *words, "--val_data", val)
    other = folder_of(tmp_path / "w", 8, size=16)
    code, out, err = called(eval_fid, *words, "--val_data", other)
    assert code == 0 and "is right on" not in out and "other images were held out" in err


def test_a_run_trains_its_judge_anew_but_no_others(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    path, before = run / "tinycnn.pt", (run / "tinycnn.pt").read_bytes()
    flags = ("--run", run, *FEW, "--generator", "ar", "--train_features")
    code, _, err = called(eval_fid, *flags, 5)
    assert code == 0 and "is kept" in err and path.read_bytes() == before
    code, _, err = called(eval_fid, *flags, 3)
    assert code == 0 and "trained anew" in err, err
    assert (run / "tinycnn.prev.pt").read_bytes() == before != path.read_bytes()
    shapes = open_images("shapes").subset(np.arange(50))
    train_judge(str(path), shapes, shapes, 32, False, 2, torch.device("cpu"))
    says = ("other images", "move it away")
    turned_away(eval_fid, *flags, 3, says=("a classifier already", *says))
    turned_away(eval_fid, *flags[:-1], says=says)
    shutil.copy(run / "tokenizer.pt", path)
    turned_away(eval_fid, *flags, 3, says=("checkpoint of another kind",))


def test_without_a_classifier_one_line_says_how_to_get_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "tinycnn.pt").unlink()
    turned_away(eval_fid, "--run", tmp_path / "run", says=("no classifier", "--train_features"))


# ------------------------------------------------------------------------------------------------
# what is not at its end is not shown as if it were

def test_an_unfinished_training_is_told_and_written_beside_its_numbers(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    saved = checkpoint.load(run / "generator-ar.pt")
    checkpoint.save(run / "generator-ar.pt", {**saved, "phase": "ar", "step": 2})
    code, out, err = called(eval_fid, "--run", run, *FEW)
    assert code == 0 and f"note: {run}/generator-ar.pt is unfinished, ar: step 2 of 5" in err
    assert "warning: ar is of an unfinished training, ar: step 2 of 5" in out
    found = json.loads((run / "summary.json").read_text())
    unfinished = {row["name"]: row["unfinished"] for row in found["rows"] if "unfinished" in row}
    assert unfinished == {"ar": "ar: step 2 of 5"} == found["unfinished"]
    # and beside the samples, wherever they go
    good(sample, "--run", run, "--npz", tmp_path / "s.npz", *FEW)
    row = rows(tmp_path, "--run", run, "--images", tmp_path / "s.npz")["s.npz"]
    assert row["unfinished"] == "ar: step 2 of 5"


# ------------------------------------------------------------------------------------------------
# images of any size

@pytest.mark.parametrize("size", (pytest.param(1, marks=pytest.mark.faults), 8,
                                  pytest.param(11, marks=pytest.mark.faults)))
def test_small_images_are_judged_and_have_an_ssim_from_11_pixels_on(tmp_path, quick, size):
    data = str(folder_of(tmp_path / "photos", 40, size=16))
    run, sizes = tmp_path / "run", ["--image_size", size, "--patch_size", size]
    train_shapes(run, data, *map(str, sizes), "--decoder_overlap", "0", "--flow_decoder_steps", "0")
    code, out, err = called(eval_fid, "--run", run, "--train_features", 2, *FEW, "--controls")
    assert code == 0, err
    row = by_name(json.loads((run / "summary.json").read_text()))["reconstruction"]
    assert ("ssim" in row) == (size >= 11) and "psnr" in row
    assert ("ssim of reconstruction is left out" in err) == (size < 11)


def test_a_single_held_out_image_is_refused_with_a_way_out(run, tmp_path):
    turned_away(eval_fid, "--run", run, "--data", some_shapes(tmp_path / "one.npz", 1, first=200),
                says=("single image", "--data", "hold out more"))


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


def test_adms_file_is_taken_at_its_word_and_its_images_are_not_looked_at(tmp_path, fake_inception):
    images = torch.from_numpy(np.stack([open_images("shapes").load(i) for i in range(50)]))
    seen = FeatureStats(FeatureNet("fid", "", fake_inception, 6), 50)
    seen.statistics.add(fake_inception(images)[0].numpy())
    np.savez(tmp_path / "adm.npz", mu=seen.statistics.mu, sigma=seen.statistics.sigma,
             mu_s=np.zeros(3), arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "same.npz", arr_0=images.numpy())
    out = good(eval_fid, "--images", tmp_path / "same.npz", "--reference", tmp_path / "adm.npz",
               "--features", "inception", "--json", tmp_path / "o.json")
    row = by_name(json.loads((tmp_path / "o.json").read_text()))["same.npz"]
    assert abs(row["fid"]) < 1e-6 * np.trace(seen.statistics.sigma)
    assert row["inception_score"] == pytest.approx(1)
    assert "adm.npz, n unknown" in out and "FID (fake)" in out


def test_a_run_gets_rfid_gfid_and_inception_score(run, tmp_path, fake_inception):
    path = tmp_path / "fid.npz"
    floor, *worse = rows(tmp_path, "--run", run, "--features", "inception", "--save_stats",
                         path).values()
    assert [row["name"] for row in worse] == ["reconstruction", "ar", "maskgit"]
    for row in worse:
        assert row["fid"] > 5 * floor["fid"] > 0
        assert row["precision"] < 0.5 < floor["precision"]
        assert row["recall"] < 0.5 < floor["recall"]
    for row in (floor, *worse):  # the fake one's logits are equal: it is never sure of anything
        assert row["inception_score"] == pytest.approx(1)
        assert row["inception_score_10_splits"] == pytest.approx([1, 0])
        assert "class_accuracy" not in row, "Inception's 1008 classes are not the run's"
    turned_away(eval_fid, "--run", run, "--reference", path,  # statistics of two networks
                says=("statistics of fid", "cannot be compared", "--features inception"))


@pytest.fixture
def grays(tmp_path, monkeypatch):
    """200 images, sorted by ten classes: shades of gray. A network that sees shades says which."""
    shades = np.repeat(np.arange(10) * 25, 20)                                # (200,)
    x = np.random.default_rng(0).integers(0, 6, (200, 16, 16, 3)) + shades[:, None, None, None]
    np.savez(tmp_path / "grays.npz", x=x.astype(np.uint8), y=shades // 25)

    def network(images):
        level = images.float().mean(dim=(1, 2))                               # (B, 3)
        emitted = F.one_hot((level.mean(dim=1) / 25).long(), 1008)
        return level, 20.0 * emitted
    net = FeatureNet("fid", "FID (fake)", network, 3)
    monkeypatch.setattr(eval_fid, "inception_net", lambda path, device: net)
    return tmp_path / "grays.npz", net


def test_of_images_that_are_sorted_by_class_some_know_all_classes(grays, tmp_path, monkeypatch):
    def judged(kept, n):
        monkeypatch.setattr(judging, "KEPT", kept)
        flags = ("--images", grays[0], "--data", grays[0], "--features", "inception")
        return rows(tmp_path, *flags, "--num_samples", n)["grays.npz"]
    everything = judged(10_000, 200)
    assert everything["precision"] == everything["recall"] == 1
    # Of a part of the images, or of features of which a part is kept, there is one of the reference
    # close to nearly every image, and the other way round. Distances are those of all features.
    part, kept = judged(10_000, 100), judged(56, 100)
    assert min(part["precision"], part["recall"], kept["precision"], kept["recall"]) > 0.7
    assert kept["fid"] == pytest.approx(part["fid"], rel=1e-3) and part["fid"] > 0


def test_each_split_of_the_inception_score_has_all_classes(grays):
    """Also that of reconstructions, which come in the order of the reference images."""
    path, net = grays
    args = eval_fid.parse(["--images", str(path), "--data", str(path), "--features", "inception"])
    how, procs = Batching(16), Processes("cpu")
    originals = eval_fid.reference_images(args, eval_fid.open_given(args, procs), how)
    (stat,), quality = extract(judging.reconstruction(Decoding(Perfect()), originals, how,
                                                     procs.device), [net], how, procs)
    whole, mean, _ = stat.score.scores()
    assert quality["psnr"] > 60
    assert whole == pytest.approx(10, rel=0.01), "ten classes, equally often, each beyond doubt"
    assert mean > 7, "20 images a split hold 8.8 of 10 classes, drawn blindly"


class Perfect:
    """A tokenizer that loses nothing."""
    num_tokens, unfinished = 3, ""  # its ids are the images, cut after so many channels

    def encode(self, images):
        return images

    def decode(self, ids):
        return ids


# ------------------------------------------------------------------------------------------------
# sweeps

def test_a_sweep_tries_every_combination_that_a_generator_reads(run, tmp_path):
    out = good(eval_fid, "--run", run, *FEW, "--json", tmp_path / "o.json", "--sweep",
               "cfg_scale=1,2.5", "steps=1,3")
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
    (("--images", "shapes", "--reference", "x.npz"), ("TinyCNN", "--features inception")),
    (("--images", "shapes", "--features", "inception"), ("--reference",)),
    (("--images", "shapes", "--judge", "RUN/judge.pt"), ("--judge FILE needs",)),
    (("--run", "RUN", "--judge", "nowhere.pt"), ("nowhere.pt", "--train_features")),
    (("--run", "RUN", "--judge", "judge.pt", "--val_data", "shapes:val"), ("without --run",)),
    (("--run", "nowhere"), ("nowhere", "not a run")),
    (("--run", "RUN", "--data", "shapes", "--reference", "x.npz"), ("two references",)),
    (("--run", "RUN", "--images", "nowhere"), ("nowhere",)),
    (("--run", "RUN", "--reference", "nowhere.npz"), ("nowhere.npz",)),
    (("--run", "RUN", "--inception", "nowhere.pth", "--features", "inception"), ("nowhere.pth",)),
    (("--run", "RUN", "--nonsense"), ("--nonsense",)),
    # out of range
    (("--run", "RUN", "--num_samples", "1"), ("num_samples",)),
    (("--run", "RUN", "--cfg_scale", "nan"), ("--cfg_scale",)),
    (("--run", "RUN", "--cfg_scale", "1e38"), ("--cfg_scale",)),
    (("--run", "RUN", "--top_p", "1.5"), ("--top_p",)),
    (("--run", "RUN", "--randomize_temperature", "-3"), ("--randomize_temperature",)),
    (("--run", "RUN", "--seed", "99999999999999999999"), ("--seed",)),
    (("--run", "RUN", "--image_size", "0"), ("--image_size",)),
    (("--run", "RUN", "--sweep", "seed=1,2"), ("seed", "cfg_scale")),
    (("--run", "RUN", "--sweep", "cfg_scale=1;2"), ("1;2", "--sweep")),
    (("--run", "RUN", "--sweep", "cfg_scale=1,nan"), ("nan",)),
    # given twice
    (("--run", "RUN", "--sweep", "cfg_scale=1", "cfg_scale=2"), ("twice",)),
    (("--run", "RUN", "--cfg_scale", "2", "--sweep", "cfg_scale=1,2"), ("twice", "A,B,C")),
    # nothing would read it
    (("--run", "RUN", "--generator", "ar", "--steps", "4"), ("no generator", "steps")),
    (("--run", "RUN", "--generator", "maskgit", "--sweep", "top_k=1"), ("no generator", "top_k")),
    (("--run", "RUN", "--features", "inception", "--train_features"), ("--train_features",)),
    (("--run", "RUN", "--inception", "x"), ("--inception",)),
    (("--run", "RUN", "--val_data", "x"), ("--val_data",)),
    (("--run", "RUN", "--images", "x.npz", "--generator", "ar"), ("--generator",)),
    (("--run", "RUN", "--images", "x.npz", "--cfg_scale", "2"), ("--cfg_scale",)),
    (("--run", "RUN", "--images", "x.npz", "--seed", "0"), ("--seed",)),
    (("--run", "RUN", "--reference", "x.npz", "--num_reference", "9"), ("--num_reference",)),
])
def test_what_is_wrong_or_out_of_range_or_would_not_be_read_is_refused(run, flags, says):
    turned_away(eval_fid, *(flag.replace("RUN", str(run)) for flag in flags), says=says)


def test_an_option_that_no_generator_of_the_run_reads_is_refused(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    for file in run.glob("generator-maskgit*"):
        file.unlink()
    turned_away(eval_fid, "--run", run, "--steps", 2, says=("steps", "no generator"))
