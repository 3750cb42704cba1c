"""Promises of explain.py: pictures are there, true to the model; the page needs no network."""
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import explain
from config import CONFIGS, TokenizerConfig
from evaluation import interactive
from evaluation.intervention import interventions
from flow_decoder import Decoding
from generator import Generator
from helpers import called, turned_away
from nativetok import NativeTok, doubling
from plumbing import checkpoint
from plumbing.images import to_float
from plumbing.page import Page, Sheet
from plumbing.run import open_run


def command(run, *flags, out) -> tuple[int, str, str]:
    return called(explain, "--run", run, "--images", 3, "--out", out, *flags)


@pytest.fixture(scope="module")
def page(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("explain") / "page"
    code, said, err = command(small_run, "--against", small_run, out=out)
    assert code == 0, err
    return out, said


def test_every_picture_of_the_page_exists_and_nothing_comes_from_elsewhere(page):
    out, said = page
    text = (out / "index.html").read_text(encoding="utf-8")
    names = {"tokens.png", "added.png", "attention.png", "answers.png", "swaps.png", "codes.png",
             "ar.png", "maskgit.png", "guidance.png"}
    assert {path.name for path in out.glob("*.png")} == names
    assert all(str(out / name) in said for name in names)
    shown = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(shown) == len(names) and all(uri.startswith("data:image/") for uri in shown)
    drawn = text.replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    assert not re.search(r"https?://|url\(|@import|fetch\(", drawn), "it must open alone"


def test_the_page_has_its_sections_and_fits_into_three_megabytes(page):
    text = (page[0] / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', text) == ["change", "prefix", "look", "write"]
    assert len(text) < 3e6
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert len(data["change"]["models"]) == 2, "those of --against answer the same clicks"
    for model in data["change"]["models"]:
        assert [len(row) for row in model["swaps"]] == [6] * 8, "images, tokens"


@pytest.mark.parametrize("size, tile", [(32, 32), (28, 32), (256, 64)])
def test_tiles_are_the_images_up_to_a_jpeg_and_equal_ones_are_one(size, tile):
    sheet, smooth = Sheet(size), torch.linspace(0, 255, size).view(1, 1, size, 1)
    images = smooth.expand(3, size, size, 3).to(torch.uint8).contiguous()
    images[1] = 255 - images[1]
    assert sheet.add(images) == [0, 1, 0] and (sheet.side, sheet.columns) == (tile, 2)
    shown = np.asarray(Image.open(io.BytesIO(sheet.jpeg()))).astype(int)
    assert shown.shape == (2 * tile, 2 * tile, 3)
    for k in (0, 1):
        cell = shown[:tile, k * tile:(k + 1) * tile]
        wanted = np.linspace(0, 255, tile) if k == 0 else np.linspace(255, 0, tile)
        assert np.abs(cell - wanted[None, :, None]).max() < 14


def test_longer_tokenizers_show_fewer_images_of_the_same_budget():
    from evaluation.interactive import PICTURES, extent
    assert extent(16) == (8, 3) and extent(128)[0] >= 2
    for L in (1, 16, 32, 64, 128, 200):
        images, donors = extent(L)
        assert 2 * images * L * donors <= PICTURES


def test_both_curves_are_on_the_page_and_need_no_other_package(page):
    text = (page[0] / "index.html").read_text(encoding="utf-8")
    order, training = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert order.count("<polyline") == 4, "two of each run"
    assert "under the AR model" in order
    # three lengths and the fine-tune, then two generators and the flow decoder
    assert training.count("<polyline") == 7 and "grow-4 (pixels)" in training
    assert "matplotlib" not in text + Path(explain.__file__).read_text(encoding="utf-8")


def cells_of(path, columns: int) -> np.ndarray:
    """A grid of enlarged images, back as (rows, columns, 32, 32, 3)."""
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    tops, lefts = range(2, len(sheet), 66), range(2, 2 + columns * 66, 66)
    return np.stack([np.stack([sheet[y:y + 64:2, x:x + 64:2] for x in lefts]) for y in tops])


@pytest.mark.parametrize("flags, told", [((), True), (("--flow_steps", 2), True),
                                         (("--decoder", "mean"), False)])
def test_the_last_column_of_the_token_picture_is_what_the_decoder_makes_of_all_tokens(
        flags, told, small_run, page, tmp_path):
    out = tmp_path / "page" if flags else page[0]
    if flags:
        code, _, err = command(small_run, *flags, out=out)
        assert code == 0, err
    model = NativeTok.of_run(str(small_run), torch.device("cpu"))
    pixels, _ = explain.held_out(open_run(str(small_run), CONFIGS))
    draw = Decoding.of_run(str(small_run), model, "flow" if told else "mean",
                           2 if "--flow_steps" in flags else None)
    right = interactive.drawn(draw, model.encode(to_float(pixels[:3]))).numpy()
    shown = cells_of(out / "tokens.png", 1 + len(doubling(model.num_tokens)))
    assert np.abs(shown[:, -1] - right).max() <= 1
    text = (out / "index.html").read_text(encoding="utf-8")
    assert ("drawn by the flow decoder" in text) == told


@pytest.mark.parametrize("tokenizer, silent", [
    ("nativetok", ""), ("titok", "titok chooses all its tokens at once")])
def test_the_picture_of_answers_holds_what_the_intervention_makes(tokenizer, silent, tmp_path):
    """Where nobody answers both pictures are one, and the page says why."""
    torch.manual_seed(0)
    model = NativeTok(TokenizerConfig(
        tokenizer=tokenizer, image_size=32, patch_size=8, encoder_width=32,
        encoder_depth=1, encoder_heads=2, expert_width=32, expert_heads=2, token_schedule=(6,),
        codebook_size=16, decoder_width=32, decoder_depth=1, decoder_heads=2,
        decoder_reads="linear")).eval()
    pixels = torch.randint(256, (9, 1, 32, 3), dtype=torch.uint8).repeat(1, 32, 1, 1)  # stripes
    ids, page = explain.encoded(model, pixels), Page(str(tmp_path), 32)
    explain.answers(page, model, pixels, ids, 4)
    shown = cells_of(tmp_path / "answers.png", 7)
    first, whole, other, broken, gone, answered, left = shown.swapaxes(0, 1)
    assert shown.shape[0] == 4 and np.array_equal(gone, np.clip(broken - whole + 128, 0, 255))
    assert np.array_equal(left, np.clip(answered - whole + 128, 0, 255))
    damage = []
    for k in range(9):
        mixed = torch.cat([ids[k - 1, :1], ids[k, 1:]])[None]
        picture = explain.decode(model, mixed)[0].numpy().astype(int)
        damage.append(((picture - explain.decode(model, ids[k:k + 1])[0].numpy()) ** 2).sum())
    for row, k in enumerate(np.argsort(damage)[::-1][:4]):  # the worst first
        assert np.array_equal(first[row], pixels[k]) and np.array_equal(other[row], pixels[k - 1])
    text = " ".join((tmp_path / "index.html").read_text().split())
    rows = interventions(model, pixels)
    assert json.loads((tmp_path / "answers.json").read_text()) == {"images": 9, "rows": rows}
    row = rows[0]
    assert f"token 1 swapped {row['broken']:.2f}, re-encoded {row['answered']:.2f}" in text
    assert bool(silent) == np.array_equal(broken, answered) == ("no token changes" in text)
    assert silent in text


def test_attention_of_the_loop_sums_to_one_and_leaves_the_ids_alone(small_run):
    model = NativeTok.of_run(str(small_run), torch.device("cpu"))
    x, trace = torch.rand(2, 3, 32, 32) * 2 - 1, []
    with torch.no_grad():
        plain = model.mocet.forward_loop(model.mit(x), model.quantizer)[1]
        watched = model.mocet.forward_loop(model.mit(x), model.quantizer, trace)[1]
    assert torch.equal(plain, watched) and len(trace) == model.num_tokens * model.cfg.expert_depth
    for i, a in enumerate(trace):
        assert a.shape[-1] == model.cfg.num_patches + i // model.cfg.expert_depth + 1
        torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]))


def test_bits_are_those_of_the_generators_loss(small_run):
    model = NativeTok.of_run(str(small_run), torch.device("cpu"))
    ar = Generator.of_run(str(small_run), "ar", model, torch.device("cpu"))
    pixels, labels = explain.held_out(open_run(str(small_run), CONFIGS))
    ids = explain.encoded(model, pixels)
    bits, marginal = explain.bits_per_position(model, ar, ids, labels)
    assert len(bits) == len(marginal) == model.num_tokens
    assert bits.mean() * np.log(2) == pytest.approx(ar.loss(ids, labels)[0].item(), rel=1e-4)
    assert (marginal <= np.log2(model.cfg.codebook_size) + 1e-6).all() and (marginal >= 0).all()


def test_wrong_use_gets_one_line(small_run, tmp_path):
    turned_away(explain, "--run", tmp_path / "nowhere", says=("nowhere", "not a run"))
    other = shutil.copytree(small_run, tmp_path / "other")
    settings = (other / "config.json").read_text()
    (other / "config.json").write_text(settings.replace("shapes.npz", "missing.npz"))
    turned_away(explain, "--run", small_run, "--against", other, says=("missing.npz",))


def test_the_page_says_what_is_unfinished(small_run, tmp_path):
    """A tokenizer before its fine-tune too: its last phase is done, and it is not its last."""
    run = shutil.copytree(small_run, tmp_path / "run")
    saved = checkpoint.load(run / "tokenizer.pt")
    del saved["results"]["finetune"]
    checkpoint.save(run / "tokenizer.pt", {**saved, "phase": "grow-6", "step": 4})
    maskgit = run / "generator-maskgit.pt"
    checkpoint.save(maskgit, {**checkpoint.load(maskgit), "phase": "maskgit", "step": 1})
    code, _, err = command(run, out=tmp_path / "page")
    tokenizer = "grow-6: step 4 of 4, and it goes on up to finetune"
    assert code == 0, err
    assert err.count("note: ") == 2 and f"{run}/tokenizer.pt is unfinished, {tokenizer}" in err
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert f"Unfinished: {tokenizer}; maskgit: step 1 of 5. " in text
    assert json.loads((tmp_path / "page" / "answers.json").read_text())["unfinished"] == tokenizer
