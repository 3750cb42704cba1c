"""The training loop, once for everything that learns here: rates, micro-batches, log, signals.

Loop     works by itself, in anybody's program:

    model = nn.Linear(3, 1)
    optim = Optim(64, 1000, 1e-2, 1e-4, 100, 0.99, 0.01)  # batch, steps, peak, end, warm-up ...
    loop = Loop(model, make_ema(model), new_optimizer(model, "adamw", 0.01, 0.99), optim,
                on_log=print)
    for x, y in loop.over(batches):     # one micro-batch a turn, on the device
        with loop.autocast():           # only here: backward is outside of it
            loss = mse(loop.model(x), y)
        loop.backward(loss, {"mse": loss})

Stage    is a Loop in a run's folder: it goes on from a checkpoint, writes RUN/log.jsonl, and saves
         before it leaves

In       a model, its averaged copy, an optimizer, endless batches
Out      trained weights in place; every log_every steps a row: step, the mean of each loss term,
         grad_norm before clipping, learning_rate, per_second (images or sequences over all
         processes), skipped, if steps were not finite, and peak_mb in the last row
Differs  From nanoGPT's loop only in what a long run needs: it can stop and go on at any step, on
         any number of processes, and a step that is not finite on one of them is skipped by all
Try      python loop.py      (prints how the learning rate rises and falls)
"""
import contextlib
import copy
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Optim
from layers import count_parameters
from muon import Muon, matrices_of
from plumbing import checkpoint
from plumbing.batches import ImagesFailed
from plumbing.flags import UserError, need
from plumbing.graphs import Recorded
from plumbing.processes import (
    INTERRUPTED, Interrupted, Processes, peak_memory, reset_peak_memory)
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


def make_ema(model: nn.Module) -> nn.Module:
    """The averaged weights to be: in eval mode, and no optimizer's business."""
    return copy.deepcopy(model).requires_grad_(False).eval()


class Loop:
    """Iterate over its batches for the micro-batches of optim.steps steps; see the top of the file.

    model      to call: `call`, or the given model; with cuda_graph from a recording
    step       steps done
    stepped    the last backward() ended a step, and the weights were changed by it
    whole      all that this process learns from in this step; a turn's micro-batch is a part of it

    call       what a step calls if it is not the model itself: such as its loss
    ema        the averaged copy, or None
    procs      whose processes share each batch (default: this one alone)
    on_log     is given each row, a dictionary
    Raises UserError when a batch cannot be cut into `accumulate` equal pieces, when the batches end
    before the steps do, and after ten steps in a row that were not finite.
    """

    def __init__(self, model: nn.Module, ema: nn.Module | None, optimizer: Muon, optim: Optim, *,
                 call: Callable | None = None, name: str = "training", start: int = 0,
                 procs: Processes | None = None, accumulate: int = 1, grad_clip: float = 1.0,
                 ema_decay: float = 0.999, precision: str = "fp32", cuda_graph: bool = False,
                 log_every: int = 50,
                 on_log: Callable[[dict], None] = lambda row: None):
        self.procs = procs or Processes.alone(next(model.parameters()).device)
        self.procs.same_start(model)
        self.raw_model, self.model = model, call or model
        self.recorded = cuda_graph
        if cuda_graph:
            self.model = Recorded(model, self.model)
        self.ema, self.optimizer, self.optim, self.name = ema, optimizer, optim, name
        self.step, self.accumulate, self.grad_clip = start, accumulate, grad_clip
        self.ema_decay, self.precision = ema_decay, precision
        self.log_every, self.on_log = log_every, on_log
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.stepped = self.agreed = self.unread = False
        self.pieces_left = self.skipped_in_a_row = 0
        # A step of one micro-batch is its own mean.
        self.alone = self.procs.world == 1 and accumulate == 1
        need_equal_pieces(name, optim.batch_size, self.procs.world, accumulate)

    def over(self, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """Batches of this process from step `start` on, as tuples of tensors with equal first
        dimensions -> micro-batches, on the device."""
        procs, optim = self.procs, self.optim
        self.batches = iter(batches)
        reset_peak_memory(procs.device)
        self.begin_log()
        self.bar = tqdm(total=optim.steps, initial=self.step, desc=f"{self.name:10}", mininterval=1,
                        disable=not procs.main)
        self.raw_model.train()
        while True:
            # 1. The batch, and whether all processes have one and want to go on.
            if self.step < optim.steps:
                with procs.interruptible():
                    batch = next(self.batches, None)
                if batch is None:
                    self.close()
                    raise UserError(f"{self.name}: the batches ended after {self.step} of "
                                    f"{optim.steps} steps; give endless batches, or fewer steps")
            self.agree()
            if self.step == optim.steps:
                break

            # 2. The learning rate of this step.
            self.lr = learning_rate(self.step, optim.steps, optim.learning_rate,
                                    optim.min_learning_rate, optim.warmup_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * group.get("scale", 1.0)

            # 3. Micro-batches of equal size.
            self.whole = tuple(part.to(procs.device, non_blocking=True) for part in batch)
            size = len(batch[0]) // self.accumulate
            self.terms, self.weight = defaultdict(list), 0.0
            self.pieces_left = self.accumulate
            for first in range(0, len(batch[0]), size):
                yield tuple(part[first:first + size] for part in self.whole)
            # Whoever iterates has called backward(), and saved if it was time to.
        self.close()

    def autocast(self):
        """For the model's forward, and nothing else: products as --precision says."""
        return self.procs.autocast(self.precision)

    # --------------------------------------------------------------------------------------------
    # how it may end

    def agree(self, error: ImagesFailed | None = None) -> None:
        """Go on, unless some process must not. Each asks before a step, and one whose images failed
        asks then, in its place.

        Raises on all processes alike: ImagesFailed of the first that has one; Interrupted when a
        signal has come to any, or when nobody reads what is printed any more.
        """
        failed, stop = self.procs.any(error is not None, self.procs.stop or self.unread)
        if failed:
            self.agreed = True
            told = [text for text in self.procs.gather(error and str(error)) if text]
            raise ImagesFailed(told[0])
        if stop:
            raise Interrupted

    def close(self) -> None:
        self.bar.close()  # so that what is said next has a line of its own
        if hasattr(self.batches, "close"):
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
        # Log and check the mean over the whole step. detach,
        # not float(): a number would make the CPU wait for the GPU.
        for name, value in {"loss": loss * weight, **terms}.items():
            self.terms[name].append(value.detach())
        self.weight = self.weight + weight
        self.pieces_left -= 1
        if self.recorded and self.pieces_left:
            self.keep_from_replay()
        self.stepped = self.pieces_left == 0 and self.take_step()

    def keep_from_replay(self) -> None:
        """TRAP: the next micro-batch's replay writes where this one's gradients and terms are."""
        for p in self.learning:
            p.grad = None if p.grad is None else p.grad.clone()
        for parts in self.terms.values():
            parts[-1] = parts[-1].clone()

    def take_step(self) -> bool:
        """Clip, step, average, log.

        Returns False if any process met a number that is not finite: then all skip the step.
        """
        values = {name: torch.stack(parts).mean() for name, parts in self.terms.items()}
        for p in self.learning:
            if p.grad is None:  # nothing has read it in this step
                p.grad = torch.zeros_like(p)
        if not self.alone:
            # Sums over micro-batches and processes of loss times weight.
            self.procs.sum_gradients(self.learning)
            torch._foreach_div_([p.grad for p in self.learning],
                                self.procs.mean(self.weight) * self.procs.world)
            values["loss"] = values["loss"] * self.accumulate / self.weight
        # A limit of infinity only measures.
        norm = nn.utils.clip_grad_norm_(self.learning, self.grad_clip or math.inf)
        values["grad_norm"] = norm
        finite = torch.stack([value.float() for value in values.values()]).isfinite().tolist()
        wrong = [name for name, good in zip(values, finite) if not good]
        skip, = self.procs.any(bool(wrong))
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
            if self.ema is not None:
                update_ema(self.ema, self.raw_model, self.ema_decay, self.step)
            for name, value in values.items():
                self.sums[name].append(value)
        self.optimizer.zero_grad()
        self.step += 1
        self.bar.update()
        self.unread = output_gone()
        if self.step % self.log_every == 0 or self.step == self.optim.steps:
            self.write_log()
        return not skip

    def begin_log(self) -> None:
        self.sums, self.skipped, self.since = defaultdict(list), 0, (time.time(), self.step)

    def write_log(self) -> None:
        """One row: means over the steps that were taken since the last one, on this process."""
        began, first = self.since
        row = {name: round(torch.stack(values).mean().item(), 6)
               for name, values in self.sums.items()}
        speed = self.optim.batch_size * (self.step - first) / (time.time() - began)
        if self.skipped:
            row["skipped"] = self.skipped
        if self.step == self.optim.steps:
            row["peak_mb"] = peak_memory(self.procs.device) >> 20
        self.on_log({"step": self.step, **row, "learning_rate": self.lr,
                     "per_second": round(speed, 1)})
        shown = f"loss {row['loss']:.4f}" if "loss" in row else f"{self.skipped} steps not finite"
        self.bar.set_postfix_str(f"{shown}, {speed:.0f}/s")
        self.begin_log()


class Stage(Loop):
    """A Loop in a run's folder, from its checkpoint as far as it has come, to the next one.

    raw_model, ema   of the checkpoint, or new
    saved            the checkpoint that it goes on from, or None; finished: nothing is left to do

    file       the checkpoint in the run's folder; name, of the phase, stands in it and in the log
    new        makes the network that a checkpoint, or None, belongs to
    settings   what must be as it was when the checkpoint was written
    content    what a checkpoint holds beside weights, so that it can be loaded by itself; needs are
               the names in it without which training cannot go on

        stage = Stage(run, "generator-ar.pt", "ar", new, settings, content)
        stage.begin(optim, number)
        with stage.saving():
            for ids, labels in stage.over(batches):
                ...
                stage.backward(loss, terms)
                stage.save_or_show(show)    # every save_every and sample_every steps
            result = measure(stage.ema)     # in here too, as it reads images
        stage.finish(result)
    """

    def __init__(self, run: Run, file: str, name: str, new: Callable[[dict | None], nn.Module],
                 settings: dict, content: Callable[[], dict], needs: tuple[str, ...] = ()):
        self.run, self.name, self.path, self.began = run, name, run.path(file), time.time()
        self.settings, self.content = settings, content
        self.saved = run.resume(self.path, settings, needs)
        self.finished = self.saved is not None and self.saved["phase"] == "finished"
        torch.manual_seed(run.train.seed)  # the same weights on every process
        self.raw_model = new(self.saved).to(run.procs.device)
        self.ema = make_ema(self.raw_model)
        if self.saved:
            checkpoint.load_strict(self.raw_model, self.saved["model"], self.path)
            checkpoint.load_strict(self.ema, self.saved["ema"], self.path)

    def begin(self, optim: Optim, number: int, call: Callable | None = None,
              codebook_rate: float = 1.0, cuda_graph: bool = False) -> None:
        """A new optimizer, or the checkpoint's if it is of this phase, and random numbers.

        number    of the phase: each draws other random numbers
        call      what a step calls if it is not raw_model itself, such as raw_model.loss
        """
        run, train, start, random = self.run, self.run.train, 0, None
        # Muon's rate rises and falls with the others'.
        optimizer = new_optimizer(self.raw_model, train.optimizer, optim.weight_decay, optim.beta2,
                                  train.muon_learning_rate / (optim.learning_rate or 1),
                                  codebook_rate)
        if self.goes_on:
            start, random = self.saved["step"], self.saved["random"]
            checkpoint.load_optimizer(optimizer, self.saved["optimizer"], f"{self.path}: optimizer")
        run.seed(random, number)
        run.trim_log(self.name, start)
        run.say(f"{self.name}: {count_parameters(self.raw_model, learning_only=True):,} of "
                f"{count_parameters(self.raw_model):,} parameters learn, step {start} of "
                f"{optim.steps}")
        if train.optimizer == "muon" and not any(g["matrices"] for g in optimizer.param_groups):
            run.say(f"{self.name}: no hidden matrices, only such as convolutions; so --optimizer "
                    "muon changes nothing here, and AdamW has all of it")
        super().__init__(self.raw_model, self.ema, optimizer, optim, call=call, name=self.name,
                         start=start, procs=run.procs, accumulate=train.accumulate,
                         grad_clip=train.grad_clip, ema_decay=train.ema_decay,
                         precision=train.precision, cuda_graph=cuda_graph,
                         log_every=train.log_every,
                         on_log=lambda row: run.log(phase=self.name, **row))

    def is_recorded(self, obstacle: str = "") -> bool:
        """Is a step recorded? Where there is a CUDA GPU, but for --no-cuda_graph or an obstacle.

        obstacle   what no recording could follow, or ""; a line says so
        """
        wanted = self.run.train.cuda_graph and self.run.procs.can_record
        if wanted and obstacle:
            self.run.say(f"{self.name}: steps are not recorded (--cuda_graph), as {obstacle}")
        return wanted and not obstacle

    @property
    def goes_on(self) -> bool:
        """Is the checkpoint one of this phase?"""
        return self.saved is not None and self.saved["phase"] == self.name

    def save(self, phase: str | None = None) -> None:
        self.run.save(self.path, settings=self.settings, phase=phase or self.name, step=self.step,
                      model=self.raw_model.state_dict(), ema=self.ema.state_dict(),
                      optimizer=self.optimizer.state_dict(), **self.content())

    def save_or_show(self, show: Callable[[str], None]) -> None:
        """Between steps, when it is time: a checkpoint, and a picture that show(name) draws.

        Not after the last step, which has both of its own. Pictures come second: they may read
        images, and these may fail.
        """
        if self.pieces_left or self.step == self.optim.steps:
            return
        if self.step % self.run.train.save_every == 0:
            self.save()
        if self.step % self.run.train.sample_every == 0 and self.procs.main:
            show(f"{self.name}-{self.step:07}")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around the loop and what measures its end: what was learned is saved, whatever ends it.

        A signal: save, and leave with exit code 3. Images that cannot be had (a bad file, a data
        worker that died) harm no weights: the same, then ImagesFailed that says so.
        """
        try:
            yield
        except Interrupted:
            self.close()
            self.save()
            self.run.say(f"interrupted: step {self.step} of {self.name} is saved; "
                         "repeat the command to go on")
            sys.exit(INTERRUPTED)
        except ImagesFailed as error:
            self.close()
            with contextlib.suppress(ImagesFailed):
                if not self.agreed:
                    self.agree(error)
            self.save()
            raise ImagesFailed(f"{error}; step {self.step} of {self.name} is saved: mend that, and "
                               "repeat the command to go on") from error

    def finish(self, results: dict, phase: str = "finished") -> None:
        """The last line of the log, and the last checkpoint, of this phase's name or finished."""
        # Before saving: a line whose checkpoint is never made is dropped, and made again.
        self.run.log(phase=self.name, step=self.step, **results)
        self.save(phase)

    @property
    def seconds(self) -> float:
        """Since the stage was made."""
        return round(time.time() - self.began, 1)


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
