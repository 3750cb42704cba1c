"""shapes.py: the same bytes on every machine, all different, and cleanly split."""
import hashlib

from plumbing import datasets
from plumbing.shapes import TOTAL


def test_shapes_are_the_same_on_every_machine():
    train, val = datasets.open_images("shapes"), datasets.open_images("shapes:val")
    h = hashlib.sha256()
    for dataset in (train, val):
        for i in range(len(dataset)):
            h.update(dataset.load(i).tobytes() + bytes([dataset.labels[i]]))
    assert h.hexdigest()[:16] == "f4274840612cd147"
    assert (len(train), len(val)) == (TOTAL - 500, 500) and train.fingerprint != val.fingerprint


def test_no_held_out_shape_is_ever_trained_on_even_mirrored():
    train, val = datasets.open_images("shapes"), datasets.open_images("shapes:val")
    seen = {train.load(i).tobytes() for i in range(len(train))}
    seen |= {train.load(i)[:, ::-1].tobytes() for i in range(len(train))}
    held = {val.load(i).tobytes() for i in range(len(val))}
    assert len(seen) == 2 * len(train) and len(held) == len(val)
    assert not seen & held
