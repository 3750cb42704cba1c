"""Promises of experiments/flow.py: which of several samples is kept, and by what."""
from types import SimpleNamespace

import torch

from config import GeneratorConfig
from experiments import flow
from generator import ARGenerator

CFG = GeneratorConfig(generator_width=32, generator_depth=1, generator_heads=2)


def test_of_n_samples_of_each_the_best_is_kept():
    drawn, asked = torch.randint(50, (6, 4), generator=torch.Generator().manual_seed(0)), []

    def sample(labels, **options):
        asked.append((labels.tolist(), options))
        return drawn
    model = SimpleNamespace(sample=sample, num_classes=3, options=("cfg_scale",), unfinished="")
    best = flow.BestOf(model, lambda labels, ids: labels * 1000 - ids[:, 0])
    ids = best.sample(torch.tensor([2, 0]), best_of=3, choose="first", cfg_scale=2.0)
    assert asked == [([2, 2, 2, 0, 0, 0], {"cfg_scale": 2.0})]
    for mine, some in zip(ids, (drawn[:3], drawn[3:])):
        assert torch.equal(mine, some[some[:, 0].argmin()])


def test_the_likeliest_is_that_of_the_least_loss_given_its_class():
    torch.manual_seed(0)
    model = ARGenerator(CFG, 4, 8, 3).eval()
    torch.nn.init.normal_(model.head.weight)
    labels, ids = torch.tensor([0, 1, 2, 2]), torch.randint(8, (4, 4))
    with torch.no_grad():
        score = flow.likelihood(model)(labels, ids)
        for row, (label, code) in enumerate(zip(labels, ids)):
            loss, _ = model.loss(code[None], label[None])
            torch.testing.assert_close(score[row], -4 * loss)


def test_a_classifier_chooses_by_how_sure_it_is_of_the_class_asked_for():
    """Images of one gray level each; the classifier sees class 0 in dark ones."""
    def decode(ids, noise):
        return (ids[:, :1, None, None] / 4 - 1).expand(-1, 3, 2, 2)

    def network(images):
        level = images.float().mean(dim=(1, 2, 3)) - 128
        return None, torch.stack([-level, level], dim=1)
    net = SimpleNamespace(network=network)
    score = flow.class_seen(decode, net)(torch.tensor([0, 0, 1, 1]), torch.tensor(
        [[1, 0], [7, 0], [1, 0], [7, 0]]))
    assert score[0] > score[1] and score[3] > score[2]
