"""What all tests share."""

import os
import signal

import pytest
import torch

from helpers import THREADS, held_shapes, some_shapes, train_shapes
from plumbing import run
from plumbing.start import stop_signals


def pytest_xdist_auto_num_workers(config):
    """One more than cores, as many tests wait for the programs that they start; those that watch
    the clock (-m faults) get a core each."""
    return (os.cpu_count() or 1) + (config.option.markexpr != "faults")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are slower with two threads than with one, above all beside other work.

    OMP_NUM_THREADS=3 in the environment is obeyed: results must not depend on it.
    """
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of a few steps on 60 shapes: bad, but complete. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("small")
    data, val = some_shapes(folder / "shapes.npz", 60), held_shapes(folder / "held.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "EVAL_IMAGES", 20)
        train_shapes(folder / "run", data, "--val_data", val)
    return folder / "run"


@pytest.fixture
def quick(monkeypatch):
    """Few held-out images, and the signal handlers as they were."""
    monkeypatch.setattr(run, "EVAL_IMAGES", 20)
    before = {number: signal.getsignal(number) for number in stop_signals()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return some_shapes(tmp_path_factory.mktemp("data") / "shapes.npz", 60)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """A whole run of train.py on 60 shapes. Never change it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "EVAL_IMAGES", 20)
        train_shapes(folder, data)
    return folder
