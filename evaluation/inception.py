"""The feature network of FID: Inception-v3 as Google trained it in 2015; torchvision's is another.

In       uint8 images (B, 3, H, W) of any size, RGB; the weights are
         pt_inception-2015-12-05-6726825d.pth, converted by pytorch-fid from the original graph. The
         keys here are the keys in that file, so it loads strictly
Out      features (B, 2048) after the last pooling, logits (B, 1008) without their bias, float32
Differs  from torchvision's inception_v3, on purpose, where the original graph does (arXiv
         1512.00567 tells neither):
           average pooling leaves the padding out of the mean
           the pooling branch of the last block takes the maximum
           there are 1008 classes
           images are resized as TensorFlow 1 did it, see resize()
         pytorch-fid, torch-fidelity and torchmetrics hold this network too, but none of them can be
         imported without a torchvision that fits; it was compared with the first two, see
         tests/test_inception.py
Try      python -m evaluation.inception      (CPU, a few seconds, random weights)
"""
import hashlib
import os
import pickle
import urllib.error

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import as_weights
from plumbing.flags import UserError, need

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
SIZE = 299


def resize(images: Tensor, size: int = SIZE) -> Tensor:
    """float (B, C, H, W) -> (B, C, size, size): bilinear as in TensorFlow 1.

    Pixel i of the result is read at i * H / size of the input: no shift by half a pixel, no
    antialiasing. TRAP: F.interpolate shifts (align_corners=False) or stretches (True); either
    changes FID by more than papers differ.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        # (size,)
        place = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = place.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (place - low).view(-1, *[1] * (3 - dim))  # of `high`
        below, above = images.index_select(dim, low), images.index_select(dim, high)
        images = below * (1 - share) + above * share
    return images


# ------------------------------------------------------------------------------------------------
# parts

class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def wide(inputs: int, outputs: int, k: int) -> Conv:
    return Conv(inputs, outputs, (1, k), padding=(0, k // 2))


def tall(inputs: int, outputs: int, k: int) -> Conv:
    return Conv(inputs, outputs, (k, 1), padding=(k // 2, 0))


def mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class A(nn.Module):
    """35 x 35: branches of 1x1, 5x5, two 3x3, and a pooled one."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide5 = self.branch5x5_2(self.branch5x5_1(x))
        twice3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide5, twice3, self.branch_pool(mean3(x))], dim=1)


class B(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        twice3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice3, F.max_pool2d(x, 3, stride=2)], dim=1)


class C(nn.Module):
    """17 x 17: 7x7 kernels, taken apart into rows and columns of width c."""

    def __init__(self, c: int):
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, c, 1)
        self.branch7x7_2 = wide(c, c, 7)
        self.branch7x7_3 = tall(c, 192, 7)
        self.branch7x7dbl_1 = Conv(768, c, 1)
        self.branch7x7dbl_2 = tall(c, c, 7)
        self.branch7x7dbl_3 = wide(c, c, 7)
        self.branch7x7dbl_4 = tall(c, c, 7)
        self.branch7x7dbl_5 = wide(c, 192, 7)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice7 = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice7 = self.branch7x7dbl_5(self.branch7x7dbl_4(twice7))
        return torch.cat([self.branch1x1(x), once7, twice7, self.branch_pool(mean3(x))], dim=1)


class D(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = wide(192, 192, 7)
        self.branch7x7x3_3 = tall(192, 192, 7)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        once3 = self.branch3x3_2(self.branch3x3_1(x))
        once7 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([once3, self.branch7x7x3_4(once7), F.max_pool2d(x, 3, stride=2)], dim=1)


class E(nn.Module):
    """8 x 8 -> 2048 channels; the two blocks of this kind differ in `pool`, the pooling branch."""

    def __init__(self, inputs: int, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = wide(384, 384, 3)
        self.branch3x3_2b = tall(384, 384, 3)
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = wide(384, 384, 3)
        self.branch3x3dbl_3b = tall(384, 384, 3)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once),
                          self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice),
                          self.branch_pool(self.pool(x))], dim=1)


# ------------------------------------------------------------------------------------------------

class FIDInceptionV3(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, 2048), logits (B, 1008). Never learns."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = D()
        self.Mixed_7b = E(1280, mean3)
        self.Mixed_7c = E(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FIDInceptionV3":
        """Stays in eval mode: with batch statistics features would depend on other images."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        need(images.dtype == torch.uint8,
             f"FIDInceptionV3 takes uint8 images, 0 to 255, not {images.dtype}")
        with torch.autocast(images.device.type, enabled=False):  # FID is defined in float32
            x = (resize(images.float()) - 128) / 128  # (B, 3, 299, 299) in [-1, 1)
            x = as_weights(x, self.fc.weight)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, stride=2)                                     # (B, 64, 73, 73)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, stride=2)                                     # (B, 192, 35, 35)
            for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a,
                          self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e,
                          self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
                x = block(x)
            features = x.mean(dim=(2, 3))  # (B, 2048, 8, 8) -> (B, 2048)
            logits = features @ self.fc.weight.T  # Inception Score leaves the bias out, too
            return features.float(), logits.float()

    @staticmethod
    def load(path: str = "") -> "FIDInceptionV3":
        """The network with the public weights: from `path`, torch's cache, or downloaded there.

        Raises UserError for a file with another SHA-256, and when it can neither be found nor
        fetched.
        """
        path = path or fetched()
        try:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; "
                            f"give --inception a copy of {WEIGHTS}") from None
        wanted = WEIGHTS.split("-")[-1].removesuffix(".pth")
        need(digest.startswith(wanted), f"{path} is not {WEIGHTS}: its SHA-256 begins with "
             f"{digest[:8]}; delete it and fetch {URL}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return FIDInceptionV3.from_state(state, path)

    @staticmethod
    def from_state(state: dict, path: str = "state") -> "FIDInceptionV3":
        net = FIDInceptionV3()
        try:
            net.load_state_dict(state)
        except (RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{path} does not fit: {reason}") from None
        return net


def fetched() -> str:
    """The weights file in torch's cache, downloaded if it is not there (91 MB)."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, WEIGHTS)
    if not os.path.exists(path):
        try:
            os.makedirs(folder, exist_ok=True)
            digest = WEIGHTS.split("-")[-1].removesuffix(".pth")
            torch.hub.download_url_to_file(URL, path, hash_prefix=digest)
        except (OSError, urllib.error.URLError, RuntimeError) as error:
            raise UserError(f"cannot fetch the FID weights ({type(error).__name__}): put {URL} "
                            f"into {folder}, or give its place with --inception") from None
    return path


if __name__ == "__main__":
    torch.manual_seed(0)
    net = FIDInceptionV3()
    for size in (32, 299):
        features, logits = net(torch.randint(256, (1, 3, size, size), dtype=torch.uint8))
        print(f"{size:3} pixels -> features {tuple(features.shape)}, logits {tuple(logits.shape)}")
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, random here; "
          "FIDInceptionV3.load() fetches the real ones")
    row = torch.arange(4.0).view(1, 1, 1, 4)
    print("0 1 2 3 resized to 8 as TensorFlow 1 did:", resize(row, 8)[0, 0, 0].tolist())
    shifted = F.interpolate(row, (8, 8), mode="bilinear")
    print("       and as PyTorch does, shifted:     ", shifted[0, 0, 0].tolist())
