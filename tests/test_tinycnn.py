"""Promises of tinycnn.py: it learns its classes, is bound to its images; its twin never changes."""
import numpy as np
import pytest
import torch

from evaluation.tinycnn import TinyCNN, load_judge, random_twin, train_judge
from helpers import folder_of, refused
from plumbing.datasets import open_images


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("judge") / "tinycnn.pt")
    data, val = open_images("shapes"), open_images("shapes:val").subset(np.arange(200))
    train_judge(path, data, val, 32, False, 30, torch.device("cpu"))
    return path, data, val


def test_a_few_seconds_of_shapes_are_enough_to_tell_them_apart(judged):
    net, accuracy = load_judge(*judged)
    assert accuracy > 0.4, "chance is 0.1, and this was a small part of the training"
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(net(x)[0], load_judge(*judged)[0](x)[0])


def test_it_is_refused_for_other_images_and_its_accuracy_is_that_of_its_own(judged):
    path, data, val = judged
    refused(load_judge, path, data.subset(range(100)), val,
            names=("other images", "--train_features"))
    assert load_judge(path, data, val.subset(range(100)))[1] is None


def test_one_class_is_nothing_to_learn(tmp_path):
    data = open_images(str(folder_of(tmp_path / "flat", 4, classes=("only",))))
    refused(train_judge, str(tmp_path / "x.pt"), data, data, 8, False, 2, torch.device("cpu"),
            names=("single class", "inception"))


def test_the_random_twin_is_the_same_every_time_and_leaves_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_twin(10)(x)[1], random_twin(10)(x)[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_images_of_other_sizes_are_looked_at_in_32_pixels():
    net = TinyCNN(4)
    assert [tuple(t.shape) for t in net(torch.rand(2, 3, 48, 64))] == [(2, 4), (2, 128)]
