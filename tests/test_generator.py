"""Promises of generator.py: what each generator may see, how it learns, what sampling keeps."""
import math
from functools import partial

import pytest
import torch

import generator as G
from config import GeneratorConfig
from generator import ARGenerator, MaskGITGenerator
from helpers import refused
from plumbing import checkpoint
from plumbing.flags import as_dict

L, K, C = 8, 16, 3
KINDS = pytest.mark.parametrize("Kind", [ARGenerator, MaskGITGenerator])


@pytest.fixture(autouse=True)
def no_label_is_hidden(monkeypatch):
    """Where nobody asked for it."""
    monkeypatch.setattr(G, "LABEL_DROPOUT", 0.0)


def small(Kind, num_tokens=L, classes=C, **settings):
    """A small generator in eval mode, without randomness in its loss that nobody asked for."""
    off = dict(generator_dropout=0.0, label_smoothing=0.0)
    cfg = GeneratorConfig(generator_width=32, generator_depth=2, generator_heads=2,
                          **{**off, **settings})
    torch.manual_seed(0)
    return Kind(cfg, num_tokens, K, classes).eval()


def loud(Kind, **settings):
    """The same with weights so large that every input visibly changes every output it can reach."""
    model = small(Kind, **settings)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model


def some_ids(batch=4, length=L):
    return torch.randint(K, (batch, length), generator=torch.Generator().manual_seed(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


LABELS = torch.tensor([0, 1, 2, 1])
NO_CLASS = torch.full_like(LABELS, C)


# ------------------------------------------------------------------------------------------------
# what a prediction may depend on

def test_ar_token_5_cannot_influence_predictions_up_to_5():
    model, ids = loud(ARGenerator), some_ids()[:, :-1]
    other = torch.where(torch.arange(L - 1) == 4, (ids + 1) % K, ids)  # token 5
    before, after = model(LABELS, ids), model(LABELS, other)   # row t predicts token t+1
    torch.testing.assert_close(before[:, :5], after[:, :5])
    changed = (before - after).abs().amax(dim=2)               # (B, L)
    assert (changed[:, 5:] > 1e-3).all(), "and it does influence all later ones"


@KINDS
def test_every_row_depends_on_the_class_and_its_place(Kind):
    model, ids = loud(Kind), torch.zeros(4, L - 1, dtype=torch.int64)
    changed = (model(LABELS, ids) - model((LABELS + 1) % C, ids)).abs().amax(dim=2)
    assert (changed > 1e-3).all()
    assert torch.pdist(model(LABELS, ids)[0, 1:]).min() > 0.1, "although all tokens are alike"
    if Kind is MaskGITGenerator:  # the last token reaches all
        other = torch.where(torch.arange(L - 1) == L - 2, 1, ids)
        assert ((model(LABELS, ids) - model(LABELS, other)).abs().amax(dim=2) > 1e-3).all()


# ------------------------------------------------------------------------------------------------
# losses

@KINDS
def test_untrained_loss_is_chance_level(Kind):
    labels = torch.zeros(64, dtype=torch.int64)
    loss, _ = small(Kind, label_smoothing=0.1).loss(some_ids(64), labels)
    assert abs(loss.item() - math.log(K)) < 0.1


@KINDS
def test_untrained_logits_do_not_grow_with_depth(Kind):
    """Unscaled residual branches would give 32 blocks more than twice the norm of 2."""
    norms = []
    for depth in (2, 32):
        torch.manual_seed(0)
        cfg = GeneratorConfig(generator_width=32, generator_depth=depth, generator_heads=2)
        model = Kind(cfg, L, K, C).eval()
        model.norm.register_forward_pre_hook(
            lambda module, args: norms.append(args[0].norm().item()))
        model(LABELS, some_ids()[:, :L - 1])
    assert norms[1] < 1.3 * norms[0]


def test_ar_row_t_is_scored_against_token_t_plus_1():
    model, ids = loud(ARGenerator), some_ids()
    loss, info = model.loss(ids, LABELS)
    expected = []
    for t in range(L):  # one position at a time, from its prefix alone
        p = model(LABELS, ids[:, :t])[:, -1].softmax(dim=-1)
        expected.append(-p[torch.arange(4), ids[:, t]].log().mean())
    torch.testing.assert_close(info["nll_by_position"], torch.stack(expected))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert not info["nll_by_position"].requires_grad


def test_maskgit_loss_is_the_weighted_smoothed_cross_entropy_of_a_masked_input():
    model, ids = loud(MaskGITGenerator, label_smoothing=0.2), some_ids(32)
    labels = LABELS.repeat(8)
    torch.manual_seed(5)
    loss, info = model.loss(ids, labels)

    torch.manual_seed(5)
    masked = G.random_masks(32, L)
    total = weights = right = 0.0
    seen = torch.where(masked, K, ids)
    log_p = model(labels, seen).detach().log_softmax(dim=-1)
    for b in range(32):
        for i in range(L):
            row = log_p[b, 1 + i]
            weight = 1.0 if masked[b, i] else 0.1
            total += weight * -(0.8 * row[ids[b, i]] + 0.2 * row.mean())
            weights += weight
            right += float(masked[b, i] and row.argmax() == ids[b, i])
    torch.testing.assert_close(loss.detach(), total / weights)
    assert info["masked_share"].item() == pytest.approx(masked.float().mean().item())
    assert info["masked_accuracy"].item() == pytest.approx(right / masked.sum().item())


@KINDS
def test_label_dropout_hides_its_share_in_training_only(Kind, monkeypatch):
    monkeypatch.setattr(G, "LABEL_DROPOUT", 0.1)
    model, labels = small(Kind), torch.ones(20000, dtype=torch.int64)
    assert torch.equal(model.hide_labels(labels), labels)
    hidden = model.train().hide_labels(labels)
    assert set(hidden.tolist()) == {1, C}
    assert (hidden == C).float().mean().item() == pytest.approx(0.1, abs=0.01)
    monkeypatch.setattr(G, "LABEL_DROPOUT", 1.0)
    model, ids, losses = loud(Kind).train(), some_ids(), []
    for labels in (LABELS, (LABELS + 1) % C):
        torch.manual_seed(0)
        losses.append(model.loss(ids, labels)[0].item())
    assert losses[0] == losses[1], "all hidden: the loss of no class"


@KINDS
def test_one_batch_overfits_and_samples_reproduce_it(Kind):
    model, labels = small(Kind, classes=4).train(), torch.arange(4)
    ids = some_ids(4)                                          # one sequence for each class
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss, info = model.loss(ids.repeat(4, 1), labels.repeat(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    for settings in (dict(temperature=0), dict(temperature=0.5, cfg_scale=2.0)):
        assert torch.equal(model.sample(labels, **settings, generator=seeded()), ids)


# ------------------------------------------------------------------------------------------------
# guidance

@KINDS
def test_guidance_0_is_unconditional_1_plain_and_2_goes_as_far_again(Kind):
    model, ids, batches = loud(Kind), some_ids()[:, :L - 1], []
    cond, uncond = model(LABELS, ids), model(NO_CLASS, ids)
    for scale, expected in ((0.0, uncond), (1.0, cond), (2.0, cond + (cond - uncond))):
        told = model.guided(LABELS, ids, scale)
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)
    model.norm.register_forward_hook(lambda module, args, out: batches.append(len(out)))
    model.sample(LABELS, cfg_scale=1.0)
    assert set(batches) == {4}, "no unconditional half"


@KINDS
def test_at_guidance_0_the_class_does_not_matter_at_any_step(Kind):
    model = loud(Kind)
    one, two = (model.sample(labels, cfg_scale=0.0, generator=seeded())
                for labels in (LABELS, (LABELS + 1) % C))
    assert torch.equal(one, two)


def test_maskgit_guidance_rises_to_its_scale_and_lower_scales_hold(monkeypatch):
    model, scales = small(MaskGITGenerator), []
    plain = model.guided
    monkeypatch.setattr(model, "guided", lambda labels, ids, scale: (
        scales.append(scale) or plain(labels, ids, scale)))
    model.sample(LABELS, steps=4, cfg_scale=3.0)
    model.sample(LABELS, steps=1, cfg_scale=3.0)
    model.sample(LABELS, steps=2, cfg_scale=0.5)
    assert scales == [1.5, 2.0, 2.5, 3.0] + [3.0] + [0.5, 0.5]


# ------------------------------------------------------------------------------------------------
# from logits to tokens

@pytest.mark.parametrize("narrow", [dict(top_k=1), dict(top_p=1e-6)])
def test_the_narrowest_choice_equals_temperature_0_whatever_the_seed(narrow):
    model = loud(ARGenerator)
    greedy = model.sample(LABELS, temperature=0)
    for seed in range(3):
        assert torch.equal(model.sample(LABELS, **narrow, generator=seeded(seed)), greedy)


# ------------------------------------------------------------------------------------------------
# sampling

@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_cached_sampling_equals_uncached(cfg_scale):
    model = loud(ARGenerator)
    cached = model.sample(LABELS, cfg_scale, generator=seeded())
    assert torch.equal(cached, model.sample(LABELS, cfg_scale, generator=seeded(), use_cache=False))


@KINDS
def test_the_same_generator_state_repeats_the_ids_and_another_seed_does_not(Kind):
    model = small(Kind)
    one, again, other = (model.sample(LABELS, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (4, L) and one.dtype == torch.int64 and 0 <= one.min() and one.max() < K


@KINDS
def test_sampling_has_no_dropout_and_restores_the_mode(Kind):
    model = loud(Kind, generator_dropout=0.5)
    expected = model.sample(LABELS, generator=seeded())
    ids = model.train().sample(LABELS, generator=seeded())
    assert torch.equal(ids, expected) and model.training and model.blocks[0].training
    losses = [model.loss(ids, LABELS)[0].item() for _ in range(2)]
    assert losses[0] != losses[1], "while training has dropout"


@pytest.mark.parametrize("num_tokens, steps", [(5, 5), (12, 8)])
def test_maskgit_takes_8_steps_by_default_but_never_more_than_it_has_tokens(num_tokens, steps):
    model, trace = small(MaskGITGenerator, num_tokens=num_tokens), []
    model.sample(LABELS, trace=trace)
    assert len(trace) == steps == model.default_steps


@KINDS
def test_one_token_is_enough(Kind):
    model = small(Kind, num_tokens=1)
    ids = model.sample(LABELS)
    assert ids.shape == (4, 1) and model.loss(ids, LABELS)[0].isfinite()


@pytest.mark.parametrize("steps", [1, 3, L])
def test_maskgit_reveals_along_the_arccos_and_never_changes_a_kept_token(steps):
    model, trace = loud(MaskGITGenerator), []
    ids = model.sample(LABELS, steps=steps, generator=seeded(), trace=trace)
    before = torch.full((4, L), K)
    assert len(trace) == steps
    for step, after in enumerate(trace, start=1):
        masked, were = ((x == K).sum(dim=1) for x in (after, before))
        curve = math.floor(L * math.acos(step / steps) / (math.pi / 2))
        assert (masked == (were - 1).clamp_max(curve)).all(), "every step reveals a token"
        assert torch.equal(after[before != K], before[before != K])
        before = after
    assert torch.equal(ids, trace[-1]) and (ids < K).all()


def test_maskgit_without_noise_keeps_the_most_confident_guesses():
    model, trace = loud(MaskGITGenerator), []
    model.sample(LABELS, steps=3, temperature=0, randomize_temperature=0, trace=trace)
    start = torch.full((4, L), K)
    confidence, guess = model(LABELS, start)[:, 1:].softmax(dim=-1).max(dim=-1)
    kept = trace[0] != K
    assert torch.equal(trace[0][kept], guess[kept])
    least, most = confidence.masked_fill(~kept, 1), confidence.masked_fill(kept, 0)
    assert (least.amin(dim=1) >= most.amax(dim=1)).all(), "of the kept, of the others"


def test_maskgit_noise_varies_the_order():
    model = loud(MaskGITGenerator)

    def kept_first(seed, noise):
        trace = []
        model.sample(LABELS, steps=4, temperature=0, randomize_temperature=noise,
                     generator=seeded(seed), trace=trace)
        return trace[0] != K
    assert torch.equal(kept_first(0, 0.0), kept_first(1, 0.0))
    assert not torch.equal(kept_first(0, 50.0), kept_first(1, 50.0))


# ------------------------------------------------------------------------------------------------
# checkpoints

def saved(model, kind, **changes):
    """What train.py stores; `model` holds zeros where `ema` holds weights, so a mix-up shows."""
    weights = model.state_dict()
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    made = dict(kind=kind, generator_config=as_dict(model.cfg), num_tokens=L, codebook_size=K,
                classes=["circle", "square", "star"], tokenizer="0123abcd",
                model=zeros, ema=weights)
    return made | changes


@pytest.mark.parametrize("kind", ["ar", "maskgit"])
def test_a_checkpoint_alone_rebuilds_the_generator(kind, tmp_path):
    model = loud(G.GENERATORS[kind], generator_dropout=0.5)
    assert model.classes == ["0", "1", "2"] and model.tokenizer_fingerprint == ""
    checkpoint.save(tmp_path / "generator.pt", saved(model, kind))
    again = G.Generator.load(tmp_path / "generator.pt")
    assert type(again) is type(model) and not again.training and again.cfg == model.cfg
    assert again.classes == ["circle", "square", "star"]
    assert again.tokenizer_fingerprint == "0123abcd"
    ids = again.sample(LABELS, generator=seeded())
    assert torch.equal(ids, model.sample(LABELS, generator=seeded()))


def test_loading_something_else_is_refused(tmp_path):
    path, model = tmp_path / "generator.pt", small(ARGenerator)
    lacking = {name: w for name, w in model.state_dict().items() if name != "position"}
    unknown = {**as_dict(model.cfg), "generator_depht": 3}
    for content, names in (
            ({"kind": "tokenizer", "model": {}}, ["holds no generator"]),
            (saved(model, "ar", ema=lacking), ["position"]),
            (saved(model, "ar", generator_config=unknown), ["unknown setting generator_depht"])):
        checkpoint.save(path, content)
        refused(G.Generator.load, path, names=names)


@KINDS
def test_what_python_users_hand_over_is_looked_at(Kind):
    """Each kind of mistake: test_given.py."""
    model, labels = small(Kind), torch.arange(2)
    refused(model.sample, labels + 100, names=["0 to"])
    wrong = [("temperature", -1), ("cfg_scale", "2"), ("generator", 0)]
    wrong += [("steps", 1.5), ("steps", 0), ("steps", L + 1)] if Kind is MaskGITGenerator else [
        ("top_k", 2.5), ("top_k", -1), ("top_p", 0), ("top_p", 1.5)]
    for name, value in wrong:
        refused(partial(model.sample, **{name: value}), labels, names=[name])
    assert model.sample(labels.to(torch.uint8)).shape == (2, model.num_tokens)
