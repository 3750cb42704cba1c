"""Faults that a run survives, each made to happen: `make test-faults`. Table: tests/README.md.

Training runs as a user would start it, in processes of its own, and faulty_train.py builds the
accident in.
"""
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    ROOT, SMALL, refused, rows, same_content, some_shapes, train_shapes, without_times)

from plumbing import checkpoint

pytestmark = pytest.mark.faults
NAMES = ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt")

PORT = iter(range(29700, 29999))


def start(folder, data, *flags, fault="none:0:0", ranks=1, once=None, launcher=(), group=False,
          limit=None) -> subprocess.Popen:
    """train.py on `ranks` processes of one thread; a limit on file sizes stands for a full disk."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
                    f"--master_port={next(PORT)}", *launcher, "--"]
    command += [str(ROOT / "tests" / "faulty_train.py"), *SMALL, "--run", str(folder),
                "--data", data, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault}
    if once:
        environment["FAULT_ONCE"] = str(once)

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=group,
                            preexec_fn=prepare)


def finish(process, timeout=180) -> tuple[int, str]:
    """-> exit code, everything that was printed to stderr. A job that hangs fails here."""
    try:
        _, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("the job hangs") from None
    return process.returncode, err


def train(*args, **kwargs) -> tuple[int, str]:
    return finish(start(*args, **kwargs))


def done(*args, **kwargs) -> None:
    code, err = train(*args, **kwargs)
    assert code == 0, err[-3000:]


def contents(folder, names=NAMES) -> dict:
    return {name: without_times(checkpoint.load(folder / name)) for name in names}


def equal(one, other) -> bool:
    return same_content(contents(one), contents(other))


def wait_for(condition, seconds=60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it never came"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing happened to, with one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(folder, data)
    return folder


@pytest.fixture(scope="module")
def whole_two(data, tmp_path_factory):
    """A run that nothing happened to, with two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done(folder, data, ranks=2)
    return folder


# ------------------------------------------------------------------------------------------------
# interrupted and resumed equals uninterrupted

# within an epoch of base, grow-4, grow-6, the fine-tune
@pytest.mark.parametrize("step", [3, 8, 12, 16])
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_and_resume_gives_the_same_bits(whole, data, tmp_path, step, workers):
    code, err = train(tmp_path, data, "--workers", workers, fault=f"term:0:{step}")
    assert code == 3, err
    done(tmp_path, data, "--workers", workers)
    assert equal(tmp_path, whole)


@pytest.mark.parametrize("step", [4, 10])
def test_the_same_with_two_processes(whole_two, data, tmp_path, step):
    # one of them gets the signal, both stop
    code, err = train(tmp_path, data, fault=f"term:1:{step}", ranks=2)
    assert code != 0 and checkpoint.load(tmp_path / "tokenizer.pt")["step"] > 0, err
    done(tmp_path, data, ranks=2)
    assert equal(tmp_path, whole_two)


def test_killed_ten_times_in_the_middle_of_saving_and_still_the_same(whole, data, tmp_path):
    for number in range(10):
        code, err = train(tmp_path, data, "--stage", "1" if number < 5 else "2",
                          fault=f"save:0:{1 + 2 * number}")
        assert code in (0, -signal.SIGKILL), err  # the ninth fsync may come after the end
        if number == 4:
            done(tmp_path, data, "--stage", "1")
    done(tmp_path, data)
    assert equal(tmp_path, whole)


def test_killed_between_two_phases_and_in_the_middle_of_the_token_cache(whole, data, tmp_path):
    done(tmp_path, data, "--stage", "1")
    done(tmp_path, data, "--stage", "2")
    assert train(tmp_path, data, "--stage", "3", fault="tokens:0:5")[0] == -signal.SIGKILL
    shards = sorted(path.name for path in (tmp_path / "tokens").glob("*.npz"))
    assert shards and not (tmp_path / "generator-ar.pt").exists()
    # no accident, but the same small shards
    done(tmp_path, data, "--stage", "3", fault="tokens:0:0")
    assert len(list((tmp_path / "tokens").glob("*.npz"))) > len(shards)
    assert equal(tmp_path, whole)


def test_another_number_of_processes_goes_on_with_the_same_order_of_images(data, tmp_path):
    assert train(tmp_path, data, fault="term:0:8")[0] == 3
    done(tmp_path, data, ranks=2)
    results = checkpoint.load(tmp_path / "tokenizer.pt")["results"]
    assert list(results) == ["base", "grow-4", "grow-6", "finetune"]


# ------------------------------------------------------------------------------------------------
# signals

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_saves_and_exits_with_3_also_when_the_whole_group_gets_it(
        whole, data, tmp_path, number, group):
    process = start(tmp_path, data, "--workers", 2, "--base_steps", 6, group=True)
    wait_for(lambda: (tmp_path / "log.jsonl").exists())
    (os.killpg if group else os.kill)(process.pid, number)
    code, err = finish(process)
    assert code == 3 and "Traceback" not in err, err
    done(tmp_path, data, "--workers", 2)
    assert equal(tmp_path, whole)


def test_sigterm_to_torchrun_saves_on_its_way_out(whole_two, data, tmp_path):
    # so there is no checkpoint but that of the way out
    process = start(tmp_path, data, "--save_every", 1000, ranks=2)
    wait_for(lambda: (tmp_path / "log.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    last = rows(tmp_path)[-1]
    phase = last["phase"]
    name = f"generator-{phase}.pt" if phase in ("ar", "maskgit") else "tokenizer.pt"
    saved = checkpoint.load(tmp_path / name)
    assert code != 0 and (saved["phase"], saved["step"]) == (last["phase"], last["step"]), err
    done(tmp_path, data, ranks=2)
    assert equal(tmp_path, whole_two)


def test_a_second_signal_quits_at_once(data, tmp_path):
    # the step never ends, so the first signal cannot be answered
    process = start(tmp_path, data, fault="hang:0:3")
    wait_for(lambda: (tmp_path / "log.jsonl").exists())
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert finish(process, timeout=10)[0] == -signal.SIGTERM


# ------------------------------------------------------------------------------------------------
# several processes

@pytest.mark.parametrize("kind", ["raise", "kill", "hang"])
def test_a_rank_that_fails_ends_the_job_and_leaves_a_good_checkpoint(
        whole_two, data, tmp_path, kind):
    began = time.time()
    code, err = train(tmp_path, data, "--timeout", 10, fault=f"{kind}:1:9", ranks=2)
    assert code != 0 and time.time() - began < 90, err
    assert checkpoint.load(tmp_path / "tokenizer.pt")["phase"] in ("base", "grow-4")
    done(tmp_path, data, ranks=2)
    assert equal(tmp_path, whole_two)


def test_max_restarts_resumes_by_itself_to_the_same_result(whole_two, data, tmp_path):
    done(tmp_path / "run", data, fault="raise:1:9", once=tmp_path / "happened", ranks=2,
         launcher=["--max-restarts=1"])
    assert (tmp_path / "happened").exists() and equal(tmp_path / "run", whole_two)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(data, tmp_path, kind):
    for rank in (0, 1):
        done(tmp_path / str(rank), data, "--stage", "1", fault=f"{kind}:{rank}:4", ranks=2)
    zero, one = (contents(tmp_path / name, ["tokenizer.pt"])["tokenizer.pt"] for name in "01")
    assert same_content(zero["model"], one["model"]), "whoever met it, all skipped the same step"
    assert all(torch.isfinite(p).all() for p in zero["model"].values())


@pytest.mark.parametrize("images", [3, 61])
def test_a_data_set_smaller_than_a_batch_or_uneven_over_ranks_works(tmp_path, images):
    done(tmp_path / "run", some_shapes(tmp_path / "few.npz", images), ranks=2)
    assert all((tmp_path / "run" / name).exists() for name in NAMES)


# ------------------------------------------------------------------------------------------------
# a full disk

def test_a_full_disk_ends_the_run_with_the_old_checkpoint_and_no_remains(whole, data, tmp_path):
    assert train(tmp_path, data, fault="term:0:3")[0] == 3
    before = checkpoint.load(tmp_path / "tokenizer.pt")
    size = (tmp_path / "tokenizer.pt").stat().st_size
    code, err = train(tmp_path, data, limit=size // 2)
    assert code == 2 and "is the disk full" in err and "Traceback" not in err, err
    assert same_content(before, checkpoint.load(tmp_path / "tokenizer.pt"))
    assert not list(tmp_path.glob(".*tmp*"))
    done(tmp_path, data)
    assert equal(tmp_path, whole)


# ------------------------------------------------------------------------------------------------
# a state that lacks something

KEYS = ["settings", "data", "phase", "step", "model", "ema", "optimizer", "random", "results",
        "num_tokens", "bypass"]


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert train(folder, data, fault="term:0:5")[0] == 3
    return checkpoint.load(folder / "tokenizer.pt"), folder


@pytest.mark.parametrize("key", [*KEYS, "model/decoder.norm.weight", "ema/quantizer.codebook",
                                 "optimizer/state", "optimizer/state/3"])
def test_each_state_that_is_taken_away_is_named(quick, stopped, data, tmp_path, key):
    saved, folder = stopped
    shutil.copytree(folder, tmp_path / "run")

    def without(tree, path):
        first, *rest = path
        first = int(first) if first.isdigit() else first
        return {k: without(v, rest) if k == first and rest else v
                for k, v in tree.items() if k != first or rest}
    (tmp_path / "run" / "tokenizer.pt").unlink()
    checkpoint.previous(tmp_path / "run" / "tokenizer.pt").unlink(missing_ok=True)
    saved.pop("format", None)
    checkpoint.save(tmp_path / "run" / "tokenizer.pt", without(saved, key.split("/")))
    name = {"optimizer/state/3": "optimizer"}.get(key, key.split("/")[-1])
    refused(train_shapes, tmp_path / "run", data, names=[name])


# ------------------------------------------------------------------------------------------------
# hostile files

def test_ten_thousand_damaged_files_of_each_kind_give_a_result_or_a_clear_error():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "fuzz.py")], cwd=ROOT,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("10000 damaged files") == 4
    assert done.stdout.count(" 0 anything else") == 4
