"""What all tests share."""
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are slower with two threads than with one, most of all on a busy machine."""
    torch.set_num_threads(1)
