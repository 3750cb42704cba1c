"""Promises of airbench.py and experiments/judge.py: a judge that learns, whose file says what it
is, and which a run and the experiments take in TinyCNN's place."""
import json

import pytest
import torch

from evaluation.airbench import SHIFT, Airbench, shifted
from evaluation.judging import tinycnn_nets
from evaluation.tinycnn import load_judge
from experiments import judge
from helpers import good, held_shapes, some_shapes, turned_away
from plumbing.datasets import open_images


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("airbench")
    data, val = some_shapes(folder / "shapes.npz", 300), held_shapes(folder / "held.npz")
    flags = ["--data", data, "--val_data", val, "--out", folder / "judge.pt"]
    return flags, good(judge, *flags, "--steps", 6, "--device", "cpu")


def test_it_learns_and_its_file_and_its_distance_say_what_it_is(made):
    flags, told = made
    data, path = open_images(str(flags[1])), str(flags[5])
    row = json.loads((flags[5].parent / "judge.pt.json").read_text())
    assert {"command", "commit", "device", "minutes"} <= set(row)
    assert row["judge_accuracy"] > 0.15, "of ten classes, after a few seconds"
    nets, right = tinycnn_nets(path, data, torch.device("cpu"), open_images(str(flags[3])))
    assert round(right, 4) == row["judge_accuracy"] and row["fingerprint"] in told
    assert [net.key.split("_")[1] for net in nets] == ["airbench", "random"]
    assert nets[0].key == f"fd_airbench_{row['fingerprint']}"
    features, logits = nets[0].network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert features.shape == (2, nets[0].features) and logits.shape == (2, 10)
    net, _ = load_judge(path, data)
    assert [tuple(t.shape) for t in net(torch.rand(2, 3, 48, 64))] == [(2, 10), (2, 256)]


def test_a_judge_is_never_overwritten_and_wrong_use_gets_one_line(made, tmp_path):
    flags, _ = made
    turned_away(judge, *flags, says=("judge.pt", "another name"))
    flags = [*flags[:4], "--out", tmp_path / "x.pt"]
    turned_away(judge, *flags[2:], says=("--data",))
    flags[3] = "nowhere"
    turned_away(judge, *flags, says=("nowhere",))


def test_the_first_convolution_whitens_patches():
    torch.manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(500, 3, 34, 34), 3, 1)  # neighbours alike
    net = Airbench(10)
    net.whiten_by(images)
    responses = net.whiten(images).transpose(0, 1).flatten(1)                  # (24, n)
    spread = responses[:12].cov()
    assert torch.allclose(spread, torch.eye(12), atol=0.05)
    assert torch.allclose(responses[12:], -responses[:12], atol=1e-4)


def test_images_are_moved_and_not_changed():
    """Each result is its image, moved: somewhere in the padded original."""
    torch.manual_seed(0)
    images = torch.rand(40, 3, 8, 8)
    padded = torch.nn.functional.pad(images, (SHIFT,) * 4, mode="reflect")
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3)             # (B, 3, 25, 8, 8)
    found = (windows == shifted(images)[:, :, None]).all(dim=(1, 3, 4))        # (B, 25)
    assert found.any(dim=1).all() and found.any(dim=0).sum() > 10
