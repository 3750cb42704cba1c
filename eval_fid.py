"""How good is a run? Reconstructions and samples, judged by a small classifier trained on the run's own images.

Run      python eval_fid.py --run runs/NAME
Prints   held-out PSNR and codebook use after each phase; for each generator the share of samples in which the
         classifier sees the class that was asked for, and the Fréchet distance in its features
Makes    RUN/summary.json, RUN/tinycnn.pt (the classifier, trained once)
Differs  A distance in TinyCNN features is NOT FID and cannot be compared with anybody's FID: another feature
         network, other images, another resolution. FID proper, in Inception features, is not implemented yet.
Try      python eval_fid.py --help
"""
import config

if __name__ == "__main__":                                                    # before torch, so that --help answers at once
    def parse():
        parser = config.Parser(prog="eval_fid.py", description=__doc__)
        parser.add_argument("--run", required=True, help="folder of a run that train.py has finished")
        parser.add_argument("--num_samples", type=int, default=500, help="samples of each generator, spread evenly over the classes")
        parser.add_argument("--cfg_scale", type=float, default=2.0, help="guidance: 0 unconditional, 1 plain, above 1 guided")
        parser.add_argument("--steps", type=int, default=8, help="steps of MaskGIT")
        parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
        parser.add_argument("--batch_size", type=int, default=250, help="images at a time; lower it when memory runs out")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
        args = parser.parse_args()
        config.need(args.num_samples >= 2, "num_samples must be at least 2, for a covariance")
        return args
    config.run(lambda: globals().update(ARGS=parse()))

import itertools
import json
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from batches import ImageStream, eval_batches
from config import build, need, read_run
from data import ImageSet, train_and_val
from generator import GENERATORS, Generator
from images import to_float, to_uint8
from nativetok import NativeTok
from processes import Processes


# ------------------------------------------------------------------------------------------------
# the judge

class TinyCNN(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> class logits (B, classes), features (B, 128). Looks at 32x32 pixels."""

    def __init__(self, classes: int):
        super().__init__()
        layers, inputs = [], 3
        for width in (32, 64, 128):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[-1] != 32:
            images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
        features = self.body(images)                                          # (B, 128)
        return self.head(features), features


def trained_judge(path: str, data: ImageSet, val: ImageSet, image_size: int, flip: bool, procs: Processes, steps: int = 500) -> tuple[TinyCNN, float]:
    """The classifier for these images and its accuracy on held-out ones, from `path` if it was trained before.

    Half of the batches it learns from are out of focus and noisy: one that has seen sharp images only calls a soft
    diamond a disc, where a person does not hesitate.
    """
    judge = TinyCNN(len(data.classes)).to(procs.device)
    settings = {"data": data.fingerprint, "steps": steps, "image_size": image_size, "flip": flip}
    if checkpoint.exists(path):
        saved = checkpoint.load(path, needs=("settings", "model", "accuracy"))
        if saved["settings"] == settings:
            checkpoint.load_strict(judge, saved["model"], path)
            return judge.eval(), saved["accuracy"]
    torch.manual_seed(0)
    judge = TinyCNN(len(data.classes)).to(procs.device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    stream = ImageStream(data, image_size, 64, seed=0, flip=flip)
    for images, labels in tqdm(itertools.islice(stream, steps), total=steps, desc="classifier"):
        images = to_float(images.to(procs.device))
        if torch.rand(()) < 0.5:
            small = F.interpolate(images, scale_factor=float(torch.empty(()).uniform_(0.3, 0.7)), mode="bilinear", antialias=True)
            images = F.interpolate(small, size=images.shape[-2:], mode="bilinear") + 0.05 * torch.randn_like(images)
        logits, _ = judge(images)
        loss = F.cross_entropy(logits, labels.to(procs.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    judge.eval()
    pairs = [(images, labels) for images, labels in eval_batches(val, image_size, 250)]
    accuracy = float(np.mean(np.concatenate([(judge_images(judge, to_float(i.to(procs.device)))[0] == y).numpy() for i, y in pairs])))
    checkpoint.save(path, {"settings": settings, "model": judge.state_dict(), "accuracy": accuracy})
    return judge, accuracy


@torch.no_grad()
def judge_images(judge: TinyCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) -> predicted classes (B,), features (B, 128), both on the CPU."""
    logits, features = judge(images)
    return logits.argmax(dim=1).cpu(), features.cpu()


# ------------------------------------------------------------------------------------------------
# distances

def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, f) -> mean (f,), covariance (f, f), in float64 with n - 1."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^1/2)  [Heusel et al. 2017, arXiv 1706.08500].

    The last trace is the sum of the singular values of sigma1^1/2 sigma2^1/2: no matrix square root of a product
    that is not symmetric, no complex numbers, and accurate where there are fewer images than features.
    """
    def half(sigma):                                                          # H with H H^T = sigma
        values, vectors = np.linalg.eigh(np.asarray(sigma, np.float64))
        return vectors * np.sqrt(values.clip(0))
    cross = np.linalg.svd(half(sigma1).T @ half(sigma2), compute_uv=False).sum()
    return float(np.square(np.asarray(mu1, np.float64) - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


# ------------------------------------------------------------------------------------------------

def balanced(num_samples: int, classes: int) -> Tensor:
    """Labels (num_samples,), each class as often as the others, up to one."""
    return torch.arange(num_samples) % classes


def judge_generator(kind: str, path: str, tokenizer: NativeTok, judge: TinyCNN, args, procs: Processes) -> tuple[float, np.ndarray]:
    """-> share of samples that show the class asked for, features of the samples (n, 128)."""
    model = Generator.load(path).to(procs.device)
    need(model.tokenizer_fingerprint == tokenizer.fingerprint, f"{path} belongs to another tokenizer; train stage 3 again in a new --run folder")
    labels, noise = balanced(args.num_samples, model.num_classes), torch.Generator().manual_seed(args.seed)
    options = {"steps": min(args.steps, model.num_tokens)} if kind == "maskgit" else {}
    hits, features = [], []
    for part in tqdm(labels.split(args.batch_size), desc=f"{kind:10}"):
        ids = model.sample(part.to(procs.device), cfg_scale=args.cfg_scale, generator=noise, **options)
        images = to_float(to_uint8(tokenizer.decode(ids)))                    # as they would be saved: rounded to 8 bits
        seen, f = judge_images(judge, images)
        hits.append(seen == part), features.append(f)
    return torch.cat(hits).float().mean().item(), torch.cat(features).numpy()


def main(args) -> None:
    began, procs = time.time(), Processes(args.device)
    values = read_run(args.run)
    values.pop("preset")
    tok, _, train = build(values)
    path = {name: os.path.join(args.run, name) for name in ("tokenizer.pt", "tinycnn.pt", "log.jsonl", "summary.json")}
    tokenizer = NativeTok.load(path["tokenizer.pt"]).to(procs.device)
    results = checkpoint.load(path["tokenizer.pt"], needs=("results",))["results"]
    need("base" in results, f"{args.run} has no finished phase yet; let train.py go on")
    data, val = train_and_val(train.data, train.val_data, train.holdout, train.seed, args.run)
    judge, on_real = trained_judge(path["tinycnn.pt"], data, val, tok.image_size, train.flip, procs)
    name = f"fd_tinycnn_{checkpoint.fingerprint(judge.state_dict())[:8]}"

    batches = eval_batches(val, tok.image_size, args.batch_size, np.random.default_rng(0).permutation(len(val))[:2000])
    real = np.concatenate([judge_images(judge, to_float(images.to(procs.device)))[1].numpy() for images, _ in batches])
    summary = {"psnr_by_tokens": {}, "codebook_used": {}, "class_accuracy": {}, "seconds": {},
               name: {}, "settings": {"num_samples": args.num_samples, "cfg_scale": args.cfg_scale, "steps": args.steps, "seed": args.seed}}
    for phase, result in results.items():                                     # in order: the fine-tune overwrites its length's growth step
        summary["psnr_by_tokens"][str(result["num_tokens"])] = result["psnr"]
        summary["codebook_used"][str(result["num_tokens"])] = result["codebook_used"]
    for kind in GENERATORS:
        checkpoint_path = os.path.join(args.run, f"generator-{kind}.pt")
        if checkpoint.exists(checkpoint_path):
            accuracy, features = judge_generator(kind, checkpoint_path, tokenizer, judge, args, procs)
            summary["class_accuracy"][kind] = round(accuracy, 4)
            summary[name][kind] = round(frechet_distance(*statistics(features), *statistics(real)), 3)
    summary["class_accuracy"]["classifier_on_real"] = round(on_real, 4)
    with open(path["log.jsonl"], encoding="utf-8") as log:
        summary["seconds"] = {row["phase"]: row["seconds"] for row in map(json.loads, log) if "seconds" in row}
    summary["seconds"]["eval"] = round(time.time() - began, 1)
    checkpoint.write_json(path["summary.json"], summary)

    print(f"\n{'phase':12}{'tokens':>8}{'PSNR, held out':>16}{'codebook used':>15}")
    for phase, result in results.items():
        print(f"{phase:12}{result['num_tokens']:>8}{result['psnr']:>13.2f} dB{result['codebook_used']:>15.0%}")
    print(f"\n{args.num_samples} samples each, guidance {args.cfg_scale:g}; the classifier is right on {on_real:.1%} of held-out real images")
    for kind in summary[name]:
        print(f"{kind:12}{summary['class_accuracy'][kind]:>8.1%} show the class asked for; Fréchet distance in TinyCNN features "
              f"(not FID) {summary[name][kind]:.2f}, n {args.num_samples} against {len(real)} of {val.name}")
    print("\nseconds: " + ", ".join(f"{phase} {s:.0f}" for phase, s in summary["seconds"].items()))
    print(f"written: {path['summary.json']}")


if __name__ == "__main__":
    config.run(lambda: main(ARGS))
