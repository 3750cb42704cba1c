"""d2it.explain: a page that needs nothing but its folder, and pictures that show what they say."""
import numpy as np
import pytest
import torch
from PIL import Image

from d2it import explain
from d2it.model import D2iT
from helpers import refused, some_shapes


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    explain.main(explain.parse(["--run", str(finished), "--out", str(folder), "--device", "cpu",
                                "--images", "3", "--against", str(finished)]))
    return folder


def test_the_page_shows_every_picture_and_asks_for_no_network(page):
    text = (page / "index.html").read_text()
    for name, title in explain.TITLES.items():
        assert title in text
        assert name == "training" or (page / f"{name}.png").exists() and f'"{name}.png"' in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_pictures_have_the_rows_that_their_captions_name(page):
    def cells(name):
        width, height = Image.open(page / f"{name}.png").size
        return (width - 2) // 66, (height - 2) // 66
    assert cells("maps") == (3, 3) and cells("latents") == (3, 3)
    assert cells("reconstructions") == (3, 5), "images, and two rows for each of two runs"
    assert cells("denoising") == (8, 12), "four rows for each of three classes"
    assert cells("painted") == (3, 8) and cells("sampled") == (10, 6)
    assert cells("samples") == (3, 20)


def test_a_run_of_two_classes_has_its_page(training, tmp_path):
    two = np.load(some_shapes(tmp_path / "all.npz", 60))
    keep = two["y"] < 2
    np.savez(tmp_path / "two.npz", x=two["x"][keep], y=two["y"][keep], classes=two["classes"][:2])
    training(tmp_path / "run", "--data", str(tmp_path / "two.npz"))
    explain.main(explain.parse(["--run", str(tmp_path / "run"), "--device", "cpu"]))
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


def test_of_two_runs_of_one_policy_both_are_shown(finished, run, tmp_path):
    explain.main(explain.parse(["--run", str(finished), "--out", str(tmp_path / "page"), "--device",
                                "cpu", "--images", "2", "--against", str(run), str(finished)]))
    text = (tmp_path / "page" / "index.html").read_text()
    for folder in (run, finished):
        assert f"entropy ({folder})" in text
    assert Image.open(tmp_path / "page" / "reconstructions.png").size[1] == 2 + 7 * 66


def test_a_run_that_holds_out_other_images_is_not_compared_with(finished, training, tmp_path):
    training(tmp_path / "seven", "--seed", "7", "--stage", "1")
    training(tmp_path / "large", "--stage", "1", "--image_size", "40")
    for name, says in (("seven", "other images"), ("large", "40 pixels")):
        words = ["--run", str(finished), "--against", str(tmp_path / name), "--device", "cpu"]
        refused(explain.main, explain.parse([*words, "--out", str(tmp_path / "page")]),
                names=[name, says])
    assert not (tmp_path / "page").exists(), "refused before the first picture"


def test_somebody_elses_page_is_not_overwritten(finished, tmp_path):
    (tmp_path / "index.html").write_text("my page")
    refused(explain.main, explain.parse(["--run", str(finished), "--out", str(tmp_path)]),
            names=["index.html", "--out"])
    assert (tmp_path / "index.html").read_text() == "my page"
