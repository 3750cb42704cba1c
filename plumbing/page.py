"""A page of pictures with captions: an index.html that needs nothing but its own folder.

In       rows of uint8 images, or HTML such as plot.svg makes
Out      FOLDER/index.html and a PNG for each grid
"""
import html
import os

import torch
from torch import Tensor

from plumbing import checkpoint
from plumbing.flags import need
from plumbing.images import save_grid
from plumbing.processes import need_room

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
      color: #222; background: #fff}}
img, svg {{max-width: 100%; height: auto; display: block}}
img {{border: 1px solid #ddd}}
figure {{margin: 1.5rem 0 3rem}} figcaption {{margin: .5rem 0}}
h2 {{margin: 2rem 0 .5rem}} code {{background: #f3f3f3; overflow-wrap: anywhere}}
</style>
<h1>{title}</h1><p>{intro}</p>
{figures}
</html>
"""

FIGURE = """<h2>{title}</h2>
<figure>{picture}
<figcaption>{caption}</figcaption></figure>"""


class Page:
    """Pictures with captions; the HTML that shows them is there after each one of them.

    intro    has to say "Made by: python ...", by which a page is known to be ours
    size     pixels of a side of the images; small ones are enlarged
    """

    def __init__(self, folder: str, size: int, title: str = "", intro: str = ""):
        need_room(folder)
        path = os.path.join(folder, "index.html")
        need(not os.path.lexists(path) or self.is_ours(path), f"{path} is there already, and none "
             "of our pages; give another folder with --out")
        self.folder, self.scale, self.figures = folder, max(1, 64 // size), []
        self.title, self.intro = title, intro

    @staticmethod
    def is_ours(path: str) -> bool:
        """Every page says what it was made by."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return "Made by: python " in file.read(10000)
        except OSError:
            return False

    def grid(self, name: str, title: str, caption: str, rows: list[Tensor]) -> None:
        """A PNG beside the page, of rows of uint8 images (n, H, W, 3), all with the same n."""
        path = os.path.join(self.folder, f"{name}.png")
        save_grid(torch.cat(rows), path, columns=len(rows[0]), scale=self.scale)
        self.add(title, caption, f'<img src="{name}.png" alt="{html.escape(title)}">')
        print(f"{path}: {title}")

    def add(self, title: str, caption: str, picture: str) -> None:
        """picture: HTML; the others plain text."""
        self.figures.append(FIGURE.format(title=html.escape(title), picture=picture,
                                          caption=html.escape(caption)))
        text = PAGE.format(title=html.escape(self.title), intro=html.escape(self.intro),
                           figures="\n".join(self.figures))
        with checkpoint.replacing(os.path.join(self.folder, "index.html")) as file:
            # A class folder's name may hold bytes that are no text.
            file.write(text.encode(errors="backslashreplace"))
