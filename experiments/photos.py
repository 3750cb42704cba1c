"""A folder of pictures like one's own: mixed sizes, formats and modes, one folder per class.

To try the README's "Your own pictures" with. The first images of each class are enlarged to sizes
between 32x32 and 200x150 and saved in turn as JPEG, PNG, WebP and GIF, every seventh of them gray,
with a palette, transparent, CMYK, or turned on its side with an EXIF tag that says so.

Run      python -m experiments.photos --data cifar10/train --classes dog ship --out photos
Makes    the folder photos/
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os

from PIL import Image

from plumbing.datasets import open_images
from plumbing.flags import Parser, choose, need, number
from plumbing.outputs import need_places

SIZES = ((32, 32), (64, 48), (100, 100), (90, 160), (200, 150))
ENDINGS = ("jpg", "png", "webp", "gif", "JPG", "jpeg")
ORIENTATION, TURNED = 0x0112, 6  # EXIF: show it turned a quarter clockwise


def save(image: Image.Image, number: int, stem: str) -> None:
    """One picture, its size, format and mode chosen by its number."""
    ending, special, options = ENDINGS[number % len(ENDINGS)], number // 7 % 5, {}
    image = image.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)
    if number % 7 == 0:
        if special == 0:
            image = image.convert("L")
        elif special == 1:
            image, ending = image.convert("P", palette=Image.Palette.ADAPTIVE), "png"
        elif special == 2:
            image, ending = image.convert("RGBA"), "png"
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        elif special == 3:
            image, ending = image.convert("CMYK"), "jpg"
        else:
            image, ending = image.transpose(Image.Transpose.ROTATE_90), "jpg"
            options["exif"] = Image.Exif()
            options["exif"][ORIENTATION] = TURNED
    image.save(f"{stem}.{ending}", **options)


def main() -> None:
    parser = Parser(prog="photos.py", description=__doc__)
    parser.add_argument("--data", default="shapes", help="images to take, in any form that "
                        "train.py takes (default: the built-in shapes)")
    parser.add_argument("--classes", nargs="+", metavar="CLASS",
                        help="names of classes (default: all)")
    parser.add_argument("--per_class", type=number(int, 1), default=400, metavar="N",
                        help="pictures of each class (default: 400)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    args = parser.parse_args()
    images = open_images(args.data)
    need(not os.path.exists(args.out), f"{args.out} is there already; give --out a new folder")
    classes = args.classes or images.classes
    for name in classes:
        choose("class", name, images.classes)
    need_places(folders={"--out": args.out})
    count = 0
    for name in classes:
        label = images.classes.index(name)
        members = [i for i, l in enumerate(images.labels) if l == label][:args.per_class]
        os.makedirs(os.path.join(args.out, name))
        for place, i in enumerate(members):
            stem = os.path.join(args.out, name, f"IMG {place:04}")
            save(Image.fromarray(images.load(i)), place, stem)
            count += 1
    print(f"{args.out}: {count} pictures")


if __name__ == "__main__":
    main_with_user_errors(main)
