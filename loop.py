"""The training loop, and the run folder that it writes: the same for tokenizers and generators.

In       a Job: model, averaged copy, optimizer, batches, loss, and what to do after a step
Out      trained weights in place; RUN/log.jsonl, checkpoints and pictures on the way
Log      one line of log.jsonl per log_every steps: phase, step, mean of each loss term, grad_norm before clipping,
         learning_rate, per_second (images or sequences over all processes)
"""
import contextlib
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from plumbing.flags import need
from plumbing.run import Run

INTERRUPTED = 3  # exit code after a signal, when all is saved


# ------------------------------------------------------------------------------------------------
# the loop

@dataclass
class Job:
    name: str
    steps: int
    batch_size: int                                                           # over all processes
    rates: tuple[float, float, int]  # learning rate: peak, end, warm-up steps
    model: nn.Module
    ema: nn.Module  # averaged weights, the ones that are used later
    optimizer: torch.optim.Optimizer
    stream: Callable[[int], Iterator]  # step -> batches of this rank from there on
    loss: Callable  # (wrapped model, batch) -> scalar, {name: scalar}
    after_step: Callable[[int], None]  # called with the number of steps done
    save: Callable[[int], None]
    picture: Callable[[str], None]
    step: int = 0                                                             # steps done


def new_optimizer(model: nn.Module, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not biases, norms, positions, queries and codes, which map nothing."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def is_matrix(name, p):
        # experts' matrices are stacked: (n, out, in)
        return p.ndim == 3 or (p.ndim == 2 and name.endswith("weight"))
    return torch.optim.AdamW([dict(params=[p for n, p in learning if is_matrix(n, p)], weight_decay=weight_decay),
                              dict(params=[p for n, p in learning if not is_matrix(n, p)], weight_decay=0.0)],
                             lr=0.0, betas=(0.9, beta2), fused=True)


def learning_rate(step: int, steps: int, peak: float, end: float, warmup: int) -> float:
    """Linear up to the peak, then half a cosine down to the end. A short phase gets a short warm-up."""
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's, faster at the start of a phase so that it is soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def fit(job: Job, run: Run) -> None:
    """Train from job.step to job.steps. Saves every save_every steps and when interrupted, then exits with 3."""
    train, procs = run.train, run.procs
    model, learning = procs.wrap(job.model, train.compile), [p for p in job.model.parameters() if p.requires_grad]
    batches, sums, broken_in_a_row, since = job.stream(job.step), defaultdict(list), 0, (time.time(), job.step)
    bar = tqdm(total=job.steps, initial=job.step, desc=f"{job.name:10}", disable=not procs.main, mininterval=1)
    job.model.train()
    while job.step < job.steps:
        # 1. The learning rate of this step.
        rate = learning_rate(job.step, job.steps, *job.rates)
        for group in job.optimizer.param_groups:
            group["lr"] = rate

        # 2. Gradients, summed over micro-batches; processes exchange them with the last one.
        micro_batches = list(zip(*(part.to(procs.device, non_blocking=True).chunk(train.accumulate) for part in next(batches))))
        for batch in micro_batches:
            silent = procs.world > 1 and batch is not micro_batches[-1]
            with model.no_sync() if silent else contextlib.nullcontext():
                with procs.autocast(train.precision):
                    loss, logs = job.loss(model, batch)
                (loss / len(micro_batches)).backward()
        norm = nn.utils.clip_grad_norm_(learning, train.grad_clip)

        # 3. The step, unless any process met a number that is not finite: then all of them skip it.
        broken, stop = procs.any(not (math.isfinite(norm) and math.isfinite(loss.detach())), procs.stop)
        broken_in_a_row = broken_in_a_row + 1 if broken else 0
        need(broken_in_a_row < 10, f"{job.name}: the loss was not finite in 10 steps in a row; lower the learning rate or use --precision fp32")
        if not broken:
            job.optimizer.step()
            update_ema(job.ema, job.model, train.ema_decay, job.step)
            job.after_step(job.step + 1)
        job.optimizer.zero_grad(set_to_none=True)
        job.step += 1
        bar.update()

        # 4. Tell, draw, save. Logged values are means over the steps since the last line, on this process.
        for name, value in {"loss": loss.detach(), "grad_norm": norm, **logs}.items():
            sums[name].append(value)  # float() would wait for the GPU at every step
        if job.step % train.log_every == 0 or job.step == job.steps:
            means = {name: round(torch.stack(values).mean().item(), 6) for name, values in sums.items()}
            speed = job.batch_size * (job.step - since[1]) / (time.time() - since[0])
            run.log(phase=job.name, step=job.step, **means, learning_rate=rate, per_second=round(speed, 1))
            bar.set_postfix_str(f"loss {means['loss']:.4f}, {speed:.0f}/s")
            sums, since = defaultdict(list), (time.time(), job.step)
        if job.step % train.sample_every == 0 and job.step < job.steps:
            job.picture(f"{job.name}-{job.step:07}")
        if stop or (job.step % train.save_every == 0 and job.step < job.steps):
            job.save(job.step)
        if stop:
            bar.close()
            run.say(f"interrupted: step {job.step} of {job.name} is saved; repeat the command to go on")
            sys.exit(INTERRUPTED)
    bar.close()
