"""Promises of experiments/moving.py: a frame for each number of tokens, and nothing else in it."""
import numpy as np
import torch
from PIL import Image

from experiments import moving


def test_frame_k_holds_the_images_and_what_k_tokens_decode_to():
    """The decoder of this test makes a gray as bright as its tokens add up to."""
    real = torch.full((2, 8, 8, 3), 7, dtype=torch.uint8)
    ids = torch.tensor([[10, 20, 30], [1, 2, 3]])

    def decode(x):
        return (x.sum(1).view(-1, 1, 1, 1) / 127.5 - 1).expand(-1, 3, 8, 8)
    pictures = moving.frames(decode, real, ids, ids.flip(0))
    middle = [[picture[6 + 10 * row, 6 + 10 * column, 0] for row in range(3) for column in (0, 1)]
              for picture in pictures]
    assert middle == [[7, 7, 10, 1, 1, 10], [7, 7, 30, 3, 3, 30], [7, 7, 60, 6, 6, 60]]
    bars = [(picture[-4] == moving.BLUE).all(-1).sum() for picture in pictures]
    assert np.allclose(np.diff([0, *bars]), bars[0], atol=1) and bars[0] > 5


def test_the_gif_has_all_frames_and_begins_again(tmp_path):
    pictures = [np.full((4, 6, 3), 60 * k, np.uint8) for k in range(4)]
    moving.write_gif(pictures, str(tmp_path / "a.gif"), scale=3)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (4, (18, 12), 0)
        seen = []
        for k in range(4):
            gif.seek(k)
            seen.append((gif.convert("RGB").getpixel((9, 9)), gif.info["duration"]))
    assert seen == [((0, 0, 0), 900), ((60, 60, 60), 220), ((120, 120, 120), 220),
                    ((180, 180, 180), 1800)]
