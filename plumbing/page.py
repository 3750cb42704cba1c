"""A page of pictures with captions: one index.html that holds all it needs.

In       rows of uint8 images, or HTML such as plot.svg makes; for what a reader can change, a
         section's HTML, and data and tiles for page.js
Out      FOLDER/index.html, and each grid as a PNG beside it, for other uses
"""
import base64
import html
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plumbing import checkpoint
from plumbing.flags import need
from plumbing.images import grid_of, save_grid
from plumbing.processes import need_room

HERE = Path(__file__).parent
STILL = 80_000       # bytes of a still picture in the page; larger ones become JPEGs
TILES = 1_100_000    # bytes of all tiles; with these the page stays below 3 MB

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>
{style}
</style>
<h1>{title}</h1><p>{intro}</p>
{sections}
{figures}
{script}
</html>
"""

FIGURE = """<h2>{title}</h2>
<figure>{picture}
<figcaption>{caption}</figcaption></figure>"""

SECTION = """<section id="{name}"><h2>{title}</h2>
<p>{caption}</p>
{body}
</section>"""

SCRIPT = """<script type="application/json" id="data">{data}</script>
<script type="text/plain" id="tiles">{tiles}</script>
<script>
{code}
</script>"""


class Sheet:
    """Many small pictures as the tiles of one JPEG, known by their numbers.

    size   pixels of a side of the images. A tile's side is a multiple of 8, the block of a JPEG,
           so that no tile shows in its neighbour, and at most 64.
    """

    def __init__(self, size: int):
        self.side = 8 * math.ceil(min(size, 64) / 8)
        self.tiles, self.numbers = [], {}

    def add(self, images: Tensor) -> list[int]:
        """uint8 images (n, H, W, 3) -> n tile numbers; equal images get one number."""
        images = images.cpu()
        if images.shape[1] != self.side:
            x = F.interpolate(images.permute(0, 3, 1, 2).float(), size=self.side, mode="area")
            images = x.permute(0, 2, 3, 1).round().to(torch.uint8)
        found = []
        for tile in images.numpy():
            number = self.numbers.setdefault(tile.tobytes(), len(self.tiles))
            if number == len(self.tiles):
                self.tiles.append(tile)
            found.append(number)
        return found

    @property
    def columns(self) -> int:
        return math.ceil(math.sqrt(len(self.tiles)))

    def jpeg(self) -> bytes:
        """The tiles row by row, `columns` to a row."""
        n, S = self.columns, self.side
        cells = np.zeros((n * n, S, S, 3), np.uint8)
        cells[:len(self.tiles)] = self.tiles
        sheet = cells.reshape(n, n, S, S, 3).swapaxes(1, 2).reshape(n * S, n * S, 3)
        return as_jpeg(Image.fromarray(sheet), TILES)


def as_jpeg(image: Image.Image, limit: int) -> bytes:
    """A JPEG of at most `limit` bytes if quality 30 gives that, and as good as they allow."""
    for quality in (92, 85, 75, 60, 45, 30):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling=0)
        if file.tell() <= limit:
            break
    return file.getvalue()


def as_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class Page:
    """Sections that a reader can change, then pictures with captions.

    The HTML is there after each one of them.

    intro    has to say "Made by: python ...", by which a page is known to be ours
    size     pixels of a side of the images; small ones are enlarged
    data     what page.js reads: a dictionary of plain values, a key for each section; tile numbers
             are those of .sheet
    """

    def __init__(self, folder: str, size: int, title: str = "", intro: str = ""):
        need_room(folder)
        path = os.path.join(folder, "index.html")
        need(not os.path.lexists(path) or self.is_ours(path), f"{path} is there already, and none "
             "of our pages; give another folder with --out")
        self.folder, self.size, self.scale = folder, size, max(1, 64 // size)
        self.sections, self.figures, self.data, self.sheet = [], [], {}, Sheet(size)
        self.title, self.intro, self.script = title, intro, ""

    @staticmethod
    def is_ours(path: str) -> bool:
        """Every page says what it was made by."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return "Made by: python " in file.read(20000)
        except OSError:
            return False

    def section(self, name: str, title: str, caption: str, body: str, data) -> None:
        """What page.js brings to life. body: HTML; title and caption: plain text."""
        self.data[name] = data
        self.sections.append(SECTION.format(name=name, title=html.escape(title), body=body,
                                            caption=html.escape(caption)))
        sheet = {"side": self.sheet.side, "columns": self.sheet.columns}
        # TRAP: "</script>" in a class's name would end the element.
        data = json.dumps({**self.data, "sheet": sheet}).replace("<", "\\u003c")
        self.script = SCRIPT.format(data=data, tiles=as_uri("jpeg", self.sheet.jpeg()),
                                    code=(HERE / "page.js").read_text(encoding="utf-8"))
        self.write()

    def grid(self, name: str, title: str, caption: str, rows: list[Tensor]) -> None:
        """Rows of uint8 images (n, H, W, 3), all with the same n; with a fourth channel, 0 is
        transparent. The PNG beside the page shows them enlarged."""
        path, cells = os.path.join(self.folder, f"{name}.png"), torch.cat([*map(opaque, rows)])
        save_grid(cells, path, columns=len(rows[0]), scale=self.scale)
        image, file = grid_of(cells, columns=len(rows[0])), io.BytesIO()
        image.save(file, "PNG", optimize=True)
        kind, data = "png", file.getvalue()
        if len(data) > STILL:
            ground = Image.new("RGB", image.size, (128, 128, 128))  # seen in light and dark
            ground.paste(image, mask=image.getchannel("A"))
            small = ground.resize([math.ceil(s / max(1, self.size / 64)) for s in image.size])
            kind, data = "jpeg", as_jpeg(small, STILL)
        width = len(rows[0]) * 128  # small grids need not fill the page
        self.add(title, caption, f'<img src="{as_uri(kind, data)}" alt="{html.escape(title)}" '
                 f'style="width: min(100%, {width}px)">')
        print(f"{path}: {title}")

    def add(self, title: str, caption: str, picture: str) -> None:
        """picture: HTML; the others plain text."""
        self.figures.append(FIGURE.format(title=html.escape(title), picture=picture,
                                          caption=html.escape(caption)))
        self.write()

    def write(self) -> None:
        text = PAGE.format(title=html.escape(self.title), intro=html.escape(self.intro),
                           style=(HERE / "page.css").read_text(encoding="utf-8"),
                           sections="\n".join(self.sections), figures="\n".join(self.figures),
                           script=self.script)
        with checkpoint.replacing(os.path.join(self.folder, "index.html")) as file:
            # A class folder's name may hold bytes that are no text.
            file.write(text.encode(errors="backslashreplace"))


def opaque(images: Tensor) -> Tensor:
    """uint8 images (n, H, W, 3 or 4) -> (n, H, W, 4); those of three channels become opaque."""
    return images if images.shape[-1] == 4 else F.pad(images, (0, 1), value=255)
