"""Looking at sets of images through networks, and what two sets have in common: the inside of eval_fid.py.

    Subject ─► batches ─► Eye ─► features ─► Seen ─► judge ─► one row of results
    real, reconstruction,        TinyCNN,    statistics,      distance to the
    generated, controls          Inception   merged over      Reference
                                             processes
"""
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluation.inception import WEIGHTS, FIDInceptionV3
from evaluation.measures import (
    InceptionScore,
    Statistics,
    frechet_distance,
    frechet_from_features,
    precision_recall,
    ssim,
)
from evaluation.tinycnn import FEATURES, load_judge, random_twin
from generator import Generator
from losses import mse, to_db
from nativetok import NativeTok, sample_batch
from plumbing import checkpoint
from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet
from plumbing.flags import need
from plumbing.images import explained, to_float, to_uint8
from plumbing.processes import Processes, enough_memory

KEPT = 10000  # images whose features are kept, for precision and recall


# ------------------------------------------------------------------------------------------------
# eyes: networks that turn images into features

@dataclass
class Eye:
    """key: the name of its Fréchet distance in the results; title: what it must be called; says_class: logits are those of the data."""
    key: str
    title: str
    look: Callable  # uint8 (B, H, W, 3) -> features (B, f), logits (B, C)
    features: int
    says_class: bool = False


def tinycnn_eyes(path: str, data: ImageSet, device: torch.device) -> tuple[list[Eye], float]:
    """-> the trained classifier and its random twin as Eyes, the classifier's accuracy on held-out images."""
    trained, accuracy = load_judge(path, data)
    eyes = []
    for name, net in (("tinycnn", trained), ("random", random_twin(len(data.classes)))):
        digest = checkpoint.fingerprint(net.state_dict())[:8]
        net = net.to(device)

        def look(images, net=net):
            logits, features = net(to_float(images.to(device)))
            return features, logits
        title = f"Fréchet distance in {'' if name == 'tinycnn' else 'random '}TinyCNN features (not FID) {digest}"
        eyes.append(Eye(f"fd_{name}_{digest}", title, look, FEATURES, name == "tinycnn"))
    return eyes, accuracy


def inception_eye(path: str, device: torch.device) -> Eye:
    net = FIDInceptionV3.load(path).to(device)
    return Eye("fid", f"FID ({WEIGHTS})", lambda images: net(images.to(device).permute(0, 3, 1, 2)), 2048)


# ------------------------------------------------------------------------------------------------
# what is looked at

@dataclass
class Subject:
    """A set of n images that comes in batches.

    batches   numbers of the batches that this process is to make -> uint8 images (b, H, W, 3), labels (b,), and for
              reconstructions the originals, else None
    """
    name: str
    n: int
    batches: Callable[[list[int]], Iterator[tuple[Tensor, Tensor, Tensor | None]]]
    labelled: bool = True  # do the labels say what should be seen?
    settings: dict = field(default_factory=dict)
    swept: dict = field(default_factory=dict)  # those settings that --sweep varies


def real(name: str, dataset: ImageSet, indices: np.ndarray, size: int, args, change: Callable | None = None) -> Subject:
    """Images of a data set; change: uint8 images, rng -> uint8 images."""
    def batches(numbers):
        mine = [indices[b * args.batch_size:(b + 1) * args.batch_size] for b in numbers]
        stream = eval_batches(dataset, size, args.batch_size, np.concatenate(mine) if mine else mine)
        for b, (images, labels) in zip(numbers, stream):
            yield (change(images, np.random.default_rng((args.seed, b))) if change else images), labels, None
    return Subject(name, len(indices), batches)


def reconstruction(tokenizer: NativeTok, originals: Subject, device: torch.device) -> Subject:
    def batches(numbers):
        for images, labels, _ in originals.batches(numbers):
            yield to_uint8(tokenizer.decode(tokenizer.encode(to_float(images.to(device))))).cpu(), labels, images
    return Subject("reconstruction", originals.n, batches, settings={"num_tokens": tokenizer.num_tokens})


def generated(kind: str, tokenizer: NativeTok, options: dict, swept: dict, args, device: torch.device) -> Subject:
    """Samples of the run's generator: the classes take turns, batch b draws from (seed, b) on any number of processes."""
    model = Generator.of_run(args.run, kind, tokenizer, device)
    labels = torch.arange(args.num_samples) % model.num_classes
    options = {**({"steps": model.default_steps} if kind == "maskgit" else {}), **options, **swept}

    def batches(numbers):
        for b in numbers:
            part = labels[b * args.batch_size:(b + 1) * args.batch_size]
            yield sample_batch(model, tokenizer, part.to(device), options, args.seed, b), part, None
    return Subject(kind, args.num_samples, batches, settings={**options, "seed": args.seed, "batch_size": args.batch_size}, swept=swept)


def blurred(images: Tensor, rng) -> Tensor:
    x = to_float(images)
    return to_uint8(F.interpolate(F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), size=x.shape[-2:], mode="bilinear"))


def noisy(images: Tensor, rng) -> Tensor:
    return to_uint8(to_float(images) + 0.2 * torch.from_numpy(rng.standard_normal(images.shape)).permute(0, 3, 1, 2).float())


def controls(dataset: ImageSet, n: int, size: int, args) -> list[Subject]:
    """Training images made worse; each must come out further from the held-out ones than those that were left alone."""
    shuffled, labels = np.random.default_rng(1).permutation(len(dataset)), dataset.labels
    some = shuffled[:n]
    few = [("half of the classes", np.isin(labels[shuffled], np.arange((len(dataset.classes) + 1) // 2))), ("one class", labels[shuffled] == 0)]
    return [real("real, blurred", dataset, some, size, args, blurred), real("real, with noise", dataset, some, size, args, noisy),
            *(real(f"real, {name}", dataset, shuffled[keep][:n], size, args) for name, keep in few)]


# ------------------------------------------------------------------------------------------------
# looking

class Seen:
    """What one Eye saw of one Subject: statistics of all images, features of the first KEPT, Inception Score, hits."""

    def __init__(self, eye: Eye, n: int, classes: int = 0):
        self.statistics, self.kept, self.hits = Statistics(eye.features), [], 0
        self.score = InceptionScore(n, classes) if classes else None

    def merge(self, other: "Seen") -> None:
        self.statistics.merge(other.statistics)
        self.kept += other.kept
        self.hits += other.hits
        if self.score:
            self.score.merge(other.score)

    def features(self) -> np.ndarray:
        return np.concatenate([f for _, f in sorted(self.kept, key=lambda pair: pair[0])])


@torch.no_grad()
def look(subject: Subject, eyes: list[Eye], args, procs: Processes) -> tuple[list[Seen], dict]:
    """-> one Seen per eye, and for reconstructions PSNR and SSIM; merged over processes, the same on each of them."""
    numbers = range(-(-subject.n // args.batch_size))
    mine = list(numbers)[procs.rank::procs.world]
    seen, errors, likeness = [Seen(eye, subject.n, 1008 if eye.key == "fid" else 0) for eye in eyes], [], []
    bar = tqdm(total=subject.n, desc=f"{subject.name[:20]:20}", disable=not procs.main, delay=1, mininterval=1)
    with bar, enough_memory("lower --batch_size"):
        for b, (images, labels, originals) in zip(mine, subject.batches(mine)):
            for eye, s in zip(eyes, seen):
                features, logits = eye.look(images)
                s.statistics.add(features.cpu().numpy())
                if b * args.batch_size < KEPT:
                    s.kept.append((b, features.cpu().numpy()))
                if s.score:
                    s.score.add(logits, b * args.batch_size)
                if eye.says_class:
                    s.hits += int((logits.argmax(dim=1).cpu() == labels).sum())
            if originals is not None:
                x, y = to_float(originals), to_float(images)
                errors.append(mse(y, x).double()), likeness.append(ssim(y, x).numpy())
            bar.update(len(images) * procs.world)
    everyone = procs.gather((seen, errors, likeness))
    seen, errors, likeness = everyone[0]
    for others, more_errors, more_likeness in everyone[1:]:
        for s, other in zip(seen, others):
            s.merge(other)
        errors, likeness = errors + more_errors, likeness + more_likeness
    quality = {"psnr": round(to_db(torch.cat(errors).mean()).item(), 3),
               "ssim": round(float(np.concatenate(likeness).mean()), 4)} if errors else {}
    return seen, quality


@dataclass
class Reference:
    """mu and sigma in each eye, and the features themselves where they are known."""
    name: str
    n: int | None
    mu: dict
    sigma: dict
    features: dict


def read_reference(path: str, eyes: list[Eye]) -> Reference:
    """An .npz with mu and sigma, from --save_stats or from ADM. Raises UserError when it is of another network."""
    with explained(path, "give an .npz with mu and sigma, as --save_stats writes it"), np.load(path, allow_pickle=False) as file:
        need("mu" in file and "sigma" in file, f"{path}: has no mu and sigma; give images with --data, or statistics that --save_stats wrote")
        mu, sigma = file["mu"], file["sigma"]
        key, n = str(file["key"]) if "key" in file else "fid", int(file["n"]) if "n" in file else None
    found = [eye for eye in eyes if eye.key == key]
    need(found, f"{path} holds statistics of {key}, and this is {' and '.join(eye.key for eye in eyes)}: they cannot be compared"
         + ("; use --features inception" if key == "fid" else ""))
    need(mu.shape == (found[0].features,) and sigma.shape == (found[0].features,) * 2, f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit {key}")
    eyes[:] = found  # the others have nothing to be compared with
    return Reference(os.path.basename(path), n, {key: mu}, {key: sigma}, {})


def judge(subject: Subject, eyes: list[Eye], reference: Reference, args, procs: Processes) -> dict:
    """-> one row of the results."""
    seen, quality = look(subject, eyes, args, procs)
    row = {"name": subject.name, "n": subject.n, **quality}
    row |= {name: values for name, values in (("settings", subject.settings), ("swept", subject.swept)) if values}
    for eye, s in zip(eyes, seen):
        mine, theirs = s.statistics, reference.features.get(eye.key)
        complete = theirs is not None and mine.n <= KEPT and len(theirs) == reference.n
        if complete and max(mine.n, len(theirs)) < eye.features:
            distance = frechet_from_features(s.features(), theirs)
        else:
            distance = frechet_distance(mine.mu, mine.sigma, reference.mu[eye.key], reference.sigma[eye.key])
        row[eye.key] = round(distance, 4)
        if s.score:
            whole, mean, std = s.score.scores()
            row |= {"inception_score": round(whole, 4), "inception_score_10_splits": [round(mean, 4), round(std, 4)]}
        if eye.key == eyes[0].key and theirs is not None and min(mine.n, len(theirs)) > 3:
            precision, recall = precision_recall(torch.from_numpy(theirs), torch.from_numpy(s.features()))
            row |= {"precision": round(precision, 4), "recall": round(recall, 4)}
        if eye.says_class and subject.labelled:
            row["class_accuracy"] = round(s.hits / subject.n, 4)
    return row
