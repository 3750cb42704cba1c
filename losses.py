"""What a reconstruction is compared by: the squared error of its pixels.

In       recon, images (B, 3, H, W) in [-1, 1]
Out      scalars without weights; train.py multiplies and adds them in one line
Paper    nothing is known to us; [TiTok] 1d-tokenizer, stage 2: squared error 1.0 + ConvNeXt-S
         logits 0.1 + hinge 0.01 of a discriminator
Differs  the squared error alone: what the other two gained here, experiments/LOG.md says
Try      python losses.py      (CPU, about a second)
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction(recon: Tensor, images: Tensor) -> Tensor:
    """Mean squared error, a scalar, the loss; float32 whatever autocast does.

    bf16 would keep two to three digits of it.
    """
    return F.mse_loss(recon.float(), images.float())


def mse(recon: Tensor, images: Tensor) -> Tensor:
    """Mean squared error (B,) of each image by itself, in float32."""
    return (recon.float() - images.float()).square().flatten(1).mean(1)


def to_db(mse: Tensor) -> Tensor:
    """Mean squared errors of images in [-1, 1], any shape -> peak signal-to-noise ratios in dB.

    The peak is 2, the distance from black (-1) to white (1):   10 log10(2^2 / mse)
    Anchors: white for black 0 dB, half as much error everywhere 6 dB more, rounding to 8 bits
    59 dB, equal images inf.
    """
    return 10 * torch.log10(4 / mse)


def psnr(recon: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,), in dB, of each image by itself; higher is better.

    TRAP: the mean of this is not the PSNR of a data set; that is to_db(mse(...).mean()), where one
    image that fails counts as much as its error does.
    """
    return to_db(mse(recon, images))


if __name__ == "__main__":
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    print("Gaussian noise on an image in [-1, 1]    halving it gains 6 dB")
    for sigma in (0.4, 0.2, 0.1, 0.05, 0.025):
        recon = images + sigma * torch.randn_like(images)
        print(f"  sigma {sigma:<6} loss {reconstruction(recon, images):.5f}   "
              f"PSNR {psnr(recon, images).mean():.1f} dB")
