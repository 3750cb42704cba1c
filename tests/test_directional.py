"""experiments/directional.py: predictors that are probabilities, choices that are the judge's,
positions that are revealed in the order that was asked for."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
from experiments import directional
from generator import MaskGITGenerator

CODES = 8
_, GEN, TRAIN = config.load_preset("tiny")
GEN = replace(GEN, generator_width=32, generator_depth=2, generator_heads=2)
TRAIN = replace(TRAIN, generator_batch_size=32)


def chain(n: int, seed: int) -> np.ndarray:
    """(n, 3): a code, the next one, and any; so the middle one is known from its neighbour."""
    rng = np.random.default_rng(seed)
    first, last = rng.integers(CODES, size=(2, n))
    return np.stack([first, (first + 1) % CODES, last], axis=1)


# ------------------------------------------------------------------------------------------------
# predictors

def test_what_was_never_seen_is_counted_as_zero():
    seen, asked = np.array([5, 1, 5, 9]), np.array([0, 1, 5, 9, 10])
    assert directional.counts_of(seen, asked).tolist() == [0, 1, 2, 1, 0]


def test_frequencies_alone_cost_what_they_should():
    """A code that is always the same costs next to nothing, four alike two bits, one never seen
    before log2(n + K/2) + 1."""
    def bits(seen, asked):
        return directional.frequency_bits(seen, np.array(asked), 16)
    constant, alike = np.zeros(4000, np.int64), np.arange(4000) % 4
    assert bits(constant, [0])[0] < 0.01
    assert bits(alike, [0, 1, 2, 3]) == pytest.approx(2, abs=0.01)
    assert bits(constant, [3])[0] == pytest.approx(math.log2(4008) + 1)


@pytest.mark.parametrize("window", (0, 1, 2))
@pytest.mark.parametrize("strength", (0.5, 20.0))
def test_shares_of_all_continuations_add_up_to_one(window, strength):
    learned = chain(50, 0)
    every = np.array([[a, b, c] for a in range(CODES) for b in range(CODES) for c in range(CODES)])
    bits = [directional.window_bits(learned, row[None], CODES, window, np.array([strength]))[0]
            for row in every]
    assert (2.0 ** -np.array(bits)).sum() == pytest.approx(1)


def test_after_a_window_that_was_never_seen_the_shorter_one_is_asked():
    """However strong the prior: frequencies after a stranger, pairs after a strange pair."""
    learned = chain(500, 0)
    learned = learned[learned[:, 0] != 3]

    def bits(row, window):
        return directional.window_bits(learned, np.array([row]), CODES, window, np.array([0.1, 9]))
    alone = [directional.frequency_bits(learned[:, i], np.array([code]), CODES)[0]
             for i, code in enumerate([3, 4])]
    assert bits([3, 4], 1) == pytest.approx(sum(alone))
    assert bits([3, 5, 0], 2) == pytest.approx(bits([3, 5, 0], 1)), "3 5 was not seen, 5 0 was"
    assert bits([4, 5, 0], 2) != pytest.approx(bits([4, 5, 0], 1))


def test_a_pair_sees_a_neighbour_and_a_window_of_two_what_two_say_together():
    rng = np.random.default_rng(0)
    pairs, triples = chain(20_000, 0), rng.integers(CODES, size=(20_000, 3))
    triples[:, 2] = (triples[:, 0] + triples[:, 1]) % CODES

    def bits(ids, window):
        return directional.counted(ids[:15_000], ids[15_000:], CODES, window)
    assert bits(pairs, 1) == pytest.approx(6, abs=0.1)
    assert bits(triples, 1) == pytest.approx(9, abs=0.1)
    assert bits(triples, 2) == pytest.approx(6, abs=0.1)


def test_counting_sees_strangers_but_no_direction():
    """Native order has the two that know each other side by side, this other order has not."""
    learned, ids = chain(20_000, 0), chain(2000, 1)
    native, back, apart = (directional.counted(learned[:, order], ids[:, order], CODES, 1)
                           for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1]))
    assert native == pytest.approx(back, abs=0.05) and apart > native + 2.5


def test_the_prior_is_chosen_without_a_look_at_what_is_reported(monkeypatch):
    """Pairs that are noise want a strong prior, whatever the held-out ids are."""
    rng, chosen = np.random.default_rng(0), []
    plain = directional.window_bits

    def watched(learned, ids, codebook_size, window, strengths):
        chosen.append(strengths)
        return plain(learned, ids, codebook_size, window, strengths)
    monkeypatch.setattr(directional, "window_bits", watched)
    directional.counted(rng.integers(CODES, size=(2000, 3)), chain(100, 1), CODES, 1)
    assert chosen[-1] == [directional.STRENGTHS.max()]
    directional.counted(chain(2000, 0), rng.integers(CODES, size=(100, 3)), CODES, 1)
    assert chosen[-1] == [directional.STRENGTHS.min()]


def test_orders_are_the_native_one_its_reverse_and_another_one_for_each_seed():
    first, second = (directional.orders_of(16, seed) for seed in (0, 1))
    assert first["native"].tolist() == list(range(16))
    assert first["reversed"].tolist() == list(range(16))[::-1]
    assert first["shuffled"].sort().values.tolist() == list(range(16))
    assert first["shuffled"].tolist() != second["shuffled"].tolist()


def test_predictors_learn_from_training_tokens_and_are_the_same_when_repeated():
    learned, labels = chain(500, 0)[:, None], np.arange(500) % 2
    ids, y = torch.from_numpy(chain(100, 1)), torch.arange(100) % 2

    def bits(steps):
        return directional.predictors(learned, labels, ids, y, 2, CODES, GEN,
                                      replace(TRAIN, generator_steps=steps))
    early, late = bits(1), bits(250)
    assert directional.weak_networks(GEN, replace(TRAIN, generator_steps=250)) == {
        "one layer": (1, 50), "few steps": (2, 25)}
    assert list(late) == ["native", "reversed", "shuffled"] and early == bits(1)
    for order in late:
        assert list(late[order]) == ["pair", "window of 2", "one layer", "few steps"]
        for name in ("one layer", "few steps"):
            assert late[order][name] < early[order][name] - 0.5 and late[order][name] > 5.9
    one_layer, two = ([row[name] for row in late.values()] for name in ("one layer", "few steps"))
    assert one_layer != two and len(set(one_layer)) == len(set(two)) == 3, "each order is learned"


# ------------------------------------------------------------------------------------------------
# beginnings

class Writer(torch.nn.Module):
    """Writes any tokens; its classes are the codes."""
    num_classes = CODES

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def sample(self, labels, generator):
        return torch.randint(CODES, (len(labels), 4), generator=generator)


def test_the_best_of_four_is_the_one_whose_beginning_the_judge_likes_and_it_stays_whole():
    """An image is the last token that is known, and the judge sees that token as a class."""
    tokenizer = SimpleNamespace(
        decode=lambda ids: (ids[:, -1] / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 2, 2))

    def network(images):
        seen = images[:, 0, 0, 0].long()
        return None, 5.0 * torch.nn.functional.one_hot(seen, CODES)
    n, kept = 300, []  # two batches
    first, best = directional.beginnings(
        Writer(), tokenizer, [1, 2, 4], n, 0, network,
        lambda ids, **settings: kept.append(ids) or settings)
    assert first == [{"tokens": k} for k in (1, 2, 4)]
    assert best == [{"of": 4, "after": k} for k in (1, 2, 4)]
    labels, prefixes, whole = torch.arange(n) % CODES, kept[0::2], kept[1::2]
    for k, beginning, chosen in zip((1, 2, 4), prefixes, whole):
        assert beginning.shape == (n, k) and chosen.shape == (n, 4)
        assert torch.equal(beginning, prefixes[-1][:, :k]), "beginnings of the same samples"
        by_chance = (beginning[:, -1] == labels).float().mean()
        hits = (chosen[:, k - 1] == labels).float().mean()
        assert abs(by_chance - 1 / CODES) < 0.1 and abs(hits - (1 - (7 / 8) ** 4)) < 0.1
        for other in {0, 1, 2, 3} - {k - 1}:  # of what was not looked at nothing is chosen
            assert abs((chosen[:, other] == labels).float().mean() - 1 / CODES) < 0.1


# ------------------------------------------------------------------------------------------------
# MaskGIT

def test_positions_are_revealed_in_the_order_that_is_asked_for(monkeypatch):
    torch.manual_seed(0)
    model, order = MaskGITGenerator(GEN, 6, CODES, 2), torch.tensor([3, 0, 5, 1, 4, 2])
    labels, seen, scales = torch.arange(20) % 2, [], []
    guided = model.guided

    def watched(labels, ids, scale):
        seen.append(ids.clone())
        scales.append(scale)
        return guided(labels, ids, scale)
    monkeypatch.setattr(model, "guided", watched)
    ids = directional.revealed(model, labels, order, 3.0, torch.Generator().manual_seed(1))
    assert ids.shape == (20, 6) and ids.max() < CODES
    for step, known in enumerate(seen):  # six steps, one token each
        assert (known[:, order[step:]] == model.mask_id).all()
        assert torch.equal(known[:, order[:step]], ids[:, order[:step]]), "what is known stays"
    assert scales == pytest.approx([1 + 2 * step / 6 for step in range(1, 7)])
    again = directional.revealed(model, labels, order, 3.0, torch.Generator().manual_seed(1))
    assert torch.equal(ids, again)
