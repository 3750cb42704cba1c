"""Sets of images through networks, and what two sets have in common: the inside of eval_fid.py.

    ImageSource ─► batches ─► FeatureNet ─► features ─► FeatureStats ─► judge ─► a row of results
    real, reconstruction,     TinyCNN,      statistics,                 distance to the
    generated, controls       Inception     merged over processes       Reference

In       an ImageSource: n images that come in batches, each a function of its number alone
Out      judge: a dict, one row of the results
Differs  batches are dealt to the processes by number, so two of them give the numbers of one
"""
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluation.inception import WEIGHTS, FIDInceptionV3
from evaluation.measures import (
    SSIM_WINDOW,
    InceptionScore,
    Statistics,
    frechet_distance,
    frechet_from_features,
    precision_recall,
    ssim,
)
from evaluation.tinycnn import load_judge, random_twin
from flow_decoder import Decoding
from generator import Generator, mask_schedule
from losses import mse, to_db
from nativetok import sample_batch
from plumbing import checkpoint
from plumbing.archives import kind_of
from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet, some_of
from plumbing.flags import need
from plumbing.images import explained, to_float, to_uint8
from plumbing.processes import Processes, enough_memory

KEPT = 10000  # images whose features are kept, for precision and recall


# ------------------------------------------------------------------------------------------------
# networks that turn images into features

@dataclass
class FeatureNet:
    """A network, and what a Fréchet distance in its features is called.

    key         the distance's name in the results; with a hash of the weights where they are ours
    title       the distance's name for a reader
    network     uint8 images (B, H, W, 3) -> features (B, f), logits (B, C)
    says_class  are the logits those of the run's classes?
    """
    key: str
    title: str
    network: Callable
    features: int  # f
    says_class: bool = False


def tinycnn_nets(path: str, data: ImageSet, device: torch.device,
                 val: ImageSet | None = None) -> tuple[list[FeatureNet], float | None]:
    """-> the trained classifier and a random TinyCNN, and the classifier's held-out accuracy.

    val   the accuracy is that on these images, or None
    """
    trained, accuracy = load_judge(path, data, val)
    kind = type(trained).__name__
    nets = []
    for name, net in ((kind, trained), ("random TinyCNN", random_twin(len(data.classes)))):
        digest = checkpoint.fingerprint(net.state_dict())[:8]
        net = net.to(device)

        def network(images, net=net):
            logits, features = net(to_float(images.to(device)))
            return features, logits
        title = f"Fréchet distance in {name} features (not FID) {digest}"
        key = f"fd_{name.split()[0].lower()}_{digest}"
        nets.append(FeatureNet(key, title, network, net.features, net is trained))
    return nets, accuracy


def inception_net(path: str, device: torch.device) -> FeatureNet:
    net = FIDInceptionV3.load(path).to(device)

    def network(images):
        return net(images.to(device).permute(0, 3, 1, 2))
    return FeatureNet("fid", f"FID ({WEIGHTS})", network, 2048)


# ------------------------------------------------------------------------------------------------
# sources of images

@dataclass
class ImageSource:
    """A set of n images that comes in batches.

    batches   numbers of the batches that this process is to make -> uint8 images (b, H, W, 3),
              labels (b,), and for reconstructions the originals, else None. Any first n of them
              hold all classes: features are kept of the first, and scores are split in order
    labelled  do the labels say what should be seen?
    swept     those of the settings that --sweep varies
    unfinished  how far the training had come of a network that made them, if not to its end
    """
    name: str
    n: int
    batches: Callable[[list[int]], Iterator[tuple[Tensor, Tensor, Tensor | None]]]
    labelled: bool = True
    settings: dict = field(default_factory=dict)
    swept: dict = field(default_factory=dict)
    unfinished: str = ""


@dataclass(frozen=True)
class Batching:
    """How images are read or drawn: batch b depends on these and on b, never on the process."""
    batch_size: int = 250
    seed: int = 0
    skip_bad: bool = False  # pass over unreadable images, as the run did


def real(name: str, dataset: ImageSet, indices: np.ndarray, size: int, how: Batching,
         labelled: bool = True, change: Callable | None = None) -> ImageSource:
    """Images of a data set; change: uint8 images, rng -> uint8 images."""
    def batches(numbers):
        if not numbers:
            return
        chosen = [indices[b * how.batch_size:(b + 1) * how.batch_size] for b in numbers]
        stream = eval_batches(dataset, size, how.batch_size, np.concatenate(chosen),
                              skip_bad=how.skip_bad)
        for b, (images, labels) in zip(numbers, stream):
            if change:
                images = change(images, np.random.default_rng((how.seed, b)))
            yield images, labels, None
    return ImageSource(name, len(indices), batches, labelled)


def reconstruction(decode: Decoding, originals: ImageSource, how: Batching, device: torch.device,
                   num_tokens: int | None = None) -> ImageSource:
    """The originals from their first num_tokens ids, by default all; batch b draws from (seed, b).
    """
    tokenizer = decode.tokenizer
    k = num_tokens or tokenizer.num_tokens

    def batches(numbers):
        for b, (images, labels, _) in zip(numbers, originals.batches(numbers)):
            ids = tokenizer.encode(to_float(images.to(device)))[:, :k]
            noise = torch.Generator().manual_seed(how.seed * 1_000_003 + b)
            yield to_uint8(decode(ids, noise)).cpu(), labels, images
    part = {"num_tokens": k} if k < tokenizer.num_tokens else {}
    return ImageSource("reconstruction", originals.n, batches, originals.labelled,
                       settings={"num_tokens": k, **decode.settings}, swept=part,
                       unfinished=decode.unfinished)


def generated(kind: str, model: Generator, decode: Decoding, n: int, options: dict,
              swept: dict, how: Batching, device: torch.device) -> ImageSource:
    """Samples of a generator: the classes take turns, batch b draws from (seed, b)."""
    labels = torch.arange(n) % model.num_classes
    options = {**options, **swept}
    if "steps" in model.options:
        if options.get("steps") is None:
            options["steps"] = model.default_steps
        mask_schedule(model.num_tokens, options["steps"])  # raises UserError for too many: now

    def batches(numbers):
        for b in numbers:
            part = labels[b * how.batch_size:(b + 1) * how.batch_size]
            images = sample_batch(model, decode, part.to(device), options, how.seed, b)
            yield images, part, None
    settings = {**options, **decode.settings, "seed": how.seed, "batch_size": how.batch_size}
    unfinished = "; ".join(filter(None, (decode.unfinished, model.unfinished)))
    return ImageSource(kind, n, batches, settings=settings, swept=swept, unfinished=unfinished)


def blurred(images: Tensor, rng) -> Tensor:
    x = to_float(images)
    scale = max(0.5, 1 / min(x.shape[-2:]))  # a pixel is left
    half = F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)
    return to_uint8(F.interpolate(half, size=x.shape[-2:], mode="bilinear"))


def noisy(images: Tensor, rng) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(images.shape)).permute(0, 3, 1, 2).float()
    return to_uint8(to_float(images) + 0.2 * noise)


def controls(dataset: ImageSet, n: int, size: int, how: Batching) -> list[ImageSource]:
    """Training images made worse: each must come out further from the held-out ones."""
    shuffled = np.random.default_rng(1).permutation(len(dataset))
    labels = dataset.labels[shuffled]
    present = np.unique(labels)  # arrays may have classes without an image
    half = np.isin(labels, present[:(len(present) + 1) // 2])
    one = labels == present[0]
    sources = [real("real, blurred", dataset, shuffled[:n], size, how, change=blurred),
               real("real, with noise", dataset, shuffled[:n], size, how, change=noisy),
               real("real, half of the classes", dataset, shuffled[half][:n], size, how),
               real("real, one class", dataset, shuffled[one][:n], size, how)]
    return [source for source in sources if source.n >= 2]  # a covariance takes two


def why_unlabelled(images: ImageSet, path: str, classes: list[str]) -> str:
    """Why the labels of `images`, which lie at `path`, say nothing of these classes; "" if they do.
    """
    if images.classes == classes:
        return ""
    if os.path.isfile(path) and kind_of(path) == "npz":
        with np.load(path, allow_pickle=False) as arrays:
            labels = "y" if "x" in arrays else "arr_1"
            if labels not in arrays:
                return f"it has no labels (an array {labels})"
            if "classes" not in arrays:
                return f"its labels {labels} have no names (an array classes)"
    if images.classes == ["all"]:
        return "its images lie in one folder, not in one for each class"
    ours, theirs = set(classes), set(images.classes)
    return (f"its classes are others (not there: {some_of(ours - theirs)}; only there: "
            f"{some_of(theirs - ours)}) or in another order")


# ------------------------------------------------------------------------------------------------
# features

class FeatureStats:
    """An ImageSource through a FeatureNet: mean and covariance, the first features, hits."""

    def __init__(self, net: FeatureNet, n: int, classes: int = 0):
        self.statistics = Statistics(net.features)  # of all images
        self.kept: list[tuple[int, np.ndarray]] = []  # features of the first KEPT, by batch
        self.hits = 0  # images whose class was recognised
        self.score = InceptionScore(n, classes) if classes else None

    def merge(self, other: "FeatureStats") -> None:
        self.statistics.merge(other.statistics)
        self.kept += other.kept
        self.hits += other.hits
        if self.score:
            self.score.merge(other.score)

    def features(self) -> np.ndarray:
        return np.concatenate([f for _, f in sorted(self.kept, key=lambda pair: pair[0])])


@torch.no_grad()
def extract(source: ImageSource, nets: list[FeatureNet], how: Batching,
            procs: Processes) -> tuple[list[FeatureStats], dict]:
    """-> FeatureStats of each net, and for reconstructions PSNR, and SSIM if they are large enough.

    Every process makes its share of the batches; the results are merged, the same on each of them.
    """
    numbers = list(range(-(-source.n // how.batch_size)))[procs.rank::procs.world]
    stats = [FeatureStats(net, source.n, 1008 if net.key == "fid" else 0) for net in nets]
    errors, similarities = [], []
    bar = tqdm(total=source.n, desc=f"{source.name[:20]:20}", disable=not procs.main, delay=1,
               mininterval=1)
    with bar, enough_memory("lower --batch_size"):
        for b, (images, labels, originals) in zip(numbers, source.batches(numbers)):
            first = b * how.batch_size
            for net, stat in zip(nets, stats):
                features, logits = net.network(images)
                stat.statistics.add(features.cpu().numpy())
                if first < KEPT:
                    stat.kept.append((b, features.cpu().numpy()))
                if stat.score:
                    stat.score.add(logits, first)
                if net.says_class:
                    stat.hits += int((logits.argmax(dim=1).cpu() == labels).sum())
            if originals is not None:
                x, y = to_float(originals), to_float(images)
                errors.append(mse(y, x).double())
                if min(x.shape[-2:]) >= SSIM_WINDOW:
                    similarities.append(ssim(y, x).numpy())
            bar.update(len(images) * procs.world)

    everyone = procs.gather((stats, errors, similarities))
    stats, errors, similarities = everyone[0]
    for other_stats, other_errors, other_similarities in everyone[1:]:
        for stat, other in zip(stats, other_stats):
            stat.merge(other)
        errors += other_errors
        similarities += other_similarities
    if not errors:
        return stats, {}
    quality = {"psnr": round(to_db(torch.cat(errors).mean()).item(), 3)}
    if similarities:
        quality["ssim"] = round(float(np.concatenate(similarities).mean()), 4)
    return stats, quality


# ------------------------------------------------------------------------------------------------
# comparing

@dataclass
class Reference:
    """mu and sigma by the key of each net, and the features themselves where they are known."""
    name: str
    n: int | None
    mu: dict
    sigma: dict
    features: dict

    @staticmethod
    def of(name: str, n: int, nets: list[FeatureNet], stats: list[FeatureStats]) -> "Reference":
        pairs = list(zip(nets, stats))
        return Reference(name, n, {net.key: stat.statistics.mu for net, stat in pairs},
                         {net.key: stat.statistics.sigma for net, stat in pairs},
                         {net.key: stat.features() for net, stat in pairs})


def read_reference(path: str) -> Reference:
    """An .npz with mu and sigma, from --save_stats or from ADM. Raises UserError for others."""
    repair = "give an .npz with mu and sigma, as --save_stats writes it"
    need(os.path.isfile(path), f"{path}: no such file; {repair}")
    need(zipfile.is_zipfile(path), f"{path}: not an .npz, or a torn one; {repair}")
    with explained(path, repair), np.load(path, allow_pickle=False) as file:
        need("mu" in file and "sigma" in file, f"{path}: has no mu and sigma; give images with "
             "--data, or statistics that --save_stats wrote")
        mu, sigma = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
        key = str(file["key"]) if "key" in file else "fid"  # ADM's files name no network
        n = int(file["n"]) if "n" in file else None
        need(mu.ndim == 1 and sigma.shape == mu.shape * 2,
             f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit; {repair}")
        need(np.isfinite(mu).all() and np.isfinite(sigma).all(),
             f"{path}: mu or sigma is not finite; {repair}")
    return Reference(os.path.basename(path), n, {key: mu}, {key: sigma}, {})


def write_reference(path: str, reference: Reference, net: FeatureNet) -> None:
    """For read_reference(), in the features of one net. Raises UserError where it cannot."""
    with checkpoint.replacing(path) as file:
        np.savez(file, mu=reference.mu[net.key], sigma=reference.sigma[net.key], n=reference.n,
                 key=net.key)
    print(f"{path}: mu and sigma of {reference.name} in {net.title}, n {reference.n}")


def comparable(nets: list[FeatureNet], reference: Reference) -> list[FeatureNet]:
    """Those of the networks whose statistics the reference holds. Raises UserError for none."""
    fitting = [net for net in nets if net.key in reference.mu]
    keys, own = " and ".join(reference.mu), " and ".join(net.key for net in nets)
    need(fitting, f"{reference.name} holds statistics of {keys}, and this is {own}: they cannot be "
         "compared" + ("; use --features inception" if "fid" in reference.mu else ""))
    for net in fitting:
        f = len(reference.mu[net.key])
        need(f == net.features,
             f"{reference.name}: mu has {f} numbers, and {net.key} has {net.features} features")
    return fitting


def judge(source: ImageSource, nets: list[FeatureNet], reference: Reference, how: Batching,
          procs: Processes) -> dict:
    """-> one row of the results. The first net's features are those of precision and recall."""
    stats, quality = extract(source, nets, how, procs)
    row = {"name": source.name, "n": source.n, **quality}
    if source.settings:
        row["settings"] = source.settings
    if source.swept:
        row["swept"] = source.swept
    if source.unfinished:
        row["unfinished"] = source.unfinished
    for net, stat in zip(nets, stats):
        known = reference.features.get(net.key)
        row[net.key] = round(distance(stat, reference, net), 4)
        if stat.score:
            whole, mean, std = stat.score.scores()
            row["inception_score"] = round(whole, 4)
            row["inception_score_10_splits"] = [round(mean, 4), round(std, 4)]
        if net is nets[0] and known is not None and min(source.n, len(known)) > 3:
            precision, recall = precision_recall(torch.from_numpy(known),
                                                 torch.from_numpy(stat.features()))
            row |= {"precision": round(precision, 4), "recall": round(recall, 4)}
        if net.says_class and source.labelled:
            row["class_accuracy"] = round(stat.hits / source.n, 4)
    return row


def distance(stat: FeatureStats, reference: Reference, net: FeatureNet) -> float:
    """The Fréchet distance; from the features where all are known and fewer than their width."""
    seen, known = stat.statistics, reference.features.get(net.key)
    complete = known is not None and seen.n <= KEPT and len(known) == reference.n
    if complete and max(seen.n, len(known)) < net.features:
        return frechet_from_features(stat.features(), known)
    return frechet_distance(seen.mu, seen.sigma, reference.mu[net.key], reference.sigma[net.key])
