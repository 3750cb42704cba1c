"""flow_decoder.py: the loss, a perfect network, prefixes, types, misuse; in a run."""
import shutil

import pytest
import torch

import diffusion
import flow_decoder
import sample
from config import FlowDecoderConfig, TokenizerConfig
from diffusion import T
from flow_decoder import Decoding, FlowDecoder, FlowNet, loss, prefix_length, random_times
from helpers import called, good, refused, train_shapes, turned_away
from nativetok import NativeTok
from plumbing import checkpoint

TOK = TokenizerConfig(image_size=16, patch_size=8, token_schedule=(4,), codebook_size=8, code_dim=4,
                      encoder_width=16, encoder_depth=1, encoder_heads=2, expert_width=16,
                      expert_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
FLOW = FlowDecoderConfig(flow_decoder_width=16, flow_decoder_depth=1, flow_decoder_heads=2,
                         flow_decoder_patch_size=4)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def decoder() -> FlowDecoder:
    torch.manual_seed(0)
    return FlowDecoder(NativeTok(TOK).eval(), FlowNet(FLOW, TOK).eval())


@pytest.fixture
def trained(decoder) -> FlowDecoder:
    """With a head that is not zero, as after training."""
    torch.nn.init.normal_(decoder.net.head.weight, std=0.3)
    return decoder


IDS = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])


def test_before_it_learns_it_is_the_mean_whatever_the_noise(decoder):
    mean = decoder.tokenizer.decode(IDS)
    for steps in (1, 12):
        assert torch.allclose(decoder.decode(IDS, steps, noise()), mean, atol=1e-5)


def test_a_perfect_network_reaches_the_image_in_any_number_of_steps(decoder):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    decoder.net.forward = lambda x_t, t, z_q, mean: images
    for steps in (1, 2, 12, 40):
        assert torch.allclose(decoder.decode(IDS, steps, noise()), images, atol=1e-5)


def test_the_loss_of_the_clean_image_is_that_of_the_velocity(trained, monkeypatch):
    """Where time is not too small: there the velocity's would be without bound."""
    images, z_q = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 4)
    mean, eps = torch.zeros_like(images), torch.randn(3, 3, 16, 16)
    t = torch.tensor([100.0, 500.0, 950.0])
    monkeypatch.setattr(flow_decoder, "random_times", lambda batch, device: t)
    monkeypatch.setattr(flow_decoder, "image_noise", lambda images: eps)
    got, logs = loss(trained.net, images, z_q, mean)
    s = (t / T).view(-1, 1, 1, 1)
    x_t = (1 - s) * images + s * eps
    x_hat = trained.net(x_t, t, z_q, mean)
    velocity, true = (x_t - x_hat) / s, diffusion.target(images, eps, "flow")
    assert got.item() == pytest.approx((velocity - true).square().mean().item(), rel=1e-4)
    late = (x_hat - images)[2:].square().mean().item()
    assert logs["x_error_late"].item() == pytest.approx(late, rel=1e-4)
    t[:] = 1.0
    bounded = (trained.net((1 - 1e-3) * images + 1e-3 * eps, t, z_q, mean) - images).square().mean()
    assert loss(trained.net, images, z_q, mean)[0].item() == pytest.approx(
        bounded.item() / flow_decoder.SMALLEST ** 2, rel=1e-4)


def test_times_lie_inside_and_most_in_the_middle(monkeypatch):
    torch.manual_seed(0)
    t = torch.cat([random_times(64) for _ in range(200)])
    assert 0 < t.min() and t.max() < T and t.median().item() == pytest.approx(T / 2, rel=0.02)
    inside = ((t > T / 4) & (t < 3 * T / 4)).float().mean().item()
    assert inside == pytest.approx(0.728, abs=0.01), "of the sigmoid of a normal number"
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: torch.full(shape, 1 - 2 ** -24))
    assert random_times(64).max() < T


def test_half_of_the_steps_read_all_tokens_and_the_others_prefixes():
    torch.manual_seed(0)
    lengths = [prefix_length(12) for _ in range(2000)]
    assert set(lengths) == {1, 2, 4, 8, 12}
    assert lengths.count(12) / 2000 == pytest.approx(0.6, abs=0.05)
    assert prefix_length(1) == 1


def test_any_prefix_is_decoded_and_later_tokens_matter(trained):
    for k in (1, 2, 3, 4):
        images = trained.decode(IDS[:, :k], 3, noise())
        assert images.shape == (2, 3, 16, 16)
    same_noise = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    t, z_q = torch.full((2,), 500.0), trained.tokenizer.quantizer.lookup(IDS)
    with torch.no_grad():
        torch.nn.init.normal_(trained.net.blocks[0].condition[1].weight, std=0.3)  # gates
        a, b = trained.net(same_noise, t, z_q, torch.zeros(2, 3, 16, 16))
    assert not torch.allclose(a, b), "the codes reach the image beside the mean"


def test_a_seed_says_all_and_another_noise_draws_another_image(trained):
    first, again, other = (trained.decode(IDS, 4, noise(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.1), (torch.float64, 1e-4)])
def test_other_types_draw_the_same_up_to_their_rounding(trained, dtype, limit):
    expected = trained.decode(IDS, 4, noise())
    trained.net.to(dtype), trained.tokenizer.to(dtype)
    got = trained.decode(IDS, 4, noise())
    assert (got.float() - expected).abs().max() < limit


def test_wrong_ids_steps_and_noise_are_refused(decoder):
    refused(decoder.decode, IDS + 5, names=["ids go from", "0 to 7"])
    refused(decoder.decode, torch.zeros(2, 5).long(), names=["1 to 4"])
    for steps in (0, 2000, 1.5):
        refused(decoder.decode, IDS, steps, names=["steps", "1 to 1000"])
    refused(decoder.decode, IDS, 3, 0, names=["generator"])


# ------------------------------------------------------------------------------------------------
# in a run

@pytest.fixture
def run(small_run, tmp_path):
    """A copy of a run of seconds that has a flow decoder."""
    return shutil.copytree(small_run, tmp_path / "run")


def test_it_can_be_loaded_by_itself_and_has_its_own_tokenizer(run):
    decoder = FlowDecoder.load(str(run / "flow-decoder.pt"))
    L = decoder.tokenizer.num_tokens
    ids = torch.randint(decoder.tokenizer.cfg.codebook_size, (2, L))
    assert decoder.decode(ids, 2, noise()).shape == (2, 3, 32, 32)
    refused(FlowDecoder.load, str(run / "tokenizer.pt"), names=["no flow decoder"])


def test_a_flow_decoder_of_another_tokenizer_is_refused(run):
    saved = checkpoint.load(run / "tokenizer.pt")
    saved["ema"]["quantizer.codebook"] += 1
    checkpoint.save(run / "tokenizer.pt", saved)
    path = str(run / "flow-decoder.pt")
    refused(FlowDecoder.load, path, names=["another tokenizer", "--stage 4"])
    turned_away(sample, "--run", run, "--reconstruct", run / "samples" / "base.png",
                says=["another tokenizer", "--decoder mean"])


def test_a_command_without_its_steps_leaves_a_flow_decoder_alone(finished, data, tmp_path):
    """Such as the one that made the tokenizer, repeated. Other steps are refused."""
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "flow-decoder.pt").read_bytes()
    train_shapes(run, data, "--flow_decoder_steps", "0")
    assert (run / "flow-decoder.pt").read_bytes() == before
    refused(train_shapes, run, data, "--flow_decoder_steps", "6", names=["flow-decoder.pt", "5"])
    refused(train_shapes, run, data, "--stage", "4", "--flow_decoder_steps", "0",
            names=["--flow_decoder_steps"])


def test_programs_take_the_flow_where_it_is_finished_and_say_which(run):
    picture = run / "samples" / "base.png"
    drawn = good(sample, "--run", run, "--reconstruct", picture)
    assert "decoder flow, flow_steps 12" in drawn
    first = (run / "samples" / "reconstruct.png").read_bytes()
    good(sample, "--run", run, "--reconstruct", picture)
    assert (run / "samples" / "reconstruct.png").read_bytes() == first, "same seed, same bytes"
    assert "flow_steps 3" in good(sample, "--run", run, "--reconstruct", picture, "--flow_steps", 3)
    assert "decoder mean" in good(sample, "--run", run, "--reconstruct", picture, "--decoder",
                                  "mean")
    turned_away(sample, "--run", run, "--decoder", "mean", "--flow_steps", 3,
                says=["--flow_steps", "leave it out"])
    for steps in (0, 2000):
        turned_away(sample, "--run", run, "--flow_steps", steps, says=["1 to 1000"])
    saved = checkpoint.load(run / "flow-decoder.pt")
    checkpoint.save(run / "flow-decoder.pt", {**saved, "phase": "flow_decoder", "step": 3})
    assert Decoding.of_run(str(run), NativeTok.load(str(run / "tokenizer.pt"))).flow is None
    code, _, err = called(sample, "--run", run, "--reconstruct", picture, "--decoder", "flow")
    assert code == 0 and "flow_decoder: step 3 of 5" in err
    for file in run.glob("flow-decoder*"):
        file.unlink()
    turned_away(sample, "--run", run, "--decoder", "flow", says=["--stage 4", "--decoder mean"])
