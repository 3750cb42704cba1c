"""d2it.explain: a page that needs nothing but its folder, and pictures that show what they say."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from browser import read_page
from d2it import explain
from d2it.dvae import Codes
from d2it.model import D2iT
from d2it.presets import CONFIGS
from helpers import refused, some_shapes
from losses import mse, to_db
from plumbing.images import to_float, to_uint8
from plumbing.run import held_out, open_run


def command(run, *flags) -> None:
    explain.main(explain.parse(["--run", str(run), "--device", "cpu", *map(str, flags)]))


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    return shutil.copytree(finished, tmp_path_factory.mktemp("other") / "run")


@pytest.fixture(scope="module")
def page(finished, other, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    command(finished, "--out", folder, "--images", 3, "--against", finished, other)
    return folder


def test_the_page_shows_every_picture_and_asks_for_no_network(page):
    text = (page / "index.html").read_text()
    for name, title in explain.TITLES.items():
        assert title in text
        assert name == "training" or (page / f"{name}.png").exists()
    assert text.count("<img src=\"data:image/") == len(explain.TITLES) - 1
    assert "http" not in text.replace("http://www.w3.org", "") and len(text) < 3e6


@pytest.mark.page
def test_a_click_makes_a_cell_fine_and_shows_its_codes_and_decibels(page, finished, tmp_path):
    dvae = D2iT.of_run(str(finished), torch.device("cpu")).dvae
    pixels, _ = held_out(open_run(str(finished), CONFIGS, "dvae.pt", "-m d2it.train"))
    read_now = """{codes: number("codes"), more: at("more").textContent,
      gain: at("gain").textContent, captions: at("cells-pictures").textContent,
      fine: [...document.querySelectorAll(".cells button")].map(x => +(x.className === "fine"))}"""
    read = read_page(page / "index.html", tmp_path, f"""
      const cell = n => document.querySelectorAll(".cells button")[n];
      read.first = {read_now};
      cell(6).click();
      read.flipped = {read_now};
      document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {{key: "ArrowDown"}}));
      read.below = [...document.querySelectorAll(".cells button")].indexOf(document.activeElement);
      cell(6).click();
      read.back = {read_now};
      at("maps").children[2].click();
      read.all = {read_now};""", "#image=1")
    own = dvae.grain_of(pixels[1:2])
    other = own.clone()
    other.view(-1)[6] ^= True

    def wanted(grain):
        mean, _ = dvae.moments(to_float(pixels[1:2]), grain)
        decoded = dvae.decode(Codes(dvae.standardised(mean, grain), grain))
        return to_db(mse(to_float(to_uint8(decoded)), to_float(pixels[1:2]))).item()
    for name, grain in (("first", own), ("flipped", other), ("back", own),
                        ("all", torch.ones_like(own))):
        codes, dB = len(own.flatten()) + 3 * int(grain.sum()), wanted(grain)
        assert read[name]["fine"] == grain.flatten().int().tolist(), name
        assert read[name]["codes"] == codes and f"{dB:.2f} dB" in read[name]["captions"], name
        gain = float(read[name]["gain"].replace("\u2212", "-"))
        assert gain == pytest.approx(dB - wanted(own), abs=0.011)
    assert read["below"] == 10, "an arrow key moves by a row"


def test_pictures_have_the_rows_that_their_captions_name(page, finished, other):
    def cells(name):
        width, height = Image.open(page / f"{name}.png").size
        return (width - 2) // 66, (height - 2) // 66
    assert cells("maps") == (3, 3) and cells("latents") == (3, 3)
    assert cells("reconstructions") == (3, 7), "images, and two rows for each of three runs"
    text = (page / "index.html").read_text()
    for folder in (finished, other):
        assert f"entropy ({folder})" in text, "of two runs of one policy both are shown"
    assert cells("denoising") == (8, 12), "four rows for each of three classes"
    assert cells("painted") == (3, 8) and cells("sampled") == (10, 6)
    assert cells("samples") == (3, 20)


@pytest.mark.faults
def test_a_run_of_two_classes_has_its_page(training, tmp_path):
    two = np.load(some_shapes(tmp_path / "all.npz", 60))
    keep = two["y"] < 2
    np.savez(tmp_path / "two.npz", x=two["x"][keep], y=two["y"][keep], classes=two["classes"][:2])
    training(tmp_path / "run", "--data", str(tmp_path / "two.npz"))
    command(tmp_path / "run")
    assert (tmp_path / "run" / "explain" / "index.html").exists()


def test_the_correction_is_white_on_coarse_cells(page, finished):
    model = D2iT.of_run(str(finished), torch.device("cpu"))
    trace = []
    grain = model.sample(torch.arange(3), 1.0, generator=explain.fixed(), trace=trace).grain
    sheet = np.asarray(Image.open(page / "denoising.png"))
    for k in range(3):
        shown = sheet[2 + 66 * (4 * k + 3):, 2:66][:64]       # the first time's correction
        coarse = np.kron(~grain[k].numpy(), np.ones((16, 16), bool))
        assert (shown[coarse] == 255).all()
        assert not grain[k].any() or (shown[~coarse] < 255).any(), "some fine code is corrected"


def test_the_mean_of_a_class_is_gray_where_its_maps_differ():
    maps = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    shown = explain.spread_to(maps.mean(dim=0, keepdim=True), 2)[0, ::2, ::2, 0].tolist()
    assert shown[0][0] > shown[1][0] > shown[0][1]


def test_a_hand_painted_map_is_a_band_that_no_image_has():
    assert explain.hand_painted(4).int().tolist() == torch.eye(4).int().tolist()
    assert explain.hand_painted(16).sum() > 16


@pytest.mark.parametrize("flags, says", [
    (("--seed", "7"), "other images"),
    pytest.param(("--image_size", "40"), "40 pixels", marks=pytest.mark.faults)])
def test_a_run_that_holds_out_other_images_is_not_compared_with(finished, training, tmp_path,
                                                                flags, says):
    training(tmp_path / "another", "--stage", "1", *flags)
    refused(command, finished, "--against", tmp_path / "another", "--out", tmp_path / "page",
            names=["another", says])
    assert not (tmp_path / "page").exists(), "refused before the first picture"


def test_somebody_elses_page_is_not_overwritten(finished, tmp_path):
    (tmp_path / "index.html").write_text("my page")
    refused(command, finished, "--out", tmp_path, names=["index.html", "--out"])
    assert (tmp_path / "index.html").read_text() == "my page"
