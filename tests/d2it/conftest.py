"""A small run of d2it.train that the tests share."""
import shutil

import pytest

from d2it import train
from d2it.presets import parse_run
from helpers import SMALL_D2IT
from plumbing import run as run_folder


@pytest.fixture(autouse=True)
def always_quick(quick):
    """In all tests of this folder."""


@pytest.fixture(scope="session")
def training(data):
    """training(folder, *flags): run d2it.train as its command line would."""
    def run(folder, *flags):
        train.main(parse_run("", [*SMALL_D2IT, "--run", str(folder), "--data", data, *flags]))
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, training):
    """Never change it; `run` is a copy."""
    folder = tmp_path_factory.mktemp("d2it-finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "EVAL_IMAGES", 20)
        training(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"
