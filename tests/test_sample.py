"""Promises of sample.py: the pictures asked for, the same ones again, and a line where it fails."""
import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from config import GeneratorConfig, TokenizerConfig
from generator import GENERATORS
from helpers import encoded, noise, program, put
from losses import psnr
from nativetok import NativeTok
from plumbing import checkpoint, samples
from plumbing.flags import as_dict
from plumbing.start import main_with_user_errors
from plumbing.images import read_image, to_float, to_uint8

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


def command(run, *flags) -> tuple[int, str, str]:
    """sample.py in this process, on the CPU -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    device = [] if "--device" in flags else ["--device", "cpu"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            words = ["--run", str(run), *device, *map(str, flags)]
            main_with_user_errors(lambda: sample.main(sample.parse(words)))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def good(run, *flags) -> str:
    code, out, err = command(run, *flags)
    assert (code, err) == (0, ""), err
    return out


def refused(run, *flags, says=()) -> None:
    code, out, err = command(run, *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    for text in says:
        assert text in err, err


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
def test_one_row_per_class_and_the_same_pictures_again(run, tmp_path, kind):
    said = good(run, "--generator", kind, "--out", tmp_path / "a", "--per_class", 5)
    good(run, "--generator", kind, "--out", tmp_path / "b", "--per_class", 5)
    name = f"sample-{kind}.png"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    grid = cells(tmp_path / "a" / name)
    assert grid.shape == (3, 5, SIZE, SIZE, 3)
    assert len(np.unique(grid.reshape(15, -1), axis=0)) > 5, "samples must differ"
    for text in (kind, str(tmp_path / "a" / name), "cfg_scale 2", "seed 0", "images per second",
                 "15 samples", *CLASSES):
        assert text in said


@KINDS
def test_another_seed_gives_other_samples(run, tmp_path, kind):
    for seed in (0, 1):
        good(run, "--generator", kind, "--out", tmp_path / str(seed), "--seed", seed)
    assert not np.array_equal(*(cells(tmp_path / seed / f"sample-{kind}.png") for seed in "01"))


def test_names_and_numbers_mean_the_same_classes(run, tmp_path):
    good(run, "--out", tmp_path / "names", "--classes", "tabby, tabby cat", "cat")
    good(run, "--out", tmp_path / "numbers", "--classes", 2, 0)
    grids = [cells(tmp_path / form / "sample-ar.png") for form in ("names", "numbers")]
    assert len(grids[0]) == 2 and np.array_equal(*grids)


def test_a_class_that_is_called_by_a_number_is_found_by_its_name(tmp_path):
    """Folders 0 .. 11 are sorted as text: 0, 1, 10, 11, 2; class "10" is then number 2."""
    names = sorted(map(str, range(12)))
    run = make_run(tmp_path / "run", names)
    assert sample.class_number("10", names) == 2 and sample.class_number("9", names) == 11
    assert "rows 0, 1, 10, 11, 2, 3, 4, 5, 6, 7 (the first 10 of 12" in good(run, "--per_class", 1)
    good(run, "--npz", tmp_path / "x.npz", "--num_samples", 12)
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
    good(run, "--generator", kind, "--out", tmp_path, *flags)
    assert seen == asked


def test_maskgit_takes_8_steps_or_as_many_as_there_are_tokens(run, tmp_path):
    assert f"steps {L}," in good(run, "--generator", "maskgit", "--out", tmp_path)


def test_pictures_go_to_the_run_unless_told_otherwise(run):
    good(run, "--per_class", 1)
    assert (run / "samples" / "sample-ar.png").exists()


def test_single_files_hold_the_pictures_of_the_grid(run, tmp_path):
    good(run, "--out", tmp_path, "--per_class", 2, "--single")
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
        said = good(run, "--generator", kind, "--npz", tmp_path / name, "--num_samples", 20,
                    "--batch_size", 9)
    assert str(tmp_path / "b.npz") in said and "(20, 16, 16, 3)" in said
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
    good(run, "--npz", tmp_path / "x.npz", "--num_samples", 7, "--batch_size", 2,
         "--temperature", 0)
    good(run, "--out", tmp_path, "--per_class", 1, "--temperature", 0)
    file, grid = np.load(tmp_path / "x.npz"), cells(tmp_path / "sample-ar.png")
    assert len(np.unique(grid.reshape(3, -1), axis=0)) == 3
    # Not equal bytes: a batch of another size may round differently.
    assert np.abs(file["arr_0"].astype(int) - grid[file["arr_1"], 0]).max() <= 1


@KINDS
def test_an_unfinished_training_is_told_and_goes_with_the_samples(run, tmp_path, kind):
    run = shutil.copytree(run, tmp_path / "run")
    path, step = run / f"generator-{kind}.pt", {"step": 10, "settings": {"generator_steps": 1000}}
    checkpoint.save(path, {**checkpoint.load(path), "phase": kind, **step})
    code, out, err = command(run, "--generator", kind, "--per_class", 1)
    told = f"{kind}: step 10 of 1,000"
    assert code == 0 and err == f"note: {path} is unfinished, {told}\n"
    command(run, "--generator", kind, "--npz", tmp_path / "x.npz", "--num_samples", 2)
    assert np.load(tmp_path / "x.npz")["unfinished"].item() == told
    assert samples.unfinished_maker(str(tmp_path / "x.npz")) == told
    checkpoint.save(path, {**checkpoint.load(path), "phase": "finished"})
    good(run, "--generator", kind, "--npz", tmp_path / "x.npz", "--num_samples", 2)
    assert samples.unfinished_maker(str(tmp_path / "x.npz")) == ""


def test_npz_can_be_of_some_classes(run, tmp_path):
    good(run, "--npz", tmp_path / "x.npz", "--num_samples", 5, "--classes", "dog", "cat")
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [1, 0, 1, 0, 1]


def test_a_stopped_run_leaves_the_old_npz_and_nothing_half_written(run, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def stopped(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(np, "savez", stopped)
    assert command(run, "--npz", path, "--num_samples", 3)[0] == 130
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------
# reconstructions

@pytest.fixture
def photos(tmp_path) -> list[str]:
    images = [Image.fromarray(noise(k, SIZE, SIZE)) for k in range(2)]
    return [put(tmp_path / f"photo{k}.png", encoded(image, "PNG"))
            for k, image in enumerate(images)]


def test_a_row_is_the_original_then_each_prefix_then_all_tokens(run, tmp_path, photos):
    said = good(run, "--reconstruct", *photos, "--prefixes", 3, 1, "--out", tmp_path / "out")
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


def test_prefixes_double_unless_told_otherwise(run, tmp_path, photos):
    assert "first 1 2 4 tokens" in good(run, "--reconstruct", photos[0], "--out", tmp_path)
    said = good(run, "--reconstruct", photos[0], "--prefixes", 4, 4, "--out", tmp_path)
    assert "first 4 tokens" in said


def test_a_photo_of_any_shape_is_cropped(run, tmp_path):
    photo = put(tmp_path / "wide.jpg", encoded(Image.fromarray(noise(0, 30, 70)), "JPEG"))
    good(run, "--reconstruct", photo, "--out", tmp_path)
    assert cells(tmp_path / "reconstruct.png").shape[:2] == (1, 4)


def test_reconstruction_needs_no_generator(run, tmp_path, photos):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "tokenizer.pt", tmp_path / "run")
    good(tmp_path / "run", "--reconstruct", photos[0])


# ------------------------------------------------------------------------------------------------
# what is refused, each in one line with exit code 2

@pytest.mark.parametrize("flags, says", [
    (["--steps", 3], ["--steps is for maskgit"]),
    (["--generator", "maskgit", "--top_k", 3], ["--top_k is for ar"]),
    (["--generator", "maskgit", "--top_p", 0.5], ["--top_p is for ar"]),
    (["--randomize_temperature", 1], ["maskgit"]),
    (["--num_samples", 3], ["--num_samples is for --npz"]),
    (["--prefixes", 3], ["--prefixes is for --reconstruct"]),
    (["--npz", "x.npz", "--per_class", 3], ["--per_class"]),
    (["--npz", "x.npz", "--out", "y"], ["--out"]),
    (["--reconstruct", "x.png", "--top_k", 3], ["--top_k is for samples"]),
    (["--reconstruct", "x.png", "--generator", "ar"], ["--generator"]),
    (["--reconstruct", "x.png", "--npz", "x.npz"], ["one of them"]),
    (["--npz", ""], ["--npz is empty"]),
    (["--npz", "."], ["name of a file"]),
    (["--class", "cat"], ["--class"]),
    (["--classes", "cta"], ["'cta' is unknown", "did you mean 'cat'"]),
    (["--classes", "Tabby"], ["did you mean 'tabby, tabby cat'"]),
    (["--classes", 3], ["0 cat, 1 dog"]),
    (["--classes", "-1"], ["'-1'"]),
    (["--generator", "maskgit", "--steps", L + 1], [f"from 1 to {L}"]),
    (["--generator", "maskgit", "--steps", 0], ["--steps"]),
    (["--top_p", 0], ["top_p"]),
    (["--top_p", 1.5], ["top_p"]),
    (["--cfg_scale", "nan"], ["--cfg_scale"]),
    (["--temperature", "-1"], ["--temperature"]),
    (["--per_class", 0], ["--per_class"]),
    (["--batch_size", 0], ["--batch_size"]),
    (["--seed", "x"], ["invalid int value: 'x'"]),
    (["--generator", "gan"], ["gan"]),
    (["--reconstruct", "absent.png"], ["absent.png"]),
])
def test_a_wrong_use_is_one_line(run, flags, says):
    refused(run, *flags, says=says)


def test_a_broken_image_or_a_prefix_too_long_leaves_no_picture(run, tmp_path, photos):
    broken = put(tmp_path / "broken.png", Path(photos[0]).read_bytes()[:200])
    out = ("--out", tmp_path / "out")
    refused(run, "--reconstruct", photos[1], broken, *out, says=["broken.png"])
    refused(run, "--reconstruct", photos[0], "--prefixes", 1, L + 1, *out, says=[f"1 to {L}"])
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_sampling(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "draw_samples", None)
    (tmp_path / "file").write_text("in the way")
    refused(run, "--out", tmp_path / "file", says=["cannot write", "file"])
    refused(run, "--npz", tmp_path / "file" / "x.npz", says=["cannot write", "file"])


def test_what_is_missing_in_a_run_is_named_with_the_command_that_makes_it(run, tmp_path):
    refused(tmp_path / "absent", says=["absent", "train.py"])
    refused(tmp_path, says=["no tokenizer.pt", f"python train.py --run {tmp_path}"])
    shutil.copy(run / "tokenizer.pt", tmp_path)
    refused(tmp_path, "--generator", "maskgit",
            says=["no maskgit generator", f"python train.py --run {tmp_path} --stage 3"])


@KINDS
def test_a_generator_of_another_tokenizer_is_refused(run, tmp_path, kind):
    shutil.copytree(run, tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run" / "tokenizer.pt")
    saved["ema"]["quantizer.codebook"][0] += 1
    checkpoint.save(tmp_path / "run" / "tokenizer.pt", saved)
    refused(tmp_path / "run", "--generator", kind,
            says=["another tokenizer", f"generator-{kind}", "--stage 3"])


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_says_what_to_lower(run, monkeypatch, error):
    def sampled(*arguments, **options):
        raise error
    monkeypatch.setattr(GENERATORS["ar"], "sample", sampled)
    refused(run, says=["out of memory", "lower --batch_size"])


def test_an_error_of_the_program_is_not_taken_for_lack_of_memory(run, monkeypatch):
    def sampled(*arguments, **options):
        raise RuntimeError("shapes differ")
    monkeypatch.setattr(GENERATORS["ar"], "sample", sampled)
    with pytest.raises(RuntimeError, match="shapes differ"):
        command(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the GPU that a machine lacks")
def test_a_gpu_that_is_not_there_is_one_line(run):
    refused(run, "--device", "cuda", says=["--device cpu"])


# ------------------------------------------------------------------------------------------------
# as a program

def test_the_program_writes_what_it_says_and_exits_with_2_on_an_unknown_class(run, tmp_path):
    flags = ["--run", run, "--device", "cpu", "--out", tmp_path]
    done = program("sample.py", *flags, "--classes", "dog")
    path = tmp_path / "sample-ar.png"
    assert done.returncode == 0 and str(path) in done.stdout and path.exists()
    done = program("sample.py", "--run", run, "--device", "cpu", "--classes", "dgo")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "'dog'" in done.stderr
