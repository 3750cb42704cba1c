"""d2it.train: three stages, and one line for each thing that does not fit.

Exact resume: tests/test_loop.py.
"""
import contextlib
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

import config
from d2it import train
from d2it.content import Content
from d2it.diffusion import loss
from d2it.dvae import DVAE
from d2it.model import D2iT
from d2it.presets import CONFIGS, PRESETS, load_preset, parse_run
from d2it.progress import held_out
from generator import ARGenerator, Generator
from helpers import SMALL_D2IT, interrupt_at, refused, rows, same_content
from layers import count_parameters
from plumbing import checkpoint
from plumbing import run as run_folder
from plumbing.datasets import open_images
from plumbing.flags import build

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# the stages

def test_a_run_leaves_three_checkpoints_a_log_and_pictures(finished):
    for name in ("dvae", "grain", "content"):
        assert checkpoint.load(finished / f"{name}.pt")["phase"] == "finished"
        assert (finished / "samples" / f"{name}.png").exists()
        assert (finished / "samples" / f"{name}-0000004.png").exists()
    dvae, saved = DVAE.load(finished / "dvae.pt"), checkpoint.load(finished / "dvae.pt")
    assert dvae.limit > 2.355 and not torch.equal(dvae.latent_std, torch.ones(2, 4)), "measured"
    assert same_content(saved["model"], saved["ema"]), "the averaged weights are what stays"
    last = {row["phase"]: row for row in rows(finished)}
    assert {"psnr", "codes", "psnr_fine_cells", "psnr_coarse_cells"} <= set(last["dvae"])
    assert last["grain"]["bits_per_map"] > 0 and last["content"]["loss"] > 0
    terms = next(row for row in rows(finished) if row["phase"] == "content")
    assert {"fine", "coarse", "quarter_1", "quarter_4"} <= set(terms)


def one_of_two(rank: int, folder: str, data: str, port: int, stop: tuple | None) -> None:
    """A process of two; rank 0 gets a signal when it has logged stop = (phase, step)."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_folder.EVAL_IMAGES = 20
    if stop and rank == 0:
        interrupt_at(pytest.MonkeyPatch(), *stop)
    with contextlib.suppress(SystemExit):
        train.main(parse_run("", [*SMALL_D2IT, "--run", folder, "--data", data]))


@pytest.mark.faults
def test_two_processes_that_are_interrupted_twice_end_with_the_same_bits(data, tmp_path):
    port = 20000 + os.getpid() % 20000
    plan = [("whole", None), ("parts", ("dvae", 3)), ("parts", ("content", 2)), ("parts", None)]
    for k, (name, stop) in enumerate(plan):
        mp.spawn(one_of_two, (str(tmp_path / name), data, port + k, stop), nprocs=2)
    for name in ("dvae", "grain", "content"):
        whole, parts = (checkpoint.load(tmp_path / f / f"{name}.pt") for f in ("whole", "parts"))
        assert whole["phase"] == "finished" and same_content(whole, parts), name


# ------------------------------------------------------------------------------------------------
# what does not belong together

def test_stages_2_and_3_refuse_to_begin_without_a_finished_dvae(training, tmp_path):
    for stage in ("2", "3"):
        refused(training, tmp_path / stage, "--stage", stage, names=["finished DVAE"])


def test_a_map_model_or_a_content_model_of_another_dvae_is_refused(run, training):
    assert isinstance(D2iT.of_run(str(run), CPU), D2iT)
    saved = checkpoint.load(run / "dvae.pt")
    saved["ema"]["decoder.corner"] += 1
    checkpoint.save(run / "dvae.pt", saved)
    refused(D2iT.of_run, str(run), CPU, names=["grain.pt", "another DVAE", "--stage 2"])
    refused(training, run, names=["grain.pt", "another DVAE"])
    saved = checkpoint.load(run / "grain.pt")  # as if it had learned the maps of this one
    saved["tokenizer"] = DVAE.load(run / "dvae.pt").fingerprint
    checkpoint.save(run / "grain.pt", saved)
    refused(D2iT.of_run, str(run), CPU, names=["content.pt", "another DVAE", "--stage 3"])
    refused(training, run, names=["content.pt", "another DVAE"])


def test_a_missing_stage_is_named(run):
    for file in run.glob("content*.pt"):
        file.unlink()
    refused(D2iT.of_run, str(run), CPU, names=["content.pt", "d2it.train"])


@pytest.mark.parametrize("flag,value,stage", [
    ("--kl_weight", "0.5", "dvae"), ("--grain_width", "16", "grain"),
    ("--path", "noise", "content")])
def test_other_settings_than_those_of_a_checkpoint_are_refused(run, training, flag, value, stage):
    refused(training, run, flag, value, names=[f"{stage}.pt", flag[2:]])


def test_a_run_of_the_other_system_is_refused(training, tmp_path, small_run):
    folder = tmp_path / "other"
    shutil.copytree(small_run, folder)
    for preset in ([], ["--preset", "d2it-tiny"]):
        refused(parse_run, "", [*preset, "--run", str(folder)], names=["tiny", "--run"])
    (folder / "config.json").unlink()
    refused(training, folder, names=["train.py"])


def test_the_other_system_refuses_a_run_of_this_one_and_leaves_it_as_it_is(run):
    before = (run / "config.json").read_bytes()
    for preset in ([], ["--preset", "tiny"]):
        refused(config.parse_run, "", [*preset, "--run", str(run)], names=["d2it-tiny", "--run"])
    assert (run / "config.json").read_bytes() == before
    (run / "config.json").write_text("{")
    refused(config.parse_run, "", ["--run", str(run)], names=["cannot be read"])
    assert config.parse_run("", ["--preset", "tiny", "--run", str(run)]).preset == "tiny"


def test_held_out_images_of_other_classes_get_the_label_none(data, tmp_path):
    for k in range(4):
        Image.new("RGB", (32, 32), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
    data, flat = open_images(data), open_images(str(tmp_path))
    for val, expected in ((flat, [10] * 4), (data, data.labels[:4].tolist())):
        run = SimpleNamespace(data=data, val=val, configs=load_preset("d2it-tiny"),
                              train=load_preset("d2it-tiny")[2], eval_indices=np.arange(4),
                              procs=SimpleNamespace(device=CPU))
        assert next(held_out(run))[1].tolist() == expected


# ------------------------------------------------------------------------------------------------
# the parts of a run

def test_each_part_can_be_loaded_by_itself(finished):
    content, grain = Content.load(finished / "content.pt"), Generator.load(finished / "grain.pt")
    assert isinstance(grain, ARGenerator) and grain.num_tokens == 16 and grain.codebook_size == 2
    assert content.fingerprint == grain.tokenizer_fingerprint == DVAE.load(
        finished / "dvae.pt").fingerprint
    assert content.classes == len(grain.classes) == 10


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_and_has_a_learning_rate_for_each_stage(name):
    dvae, content, cfg = load_preset(name)
    assert dvae.image_size == dvae.side * dvae.cell_size
    assert min(cfg.dvae_learning_rate, cfg.grain_learning_rate, cfg.content_learning_rate) > 0
    with torch.device("meta"):
        DVAE(dvae), Content(content, dvae.code_dim, dvae.side, 10)


@pytest.mark.parametrize("depth,refine,width,heads,paper", [
    (20, 4, 1024, 16, 467), (24, 4, 1152, 16, 687)])
def test_the_papers_sizes_have_its_numbers_of_parameters(depth, refine, width, heads, paper):
    values = dict(content_width=width, content_depth=depth, refine_depth=refine,
                  content_heads=heads)
    cfg = build(CONFIGS, values)[1]
    with torch.device("meta"):
        count = count_parameters(Content(cfg, 4, 16, 1000)) / 1e6
    assert count == pytest.approx(paper, rel=0.01)


def test_the_256_pixel_preset_takes_a_step_with_small_widths():
    small = dict(dvae_width=8, dvae_blocks=1, content_width=32, content_depth=1, refine_depth=1,
                 content_heads=2, grain_width=32, grain_depth=1, grain_heads=2)
    dvae_cfg, cfg, _ = build(CONFIGS, {**PRESETS["d2it-256"], **small})
    torch.manual_seed(0)
    dvae, content = DVAE(dvae_cfg), Content(cfg, dvae_cfg.code_dim, dvae_cfg.side, 10)
    pixels = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)
    pixels[0, 128:] = 9
    dvae.calibrate(dvae.entropy(pixels))
    codes = dvae.encode(pixels)
    assert codes.z.shape == (2, 4, 32, 32) and codes.grain.shape == (2, 16, 16)
    loss(content, codes.z, torch.tensor([0, 1]), codes.grain)[0].backward()
    assert dvae.decode(codes).shape == (2, 3, 256, 256)


def test_wrong_sizes_are_refused_with_what_to_try():
    for values, names in (
            (dict(image_size=30, dvae_mults=(1, 2, 2, 4)), ["try 24 or 32"]),
            (dict(dvae_mults=(1, 2)), ["dvae_mults 1 2", "cells of 2 pixels", "three"]),
            (dict(content_width=30), ["content_width 30", "try"]),
            (dict(grain_policy="wavelet"), ["entropy"]),
            (dict(grain_ratio=1.5), ["share"])):
        refused(build, CONFIGS, values, names=names)
