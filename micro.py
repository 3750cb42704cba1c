"""NativeTok on one page: images to ordered tokens and back, longer sequences, new images.

It imports nothing of the project. Each part has the name that it has there, where it is explained
at length: mit.py, mocet.py, quantizer.py, decoder.py, train.py, generator.py.

Run       python micro.py      (CPU, about a minute)
Makes     micro.png: held-out images, their first 1, 2, 4, 8 tokens decoded, token 1 swapped, later
          tokens re-encoded, new images
"""
import copy
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

S, P, N = 32, 8, 16  # side of an image and of a patch in pixels, patches of an image
D, E = 96, 64        # channels of MIT, decoder and generator; channels of an expert
K, d = 128, 8        # codes in the codebook, channels of a code
SHORT, L = 4, 8      # tokens of an image at first, and after growth
TRAIN = 8000         # images to learn from

# ------------------------------------------------------------------------------------------------
# Images: five shapes, four colours, any place and size. So many are possible that no held-out image
# is a training image, and so few bits tell them apart that 8 tokens of log2(128) = 7 bits can.

SHAPES = {  # how deep the point x, y lies inside a shape of radius r, in pixels
    "disc": lambda x, y, r: r - np.hypot(x, y),
    "ring": lambda x, y, r: r / 4 - abs(np.hypot(x, y) - 0.75 * r),
    "square": lambda x, y, r: 0.85 * r - np.maximum(abs(x), abs(y)),
    "triangle": lambda x, y, r: np.minimum(r - y, (y + r) / 2 - abs(x)),
    "plus": lambda x, y, r: np.minimum(r - np.maximum(abs(x), abs(y)),
                                       r / 3 - np.minimum(abs(x), abs(y))),
}
COLOURS = np.array([(240, 70, 55), (255, 205, 50), (80, 160, 255), (110, 220, 120)])


def draw(n, seed):
    """n images (n, 3, 32, 32) in [-1, 1] and their labels (n,)."""
    rng = np.random.default_rng(seed)
    labels, colours = rng.integers(len(SHAPES), size=n), rng.integers(len(COLOURS), size=n)
    row, column = rng.uniform(12, 20, (2, n, 1, 1))
    r = rng.uniform(7, 11, (n, 1, 1))
    y, x = np.arange(S)[:, None] + 0.5 - row, np.arange(S) + 0.5 - column
    depth = np.empty((n, S, S))
    for label, inside in enumerate(SHAPES.values()):
        mine = labels == label
        depth[mine] = inside(x[mine], y[mine], r[mine])
    cover = np.clip(depth + 0.5, 0, 1)[:, None]  # (n, 1, S, S), soft at the edge
    images = cover * COLOURS[colours][:, :, None, None] / 127.5 - 1
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels)

# ------------------------------------------------------------------------------------------------
# One transformer layer. All four networks are made of it.


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.wo = nn.Linear(width, width)
        self.w1, self.w2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, asking, rows, causal=False):
        """asking (B, R, width) looks at rows (B, T, width) -> what it reads, (B, R, width)."""
        asked = ((self.wq, asking), (self.wk, rows), (self.wv, rows))
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w, x in asked)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x):
        return self.w2(F.gelu(self.w1(norm(x))))

    def forward(self, x, causal=False):
        x = x + self.attend(norm(x), norm(x), causal)
        return x + self.mlp(x)

# ------------------------------------------------------------------------------------------------
# The tokenizer: images -> MIT -> x_latent -> experts, one by one -> ids -> decoder -> images


class MIT(nn.Module):
    """Meta Image Transformer: all patches look at all. Its features are computed once per image."""

    def __init__(self):
        super().__init__()
        self.embed, self.pos = nn.Linear(3 * P * P, D), nn.Parameter(torch.randn(N, D))
        self.layer, self.dimension_switcher = Layer(D, 4), nn.Linear(D, E)

    def forward(self, images):
        x = F.unfold(images, P, stride=P).mT                    # (B, N, 3*P*P)
        x = self.layer(self.embed(x) + self.pos)                # (B, N, D)
        return self.dimension_switcher(norm(x))                 # x_latent (B, N, E)


class Expert(nn.Module):
    """Emits one token. Its query looks at the image's features and at the tokens before."""

    def __init__(self):
        super().__init__()
        self.query, self.pos = nn.Parameter(torch.randn(E)), nn.Parameter(torch.randn(E))
        self.layer, self.head = Layer(E, 8), nn.Linear(E, d)

    def forward(self, rows):
        """rows (B, N + earlier tokens, E) -> z_i (B, d)."""
        h = self.query.expand(len(rows), 1, -1)                 # (B, 1, E)
        context = norm(torch.cat([rows, h], dim=1))
        h = h + self.layer.attend(norm(h), context)
        h = h + self.layer.mlp(h)
        return self.head(norm(h))[:, 0]


class Quantizer(nn.Module):
    """K codes on the unit sphere: a vector becomes the nearest, and its number is the token."""

    def __init__(self):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(K, d))
        self.used = torch.zeros(K, dtype=torch.bool)  # since dead codes were restarted last

    def codes(self):
        return F.normalize(self.codebook, dim=-1)

    def quantize(self, z):
        """z (B, d) -> z_q (B, d), ids (B,), z normalised."""
        z, codes = F.normalize(z, dim=-1), self.codes().detach()
        ids = (z @ codes.T).argmax(dim=-1)
        # Straight-through: argmax has no gradient, so that of z_q is handed to z unchanged.
        return z + (codes[ids] - z).detach(), ids, z

    def loss(self, z, ids):
        """z (B, L, d) normalised, ids (B, L) -> scalar."""
        e = self.codes()[ids]
        codebook = F.mse_loss(e, z.detach())    # codes move to vectors
        commitment = F.mse_loss(z, e.detach())  # vectors stay near their codes
        # Each position shall use many codes: without this, new experts end with one code for all.
        # A soft choice has the gradient that argmax lacks; share (L, K) is its mean over the batch.
        share = (z @ self.codes().detach().T / 0.1).softmax(dim=-1).mean(dim=0)
        entropy = 1 - torch.special.entr(share).sum(dim=-1).mean() / math.log(K)
        return codebook + 0.25 * commitment + 0.05 * entropy

    @torch.no_grad()
    def restart_dead_codes(self, z):
        """A code that nothing chose gets no gradient, ever: move it to where a vector is."""
        z = z.flatten(0, -2)
        dead = ~self.used
        self.codebook[dead] = z[torch.randint(len(z), (int(dead.sum()),))]
        self.used[:] = False


class Decoder(nn.Module):
    """Any first k codes -> image. Code i adds a linear map of its own to all patches at once."""

    def __init__(self):
        super().__init__()
        self.mask_tokens = nn.Parameter(torch.randn(N, D))
        self.maps = nn.ParameterList(torch.randn(d, N * D) * SHORT ** -0.5 for _ in range(SHORT))
        self.layer, self.to_pixels = Layer(D, 4), nn.Linear(D, 3 * P * P)

    def forward(self, z_q):
        maps = torch.cat(list(self.maps)[:z_q.shape[1]])                      # (k*d, N*D)
        x = self.mask_tokens + (z_q.flatten(1) @ maps).unflatten(1, (N, D))   # (B, N, D)
        pixels = self.to_pixels(norm(self.layer(x)))                          # (B, N, 3*P*P)
        return F.fold(pixels.mT, S, P, stride=P)                              # (B, 3, S, S)


class Tokenizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mit, self.quantizer, self.decoder = MIT(), Quantizer(), Decoder()
        self.experts = nn.ModuleList(Expert() for _ in range(SHORT))
        self.embed_code = nn.Linear(d, E)
        nn.init.normal_(self.embed_code.weight)  # codes have norm 1: this makes them unit scale

    def tokenize(self, x_latent, force=None):
        """x_latent (B, N, E) -> z_q (B, L, d), ids (B, L), z. This loop is the paper.

        force   {position from 0: ids (B,)}: these are emitted there, and later experts read them
        """
        rows, emitted = x_latent, []
        for i, expert in enumerate(self.experts):
            z_q_i, id_i, z_i = self.quantizer.quantize(expert(rows))
            if force and i in force:
                z_q_i, id_i = self.quantizer.codes()[force[i]], force[i]
            # Later experts read the code, not the vector: it is all that a generator will know.
            prior = self.embed_code(z_q_i) + expert.pos                       # (B, E)
            rows = torch.cat([rows, prior[:, None]], dim=1)                   # (B, N+i+1, E)
            emitted.append((z_q_i, id_i, z_i))
        return (torch.stack(parts, dim=1) for parts in zip(*emitted))

    @torch.no_grad()
    def encode(self, images, force=None):
        _, ids, _ = self.tokenize(self.mit(images), force)
        return ids

    @torch.no_grad()
    def decode(self, ids):
        """ids (B, k), any k -> images."""
        return self.decoder(self.quantizer.codes()[ids]).clamp(-1, 1)

    def grow(self):
        """Twice as many tokens. Old experts cannot see new tokens, so old ids stay as they are."""
        for expert in list(self.experts):
            expert = copy.deepcopy(expert)  # a start near existing codes, as they are frozen now
            nn.init.normal_(expert.query)
            nn.init.normal_(expert.pos)
            self.experts.append(expert)
            self.decoder.maps.append(torch.zeros(d, N * D))  # the image is at first as before
        self.requires_grad_(False)
        for learns in (self.decoder, *self.experts[SHORT:]):
            learns.requires_grad_(True)

# ------------------------------------------------------------------------------------------------
# The generator: a language model whose words are codes


class Generator(nn.Module):
    """p(id_i | class, id_1 .. id_{i-1}), from left to right, as the experts emitted them."""

    def __init__(self):
        super().__init__()
        self.label, self.token = nn.Embedding(len(SHAPES), D), nn.Embedding(K, D)
        self.position = nn.Parameter(torch.randn(L, D))
        self.layers, self.head = nn.ModuleList(Layer(D, 4) for _ in range(2)), nn.Linear(D, K)

    def forward(self, labels, ids):
        """labels (B,), ids (B, T) -> logits (B, T+1, K), each of the next token."""
        x = torch.cat([self.label(labels)[:, None], self.token(ids)], dim=1)
        x = x + self.position[:x.shape[1]]
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.head(norm(x))

    @torch.no_grad()
    def sample(self, labels):
        ids = torch.empty(len(labels), 0, dtype=torch.int64)
        while ids.shape[1] < L:
            p = self(labels, ids)[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
        return ids

# ------------------------------------------------------------------------------------------------
# Learning


def learning(name, model, steps, rate=1.0):
    """Yields so many times, and after each loss.backward() moves what has a gradient."""
    matrices, rest = [], []  # positions, queries, codes and biases are the rest
    for key, p in model.named_parameters():
        if p.requires_grad:
            (matrices if key.endswith(".weight") else rest).append(p)
    # On matrices a step of Muon is worth about two of AdamW.
    optimizers = ((torch.optim.Muon(matrices, weight_decay=0.0), 0.02 * rate),
                  (torch.optim.AdamW(rest, betas=(0.9, 0.98)), 3e-3 * rate))
    for step in range(steps):
        yield step
        nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        rise, fall = min(1, (step + 1) / 20), math.cos(math.pi / 2 * step / steps) ** 2
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * rise * (0.05 + 0.95 * fall)
            optimizer.step()
            optimizer.zero_grad()
        print(f"\r{name}: step {step + 1} of {steps}", end="", flush=True)
    print()


def train_tokenizer(name, model, images, steps, rate=1.0):
    quantizer = model.quantizer
    for step in learning(name, model, steps, rate):
        batch = images[torch.randint(len(images), (64,))]
        z_q, ids, z = model.tokenize(model.mit(batch))
        quantizer.used[ids] = True
        if step % 50 == 0 and quantizer.codebook.requires_grad:
            quantizer.restart_dead_codes(z.detach())  # at step 0 this draws the codebook from z
        loss = quantizer.loss(z, ids)
        # In some steps the decoder gets the first k tokens only. So what it needs most comes first.
        if torch.rand(()) < 0.4:
            z_q = z_q[:, :int(torch.randint(1, len(model.experts) + 1, ()))]
        loss = loss + F.mse_loss(model.decoder(z_q), batch)
        loss.backward()


def psnr(a, b):
    """Of images in [-1, 1], in dB; +6 dB halves the RMS error."""
    return 10 * math.log10(4 / F.mse_loss(a, b).item())


def main(base=450, grow=120, finetune=200, ar=350, out="micro.png"):
    """Everything in turn -> the figures that it prints."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # beside other work, two threads mostly wait for each other
    (images, labels), (held, _) = draw(TRAIN, seed=0), draw(500, seed=1)

    # A short sequence first, then twice as many tokens while the old experts are frozen, then all.
    model = Tokenizer()
    train_tokenizer(f"{SHORT} tokens", model, images, base)
    short_ids = model.encode(held)
    model.grow()
    train_tokenizer(f"new experts, {L} tokens", model, images, grow, rate=0.5)
    same = torch.equal(short_ids, model.encode(held)[:, :SHORT])
    print(f"the first {SHORT} ids of {len(held)} held-out images are as before growth: {same}")
    model.requires_grad_(True)
    train_tokenizer("all together", model, images, finetune, rate=0.5)

    # Any prefix is an image. Then an intervention: token 1 is the previous image's. The decoder
    # cannot repair that. Experts that are asked again read the wrong token and correct it.
    ids = model.encode(held)
    first = ids[:, 0].roll(1)
    swapped = torch.cat([first[:, None], ids[:, 1:]], dim=1)
    re_encoded = model.encode(held, force={0: first})
    pictures = {f"{k} token{'s' * (k > 1)}": model.decode(ids[:, :k]) for k in (1, 2, 4, 8)}
    pictures |= {"swapped": model.decode(swapped), "re-encoded": model.decode(re_encoded)}
    figures = {name: psnr(picture, held) for name, picture in pictures.items()}
    print("PSNR:", ", ".join(f"{name} {db:.1f}" for name, db in figures.items()), "dB")

    # The generator learns the ids of all images, and then writes new ones, class by class.
    train_ids = torch.cat([model.encode(part) for part in images.split(500)])
    generator = Generator()
    for _ in learning("generator", generator, ar):
        chosen = torch.randint(len(images), (128,))
        logits = generator(labels[chosen], train_ids[chosen, :-1])            # (B, L, K)
        F.cross_entropy(logits.flatten(0, 1), train_ids[chosen].flatten()).backward()
    rows = {"held out": held, **pictures}
    for label, name in enumerate(SHAPES):
        rows[f"new {name}"] = model.decode(generator.sample(torch.full((10,), label)))

    # One row of ten images for each, three times as large.
    page = torch.cat([torch.cat(list(row[:10]), dim=2) for row in rows.values()], dim=1)
    page = ((page + 1) * 127.5).byte().permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
    page = Image.fromarray(np.pad(page, ((0, 0), (90, 0), (0, 0))))
    for i, name in enumerate(rows):
        ImageDraw.Draw(page).text((8, 96 * i + 42), name)
    page.save(out)
    print(f"{out}: {', '.join(rows)}")
    return figures | {"old ids are the same": same}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
