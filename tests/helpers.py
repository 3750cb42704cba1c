"""What several test files need: images to feed in, programs to start, what a UserError is like."""
import contextlib
import copy
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten, tree_unflatten

import config
import train
from plumbing import checkpoint
from plumbing.datasets import open_images
from plumbing.flags import UserError
from plumbing.start import main_with_user_errors

ROOT = Path(__file__).parent.parent
RED = (200, 30, 60)
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)
# train.py's flags for a run of seconds, with every phase in it.
SMALL = ("--preset tiny --encoder_width 32 --encoder_heads 2 --expert_width 32 --expert_heads 2 "
         "--decoder_width 32 --decoder_heads 2 --token_schedule 2 4 6 --codebook_size 16 "
         "--batch_size 8 --base_steps 6 --continuous_steps 3 --grow_steps 4 --finetune_steps 4 "
         "--generator_width 32 --generator_depth 1 --generator_heads 2 --generator_batch_size 8 "
         "--generator_steps 5 --tail_drop 0.5 --flow_decoder_width 16 --flow_decoder_heads 2 "
         "--flow_decoder_depth 1 --flow_decoder_steps 5 "
         "--reseed_every 2 --log_every 1 --save_every 2 --sample_every 3 --device cpu").split()
# d2it.train's, with all stages in it.
SMALL_D2IT = (
    "--preset d2it-tiny --dvae_width 8 --content_width 32 --content_depth 1 --refine_depth 1 "
    "--content_heads 2 --grain_width 32 --grain_depth 1 --grain_heads 2 --batch_size 8 "
    "--dvae_steps 5 --grain_steps 5 --content_steps 5 --save_every 2 --log_every 1 "
    "--sample_every 4 --device cpu").split()


def noise(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(Image.new("RGB", (6, 4), RED), "PNG")


def put(path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def folder_of(root, n: int, classes=("cat", "dog"), size: int = 8, first: int = 0):
    """n lossless images, dealt to the classes in turn; other ones from another `first`."""
    for k in range(n):
        content = encoded(Image.fromarray(noise(first + k, size, size)), "PNG")
        put(root / classes[k % len(classes)] / f"{k:03}.png", content)
    return root


def packed(root, path, prefix: str) -> str:
    """The folder as the archive that `path` ends in."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, prefix + str(file.relative_to(root)))
    else:
        kind = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz"}[path.suffix]
        with tarfile.open(path, kind) as archive:
            for file in reversed(files):  # the order inside an archive must not matter
                archive.add(file, prefix + str(file.relative_to(root)))
    return str(path)


def refused(call, *arguments, names=()) -> str:
    """The one line of the UserError that the call must raise; it must contain `names`."""
    with pytest.raises(UserError) as caught:
        result = call(*arguments)
        if hasattr(result, "__next__"):
            for _ in range(1000):
                next(result)
    message = str(caught.value)
    assert "\n" not in message and "object at 0x" not in message
    for name in names:
        assert name in message, message
    return message


def take(stream, n: int):
    return [(images.clone(), y.clone()) for images, y in itertools.islice(iter(stream), n)]


def same(a, b) -> bool:
    """Do two lists of batches hold the same images and labels?"""
    return len(a) == len(b) and all(torch.equal(images, others) and torch.equal(y, z)
                                    for (images, y), (others, z) in zip(a, b))


def some_shapes(path, n: int, first: int = 0) -> str:
    """n of the built-in shapes as .npz: encoding all of them takes longer than training on them."""
    shapes, chosen = open_images("shapes"), np.arange(first, first + n)
    np.savez(path, x=np.stack([shapes.load(i) for i in chosen]), y=shapes.labels[chosen],
             classes=np.array(shapes.classes))
    return str(path)


def shape_pixels(n: int) -> torch.Tensor:
    """The first n of the built-in shapes: uint8 (n, 32, 32, 3)."""
    images = open_images("shapes")
    return torch.from_numpy(np.stack([images.load(i) for i in range(n)]))


def held_shapes(path, n: int = 60) -> str:
    """n shapes that are none of the first 60, which tests learn from."""
    return some_shapes(path, n, first=60)


def made_once(tmp_path_factory, name: str, make) -> Path:
    """A folder that make(folder) fills, for all of pytest's processes; never change it.

    The first process that asks makes it, and the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several, each with a folder of its own in this
        base = base.parent
    folder, finished = base / name, base / f"{name}.finished"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            finished.touch()
    return folder


def same_content(a, b) -> bool:
    """Equal to the bit, through dicts and lists, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_content(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_content, a, b))
    return a == b


def without_times(saved: dict) -> dict:
    results = copy.deepcopy(saved.get("results", {}))
    for result in results.values():
        result.pop("seconds", None)
    return {**saved, "results": results}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def contents(folder: Path) -> dict[Path, bytes]:
    """All files below, but for a run's lock, which names its holder until that process ends."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def train_shapes(folder, data, *flags) -> None:
    """train.py in this process: the settings of SMALL, and these flags."""
    train.main(config.parse_run("", [*SMALL, "--run", str(folder), "--data", data, *flags]))


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def when_logged(patch, phase: str, step: int | None, act) -> None:
    """act() as soon as that line of the log is written; step None: that of the phase's results."""
    write = checkpoint.append_jsonl

    def write_and_act(path, row):
        write(path, row)
        logged = row["step"] if "learning_rate" in row else None
        if (row["phase"], logged) == (phase, step):
            act()
    patch.setattr(checkpoint, "append_jsonl", write_and_act)


def interrupt_at(patch, phase: str, step: int) -> None:
    """SIGTERM as soon as that line of the log is written."""
    when_logged(patch, phase, step, lambda: signal.raise_signal(signal.SIGTERM))


def replayed(model, call, inputs):
    """In the place of graphs.record, on any device: outputs and gradients lie in memory that the
    next call writes over, as those of a recording do."""
    params, kept = [p for p in model.parameters() if p.requires_grad], {}

    def into(name, value):
        if value is not None:
            value = kept.setdefault(name, value.detach().clone()).copy_(value.detach()).detach()
        return value

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, count, *inputs_and_params):
            with torch.enable_grad():
                made, shape = tree_flatten(call(*inputs_and_params[:count]))
            kept["shape"], ctx.made = shape, made
            outputs = tuple(into(i, x) for i, x in enumerate(made))
            ctx.mark_non_differentiable(*(o for o, x in zip(outputs, made) if not x.requires_grad))
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            pairs = [(x, g) for x, g in zip(ctx.made, grads) if x.requires_grad]
            outputs, grads = zip(*pairs)
            found = torch.autograd.grad(outputs, params, grads, allow_unused=True)
            written = (into(f"gradient {i}", g) for i, g in enumerate(found))
            return (*[None] * (1 + len(inputs)), *written)

    def replay(*inputs):
        made = Replay.apply(len(inputs), *inputs, *params)
        return tree_unflatten(list(made), kept["shape"])
    return replay


# ------------------------------------------------------------------------------------------------
# programs, as their users start them

# A server imports torch once and forks for each program: that saves 3 s of every start, 1 s of it
# by torch._dynamo, which every optimizer imports. A process that has run tests is no good to fork:
# it has threads, patches and settings.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "PIL.Image", "tqdm"])


def run_as_main(words: list[str], said: str, environment: dict[str, str]) -> None:
    """In the child: `python WORDS...` in the root, its output to the files said.out, said.err."""
    for number, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said + ending, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(THREADS)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def start_program(*words, **environment: str):
    """`python WORDS...` as a multiprocessing.Process that has been started."""
    said = os.path.join(tempfile.mkdtemp(), "said")
    child = SERVER.Process(target=run_as_main, args=(list(map(str, words)), said, environment))
    child.start()
    child.said = said
    return child


def ended(child, timeout: float = 120) -> SimpleNamespace:
    """Wait for a started program -> .returncode .stdout .stderr"""
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        child.join()
    texts = [Path(child.said + ending) for ending in (".out", ".err")]
    out, err = (path.read_text("utf-8", "replace") if path.exists() else "" for path in texts)
    for path in texts:
        path.unlink(missing_ok=True)
    return SimpleNamespace(returncode=child.exitcode, stdout=out, stderr=err)


def program(*words, **environment: str) -> SimpleNamespace:
    """`python WORDS...` to its end, as subprocess.run(capture_output=True) gives it."""
    return ended(start_program(*words, **environment))


def ranks(n: int, *words) -> list[SimpleNamespace]:
    """The same on n processes, with the environment that torchrun gives each."""
    place = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=str(free_port()))
    children = [start_program(*words, RANK=str(rank), LOCAL_RANK=str(rank), **place)
                for rank in range(n)]
    return [ended(child) for child in children]


def called(program, *words) -> tuple[int, str, str]:
    """A program's module, in this process and on the CPU -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [*map(str, words), *([] if "--device" in words else ["--device", "cpu"])]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main_with_user_errors(lambda: program.main(program.parse(words)))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def good(program, *words) -> str:
    """The same, which must end well -> stdout."""
    code, out, err = called(program, *words)
    assert code == 0, err
    return out


def turned_away(program, *words, says=()) -> None:
    """The same, which must end with exit code 2 and one line, perhaps behind notes."""
    code, out, err = called(program, *words)
    *notes, last = err.splitlines()
    assert (code, out) == (2, "") and last.startswith("error: "), err
    assert all(line.startswith("note: ") for line in notes), err
    for text in says:
        assert text in last, err


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
