"""Promises of evaluation/best_of.py: which of several samples is kept, and by whom."""
from types import SimpleNamespace

import torch

from evaluation.best_of import PIECE, BestOf, class_seen


def test_of_n_samples_of_each_the_best_is_kept():
    drawn, asked = torch.randint(50, (6, 4), generator=torch.Generator().manual_seed(0)), []

    def sample(labels, **options):
        asked.append((labels.tolist(), options))
        return drawn
    model = SimpleNamespace(sample=sample, num_classes=3, options=("cfg_scale",), unfinished="")
    best = BestOf(model, lambda labels, ids: labels * 1000 - ids[:, 0], 3)
    ids = best.sample(torch.tensor([2, 0]), cfg_scale=2.0)
    assert asked == [([2, 2, 2, 0, 0, 0], {"cfg_scale": 2.0})]
    for mine, some in zip(ids, (drawn[:3], drawn[3:])):
        assert torch.equal(mine, some[some[:, 0].argmin()])


def test_a_classifier_chooses_by_how_sure_it_is_of_the_class_asked_for():
    """Images of one gray level each; the classifier sees class 0 in dark ones."""
    def decode(ids):
        assert len(ids) <= PIECE
        return (ids[:, :1, None, None] / 4 - 1).expand(-1, 3, 2, 2)

    def classifier(images):
        level = images.mean(dim=(1, 2, 3))
        return torch.stack([-level, level], dim=1), None
    labels, ids = torch.tensor([0, 0, 1, 1]), torch.tensor([[1, 0], [7, 0], [1, 0], [7, 0]])
    score = class_seen(SimpleNamespace(decode=decode), classifier)(
        labels.repeat(PIECE), ids.repeat(PIECE, 1))
    assert score.shape == (4 * PIECE,) and torch.equal(score[:4], score[-4:])
    assert score[0] > score[1] and score[3] > score[2]
