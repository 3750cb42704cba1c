"""shapes.py: the same on every machine, all different, to be told apart, and cleanly split."""
import hashlib
import itertools

import numpy as np

from plumbing import datasets
from plumbing.shapes import BACKGROUNDS, COLOURS, TOTAL, coverage


def test_shapes_are_the_same_on_every_machine():
    train, val = datasets.open_images("shapes"), datasets.open_images("shapes:val")
    h = hashlib.sha256()
    for dataset in (train, val):
        for i in range(0, len(dataset), 100):
            h.update(dataset.load(i).tobytes() + bytes([dataset.labels[i]]))
    assert h.hexdigest()[:16] == "4b70cff074ba1250"
    assert (len(train), len(val)) == (TOTAL - 500, 500) and train.fingerprint != val.fingerprint


def test_no_held_out_shape_is_ever_trained_on_even_mirrored():
    train, val = datasets.open_images("shapes"), datasets.open_images("shapes:val")
    seen = {train.load(i).tobytes() for i in range(len(train))}
    seen |= {train.load(i)[:, ::-1].tobytes() for i in range(len(train))}
    held = {val.load(i).tobytes() for i in range(len(val))}
    assert len(seen) == 2 * len(train) and len(held) == len(val)
    assert not seen & held


def test_every_shape_lies_wholly_inside_the_picture():
    for shape, size in itertools.product(range(10), range(3)):
        areas = {int(coverage(shape, size, row, column).sum())
                 for row, column in itertools.product(range(5), range(5))}
        assert len(areas) == 1  # cut off anywhere, it would be smaller there


def test_labels_tell_the_shape_and_colours_contrast():
    dataset = datasets.open_images("shapes")
    assert sorted(set(dataset.labels.tolist())) == list(range(10)) and len(dataset.classes) == 10
    for front, back in itertools.product(COLOURS.values(), BACKGROUNDS.values()):
        assert np.sqrt(np.mean((np.array(front) - np.array(back)) ** 2)) > 90


def test_shapes_of_any_two_classes_differ_even_out_of_focus():
    for size in range(3):  # 8 x 8 pixels must still tell them apart
        small = [coverage(shape, size, 2, 2).reshape(8, 4, 8, 4).mean((1, 3)) / 16
                 for shape in range(10)]
        for a, b in itertools.combinations(small, 2):
            assert np.abs(a - b).sum() > 2  # the area of two such pixels
