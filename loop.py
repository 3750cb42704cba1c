"""The training loop, once for everything that learns here: rates, micro-batches, log, signals.

In       a model, its averaged copy, an optimizer, endless batches
Out      trained weights in place; one line of RUN/log.jsonl per log_every steps: phase, step, the
         mean of each loss term, grad_norm before clipping, learning_rate, per_second (images or
         sequences over all processes), skipped, if steps were not finite, and peak_mb in
         the last line of a phase
Differs  From nanoGPT's loop only in what a long run needs: it can stop and go on at any step, on
         any number of processes, and a step that is not finite on one of them is skipped by all

    loop = Loop(run, "base", model, ema, optimizer, stream, steps, batch_size, rates)
    with loop.saved_by(save):           # a signal, or images that fail: save(steps done), and leave
        for images, labels in loop:     # one micro-batch a turn, on the device
            with loop.autocast():       # only here: backward, pictures, saving are outside of it
                recon = loop.model(images)
            loss = mse(recon, images)
            loop.backward(loss, {"pixels": loss})
            if loop.stepped:            # False within an accumulation, and when a step was skipped
                ...                     # what has to happen after each optimizer step
            if loop.time_to_save:
                save(loop.step)         # steps done, this one included
            if loop.time_to_show:       # after saving: it may read images, and these may fail
                show(loop.step)
        result = evaluate(ema)          # in here too, as it reads images

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

from muon import Muon, matrices_of
from plumbing.batches import ImagesFailed
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
    groups, marked = {}, matrices_of(model)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = weight_decay if p in marked else 0.0
        matrices = marked.get(p, 0) if kind == "muon" else 0
        scale = muon_scale if matrices else codebook_scale if name.endswith("codebook") else 1.0
        groups.setdefault((matrices, scale, decay), []).append(p)
    return Muon([dict(params=params, matrices=matrices, scale=scale, weight_decay=decay)
                 for (matrices, scale, decay), params in groups.items()], betas=(0.9, beta2))


def learning_rate(step: int, steps: int, peak: float, end: float, warmup: int) -> float:
    """Linear up to the peak, then half a cosine down to the end.

    The warm-up takes a tenth of the phase at most, or a short phase would be nothing else. An end
    above the peak follows it: who lowers the peak, or freezes with 0, wants no rate above it.
    """
    end = min(end, peak)
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
    whole      all that this process learns from in this step; a turn's micro-batch is a part of it

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
        self.stepped = self.agreed = self.unread = False
        self.pieces_left = self.skipped_in_a_row = 0
        # A step of one micro-batch is its own mean.
        self.alone = run.procs.world == 1 and run.train.accumulate == 1
        need_equal_pieces(name, batch_size, run.procs.world, run.train.accumulate)
        if run.train.optimizer == "muon" and not any(g["matrices"] for g in optimizer.param_groups):
            run.say(f"{name}: no hidden matrices, only such as convolutions; so --optimizer muon "
                    "changes nothing here, and AdamW has all of it")

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        train, procs = self.run.train, self.run.procs
        self.run.trim_log(self.name, self.step)
        self.batches = self.stream(self.step)
        reset_peak_memory(procs.device)
        self.begin_log()
        self.bar = tqdm(total=self.steps, initial=self.step, desc=f"{self.name:10}", mininterval=1,
                        disable=not procs.main)
        self.bare.train()
        while True:
            # 1. The batch, and whether all processes have one and want to go on.
            if self.step < self.steps:
                with procs.interruptible():
                    batch = next(self.batches)
            self.agree()
            if self.step == self.steps:
                break

            # 2. The learning rate of this step.
            self.rate = learning_rate(self.step, self.steps, *self.rates)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * group.get("scale", 1.0)

            # 3. Micro-batches of equal size. Processes exchange gradients with the last one.
            self.whole = tuple(part.to(procs.device, non_blocking=True) for part in batch)
            size = len(batch[0]) // train.accumulate
            self.terms, self.weight = defaultdict(list), 0.0
            self.pieces_left = train.accumulate
            for first in range(0, len(batch[0]), size):
                last = procs.world == 1 or self.pieces_left == 1
                with contextlib.nullcontext() if last else self.model.no_sync():
                    yield tuple(part[first:first + size] for part in self.whole)
            # Whoever iterates has called backward(), and saved if it was time to.
        self.close()

    def autocast(self):
        """For the model's forward, and nothing else: products as --precision says."""
        return self.run.procs.autocast(self.run.train.precision)

    # --------------------------------------------------------------------------------------------
    # how it may end

    def agree(self, error: ImagesFailed | None = None) -> None:
        """Go on, unless some process must not. Each asks before a step, and one whose images failed
        asks then, in its place.

        Raises on all processes alike: ImagesFailed of the first that has one; Interrupted when a
        signal has come to any, or when nobody reads what is printed any more.
        """
        procs = self.run.procs
        failed, stop = procs.any(error is not None, procs.stop or self.unread)
        if failed:
            self.agreed = True
            told = [text for text in procs.gather(error and str(error)) if text]
            raise ImagesFailed(told[0])
        if stop:
            raise Interrupted

    @contextlib.contextmanager
    def saved_by(self, save: Callable[[int], None]) -> Iterator[None]:
        """Around the loop and what measures its end: what was learned is saved, whatever ends it.

        A signal: save(steps done), and leave with exit code 3. Images that cannot be had (a bad
        file, a data worker that died) harm no weights: the same, then ImagesFailed that says so.
        """
        try:
            yield
        except Interrupted:
            self.close()
            save(self.step)
            self.run.say(f"interrupted: step {self.step} of {self.name} is saved; "
                         "repeat the command to go on")
            sys.exit(INTERRUPTED)
        except ImagesFailed as error:
            self.close()
            with contextlib.suppress(ImagesFailed):
                if not self.agreed:
                    self.agree(error)
            save(self.step)
            raise ImagesFailed(f"{error}; step {self.step} of {self.name} is saved: mend that, and "
                               "repeat the command to go on") from error

    def close(self) -> None:
        self.bar.close()  # so that what is said next has a line of its own
        self.batches.close()  # so that data workers end

    # --------------------------------------------------------------------------------------------
    # a step

    def backward(self, loss: Tensor, terms: dict[str, Tensor], weight: Tensor | float = 1.0
                 ) -> None:
        """Add the gradients of one micro-batch; with the last one of a step, take the step.

        loss     a mean over the micro-batch
        terms    what to log beside it; scalars, means over the micro-batch. One that some lack is
                 averaged over those that have it
        weight   what share of the micro-batch `loss` is a mean over, where that differs: a step's
                 loss is the mean over all that its micro-batches, on all processes, have together
        """
        weight = 1.0 if self.alone else weight  # or it would only be rounded
        (loss * weight).backward()
        # What is logged, and looked at for being finite, is the mean over the whole step. detach,
        # not float(): a number would make the CPU wait for the GPU.
        for name, value in {"loss": loss * weight, **terms}.items():
            self.terms[name].append(value.detach())
        self.weight = self.weight + weight
        self.pieces_left -= 1
        self.stepped = self.pieces_left == 0 and self.take_step()

    def take_step(self) -> bool:
        """Clip, step, average, log.

        Returns False if any process met a number that is not finite: then all skip the step.
        """
        train, procs = self.run.train, self.run.procs
        values = {name: torch.stack(parts).mean() for name, parts in self.terms.items()}
        if not self.alone:
            # Gradients are sums over micro-batches of loss times weight, and the processes' mean.
            torch._foreach_div_([p.grad for p in self.learning if p.grad is not None],
                                procs.mean(self.weight))
            values["loss"] = values["loss"] * train.accumulate / self.weight
        # A limit of infinity only measures.
        norm = nn.utils.clip_grad_norm_(self.learning, train.grad_clip or math.inf)
        values["grad_norm"] = norm
        finite = torch.stack([value.float() for value in values.values()]).isfinite().tolist()
        wrong = [name for name, good in zip(values, finite) if not good]
        skip, = procs.any(bool(wrong))
        if skip:
            self.skipped += 1
            self.skipped_in_a_row += 1
            where = ", ".join(wrong) or "a term on another process"
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
        self.unread = output_gone()
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
