"""Promises of force, in mocet.py and nativetok.py: one token is replaced, later experts answer."""
import test_mocet
import torch
from helpers import refused
from test_mocet import DEPTHS, FORMS, LONG, K
from test_nativetok import KIND, small, some_images


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
