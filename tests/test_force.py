"""Promises of force, in mocet.py and nativetok.py: one token is replaced, later experts answer."""
import test_mocet
import torch
from helpers import refused
from test_mocet import DEPTHS, FORMS, LONG, K
from test_nativetok import KIND, small, some_images

from config import TokenizerConfig
from mocet import MoCET
from quantizer import VectorQuantizer


def changed(one, two) -> list[bool]:
    """(L,) list: at which positions does any image have another id?"""
    return (one != two).any(dim=0).tolist()


# ------------------------------------------------------------------------------------------------
# the experts

@FORMS
@DEPTHS
@torch.no_grad()
def test_forward_equals_the_readable_loop_under_every_intervention(form, depth):
    mocet, quantizer = test_mocet.small(form, depth, grown=True)
    x_latent, others = test_mocet.some_latents(), test_mocet.some_latents().flip(0)
    _, ids, _ = mocet(x_latent, quantizer)
    _, wanted, _ = mocet(others, quantizer)
    forces = [{i: wanted[:, i]} for i in range(LONG)] + [{1: wanted[:, 1], 4: wanted[:, 4]}]
    for force in forces:
        fast = mocet(x_latent, quantizer, force)
        slow = mocet.forward_loop(x_latent, quantizer, force=force)
        assert all(torch.equal(fast[1][:, i], said) for i, said in force.items())
        assert torch.equal(fast[1], slow[1])
        torch.testing.assert_close(fast[0], slow[0])
        torch.testing.assert_close(fast[0], quantizer.lookup(fast[1]))
        assert torch.equal(fast[1][:, :min(force)], ids[:, :min(force)])


def pair(form: str, listens: bool) -> tuple[MoCET, VectorQuantizer]:
    """Two experts set by hand, four codes at the compass points of a circle.

    Expert 1 always says code 0. Expert 2 attends to all rows alike, and only token 1 is not zero;
    it says token 1 turned by a quarter, or always code 0 when its values are zero.
    """
    cfg = TokenizerConfig(image_size=16, patch_size=4, expert=form, expert_width=4, expert_heads=2,
                          expert_depth=1, token_schedule=(2,), codebook_size=4, code_dim=2)
    mocet, quantizer = MoCET(cfg).eval(), VectorQuantizer(cfg).eval()
    with torch.no_grad():
        for p in mocet.parameters():
            p.zero_()
        quantizer.codebook.copy_(torch.tensor([[1., 0.], [0., 1.], [-1., 0.], [0., -1.]]))
        # A norm takes the mean away, so a code (a, b) is read as (a, -a, b, -b), whose mean is 0.
        mocet.embed_code.weight.copy_(torch.tensor([[1., 0.], [-1., 0.], [0., 1.], [0., -1.]]))
        first, second = mocet.experts
        first.head.bias.copy_(torch.tensor([1., 0.]))
        second.head.bias.copy_(torch.tensor([0.01, 0.]))  # when there is nothing to turn
        if listens:
            second.layers[0].wv.weight.copy_(torch.eye(4))
        second.layers[0].wo.weight.copy_(torch.eye(4))
        # (a, b) -> (-b, a)
        second.head.weight.copy_(torch.tensor([[0., 0., -1., 0.], [1., 0., 0., 0.]]))
    return mocet, quantizer


@FORMS
@torch.no_grad()
def test_a_pair_of_experts_made_by_hand_answers_as_it_must(form):
    x_latent, forced = torch.zeros(4, 16, 4), torch.arange(4)
    for listens, alone, answers in ((True, [0, 1], [1, 2, 3, 0]), (False, [0, 0], [0, 0, 0, 0])):
        mocet, quantizer = pair(form, listens)
        for forward in (mocet, mocet.forward_loop):
            assert forward(x_latent, quantizer)[1].tolist() == [alone] * 4
            _, ids, _ = forward(x_latent, quantizer, force={0: forced})
            assert ids.T.tolist() == [[0, 1, 2, 3], answers]
            _, ids, _ = forward(x_latent, quantizer, force={1: forced})
            assert ids.T.tolist() == [[0] * 4, [0, 1, 2, 3]], "nobody answers backwards"


# ------------------------------------------------------------------------------------------------
# the tokenizer

def whole(kind):
    """At full length, 6 tokens."""
    return small(kind).grow_to(6)


@KIND
def test_forcing_what_would_be_said_anyway_changes_no_bit(kind):
    model, images = whole(kind), some_images()
    ids = model.encode(images)
    everything = {i: ids[:, i] for i in range(6)}
    for force in ({}, *({i: said} for i, said in everything.items()), everything):
        assert torch.equal(model.encode(images, force), ids)
        with torch.no_grad():
            assert torch.equal(model.tokenize(images, force)[0], model.tokenize(images)[0])


@KIND
def test_earlier_tokens_never_change_and_later_ones_only_where_experts_can_answer(kind):
    model, images = whole(kind), some_images()
    ids, answered = model.encode(images), []
    for i in range(6):
        said = (ids[:, i] + 7) % K
        now = model.encode(images, {i: said})
        assert torch.equal(now[:, i], said)
        assert changed(now, ids)[:i + 1] == [False] * i + [True]
        answered += changed(now, ids)[i + 1:]
    assert any(answered) == kind.startswith("native"), "a baseline's later tokens stay exactly"
    assert torch.equal(model.encode(images), ids), "an intervention leaves nothing behind"


@KIND
def test_a_position_or_an_id_that_is_not_there_is_refused(kind):
    model, images = whole(kind), some_images()
    for position, said in ((6, 0), (-1, 0), (2, K), (2, -1)):
        refused(model.encode, images, {position: torch.full((8,), said)},
                names=(f"position {position}", "0 to 5", f"0 to {K - 1}"))
