"""TinyCNN: a small classifier of a run's own images, where Inception would be a stretch.

In       images (B, 3, H, W) in [-1, 1]
Out      class logits (B, C), features (B, 128)
Differs  from FID's network: a distance in these features depends on the data, the training and the
         net, so its name carries the weights' hash, and numbers with different hashes must not be
         compared. There are two: the one trained on the run's images sees what makes a class and is
         blind to some faults (noise: half of what it learned from was noisy); the same network with
         random weights knows no class, but any change of texture moves its features
Try      python -m evaluation.tinycnn      (trains on the shapes, CPU, ten seconds)
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Optim, TrainConfig
from evaluation.airbench import Airbench
from layers import as_weights
from loop import Loop, new_optimizer
from plumbing import checkpoint
from plumbing.archives import note
from plumbing.batches import ImageStream, eval_batches
from plumbing.datasets import ImageSet, open_images, train_and_val
from plumbing.flags import need
from plumbing.images import to_float

FEATURES = 128
CUT = (TrainConfig.holdout, TrainConfig.seed)  # train.py's defaults


class TinyCNN(nn.Module):
    """Looks at 32x32 pixels, whatever the size of the images."""
    features = FEATURES

    def __init__(self, classes: int):
        super().__init__()
        layers, inputs = [], 3
        for width in (32, 64, 128):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(),
                       nn.MaxPool2d(2)]
            inputs = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, FEATURES),
                                  nn.ReLU())
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[-2:] != (32, 32):
            images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
        features = self.body(as_weights(images, self.head.weight))            # (B, 128)
        return self.head(features), features


NETS = {"tinycnn": TinyCNN, "airbench": Airbench}  # by the name in a judge's file


def random_twin(classes: int) -> TinyCNN:
    """The same net, never trained; the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyCNN(classes).eval()


def train_judge(path: str, data: ImageSet, val: ImageSet, image_size: int, flip: bool, steps: int,
                device: torch.device, skip_bad: bool = False, cut: tuple[int, int] = CUT) -> None:
    """Train a TinyCNN on `data` for `steps` batches of 64; write it and its accuracy to `path`.

    cut   holdout and seed by which `val` was cut from the images, for images_of_judge()
    There is no accuracy where the labels of `val` are not those of `data`, as in a flat folder.
    Half of the batches are out of focus and noisy: a net that has seen sharp images only calls a
    soft diamond a disc, where a person does not hesitate.
    """
    torch.manual_seed(0)
    need(len(data.classes) > 1, f"{data.name} has a single class, and a classifier learns nothing "
         "from it; use --features inception")
    judge = TinyCNN(len(data.classes)).to(device)
    optim = Optim(64, steps, 2e-3, 0.0, warmup_steps=steps, beta2=0.999, weight_decay=0.01)
    optimizer = new_optimizer(judge, "adamw", optim.weight_decay, optim.beta2)
    loop = Loop(judge, None, optimizer, optim, name="classifier", grad_clip=0)
    stream = ImageStream(data, image_size, optim.batch_size, seed=0, flip=flip, skip_bad=skip_bad)
    for pixels, labels in loop.over(stream):
        images = to_float(pixels)
        if torch.rand(()) < 0.5:
            scale = float(torch.empty(()).uniform_(0.3, 0.7))
            scale = max(scale, 1 / image_size)  # a pixel is left
            small = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
            blurred = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
            images = blurred + 0.05 * torch.randn_like(images)
        logits, _ = judge(images)
        loop.backward(F.cross_entropy(logits, labels), {})
    save_judge(path, judge, data, val, image_size, steps, device, skip_bad, cut)


def save_judge(path: str, judge: nn.Module, data: ImageSet, val: ImageSet, image_size: int,
               steps: int, device: torch.device, skip_bad: bool = False,
               cut: tuple[int, int] = CUT) -> float | None:
    """Write a classifier of one of NETS; -> its accuracy, or None; see train_judge()."""
    right = None
    if val.classes == data.classes:
        right = accuracy(judge.eval(), val, image_size, device, skip_bad)
    checkpoint.save(path, {"net": type(judge).__name__.lower(), "classes": data.classes,
                           "data": data.fingerprint, "val": val.fingerprint, "cut": list(cut),
                           "steps": steps, "model": judge.state_dict(), "accuracy": right})
    return right


@torch.no_grad()
def accuracy(judge: nn.Module, val: ImageSet, image_size: int, device: torch.device,
             skip_bad: bool = False) -> float:
    """The share of held-out images that the classifier gets right."""
    hits = []
    for images, labels in eval_batches(val, image_size, 250, skip_bad=skip_bad):
        logits, _ = judge(to_float(images.to(device)))
        hits.append((logits.argmax(dim=1).cpu() == labels).numpy())
    return float(np.mean(np.concatenate(hits)))


def read_judge(path: str) -> dict:
    return checkpoint.load(path, needs=("classes", "data", "steps", "model", "accuracy"))


def build_judge(saved: dict, path: str) -> nn.Module:
    """read_judge(path) -> the classifier."""
    judge = NETS[saved.get("net", "tinycnn")](len(saved["classes"]))  # older files name none
    checkpoint.load_strict(judge, saved["model"], path)
    return judge.eval()


def load_judge(path: str, data: ImageSet,
               val: ImageSet | None = None) -> tuple[nn.Module, float | None]:
    """-> the classifier at `path`, its accuracy on held-out images if they had labels.

    val   those images; if they are others, there is no accuracy
    Raises UserError when it learned from other images.
    """
    saved = read_judge(path)
    need(saved["data"] == data.fingerprint, f"{path} was trained on other images than {data.name}, "
         "and others may judge by it; move it away, or give --judge the name of a new file, and "
         "add --train_features")
    judge = build_judge(saved, path)
    same = val is None or saved.get("val") == val.fingerprint
    return judge, saved["accuracy"] if same else None


def images_of_judge(path: str, data: str, val_data: str) -> tuple[ImageSet, ImageSet]:
    """The images at `data`, and what is held out: as when the judge at `path` learned from them.

    A new judge's are cut as train.py cuts them by default. Raises UserError when an old one has
    learned from all of them, or from a part, and the other is asked for.
    """
    saved = read_judge(path) if checkpoint.exists(path) else {}
    cut = saved.get("cut", CUT)
    learned, val = train_and_val(data, val_data, *cut)
    if saved and saved["data"] != learned.fingerprint:
        if val_data:
            part, _ = train_and_val(data, "", *cut)
            need(saved["data"] != part.fingerprint, f"{path} learned from a part of {data}, and "
                 "the others were held out; leave out --val_data")
        else:
            need(saved["data"] != open_images(data).fingerprint, f"{path} learned from all of "
                 f"{data}; give --val_data the images that were held out")
    return learned, val


def is_to_be_trained(path: str, data: ImageSet, val: ImageSet, steps: int, replace: bool) -> bool:
    """Is a judge to be trained at `path`, or is there one already that learned the same?

    replace   one that learned for other steps may make way; it stays beside the new one
    Raises UserError for any other file that is there: a judge's numbers bear its hash, and without
    it they cannot be had again.
    """
    if not checkpoint.exists(path):
        return True
    saved = read_judge(path)
    same = saved["data"] == data.fingerprint
    if same and saved.get("val") == val.fingerprint and saved["steps"] == steps:
        note(f"{path} has learned from these images for {steps} steps already and is kept")
        return False
    need(same and replace, f"{path} is a classifier already, trained on "
         f"{'these' if same else 'other'} images for {saved['steps']} steps, and it would be lost; "
         "leave out --train_features, or give --judge the name of a new file, or move it away")
    note(f"{path} is trained anew; the one before is now {checkpoint.previous(path)}")
    return True


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tinycnn.pt")
        data, val = open_images("shapes"), open_images("shapes:val")
        train_judge(path, data, val, 32, False, 35, torch.device("cpu"))
        judge, right = load_judge(path, data, val)
    print(f"right on {right:.1%} of held-out shapes after 35 steps; "
          f"a coin with {len(data.classes)} sides: {1 / len(data.classes):.0%}")
