"""d2it.sample: maps that are obeyed, samples that repeat, and files that a judge can read."""
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
from d2it import explain, sample
from d2it import model as d2it_model
from d2it.model import D2iT
from experiments import record
from helpers import good, refused
from plumbing import checkpoint
from plumbing.datasets import open_images

LABELS = torch.arange(6)


@pytest.fixture(scope="session")
def model(finished):
    return D2iT.of_run(str(finished), torch.device("cpu"))


def command(run, *flags) -> None:
    sample.main(sample.parse(["--run", str(run), "--device", "cpu", *map(str, flags)]))


def test_a_sampled_latent_has_the_blocks_of_its_map(model):
    asked = torch.rand(6, 4, 4) < 0.5
    for grain in (None, asked):
        codes = model.sample(LABELS, steps=3, grain=grain)
        blocks = codes.z.view(6, 4, 4, 2, 4, 2).transpose(3, 4).flatten(4)
        assert torch.equal((blocks == blocks[..., :1]).all(-1).all(1), ~codes.grain)
        assert grain is None or torch.equal(codes.grain, asked)


def test_the_same_state_gives_the_same_bits_and_maps_are_drawn_not_averaged(model):
    def draw(seed):
        return model.sample(LABELS, steps=3, generator=torch.Generator().manual_seed(seed))
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first.z, again.z) and torch.equal(first.grain, again.grain)
    assert not torch.equal(first.grain, other.grain)
    same_class = model.maps(torch.zeros(20).long(), torch.Generator().manual_seed(0))
    assert len(same_class.flatten(1).unique(dim=0)) > 10


def test_guidance_changes_the_content_and_not_the_map(model):
    torch.nn.init.normal_(model.content.fine_head.weight, std=0.1)
    plain, guided = (model.sample(LABELS, s, 3, generator=torch.Generator().manual_seed(1))
                     for s in (1.0, 4.0))
    assert torch.equal(plain.grain, guided.grain) and not torch.equal(plain.z, guided.z)


def test_a_picture_has_two_rows_a_class_and_the_same_command_writes_the_same_bytes(run, capsys):
    flags = ("--classes", "disc", "3", "--per_class", 3, "--steps", 2)
    command(run, *flags)
    first = (run / "samples" / "sample.png").read_bytes()
    assert Image.open(run / "samples" / "sample.png").size == (2 + 3 * 66, 2 + 4 * 66)
    told = capsys.readouterr().out
    assert "disc, triangle" in told and "codes each" in told and "cfg_scale 2" in told
    command(run, *flags)
    assert (run / "samples" / "sample.png").read_bytes() == first


def test_a_painted_map_is_used_for_every_sample_and_another_size_refused(run, tmp_path, capsys):
    painted = np.zeros((4, 4, 3), np.uint8)
    painted[0, :3] = 255
    Image.fromarray(painted).save(tmp_path / "map.png")
    assert sample.read_map(tmp_path / "map.png", 4)[0, 0].tolist() == [1, 1, 1, 0]
    command(run, "--grain", tmp_path / "map.png", "--per_class", 2, "--steps", 2)
    assert f"samples of {16 + 3 * 3}.0 codes each" in capsys.readouterr().out
    for width, height in ((8, 4), (6, 6), (2, 2)):
        Image.new("RGB", (width, height)).save(tmp_path / "map.png")
        refused(sample.read_map, tmp_path / "map.png", 4,
                names=[f"{width} x {height}; a map is 4 x 4 here"])


def test_an_npz_names_its_classes_and_what_is_said_of_it_can_be_kept(run, tmp_path, monkeypatch):
    command(run, "--npz", tmp_path / "x.npz", "--num_samples", 12, "--steps", 2,
            "--json", run / "samples.json")
    images = open_images(str(tmp_path / "x.npz"))
    assert len(images) == 12 and images.classes[:2] == ["disc", "ring"]
    assert images.labels.tolist() == [k % 10 for k in range(12)]
    said = json.loads((run / "samples.json").read_text())
    assert said["n"] == 12 and 16 <= said["codes"] <= 64 and 0 <= said["maps_obeyed"] <= 1
    assert said["command"].startswith("python -m d2it.sample --run") and said["steps"] == 2
    # record.py keeps it
    monkeypatch.setattr(sys, "argv", ["record", "--run", str(run), "--by", "make it", "--out",
                                      str(tmp_path / "kept.json")])
    record.main()
    assert json.loads((tmp_path / "kept.json").read_text())["samples"] == said


def test_eval_fid_judges_the_npz_by_one_judge_for_both_systems(run, data, tmp_path):
    command(run, "--npz", tmp_path / "x.npz", "--num_samples", 12, "--steps", 2)
    words = ["--images", tmp_path / "x.npz", "--judge", tmp_path / "judge.pt", "--data",
             data, "--json", tmp_path / "x.json", "--train_features", "2"]
    told = good(eval_fid, *words)
    assert "class_accuracy" in told and "x.npz" in told
    row = json.loads((tmp_path / "x.json").read_text())["rows"][0]
    assert row["n"] == 12 and 0 <= row["class_accuracy"] <= 1


def test_each_part_that_is_unfinished_is_told_and_written(run, tmp_path, capsys):
    parts = ("dvae", "grain", "content")
    for name in parts:
        path = run / f"{name}.pt"
        checkpoint.save(path, {**checkpoint.load(path), "phase": name, "step": 4})
    kept = "; ".join(f"{name}: step 4 of 5" for name in parts)
    command(run, "--npz", tmp_path / "x.npz", "--num_samples", 12, "--steps", 2,
            "--json", tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["unfinished"] == kept
    assert np.load(tmp_path / "x.npz")["unfinished"].item() == kept
    told = capsys.readouterr().err
    for name in parts:
        assert f"note: {run / name}.pt is unfinished, {name}: step 4 of 5" in told
    explain.main(explain.parse(["--run", str(run), "--images", "2", "--device", "cpu"]))
    assert f"Unfinished: {kept}. " in (run / "explain" / "index.html").read_text("utf-8")


def test_reconstructing_shows_image_entropy_map_and_image_again(run, tmp_path, capsys):
    files = []
    for k, level in enumerate((0, 255)):
        image = np.full((40, 32, 3), level, np.uint8)
        image[::2, ::3] = 130 * k
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(image).save(files[-1])
    command(run, "--reconstruct", *files)
    told = capsys.readouterr().out
    assert "PSNR" in told and "of at most 64" in told
    assert Image.open(run / "samples" / "reconstruct.png").size == (2 + 4 * 66, 2 + 2 * 66)


@pytest.mark.parametrize("flags, names", [
    (("--reconstruct", "x.png", "--json", "x"), ["--json is for samples"]),
    (("--json", "x"), ["--json is for --npz"]),
    (("--npz", "x", "--out", "y"), ["--out is for pictures"]),
    (("--classes", "dusc"), ["disc"])])
def test_flags_that_would_not_be_read_and_unknown_classes_are_refused(finished, flags, names):
    """What sample.py refuses too is tried there: the flags are read by one function."""
    refused(command, finished, *flags, names=names)


def test_a_run_of_the_other_system_is_refused(small_run):
    for flags in ((), ("--reconstruct", "x.png")):
        refused(command, small_run, *flags, names=["a run of python train.py, the other system"])


def test_maps_are_obeyed_when_detail_lies_where_they_asked_for_it(model):
    grain = torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    inside = grain.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None]
    noise = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    images = torch.where(inside, noise, 90).to(torch.uint8)
    assert model.obeyed(images, grain) == 1
    half = torch.arange(16).view(1, 4, 4).expand(8, 4, 4) < 8
    images = torch.where(half.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None], noise, 90)
    assert model.obeyed(images.to(torch.uint8), ~half) == 0
    assert model.obeyed(images.to(torch.uint8), half[:, :, [0, 1, 3, 2]]) == 1
    assert model.obeyed(images.to(torch.uint8)[:1], torch.zeros(1, 4, 4).bool()) == 1
    faint = torch.where(images == 90, 90 + noise % 3, images).to(torch.uint8)
    assert model.obeyed(faint, half) == 1, "faint noise is no detail"


def test_what_python_users_hand_over_is_looked_at(model):
    """Each kind of label and map: test_given.py."""
    from d2it.dvae import Codes
    pixels, labels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.arange(2)
    wrong = labels + 10
    for call in (model.sample, model.maps, partial(model.sample, grain=torch.zeros(2, 4, 4) > 0)):
        refused(call, wrong, names=["0 to 9"])
    refused(partial(model.sample, grain=torch.zeros(2, 5, 5) > 0), labels, names=["bool (2, 4, 4)"])
    for settings in (dict(steps=0), dict(steps=2.5), dict(eta=2), dict(cfg_scale=float("nan")),
                     dict(generator=3)):
        refused(partial(model.sample, **settings), labels, names=[next(iter(settings))])
    for wrong in (pixels.float(), pixels.permute(0, 3, 1, 2), pixels[0], pixels.numpy()):
        refused(model.dvae.encode, wrong, names=["uint8"])
        refused(model.dvae.entropy, wrong, names=["uint8"])
        refused(model.obeyed, wrong, torch.zeros(2, 4, 4).bool(), names=["uint8"])
    codes = model.dvae.encode(pixels)
    for wrong in (codes.z, (codes.z[0], codes.grain), (codes.z.long(), codes.grain),
                  Codes(codes.z, codes.grain.float())):
        refused(model.decode, wrong)
    refused(model.decode, Codes(codes.z / 0, codes.grain), names=["not finite"])
    assert model.decode(codes).shape == (2, 3, 32, 32)


def painted(kind: str):
    """7 fine cells of 16, as people paint them."""
    grain = np.zeros((4, 4), bool)
    grain[0] = grain[:, 0] = True
    big = grain.repeat(8, 0).repeat(8, 1)
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[big] = 255
    dark = np.where(big, 90, np.arange(32))  # all below middle gray, and more than two values
    return {"bits": big.astype(np.uint8), "strokes": rgba, "dark": dark.astype(np.uint8),
            "colours": np.where(big[..., None], [255, 60, 50], [40, 90, 230]).astype(np.uint8),
            "black": 0 * big.astype(np.uint8)}[kind]


@pytest.mark.parametrize("kind, fine, note", (
    ("bits", 7, False), ("strokes", 7, False), ("colours", 7, False), ("dark", 0, True),
    ("black", 0, False)))
def test_a_map_means_what_was_painted_or_a_note_says_that_it_does_not(tmp_path, capsys, kind, fine,
                                                                    note):
    Image.fromarray(painted(kind)).save(tmp_path / "map.png")
    assert sample.read_map(str(tmp_path / "map.png"), 4).sum() == fine
    assert ("coarse" in capsys.readouterr().err) == note


def test_how_maps_are_obeyed_does_not_depend_on_what_is_in_memory_at_a_time(model, monkeypatch):
    images = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8)
    images[::2, :16] = 90
    grain = torch.rand(7, 4, 4) < 0.5
    whole = model.obeyed(images, grain)
    most, entropy = [], model.dvae.entropy
    monkeypatch.setattr(model.dvae, "entropy", lambda x: most.append(len(x)) or entropy(x))
    monkeypatch.setattr(d2it_model, "PIXELS", 2 * 32 * 32)
    assert model.obeyed(images, grain) == whole and max(most) == 2
