"""Promises of sample.py: the pictures asked for, the same ones again, and a line where it fails."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from config import GeneratorConfig, TokenizerConfig
from evaluation.best_of import load_chooser
from evaluation.tinycnn import TinyCNN
from generator import GENERATORS
from helpers import called, encoded, noise, put, turned_away
from losses import psnr
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import as_dict
from plumbing.images import read_image, to_float, to_uint8
from plumbing.samples import class_number, unfinished_maker

CLASSES = ["cat", "dog", "tabby, tabby cat"]
SIZE, L, MARGIN, SCALE = 16, 4, 2, 4  # SCALE: small pictures are enlarged to 64 pixels
TOK = TokenizerConfig(
    image_size=SIZE, patch_size=8, token_schedule=(2, L), codebook_size=16, code_dim=4,
    encoder_width=16, encoder_depth=1, encoder_heads=2, expert_width=16, expert_depth=1,
    expert_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
GEN = GeneratorConfig(generator_width=16, generator_depth=1, generator_heads=2)
KINDS = pytest.mark.parametrize("kind", ["ar", "maskgit"])


def make_run(folder: Path, classes=CLASSES) -> Path:
    """A run as far as sampling reads it, with weights so loud that every input shows."""
    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = NativeTok(TOK).grow_to(L)
    generators = {kind: Kind(GEN, L, TOK.codebook_size, len(classes))
                  for kind, Kind in GENERATORS.items()}
    for model in (tokenizer, *generators.values()):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.4)
    checkpoint.save(folder / "tokenizer.pt", {
        "tokenizer_config": as_dict(TOK), "num_tokens": L, "ema": tokenizer.state_dict()})
    fingerprint = NativeTok.load(folder / "tokenizer.pt").fingerprint
    for kind, model in generators.items():
        checkpoint.save(folder / f"generator-{kind}.pt", {
            "kind": kind, "generator_config": as_dict(GEN), "num_tokens": L,
            "codebook_size": TOK.codebook_size, "classes": classes, "tokenizer": fingerprint,
            "ema": model.state_dict()})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "small")


def drawn(run, *flags) -> str:
    """sample.py, which must end well and without a word on stderr -> stdout."""
    code, out, err = called(sample, "--run", run, *flags)
    assert (code, err) == (0, ""), err
    return out


def cells(path) -> np.ndarray:
    """A grid's PNG -> uint8 (rows, columns, SIZE, SIZE, 3)."""
    step = SIZE * SCALE + MARGIN
    sheet = np.asarray(Image.open(path))[MARGIN:, MARGIN:]
    rows, columns = (n // step for n in sheet.shape[:2])
    assert sheet.shape == (rows * step, columns * step, 3)
    squares = sheet.reshape(rows, step, columns, step, 3).swapaxes(1, 2)
    return squares[:, :, :SIZE * SCALE:SCALE, :SIZE * SCALE:SCALE]


# ------------------------------------------------------------------------------------------------
# samples

@KINDS
def test_one_row_per_class_and_the_same_pictures_again_unless_the_seed_is_another(run, tmp_path,
                                                                                 kind):
    said = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        said[name] = drawn(run, "--generator", kind, "--out", tmp_path / name, "--per_class", 5,
                           "--seed", seed)
    a, b, c = (tmp_path / name / f"sample-{kind}.png" for name in said)
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    grid = cells(a)
    assert grid.shape == (3, 5, SIZE, SIZE, 3)
    assert len(np.unique(grid.reshape(15, -1), axis=0)) > 5, "samples must differ"
    for text in (kind, str(a), "cfg_scale 2", "seed 0", "images per second", "15 samples",
                 *CLASSES):
        assert text in said["a"]
    assert kind == "ar" or f"steps {L}," in said["a"], "8 steps, or as many as there are tokens"


def test_names_and_numbers_mean_the_same_classes(run, tmp_path):
    drawn(run, "--out", tmp_path / "names", "--classes", "tabby, tabby cat", "cat")
    drawn(run, "--out", tmp_path / "numbers", "--classes", 2, 0)
    grids = [cells(tmp_path / form / "sample-ar.png") for form in ("names", "numbers")]
    assert len(grids[0]) == 2 and np.array_equal(*grids)


def test_a_class_that_is_called_by_a_number_is_found_by_its_name(tmp_path):
    """Folders 0 .. 11 are sorted as text: 0, 1, 10, 11, 2; class "10" is then number 2."""
    names = sorted(map(str, range(12)))
    run = make_run(tmp_path / "run", names)
    assert class_number("10", names) == 2 and class_number("9", names) == 11
    assert "rows 0, 1, 10, 11, 2, 3, 4, 5, 6, 7 (the first 10 of 12" in drawn(run, "--per_class", 1)
    assert (run / "samples" / "sample-ar.png").exists(), "in the run unless told otherwise"
    drawn(run, "--npz", tmp_path / "x.npz", "--num_samples", 12)
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == list(range(12))


@KINDS
def test_options_reach_the_generator(run, kind, monkeypatch, tmp_path):
    seen = {}
    original = GENERATORS[kind].sample

    def watched(self, labels, generator, **options):
        seen.update(options)
        return original(self, labels, generator=generator, **options)
    monkeypatch.setattr(GENERATORS[kind], "sample", watched)
    own = {"ar": {"top_k": 3, "top_p": 0.5},
           "maskgit": {"steps": 2, "randomize_temperature": 1.5}}
    asked = {"cfg_scale": 3.0, "temperature": 0.5, **own[kind]}
    flags = [word for name, value in asked.items() for word in (f"--{name}", value)]
    drawn(run, "--generator", kind, "--out", tmp_path, *flags)
    assert seen == asked


def test_single_files_hold_the_pictures_of_the_grid(run, tmp_path):
    drawn(run, "--out", tmp_path, "--per_class", 2, "--single")
    twice = ("cat", "cat", "dog", "dog", "tabby-tabby-cat", "tabby-tabby-cat")
    names = [f"{j:03}_{name}.png" for j, name in enumerate(twice)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "sample-ar.png"]
    grid = cells(tmp_path / "sample-ar.png").reshape(6, SIZE, SIZE, 3)
    assert np.array_equal(grid, [np.asarray(Image.open(tmp_path / name)) for name in names])


# ------------------------------------------------------------------------------------------------
# an .npz for an evaluator

@KINDS
def test_npz_holds_nhwc_bytes_and_balanced_labels_and_repeats(run, tmp_path, kind):
    for name in ("a.npz", "b.npz"):
        said = drawn(run, "--generator", kind, "--npz", tmp_path / name, "--num_samples", 20,
                     "--batch_size", 9)
    assert f"{tmp_path / 'b.npz'}: arr_0 uint8 (20, 16, 16, 3), arr_1 their labels, 3" in said
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        images, labels, named = file["arr_0"], file["arr_1"], file["classes"].tolist()
        assert named == CLASSES and "unfinished" not in file
    assert images.shape == (20, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [7, 7, 6]
    # Two batches of the same labels must draw different numbers.
    assert not np.array_equal(images[:9], images[9:18])
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]


def test_npz_images_show_the_classes_of_their_labels(run, tmp_path):
    """At temperature 0 a class has one picture, which must stand wherever its label does."""
    drawn(run, "--npz", tmp_path / "x.npz", "--num_samples", 7, "--batch_size", 2,
          "--temperature", 0)
    drawn(run, "--out", tmp_path, "--per_class", 1, "--temperature", 0)
    file, grid = np.load(tmp_path / "x.npz"), cells(tmp_path / "sample-ar.png")
    assert len(np.unique(grid.reshape(3, -1), axis=0)) == 3
    # Not equal bytes: a batch of another size may round differently.
    assert np.abs(file["arr_0"].astype(int) - grid[file["arr_1"], 0]).max() <= 1


def test_npz_can_be_of_some_classes_and_tells_how_many_it_really_holds(run, tmp_path):
    flags = ("--npz", tmp_path / "x.npz", "--classes", "dog", "cat", "dog", "--num_samples")
    assert "2 classes" in drawn(run, *flags, 5)
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [1, 0, 1, 1, 0]
    assert "1 classes" in drawn(run, *flags, 1)


@KINDS
def test_an_unfinished_training_is_told_and_goes_with_the_samples(run, tmp_path, kind):
    run = shutil.copytree(run, tmp_path / "run")
    path, step = run / f"generator-{kind}.pt", {"step": 10, "settings": {"generator_steps": 1000}}
    checkpoint.save(path, {**checkpoint.load(path), "phase": kind, **step})
    flags = ("--generator", kind, "--npz", tmp_path / "x.npz", "--num_samples", 2)
    code, out, err = called(sample, "--run", run, *flags)
    told = f"{kind}: step 10 of 1,000"
    assert code == 0 and err == f"note: {path} is unfinished, {told}\n"
    assert unfinished_maker(str(tmp_path / "x.npz")) == told
    checkpoint.save(path, {**checkpoint.load(path), "phase": "finished"})
    drawn(run, *flags)
    assert unfinished_maker(str(tmp_path / "x.npz")) == ""


def test_a_stopped_run_leaves_the_old_npz_and_nothing_half_written(run, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def stopped(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(np, "savez", stopped)
    assert called(sample, "--run", run, "--npz", path, "--num_samples", 3)[0] == 130
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------
# reconstructions

@pytest.fixture
def photos(tmp_path) -> list[str]:
    images = [Image.fromarray(noise(k, SIZE, SIZE)) for k in range(2)]
    return [put(tmp_path / f"photo{k}.png", encoded(image, "PNG"))
            for k, image in enumerate(images)]


def test_a_row_is_the_original_then_each_prefix_then_all_tokens(run, tmp_path, photos):
    said = drawn(run, "--reconstruct", *photos, "--prefixes", 3, 1, "--out", tmp_path / "out")
    grid = cells(tmp_path / "out" / "reconstruct.png")
    assert grid.shape[:2] == (2, 1 + 3)
    tokenizer = NativeTok.load(run / "tokenizer.pt")
    for file, row in zip(photos, grid):
        image = torch.tensor(read_image(file))[None]
        ids = tokenizer.encode(to_float(image))
        recon = [tokenizer.decode(ids[:, :k]) for k in (1, 3, L)]
        assert np.array_equal(row, torch.cat([image, *map(to_uint8, recon)]).numpy())
        dB = [psnr(r.clamp(-1, 1), to_float(image)).item() for r in recon]
        assert f"1: {dB[0]:.2f}, 3: {dB[1]:.2f}, {L}: {dB[2]:.2f} dB" in said
        assert " ".join(map(str, ids[0].tolist())) in said and file in said


def test_a_photo_of_any_shape_is_cropped_and_needs_no_generator(run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "tokenizer.pt", tmp_path / "run")
    photo = put(tmp_path / "wide.jpg", encoded(Image.fromarray(noise(0, 30, 70)), "JPEG"))
    said = drawn(tmp_path / "run", "--reconstruct", photo)
    assert cells(tmp_path / "run" / "samples" / "reconstruct.png").shape[:2] == (1, 4)
    assert "first 1 2 4 tokens" in said, "prefixes double unless told otherwise"


# ------------------------------------------------------------------------------------------------
# what is refused, each in one line with exit code 2

@pytest.mark.parametrize("flags, says", [
    (["--steps", 3], ["--steps is for maskgit"]),
    (["--generator", "maskgit", "--top_k", 3], ["--top_k is for ar"]),
    (["--num_samples", 3], ["--num_samples is for --npz"]),
    (["--prefixes", 3], ["--prefixes is for --reconstruct"]),
    (["--npz", "x.npz", "--per_class", 3], ["--per_class"]),
    (["--npz", "x.npz", "--single"], ["--single"]),
    (["--reconstruct", "x.png", "--seed", 0], ["--seed is for samples"]),
    (["--reconstruct", "x.png", "--npz", "x.npz"], ["one of them"]),
    (["--npz", ""], ["--npz is empty"]),
    (["--npz", "."], ["name of a file"]),
    (["--class", "cat"], ["--class"]),
    (["--classes", "cta"], ["'cta' is unknown", "did you mean 'cat'"]),
    (["--classes", "Tabby"], ["did you mean 'tabby, tabby cat'"]),
    (["--classes", 3], ["0 cat, 1 dog"]),
    (["--generator", "maskgit", "--steps", L + 1], [f"from 1 to {L}"]),
    (["--top_p", 0], ["top_p"]),
    (["--cfg_scale", "nan"], ["--cfg_scale"]),
    (["--per_class", 0], ["--per_class"]),
])
def test_a_wrong_use_is_one_line(run, flags, says):
    turned_away(sample, "--run", run, *flags, says=says)


def test_a_broken_image_or_a_prefix_too_long_leaves_no_picture(run, tmp_path, photos):
    broken = put(tmp_path / "broken.png", Path(photos[0]).read_bytes()[:200])
    for flags, says in (((photos[1], broken), "broken.png"), (("absent.png",), "absent.png"),
                        ((photos[0], "--prefixes", 1, L + 1), f"1 to {L}")):
        turned_away(sample, "--run", run, "--out", tmp_path / "out", "--reconstruct", *flags,
                    says=[says])
    assert not (tmp_path / "out").exists()


def test_what_is_missing_in_a_run_is_named_with_the_command_that_makes_it(run, tmp_path):
    turned_away(sample, "--run", tmp_path / "absent", says=["absent is not there", "--run"])
    turned_away(sample, "--run", tmp_path,
                says=["no tokenizer.pt", f"python train.py --run {tmp_path}"])
    shutil.copy(run / "tokenizer.pt", tmp_path)
    turned_away(sample, "--run", tmp_path, "--generator", "maskgit",
                says=["no maskgit generator", f"python train.py --run {tmp_path} --stage 3"])


@KINDS
def test_a_generator_of_another_tokenizer_is_refused(run, tmp_path, kind):
    shutil.copytree(run, tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run" / "tokenizer.pt")
    saved["ema"]["quantizer.codebook"][0] += 1
    checkpoint.save(tmp_path / "run" / "tokenizer.pt", saved)
    turned_away(sample, "--run", tmp_path / "run", "--generator", kind,
                says=["another tokenizer", f"generator-{kind}", "--stage 3"])


def test_running_out_of_memory_says_what_to_lower_and_other_errors_show(run, monkeypatch):
    def fails_with(error):
        def sampled(*arguments, **options):
            raise error
        monkeypatch.setattr(GENERATORS["ar"], "sample", sampled)
    for error in (torch.cuda.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        fails_with(error)
        turned_away(sample, "--run", run, says=["out of memory", "lower --batch_size"])
    fails_with(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        called(sample, "--run", run)


# ------------------------------------------------------------------------------------------------
# the best of several

@pytest.fixture
def judged(run, tmp_path):
    """The run with a classifier that has learned nothing yet."""
    folder = shutil.copytree(run, tmp_path / "judged")
    torch.manual_seed(0)
    save_classifier(folder / "tinycnn.pt", CLASSES)
    return folder


def save_classifier(path, classes) -> None:
    checkpoint.save(path, {"classes": classes, "data": "", "steps": 0, "accuracy": None,
                           "model": TinyCNN(len(classes)).state_dict()})


@KINDS
def test_best_of_keeps_of_each_n_the_one_that_the_classifier_is_surest_of(judged, tmp_path, kind):
    path, classifier = tmp_path / "x.npz", load_chooser(judged / "tinycnn.pt", judged, CLASSES)

    def sure(*flags) -> np.ndarray:
        drawn(judged, "--generator", kind, "--npz", path, "--num_samples", 30, *flags)
        with np.load(path) as made, torch.no_grad():
            logits, _ = classifier(to_float(torch.from_numpy(made["arr_0"])))
            labels = torch.from_numpy(made["arr_1"])[:, None]
        return logits.log_softmax(dim=1).gather(1, labels).view(-1, len(CLASSES)).numpy()
    plain, best, other = sure(), sure("--best_of", 8), tmp_path / "other.pt"
    gain = (best.mean(axis=0) - plain.mean(axis=0)) / plain.std(axis=0)  # of each class
    assert gain.min() > 0 and gain.mean() > 0.5
    torch.manual_seed(1)
    save_classifier(other, CLASSES)
    assert not np.array_equal(sure("--best_of", 8, "--judge", other), best)


def test_what_stands_in_the_way_of_choosing_is_said_in_a_line(run, judged, tmp_path):
    turned_away(sample, "--run", run, "--best_of", 4,
                says=["tinycnn.pt is not there", "eval_fid.py --run", "--train_features"])
    save_classifier(tmp_path / "two.pt", CLASSES[:2])
    turned_away(sample, "--run", judged, "--best_of", 4, "--judge", tmp_path / "two.pt",
                says=["other classes", "--judge"])
    turned_away(sample, "--run", judged, "--judge", tmp_path / "two.pt", says=["--best_of"])
    turned_away(sample, "--run", judged, "--best_of", 1, says=["best_of"])
    turned_away(sample, "--run", judged, "--reconstruct", "x.png", "--best_of", 4,
                says=["--best_of is for samples"])
