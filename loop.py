"""The training loop, once for everything that learns here: rates, micro-batches, log, signals.

In       a model, its averaged copy, an optimizer, endless batches
Out      trained weights in place; one line of RUN/log.jsonl per log_every steps: phase, step, the
         mean of each loss term, grad_norm before clipping, learning_rate, per_second (images or
         sequences over all processes), skipped, if steps were not finite, and peak_mb in
         the last line of a phase
Differs  From nanoGPT's loop only in what a long run needs: it can stop and go on at any step, on
         any number of processes, and a step that is not finite on one of them is skipped by all

    loop = Loop(run, "base", model, ema, optimizer, stream, steps, batch_size, rates)
    for images, labels in loop:     # one micro-batch a turn, on the device, under autocast
        loss = mse(loop.model(images), images)
        loop.backward(loss, {"pixels": loss})
        if loop.stepped:            # False within an accumulation, and when a step was skipped
            ...                     # what has to happen after each optimizer step
        if loop.time_to_save:
            save(loop.step)         # steps done, this one included
    loop.leave_if_stopped(save)     # a signal has come: save, and leave with exit code 3

Try      python loop.py      (prints how the learning rate rises and falls)
"""
import contextlib
import copy
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from muon import Muon, is_hidden_matrix
from plumbing.flags import need
from plumbing.processes import INTERRUPTED, Interrupted, peak_memory, reset_peak_memory
from plumbing.run import Run
from plumbing.start import output_gone


def new_optimizer(model: nn.Module, kind: str, weight_decay: float, beta2: float,
                  muon_scale: float = 1.0, codebook_scale: float = 1.0) -> Muon:
    """An optimizer for what learns in `model`: "adamw", or "muon" for its hidden matrices.

    Weight decay touches matrices only: biases, norms, positions, queries and codes map nothing.
    A group's "scale" is its learning rate as a multiple of the one that Loop sets for each step.
    """
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # Experts' matrices are stacked: (n, out, in).
        decay = weight_decay if p.ndim >= 3 or (p.ndim == 2 and name.endswith("weight")) else 0.0
        matrices, scale = 0, codebook_scale if name.endswith("codebook") else 1.0
        if kind == "muon" and is_hidden_matrix(name, p):
            matrices = 3 if "qkv" in name else 2 if "w13" in name else 1  # stored as one
            scale = muon_scale
        groups.setdefault((matrices, scale, decay), []).append(p)
    return Muon([dict(params=params, matrices=matrices, scale=scale, weight_decay=decay)
                 for (matrices, scale, decay), params in groups.items()], betas=(0.9, beta2))


def learning_rate(step: int, steps: int, peak: float, end: float, warmup: int) -> float:
    """Linear up to the peak, then half a cosine down to the end.

    The warm-up takes a tenth of the phase at most, or a short phase would be nothing else.
    """
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's; what is frozen is equal in both, and stays.

    Faster at the start of a phase, (1 + step) / (10 + step), so that the weights it began with are
    soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(ema.parameters(), model.parameters())
    averages, weights = zip(*((a, p) for a, p in pairs if p.requires_grad))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def frozen_copy(model: nn.Module) -> nn.Module:
    """The averaged weights to be: in eval mode, and no optimizer's business."""
    return copy.deepcopy(model).requires_grad_(False).eval()


class LossOf(nn.Module):
    """A generator whose forward is its loss: DDP looks at forward only."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, ids: Tensor, labels: Tensor):
        return self.generator.loss(ids, labels)


class Loop:
    """Iterate for the micro-batches of steps `start` to `steps`; see the top of this file for how
    to use it.

    model      to call: the given model, with gradients averaged over processes
    step       steps done
    stepped    the last backward() ended a step, and the weights were changed by it
    time_to_save   every save_every steps
    stop       a signal has come; the loop ends after this step, and leave_if_stopped() the program

    stream     step -> batches of this process from that step on, tuples of tensors with equal first
    dimensions batch_size   over all processes; rates: peak, end, warm-up steps of the learning rate
    Raises UserError when a batch cannot be cut into train.accumulate equal pieces, and after ten
    steps in a row that were not finite.
    """

    def __init__(self, run: Run, name: str, model: nn.Module, ema: nn.Module,
                 optimizer: Muon, stream: Callable[[int], Iterator], steps: int,
                 batch_size: int, rates: tuple[float, float, int], start: int = 0,
                 cuda_graph: bool = False):
        self.run, self.name, self.ema, self.optimizer = run, name, ema, optimizer
        self.stream, self.steps, self.batch_size, self.rates = stream, steps, batch_size, rates
        self.step = start
        self.bare = model
        self.model = run.procs.wrap(model, cuda_graph)
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.stepped = self.stop = False
        self.pieces_left = self.skipped_in_a_row = 0
        need_equal_pieces(name, batch_size, run.procs.world, run.train.accumulate)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        train, procs = self.run.train, self.run.procs
        batches = self.stream(self.step)
        reset_peak_memory(procs.device)
        self.begin_log()
        self.bar = tqdm(total=self.steps, initial=self.step, desc=f"{self.name:10}", mininterval=1,
                        disable=not procs.main)
        self.bare.train()
        while self.step < self.steps:
            # 1. The learning rate of this step.
            self.rate = learning_rate(self.step, self.steps, *self.rates)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * group.get("scale", 1.0)

            # 2. The batch, cut into micro-batches of equal size. Processes exchange gradients with
            # the last one.
            try:
                with procs.interruptible():
                    batch = next(batches)
            except Interrupted:  # while it was waited for: nothing of this step has begun
                self.stop = True
                break
            batch = [part.to(procs.device, non_blocking=True) for part in batch]
            size = len(batch[0]) // train.accumulate
            self.terms, self.pieces_left = defaultdict(float), train.accumulate
            for first in range(0, len(batch[0]), size):
                alone = procs.world == 1 or self.pieces_left == 1
                with contextlib.nullcontext() if alone else self.model.no_sync():
                    with procs.autocast(train.precision):
                        yield tuple(part[first:first + size] for part in batch)

            # 3. Whoever iterates has called backward(), and saved if it was time to.
            if self.stop:
                break
        self.bar.close()

    def leave_if_stopped(self, save: Callable[[int], None]) -> None:
        """After the loop: if a signal has ended it, save(steps done) and leave with exit code 3."""
        if self.stop:
            save(self.step)
            self.run.say(f"interrupted: step {self.step} of {self.name} is saved; "
                         "repeat the command to go on")
            sys.exit(INTERRUPTED)

    def backward(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Add the gradients of one micro-batch; with the last one of a step, take the step.

        terms   what to log beside the loss; scalars, means over the micro-batch
        """
        accumulate = self.run.train.accumulate
        with torch.autocast(loss.device.type, enabled=False):  # backward has its forward's types
            (loss / accumulate).backward()
        # What is logged, and looked at for being finite, is the mean over the whole step. detach,
        # not float(): a number would make the CPU wait for the GPU.
        for name, value in {"loss": loss, **terms}.items():
            self.terms[name] += value.detach() / accumulate
        self.pieces_left -= 1
        self.stepped = self.pieces_left == 0 and self.take_step()

    def take_step(self) -> bool:
        """Clip, step, average, log.

        Returns False if any process met a number that is not finite: then all skip the step.
        """
        train, procs = self.run.train, self.run.procs
        # A limit of infinity only measures.
        norm = nn.utils.clip_grad_norm_(self.learning, train.grad_clip or math.inf)
        values = {**self.terms, "grad_norm": norm}
        finite = torch.stack([value.float() for value in values.values()]).isfinite().tolist()
        wrong = [name for name, good in zip(values, finite) if not good]
        skip, self.stop = procs.any(bool(wrong), procs.stop or output_gone())
        if skip:
            self.skipped += 1
            self.skipped_in_a_row += 1
            where = ", ".join(wrong) or "a term on another process"
            if self.skipped_in_a_row == 10:
                self.bar.close()  # so that the message has a line of its own
            need(self.skipped_in_a_row < 10,
                 f"{self.name}, step {self.step + 1}: {where} was not finite in 10 steps in a row; "
                 "lower the learning rate or use --precision fp32")
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step()
            update_ema(self.ema, self.bare, train.ema_decay, self.step)
            for name, value in values.items():
                self.sums[name].append(value)
        self.optimizer.zero_grad()
        self.step += 1
        self.bar.update()
        if self.step % train.log_every == 0 or self.step == self.steps:
            self.write_log()
        return not skip

    def begin_log(self) -> None:
        self.sums, self.skipped, self.since = defaultdict(list), 0, (time.time(), self.step)

    def write_log(self) -> None:
        """One line: means over the steps that were taken since the last line, on this process."""
        began, first = self.since
        row = {name: round(torch.stack(values).mean().item(), 6)
               for name, values in self.sums.items()}
        speed = self.batch_size * (self.step - first) / (time.time() - began)
        if self.skipped:
            row["skipped"] = self.skipped
        if self.step == self.steps:
            row["peak_mb"] = peak_memory(self.run.procs.device) >> 20
        self.run.log(phase=self.name, step=self.step, **row, learning_rate=self.rate,
                     per_second=round(speed, 1))
        shown = f"loss {row['loss']:.4f}" if "loss" in row else f"{self.skipped} steps not finite"
        self.bar.set_postfix_str(f"{shown}, {speed:.0f}/s")
        self.begin_log()

    @property
    def time_to_save(self) -> bool:
        """Between steps only, and not after the last one: it is saved with the phase's results."""
        every = self.run.train.save_every
        return not self.pieces_left and self.step % every == 0 and self.step < self.steps

    @property
    def time_to_show(self) -> bool:
        """Every sample_every steps, but not at the last one, which has a picture of its own."""
        every = self.run.train.sample_every
        return not self.pieces_left and self.step % every == 0 and self.step < self.steps


def need_equal_pieces(name: str, batch_size: int, world: int, accumulate: int) -> None:
    """Raise UserError unless all micro-batches are of one size: else their mean is another loss."""
    together = world * accumulate
    need(batch_size % together == 0,
         f"{name}: {batch_size} cannot be cut into {world} processes x {accumulate} equal micro-"
         f"batches; try {max(1, batch_size // together) * together}, or another --accumulate")


if __name__ == "__main__":
    print("learning rate, peak 1, end 0.1, warm-up 5 of 20 steps (cut to a tenth of them, 2):")
    for step in range(20):
        rate = learning_rate(step, 20, 1.0, 0.1, 5)
        print(f"  step {step:2}  {rate:.2f} {'#' * round(40 * rate)}")
    print("\nA phase starts with a rise because the optimizer's averages know nothing yet.")
    print("How long is AdamW's first step without it? (As the rate, whatever the gradient.)")
