"""inception.py is the network that FID is defined by, as the two that everybody uses have it.

tests/golden/inception.npz holds what torch-fidelity 0.4.0 said for the weights and images made
below. Recipe, in an environment that is thrown away afterwards:

    pip install --no-deps --target site torch-fidelity==0.4.0 pytorch-fid==0.3.0 torchvision
    (torchvision without its compiled operators: put empty modules named torchvision,
     torchvision.models, torchvision.transforms with the right __path__ into sys.modules before
     anything imports them)
    torch.save(random_state(...), "state.pth")
    net = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"],
                                      feature_extractor_weights_path="state.pth")
    features, logits = net(image);    stored: features[0, ::16], logits[0, ::8] of every image

pytorch-fid's network (its downloader replaced by one that returns the same state) gave the same
features to 3e-7 for images resized and scaled by torch-fidelity; by itself it resizes in another
way and has no logits.
"""
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import inception
from evaluation.inception import FIDInceptionV3
from helpers import refused

GOLDEN = Path(__file__).parent / "golden" / "inception.npz"
SLOW = pytest.mark.faults
SIZES = (pytest.param((32, 32), marks=SLOW), (48, 64), (256, 256),
         pytest.param((299, 299), marks=SLOW))


def random_state(keys_and_shapes: dict) -> dict:
    """{key: shape} -> {key: tensor}: one stream of NumPy random numbers over the sorted keys."""
    rng, state = np.random.default_rng(20150512), {}
    for key, shape in sorted(keys_and_shapes.items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        if key.endswith(("bn.weight", "running_var")):
            value = rng.uniform(0.5, 1.5, shape)
        elif key.endswith("conv.weight"):
            value = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            value = rng.standard_normal(shape) * 0.1
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


def image(height: int, width: int) -> torch.Tensor:
    """Noise over a slope that differs between rows, columns and channels: (1, 3, H, W) uint8."""
    noise = np.random.default_rng(height * 1000 + width).integers(0, 96, (height, width, 3))
    slope = (np.linspace(0, 80, height)[:, None, None] + np.linspace(0, 40, width)[:, None]
             + np.array([0, 20, 39]))
    return torch.from_numpy((noise + slope).astype(np.uint8)).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def net() -> FIDInceptionV3:
    shapes = {key: tuple(value.shape) for key, value in FIDInceptionV3().state_dict().items()}
    return FIDInceptionV3.from_state(random_state(shapes))


def difference(net, size) -> tuple[float, float]:
    """Largest difference to the golden features and logits, in units of their largest value."""
    golden, differences = np.load(GOLDEN), []
    features, logits = net(image(*size))
    for name, ours in (("features", features[0, ::16]), ("logits", logits[0, ::8])):
        theirs = golden[f"{name}-{size[0]}x{size[1]}"]
        differences.append(float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max()))
    return tuple(differences)


@pytest.mark.parametrize("size", SIZES)
def test_features_and_logits_equal_those_of_torch_fidelity(net, size):
    assert max(difference(net, size)) < 1e-5


def test_an_image_alone_or_in_a_batch_gives_the_same_features_and_logits_without_bias(net):
    one, two = image(32, 32), image(32, 32).flip(3)
    (alone, logits), (together, _) = net(one), net.train()(torch.cat([one, two]))
    # in train mode it would see its neighbour
    assert torch.allclose(alone[0], together[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, alone @ net.fc.weight.T)
    assert not torch.allclose(logits, net.fc(alone), atol=1e-3)


def test_only_bytes_are_taken(net):
    refused(net, image(32, 32).float() / 255, names=("uint8",))


def test_weights_with_another_hash_are_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    refused(FIDInceptionV3.load, str(tmp_path / "weights.pth"), names=("SHA-256", "weights.pth"))
    refused(FIDInceptionV3.load, str(tmp_path / "missing.pth"),
            names=("missing.pth", "--inception"))


def test_without_a_network_one_line_says_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/nothing.pth")
    refused(FIDInceptionV3.load, names=(str(tmp_path), "127.0.0.1", "--inception"))


def test_a_state_with_a_missing_key_names_it(net):
    state = net.state_dict()
    state.pop("Mixed_7c.branch_pool.conv.weight")
    refused(FIDInceptionV3.from_state, state, names=("Mixed_7c.branch_pool.conv.weight",))
