"""CUDA graphs: the kernels of a training step are recorded once, then started all together.

A step of MoCET is thousands of small kernels, an expert after the other, and a GPU waits for each
to be started far longer than it takes to run (experiments/README.md, "Speed"). A recording has no
Python in it: it starts the same kernels on the same memory, forward as one launch, backward as one.

Forward and backward are recorded. Gradients then go between processes as one tensor, and the
optimizer runs, as without a recording: so nothing of several processes is in it, and what is not
finite can still be skipped.

In       a function of a model, from tensors to tensors, on a GPU; batches of one shape
Out      Recorded(model, call): called as the function is, the same values and gradients
Differs  from torch.cuda.make_graphed_callables in recording when, and as often as, it is needed
"""
import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from plumbing.flags import UserError


class Recorded:
    """call(*inputs) in training, from a recording; a new one when shapes or `bypass` change.

    call   the model, or what it learns from, such as its loss

    Learned parameters, what learns, and training mode have to stay as they are at the first call.
    TRAP: outputs, and gradients, lie in the recording's own memory and hold until the next call.
    """

    def __init__(self, model: nn.Module, call: Callable | None = None):
        self.model, self.call, self.key, self.replay = model, call or model, None, None
        # A recording has no branches: what the quantizer does by this switch is recorded again.
        self.switched = [part for part in model.modules() if hasattr(part, "bypass")]

    def __call__(self, *inputs: Tensor):
        key = [x.shape for x in inputs], [part.bypass for part in self.switched]
        if key != self.key:
            self.replay = None  # first, so that its memory is free
            self.replay, self.key = record(self.model, self.call, inputs), key
        return self.replay(*inputs)


class Same(nn.Module):
    """A module of the model's parameters whose forward is `call`: torch puts the recording in the
    place of a forward, and the model keeps its own."""

    def __init__(self, model: nn.Module, call: Callable):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: Tensor):
        return self.call(*inputs)


def record(model: nn.Module, call: Callable, inputs: tuple[Tensor, ...]) -> Callable:
    """-> what replays call(*inputs), under the autocast of this call.

    Rounds that warm up leave nothing behind: buffers and random numbers are as before.
    Raises UserError when the call does what no recording can, such as wait for a number.
    """
    # A replay hands gradients over on another stream than the recording; torch waits, and warns.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    buffers, random = [b.clone() for b in model.buffers()], torch.cuda.get_rng_state()
    # Without autocast's cache: a weight that was converted in one recording is gone in the next.
    with torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"),
                        cache_enabled=False), recordable(model):
        replay = torch.cuda.make_graphed_callables(
            Same(model, call), tuple(x.clone() for x in inputs), allow_unused_input=True)
    for b, before in zip(model.buffers(), buffers):
        b.copy_(before)
    torch.cuda.set_rng_state(random)
    return replay


@contextlib.contextmanager
def recordable(model: nn.Module):
    """CUDA's error about what cannot be recorded becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "captur" in str(error):  # all of them speak of capturing; a fault of the model does not
            raise UserError(f"a step of {type(model).__name__} cannot be recorded "
                            f"({str(error).splitlines()[0]}); add --no-cuda_graph") from error
        raise
