"""The best of N: several samples are drawn in place of each, and a classifier keeps one.

    labels (B,) ─► generator, N times ─► ids (B*N, L) ─► mean decoder ─► classifier ─► ids (B, L)

In       a generator, and a classifier of the run's classes: a TinyCNN that eval_fid.py has trained,
         or one by experiments/judge.py
Out      a generator that draws so; its images show their class more often
Differs  the generator's own likelihood in place of the classifier does no more than guidance does
         (experiments/LOG.md). Who has chosen must not judge as well: he would praise his own choice
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from evaluation.tinycnn import build_judge, read_judge
from generator import Generator
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import need

PIECE = 250  # images that are decoded and classified at a time


class BestOf:
    """A generator whose sample() draws `best_of` in place of each and keeps the best.

    score   (labels (M,), ids (M, L)) -> (M,), the more the better
    """

    def __init__(self, model: Generator, score: Callable, best_of: int):
        self.model, self.score, self.best_of = model, score, best_of
        self.num_classes, self.options = model.num_classes, model.options
        self.unfinished = model.unfinished

    @torch.no_grad()
    def sample(self, labels: Tensor, **options) -> Tensor:
        """labels (B,) -> ids (B, L); options are those of the generator's sample()."""
        many = labels.repeat_interleave(self.best_of)
        ids = self.model.sample(many, **options)
        best = self.score(many, ids).view(-1, self.best_of).argmax(dim=1)       # (B,)
        rows = torch.arange(len(labels), device=ids.device)
        return ids.unflatten(0, (-1, self.best_of))[rows, best]


def class_seen(tokenizer: NativeTok, classifier: nn.Module) -> Callable:
    """score: log of the probability that a classifier gives to the class, in the mean's image."""
    def score(labels: Tensor, ids: Tensor) -> Tensor:
        images = (tokenizer.decode(part).clamp(-1, 1) for part in ids.split(PIECE))
        logits = torch.cat([classifier(part)[0] for part in images])            # (M, C)
        return logits.log_softmax(dim=-1).gather(1, labels[:, None].long())[:, 0]
    return score


def load_chooser(path: str, run: str, classes: list[str]) -> nn.Module:
    """The classifier at `path`. Raises UserError unless it knows these classes."""
    need(checkpoint.exists(path), f"{path} is not there, and --best_of needs a classifier; train "
         f"it: python eval_fid.py --run {run} --train_features")
    saved = read_judge(path)
    need(saved["classes"] == classes, f"{path} tells other classes apart than this run has; give "
         "--judge a classifier of its images")
    return build_judge(saved, path)
