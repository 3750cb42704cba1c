"""micro.py: the paper on one page is the project's method, stands alone, and runs."""
import shutil
import subprocess
import sys

import pytest
import torch

import micro
from config import TokenizerConfig
from helpers import ROOT
from mocet import MoCET
from quantizer import VectorQuantizer

CONFIG = TokenizerConfig(
    image_size=micro.S, patch_size=micro.P, expert_width=micro.E, expert_depth=1, expert_heads=8,
    token_schedule=(micro.SHORT,), codebook_size=micro.K, code_dim=micro.d,
    entropy_weight=0.05)  # a smaller codebook, and a stronger push to use all of it


@pytest.fixture
def both():
    """micro's tokenizer, and the project's experts and quantizer with the same weights."""
    torch.manual_seed(0)
    tokenizer, mocet, quantizer = micro.Tokenizer(), MoCET(CONFIG), VectorQuantizer(CONFIG)
    mine = tokenizer.state_dict()
    mocet.load_state_dict({name: mine[name.replace("layers.0.", "layer.")]
                           for name in mocet.state_dict()})
    with torch.no_grad():
        quantizer.codebook.copy_(tokenizer.quantizer.codebook)
    return tokenizer, mocet.eval(), quantizer.eval()


def test_the_same_weights_emit_the_same_ids_as_mocet_and_quantizer(both):
    tokenizer, mocet, quantizer = both
    x_latent = torch.randn(16, micro.N, micro.E)
    forced = torch.randint(micro.K, (16,))
    for force in (None, {0: forced}, {2: forced}):
        z_q, ids, _ = tokenizer.tokenize(x_latent, force)
        theirs, their_ids, _ = mocet.forward_loop(x_latent, quantizer, force=force)
        assert torch.equal(ids, their_ids) and len(ids.unique()) > 4
        torch.testing.assert_close(z_q, theirs)


def test_the_gradient_passes_the_choice_as_in_quantizer(both):
    tokenizer, _, quantizer = both
    z, weights = torch.randn(16, micro.d), torch.randn(16, micro.d)
    gradients = []
    for quantize in (tokenizer.quantizer.quantize,
                     lambda z: quantizer.quantize(z, quantizer.codes())):
        z = z.detach().requires_grad_()
        (quantize(z)[0] * weights).sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)


def test_the_loss_is_that_of_quantizer_weighed_as_in_train(both):
    tokenizer, _, quantizer = both
    z = torch.nn.functional.normalize(torch.randn(16, 4, micro.d), dim=-1)
    _, ids, losses = quantizer.train()(z)
    weights = {"codebook": 1, "commitment": 0.25,
               "entropy": CONFIG.entropy_weight}
    expected = sum(weights[name] * loss for name, loss in losses.items())
    torch.testing.assert_close(tokenizer.quantizer.loss(z, ids), expected)


def test_growth_leaves_old_ids_as_they_are_to_the_bit():
    torch.manual_seed(0)
    images, _ = micro.draw(100, seed=0)
    tokenizer = micro.Tokenizer()
    micro.train_tokenizer("short", tokenizer, images, 3)
    before = tokenizer.encode(images)
    tokenizer.grow()
    new = [p.clone() for p in tokenizer.experts[micro.SHORT].parameters()]
    micro.train_tokenizer("new experts", tokenizer, images, 60)  # dead codes are looked for at 50
    ids = tokenizer.encode(images)
    assert ids.shape == (100, micro.L) and torch.equal(ids[:, :micro.SHORT], before)
    learned = zip(new, tokenizer.experts[micro.SHORT].parameters())
    assert any(not torch.equal(a, b) for a, b in learned)


def test_a_code_that_nothing_chose_moves_to_a_vector_and_others_stay():
    quantizer = micro.Quantizer()
    before, z = quantizer.codebook.detach().clone(), torch.randn(5, 4, micro.d)
    quantizer.used[:100] = True
    quantizer.restart_dead_codes(z)
    assert torch.equal(quantizer.codebook[:100], before[:100])
    assert all((z.flatten(0, 1) == code).all(1).any() for code in quantizer.codebook[100:])
    assert not quantizer.used.any()


def test_later_tokens_do_not_reach_earlier_predictions_of_the_generator():
    generator = micro.Generator()
    labels, ids = torch.zeros(2, dtype=torch.long), torch.randint(micro.K, (2, micro.L - 1))
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % micro.K
    difference = (generator(labels, ids) - generator(labels, changed)).abs().amax(dim=(0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()


def test_alone_in_an_empty_folder_it_tells_its_story(tmp_path):
    """A few steps of each phase, in a Python that finds nothing of the project."""
    shutil.copy(ROOT / "micro.py", tmp_path)
    program = "import micro; micro.TRAIN = 200; print(micro.main(2, 1, 1, 1))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = eval(done.stdout.splitlines()[-1])
    assert set(figures) == {"1 token", "2 tokens", "4 tokens", "8 tokens", "swapped", "re-encoded",
                            "old ids are the same"} and figures["old ids are the same"]
    assert (tmp_path / "micro.png").stat().st_size > 1000
