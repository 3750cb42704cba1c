"""A small run of d2it.train that the tests share."""
import shutil
import signal

import pytest

from d2it import train
from d2it.presets import parse_run
from helpers import SMALL_D2IT, some_shapes
from plumbing import run as run_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few held-out images, and the signal handlers as they were."""
    monkeypatch.setattr(run_folder, "EVAL_IMAGES", 20)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shapes_npz(tmp_path_factory):
    return some_shapes(tmp_path_factory.mktemp("d2it-data") / "shapes.npz", 60)


@pytest.fixture(scope="session")
def training(shapes_npz):
    """training(folder, *flags): run d2it.train as its command line would."""
    def run(folder, *flags):
        train.main(parse_run("", [*SMALL_D2IT, "--run", str(folder), "--data", shapes_npz, *flags]))
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, training):
    """Never change it; `run` is a copy."""
    folder = tmp_path_factory.mktemp("d2it-finished") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(run_folder, "EVAL_IMAGES", 20)
    training(folder)
    patch.undo()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"
