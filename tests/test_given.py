"""given.py: what is no image, id, label or map is named with what was given and what is taken."""
import numpy as np
import pytest
import torch

from helpers import refused
from plumbing.given import need_ids, need_images, need_labels, need_map, need_number

HERE = torch.zeros(1)
GOOD = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("images, says", (
    (GOOD.to(torch.uint8), "uint8 (2, 3, 8, 8)"), (GOOD.permute(0, 2, 3, 1), "(2, 8, 8, 3)"),
    (GOOD[0], "(3, 8, 8)"), (GOOD[:0], "(0, 3, 8, 8)"), (GOOD[:, :1], "(2, 1, 8, 8)"),
    (GOOD + 128, "from 128 to 128"), (GOOD - 2.1, "from -2.1"), (GOOD.bool(), "bool"),
    (GOOD.numpy(), "ndarray float32"), ([[0.0]], "list of 1"), (None, "None"),
    (GOOD.to("meta"), "on meta"), (GOOD / 0, "not finite"),
))
def test_images_of_another_range_type_size_or_number_are_refused(images, says):
    refused(need_images, images, 8, HERE, names=["images", says])


def test_images_are_taken_in_any_float_and_a_little_beyond_their_range():
    for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        need_images(GOOD.to(kind) - 1.2, 8, HERE)


@pytest.mark.parametrize("ids, says", (
    (torch.zeros(2, 5).long(), "5 tokens"), (torch.zeros(2, 0).long(), "0 tokens"),
    (torch.zeros(2, 4), "float32"), (torch.zeros(2, 4).bool(), "bool"), (torch.zeros(2), "(2,)"),
    (torch.full((2, 4), 16), "from 16 to 16"), (torch.full((2, 4), -1), "from -1"),
    (torch.zeros(0, 4).long(), "none at all"), ([[0]], "list of 1"), (np.zeros((2, 4)), "ndarray"),
))
def test_ids_that_are_none_are_refused(ids, says):
    refused(need_ids, ids, 4, 16, HERE, names=[says])
    need_ids(torch.full((2, 4), 15, dtype=torch.uint8), 4, 16, HERE)


@pytest.mark.parametrize("labels, says", (
    ([0, 1], "list of 2"), ("disc", "str 'disc'"), (3, "int 3"), (torch.tensor(3), "int64 ()"),
    (torch.tensor([1.0]), "float32"), (torch.tensor([True]), "bool"),
    (torch.tensor([10]), "class 10"),
    (torch.tensor([-1]), "class -1"), (torch.tensor([[1]]), "(1, 1)"),
    (torch.tensor([]).long(), "none at all"),
))
def test_labels_that_are_none_are_refused(labels, says):
    message = refused(need_labels, labels, 10, HERE, names=[says])
    assert "0 to 9" in message
    need_labels(torch.tensor([9], dtype=torch.int32), 10, HERE)


@pytest.mark.parametrize("grain, says", (
    (torch.zeros(2, 5, 5).bool(), "(5, 5)"), (torch.zeros(4, 4).bool(), "(4,)"),
    (torch.zeros(1, 4, 4).bool(), "(1, 4, 4)"), (torch.zeros(2, 4, 4), "float32"),
    (torch.zeros(2, 4, 4).long(), "int64"), (np.zeros((2, 4, 4), bool), "ndarray"),
))
def test_maps_that_are_none_are_refused(grain, says):
    refused(need_map, grain, 2, 4, HERE, names=[says, "bool (2, 4, 4)"])


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -1, "2", None, True, 2.5))
def test_a_number_that_is_none_is_refused(value):
    refused(need_number, "steps", value, 1, 50, True, names=["steps", "1 to 50"])
