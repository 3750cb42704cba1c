"""train.py with an accident built in, for test_faults.py: FAULT="kind:rank:step" says which.

It happens once per file named in FAULT_ONCE. The step is counted over the tokenizer's training
steps of this process, from 1. Kinds:
raise         an exception
kill          SIGKILL
hang          sleep for an hour
nan           a loss that is not a number, and its gradients
inf           a loss that is not finite while its gradients are: nobody else notices by himself
term          SIGTERM to this process
tokens        SIGKILL in the middle of the token cache
save          SIGKILL at the fsync of a save that has this number
"""
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import train
from plumbing import run, tokens
from plumbing.start import main_with_user_errors

kind, rank, step = os.environ["FAULT"].split(":")
once, count = os.environ.get("FAULT_ONCE"), 0
mine = os.environ.get("RANK", "0") == rank and not (once and os.path.exists(once))
run.EVAL_IMAGES = 20


def accident() -> None:
    if once:
        Path(once).touch()
    if kind == "raise":
        raise RuntimeError("an accident, on purpose")
    if kind == "hang":
        time.sleep(3600)
    if kind not in ("nan", "inf"):
        os.kill(os.getpid(), signal.SIGTERM if kind == "term" else signal.SIGKILL)


def counted(recon, images, original=train.reconstruction):
    global count
    count += 1
    loss = original(recon, images)
    if mine and count == int(step):
        accident()
        loss = loss * {"nan": float("nan")}.get(kind, 1) + {"inf": float("inf")}.get(kind, 0)
    return loss


def fsync_and_die(number, original=os.fsync):
    global count
    count += 1
    if mine and count == int(step):
        accident()
    original(number)


if kind == "save":
    os.fsync = fsync_and_die
elif kind == "tokens":
    tokens.SHARD, tokens.BATCH = 16, 8  # several shards even of a small data set

    def encode_and_die(*args, original=tokens.eval_batches, **kwargs):
        global count
        for batch in original(*args, **kwargs):
            count += 1
            if mine and count == int(step):
                accident()
            yield batch
    tokens.eval_batches = encode_and_die
else:
    train.reconstruction = counted

if __name__ == "__main__":
    main_with_user_errors(lambda: train.main(config.parse_run(train.__doc__)))
