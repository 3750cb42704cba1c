"""What a reconstruction is compared by: pixels, a classifier's opinion, and an adversary.

In       recon, images (B, 3, H, W) in [-1, 1]
Out      scalars without weights; train.py multiplies and adds them in one line
Paper    nothing is known to us; [TiTok] 1d-tokenizer, stage 2: squared error 1.0 + ConvNeXt-S
         logits 0.1 + hinge 0.01 (from step 20,000 on), with LeCam 0.001 on the discriminator
Differs  the discriminator is the 70x70 PatchGAN of pix2pix and taming-transformers, the one most
         readers know; TiTok's own is a wider relative that blurs as it down-samples
Try      python losses.py      (CPU, about a second)
"""
import pickle
from collections import deque

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from layers import ExactBuffers, as_weights
from plumbing import checkpoint
from plumbing.flags import UserError, need

# of images in [0, 1]: what the classifier was trained with [torchvision]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------
# pixels

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


# ------------------------------------------------------------------------------------------------
# perception

class Perceptual(ExactBuffers):
    """Squared error between a frozen ImageNet classifier's logits of two images [TiTok].

    network   normalised images (B, 3, 224, 224) -> logits (B, classes);
              None is torchvision's ConvNeXt-S

    The gradient reaches `recon` only. Raises UserError when torchvision or its weights are missing.
    """

    def __init__(self, network: nn.Module | None = None):
        super().__init__()
        self.network = pretrained_convnext() if network is None else network
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in eval mode: dropped layers would make two equal images differ."""
        return super().train(False)

    def forward(self, recon: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.logits(images)
        return F.mse_loss(self.logits(recon), target)

    def logits(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):    # float32 throughout [TiTok]
            x = (images.float() + 1) / 2  # [0, 1], as ImageNet's mean and std expect
            x = F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
            x = (x - self.mean) / self.std
            x = as_weights(x, next(self.network.parameters(), x))
            return self.network(x).float()                         # (B, classes)


def pretrained_convnext() -> nn.Module:
    """torchvision's ConvNeXt-S with its ImageNet weights, which are downloaded once, about 190 MB.

    Raises UserError that says what to install, or which file to put where.
    """
    try:
        from torchvision.models import ConvNeXt_Small_Weights, convnext_small
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another version of torch
        raise UserError(
            f"the perceptual loss needs a torchvision that fits torch {torch.__version__}: "
            "pip install torchvision, or run with --perceptual_weight 0") from error
    weights = ConvNeXt_Small_Weights.IMAGENET1K_V1
    try:
        return convnext_small(weights=weights)
    # no network, or half a file
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(f"cannot load the weights of the perceptual loss ({type(error).__name__}): "
                        f"put {weights.url} into {folder}, replacing what is there, "
                        "or run with --perceptual_weight 0") from error


# ------------------------------------------------------------------------------------------------
# adversary

class Discriminator(nn.Module):
    """PatchGAN: images (B, 3, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2).

    One verdict per 70x70 patch, positive means "real". At 32x32 each of the 2x2 verdicts sees the
    whole image; 24x24 is the least.

    Widths, kernels and initialisation as in pix2pix and taming-transformers. They normalise over
    the batch; we normalise each image by itself, in groups of channels, so there are no running
    statistics that could differ between ranks or after a restart.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]             # H/2
        for inputs, outputs, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):  # H/4, H/8, H/8 - 1
            layers += [nn.Conv2d(inputs * width, outputs * width, 4, stride, padding=1, bias=False),
                       nn.GroupNorm(32, outputs * width), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(8 * width, 1, 4, stride=1, padding=1)]  # H/8 - 2
        self.layers = nn.Sequential(*layers)
        self.apply(self.init)

    @staticmethod
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        side = min(images.shape[-2:])
        need(side >= 24, f"the adversarial loss needs images of 24 pixels or more, not {side}; "
                         "run with --adversarial_weight 0")
        return self.layers(as_weights(images, self.layers[0].weight))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator, a scalar [taming-transformers, TiTok].

    It is half the sum of the two sides. Anchors: 0 when all real logits are above 1 and all fake
    ones below -1; 1 when all are 0 (undecided).
    """
    real = F.relu(1 - real_logits.float()).mean()
    fake = F.relu(1 + fake_logits.float()).mean()
    return (real + fake) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The tokenizer's side, a scalar: raise the logits of its reconstructions, without a limit.

    TRAP: its backward fills the discriminator's gradients too; clear them before the
    discriminator's own step.
    """
    return -fake_logits.float().mean()


class LeCam(ExactBuffers):
    """LeCam regularisation: holds the discriminator back where real and fake are far apart.

        relu(mean(real) - fake anchor)^2 + relu(real anchor - mean(fake))^2

    Anchors are moving averages of the mean logits, from 0 on, the same on all ranks. They are
    buffers, so the checkpoint has them. Formula, start and decay as in [TiTok]; the idea is Tseng
    et al. 2021, for little data.

    forward() only reads the anchors and update() only moves them: a step that is skipped because
    its loss is not finite must leave them alone, so call update() after the optimizer has stepped.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real_anchor", torch.zeros(()))
        self.register_buffer("fake_anchor", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real = F.relu(real_logits.float().mean() - self.fake_anchor).square()
        fake = F.relu(self.real_anchor - fake_logits.float().mean()).square()
        return real + fake

    @torch.no_grad()
    def update(self, real_logits: Tensor, fake_logits: Tensor) -> None:
        """Move the anchors towards the mean logits of all ranks; every rank must call it."""
        means = torch.stack([real_logits.float().mean(), fake_logits.float().mean()])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self.real_anchor.lerp_(means[0], 1 - self.decay)
        self.fake_anchor.lerp_(means[1], 1 - self.decay)


class Adversary:
    """The discriminator with its optimizer.

    judge() gives the tokenizer's loss, learn() takes the discriminator's own step.
    Hinge loss plus 0.001 x LeCam, AdamW at the tokenizer's learning rate [TiTok].
    """

    def __init__(self, learning_rate: float, device: torch.device, pieces: int = 1):
        """pieces   micro-batches of a step"""
        self.net, self.lecam = Discriminator().to(device), LeCam().to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=learning_rate,
                                           betas=(0.9, 0.999), weight_decay=1e-4)
        # (real, fake) of each micro-batch; those of a step that was skipped are pushed out
        self.seen = deque(maxlen=pieces)

    def see(self, images: Tensor, recon: Tensor) -> None:
        """images, recon (B, 3, H, W) of a micro-batch: the next learn() learns from all of them."""
        self.seen.append((images, recon.detach()))

    def judge(self, recon: Tensor, error: Tensor) -> Tensor:
        """recon (B, 3, H, W), its pixel error -> the tokenizer's adversarial loss, a scalar.

        Scaled so that it pulls at recon as hard as the pixel error does [VQGAN, which compares at
        the last layer]: else its weight would mean something else with every discriminator, and
        0.1 of a fresh one throws a reconstruction back.
        """
        loss = generator_loss(self.net(recon))
        pixels, = torch.autograd.grad(error, recon, retain_graph=True)
        own, = torch.autograd.grad(loss, recon, retain_graph=True)
        return loss * (pixels.norm() / own.norm().clamp_min(1e-8)).clamp_max(1e4)

    def learn(self) -> None:
        """One step of the discriminator on what it saw in this step; nothing if it saw nothing.

        LeCam's part is the mean over micro-batches, each of which it looks at by itself.
        """
        if not self.seen:
            return
        self.optimizer.zero_grad(set_to_none=True)  # judge() left the tokenizer's gradients here
        verdicts = []
        for images, recon in self.seen:
            real, fake = self.net(images), self.net(recon)
            loss = discriminator_loss(real, fake) + 0.001 * self.lecam(real, fake)
            (loss / len(self.seen)).backward()
            verdicts.append((real.detach(), fake.detach()))
        self.seen.clear()
        if dist.is_initialized():
            for p in self.net.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        self.optimizer.step()
        self.lecam.update(*(torch.cat(side) for side in zip(*verdicts)))

    def state_dict(self) -> dict:
        return {"net": self.net.state_dict(), "lecam": self.lecam.state_dict(),
                "optimizer": self.optimizer.state_dict()}

    def load(self, parts: dict, path: str) -> None:
        """Take over a state_dict() of the checkpoint at `path`. Raises UserError if parts miss."""
        missing = [name for name in ("net", "lecam", "optimizer") if name not in parts]
        need(not missing, f"{path}: adversary has no {', '.join(missing)}")
        checkpoint.load_strict(self.net, parts["net"], f"{path}: adversary net")
        checkpoint.load_strict(self.lecam, parts["lecam"], f"{path}: adversary lecam")
        # Its optimizer is empty until the discriminator has begun to learn.
        checkpoint.load_optimizer(self.optimizer, parts["optimizer"],
                                  f"{path}: adversary optimizer", may_be_new=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    print("Gaussian noise on an image in [-1, 1]    halving it gains 6 dB")
    for sigma in (0.4, 0.2, 0.1, 0.05, 0.025):
        recon = images + sigma * torch.randn_like(images)
        print(f"  sigma {sigma:<6} loss {reconstruction(recon, images):.5f}   "
              f"PSNR {psnr(recon, images).mean():.1f} dB")

    print("\nhinge losses at some logits               discriminator   tokenizer")
    cases = (("undecided", 0., 0.), ("right, by a margin", 1., -1.),
             ("right, far beyond it", 5., -5.), ("wrong", -1., 1.))
    for what, real, fake in cases:
        theirs = discriminator_loss(torch.tensor(real), torch.tensor(fake))
        ours = generator_loss(torch.tensor(fake)) + 0  # + 0 turns -0 into 0
        print(f"  {what:21} real {real:4g}  fake {fake:4g}   {theirs:12g} {ours:12g}")

    discriminator = Discriminator()
    millions = sum(p.numel() for p in discriminator.parameters()) / 1e6
    print(f"\nPatchGAN of {millions:.1f}M parameters, its verdicts:")
    for size in (32, 64, 256):
        with torch.no_grad():
            logits = discriminator(torch.zeros(1, 3, size, size))
        print(f"  {size:3} x {size:<3} pixels -> {logits.shape[2]:2} x {logits.shape[3]}")
