"""outputs.py: what cannot be written is told before anything is (by all: d2it/test_programs.py)."""
import os

import pytest

from helpers import refused
from plumbing.outputs import JSON, NPZ, need_places


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    need_places({"--json": (str(tmp_path / "old.json"), JSON),
                 "--npz": (str(tmp_path / "new.npz"), NPZ), "--stats": (None, NPZ)},
                {"--out": str(tmp_path / "a" / "b"), "--other": None}, {"--data": None})
    assert sorted(os.listdir(tmp_path)) == ["a", "old.json"]
    assert (tmp_path / "old.json").read_text() == "{}"


@pytest.mark.parametrize("name, says", (
    ("folder", "is a folder"), ("new/", "is a folder"), ("", "empty"), (" ", "empty"),
    ("none/x.json", "no folder"), ("file/x.json", "is a file, not a folder"),
    ("n" * 300 + ".json", "name too long"), ("n" * 250, "name too long"),
    ("photo.jpg", "is no .json file"), ("samples.npz", "is no .json file"),
    ("config.json", "part of the run"), ("dvae.pt", "part of the run"), ("pipe", "pipe"),
))
def test_a_file_that_cannot_be_written_is_named_with_its_flag(tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    for other in ("file", "photo.jpg", "samples.npz", "config.json", "dvae.pt"):
        (tmp_path / other).write_bytes(b"\xff\xd8 something else")
    os.mkfifo(tmp_path / "pipe")
    path = f"{tmp_path}/{name}" if name.strip() else name
    message = refused(need_places, {"--json": (path, JSON)}, names=["--json"])
    assert says in message.lower()


def test_two_flags_of_one_file_are_refused_however_it_is_spelled(tmp_path):
    one, other = str(tmp_path / "x"), str(tmp_path / "." / "sub" / ".." / "x")
    (tmp_path / "sub").mkdir()
    refused(need_places, {"--npz": (one, NPZ), "--json": (other, JSON)},
            names=["--npz", "--json", "same file"])
    (tmp_path / "map.png").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "map.png")
    refused(need_places, {"--json": (str(tmp_path / "link"), JSON)}, {},
            {"--grain": ["elsewhere", str(tmp_path / "map.png")]}, names=["--json", "--grain"])
