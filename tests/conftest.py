"""What all tests share."""
import pytest
import torch

import config
import train
from helpers import SMALL, some_shapes
from plumbing import run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are slower with two threads than with one, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of a few steps on 60 shapes: bad, but complete. Copy it before changing it."""
    folder, before = tmp_path_factory.mktemp("small"), run.EVAL_IMAGES
    data, run.EVAL_IMAGES = some_shapes(folder / "shapes.npz", 60), 20
    try:
        train.main(config.parse_run("", [*SMALL, "--run", str(folder / "run"), "--data", data, "--val_data", data]))
    finally:
        run.EVAL_IMAGES = before
    return folder / "run"
