"""Airbench: a classifier of photographs of 32x32 pixels that is right on nine of ten.

Source   Jordan 2024, arXiv 2404.00498; its airbench94 is right on 94% of CIFAR-10's test images.
         From there: whitened patches, blocks of two convolutions, shifts of two pixels, flips,
         softened labels. Left out: alternating flips, lookahead, several views of a test image
In       images (B, 3, 32, 32) in [-1, 1]
Out      class logits (B, C), features (B, 256)
Differs  from TinyCNN, which a demo trains in seconds and which half of all real photographs fool
Try      python -m experiments.judge --data DIR --val_data DIR --out runs/judge.pt
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Optim
from layers import as_weights
from loop import Loop
from plumbing.batches import ImageStream, eval_batches
from plumbing.datasets import ImageSet
from plumbing.images import to_float

WIDTHS = (64, 128, 256)
SHIFT = 2  # pixels, at most, in each direction
SMOOTH = 0.2  # of a label's probability goes to all classes alike [airbench]
MOMENTUM, WEIGHT_DECAY = 0.85, 1.3e-3  # [airbench], for the mean of a batch's losses
RATE = 0.4  # at the peak, for batches of 256: a quarter of airbench's for 1024


class Block(nn.Module):
    """(B, inputs, S, S) -> (B, width, S // 2, S // 2)"""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width, momentum=0.4) for _ in range(2)])
        for conv in (self.first, self.second):
            # The first channels are handed through: a block begins as little more than a pooling.
            nn.init.dirac_(conv.weight.data[:conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norms[0](F.max_pool2d(self.first(x), 2)))
        return F.gelu(self.norms[1](self.second(x)))


class Airbench(nn.Module):
    """Looks at 32x32 pixels, whatever the size of the images."""
    features = WIDTHS[-1]

    def __init__(self, classes: int):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        widths = (24, *WIDTHS)
        self.blocks = nn.Sequential(*(Block(i, o) for i, o in zip(widths, widths[1:])))
        self.head = nn.Linear(self.features, classes, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[-2:] != (32, 32):
            images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
        x = F.gelu(self.whiten(as_weights(images, self.head.weight)))         # (B, 24, 31, 31)
        features = self.blocks(x).amax(dim=(2, 3))                            # (B, 256)
        return self.head(features) / 9, features  # [airbench] small logits at the start

    @torch.no_grad()
    def whiten_by(self, images: Tensor) -> None:
        """The first convolution's weights: the principal directions of the images' 2x2 patches,
        each with its length made 1, and once more with the other sign."""
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)         # (n, 12)
        values, vectors = torch.linalg.eigh(patches.double().T.cov())
        directions = (vectors / (values + 5e-4).sqrt()).T.float().view(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([directions, -directions]))
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias.zero_()


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to SHIFT pixels each way; mirrored pixels fill the edge."""
    B, _, H, W = images.shape
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    result = torch.empty_like(images)
    places = torch.randint(2 * SHIFT + 1, (B, 2))
    for y, x in places.unique(dim=0).tolist():
        chosen = (places == torch.tensor([y, x])).all(dim=1).to(images.device)
        result[chosen] = padded[chosen, :, y:y + H, x:x + W]
    return result


def learn(net: Airbench, data: ImageSet, steps: int, skip_bad: bool, device: torch.device) -> None:
    """Train `net`, on the device, for `steps` batches of 256, in bfloat16.

    Convolutions in bfloat16 take half of the time on a CPU that has it, as on a GPU.
    """
    net.to(device, memory_format=torch.channels_last)
    stream = ImageStream(data, 32, 256, seed=0, flip=True, skip_bad=skip_bad)
    first, _ = next(eval_batches(data, 32, 2000, skip_bad=skip_bad))
    net.whiten_by(to_float(first.to(device)))
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=RATE, momentum=MOMENTUM, nesterov=True,
                                weight_decay=WEIGHT_DECAY)
    optim = Optim(256, steps, RATE, 0.0, warmup_steps=steps, beta2=0.0, weight_decay=0.0)
    loop = Loop(net, None, optimizer, optim, name="judge", grad_clip=0, precision="bf16")
    for pixels, labels in loop.over(stream):
        images = shifted(to_float(pixels)).contiguous(memory_format=torch.channels_last)
        with loop.autocast():
            logits, _ = net(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTH)
        loop.backward(loss, {"right": (logits.argmax(dim=1) == labels).float().mean()})
