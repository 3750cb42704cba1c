"""MoCET, Mixture of Causal Expert Transformer: one small expert per token position.

Paper    z_i = T_i(X_latent, z_<i),   i = 1 .. L: expert i emits token i from the image's features
         and the tokens before it. No gate is learned: the position is the routing.
In       x_latent (B, N, E)   from mit.py, read-only here
Out      z_q (B, L, d), ids (B, L), losses {"codebook", "commitment", "entropy"}
Differs  Experts read the prior tokens quantized and with a position, as the generator will see
         them, and each has a head of its own [ours]. In the first author's earlier public
         experiments they read each other's outputs unquantized, share one head, and all is
         quantized at the end; what the paper does is not known to us. When experts read
         unquantized outputs, changing an id changes no later token (experiments/LOG.md). Norms
         inside an expert have no scale and shift of their own: the matrices behind them can hold
         both [ours].

Two forms of an expert share the same parameters:

    block   a transformer over [X_latent ; prior tokens ; query_i], every layer rewrites every row,
            read at the query's row                                              (as published)
    query   X_latent and prior tokens stay as they are; each layer rewrites the query's row only;
            at depth 1 the same function                                         (the default)

A layer over N rows of width E costs 12 N E^2 + 2 N^2 E multiply-adds in the block form, and
12 E^2 + 2 N E heads in the query form: at N = E = 256 and 4 heads that is 179 times fewer. In time
it is less, because small products fill a processor badly: on two CPU cores 32 experts ran 11 to 13
times as fast (experiments/README.md, "Speed").

How the query form is fast. One row asks, so keys need not be formed: with normalised rows c_j,

    score_j = (Wq h) . (Wk c_j) = u . c_j        with  u = Wk^T Wq h      (one u per head)
    value   = sum_j a_j Wv c_j  = Wv m           with  m = sum_j a_j c_j

so the context is only ever touched by two dot products per head. In the first layer h is the
learned query, the same for every image: all experts' scores against X_latent are one product.

How the experts learn. An expert reads tokens that other experts made, so its gradient can go back
into these: through the straight-through estimator, one expert after the other. With teacher_forcing
it ends at the token. Then experts need not wait for each other once the tokens are known, as in a
language model's training, and all of them learn in one batch of matrices: half as many operations.
It costs grown tokenizers 0.1 dB on CIFAR-10 and others nothing (experiments/README.md).

Try      python mocet.py      (CPU, a few seconds)
"""
import copy
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import TokenizerConfig
from layers import as_matrices, as_weights, count_parameters, init_vit
from quantizer import VectorQuantizer


def norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and shift."""
    return F.layer_norm(x, x.shape[-1:])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., E) -> (..., heads, E/heads)"""
    return x.unflatten(-1, (heads, -1))


# ------------------------------------------------------------------------------------------------
# the paper, word for word

class Layer(nn.Module):
    """The matrices of one transformer layer: attention, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        E = width
        self.wq, self.wk, self.wv = (nn.Linear(E, E, bias=False) for _ in range(3))
        self.wo, self.w1, self.w2 = nn.Linear(E, E), nn.Linear(E, 4 * E), nn.Linear(4 * E, E)
        for linear in self.children():
            as_matrices(linear)

    def attend(self, asking: Tensor, rows: Tensor, heads: int, trace: list | None) -> Tensor:
        """asking (B, R, E) and rows (B, T, E), both normalised -> what is read, (B, R, E)."""
        # (B, heads, R or T, E/heads)
        q = split_heads(self.wq(asking), heads).transpose(1, 2)
        k, v = (split_heads(w(rows), heads).transpose(1, 2) for w in (self.wk, self.wv))
        if trace is not None:  # how the last row that asks looks at the rows, for pictures only
            scores = q[:, :, -1:] @ k.mT * q.shape[-1] ** -0.5
            trace.append(scores.softmax(dim=-1)[:, :, 0])  # (B, heads, T)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(norm(x))))


class Expert(nn.Module):
    """T_i in the query form: its query reads the image and the tokens so far, and only the query's
    row h is rewritten.

    query (E,)   what h is before the first layer, the same for every image
    pos (E,)     the position of token i, for the experts that read it
    head         h -> z_i

    Another kind of expert is a subclass with a forward of its own (EXERCISES.md).
    """

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.heads = cfg.expert_heads
        # Unit-scale queries make attention pick other patches for each expert from the first step.
        self.query = nn.Parameter(torch.randn(cfg.expert_width))
        self.pos = nn.Parameter(torch.randn(cfg.expert_width))
        self.layers = nn.ModuleList(Layer(cfg.expert_width) for _ in range(cfg.expert_depth))
        self.head = nn.Linear(cfg.expert_width, cfg.code_dim)
        self.apply(init_vit)

    def forward(self, rows: Tensor, trace: list | None = None) -> Tensor:
        """rows (B, T, E), X_latent and then the prior tokens -> h (B, E), for the head."""
        h = self.query.expand(len(rows), 1, -1)  # (B, 1, E)
        for layer in self.layers:
            context = norm(torch.cat([rows, h], dim=1))  # (B, T+1, E)
            h = h + layer.attend(norm(h), context, self.heads, trace)
            h = h + layer.mlp(h)
        return h[:, 0]


class BlockExpert(Expert):
    """T_i in the published form: a transformer over all rows, read at the query's."""

    def forward(self, rows: Tensor, trace: list | None = None) -> Tensor:
        """rows (B, T, E), X_latent and then the prior tokens -> h (B, E), for the head."""
        x = torch.cat([rows, self.query.expand(len(rows), 1, -1)], dim=1)  # (B, T+1, E)
        for layer in self.layers:
            x = x + layer.attend(norm(x), norm(x), self.heads, trace)
            x = x + layer.mlp(x)
        return x[:, -1]


EXPERTS = {"query": Expert, "block": BlockExpert}


class MoCET(nn.Module):
    """x_latent (B, N, E), quantizer -> z_q (B, L, d), ids (B, L), losses {name: scalar}.

    experts   one for each token, in order
    lengths   number of experts after each growth step so far
    """

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        length = cfg.token_schedule[0]
        self.embed_code = nn.Linear(cfg.code_dim, cfg.expert_width)
        nn.init.normal_(self.embed_code.weight)  # codes have norm 1: this makes them unit scale
        nn.init.zeros_(self.embed_code.bias)
        self.experts = nn.ModuleList(EXPERTS[cfg.expert](cfg) for _ in range(length))
        self.lengths = [length]
        self.teacher_forcing = cfg.teacher_forcing

    @property
    def num_tokens(self) -> int:
        return len(self.experts)

    def newest(self) -> list[Expert]:
        """The experts of the last growth step."""
        return list(self.experts)[self.lengths[-2] if len(self.lengths) > 1 else 0:]

    def forward_loop(self, x_latent: Tensor, quantizer: VectorQuantizer,
                     trace: list | None = None, force: dict[int, Tensor | Callable] | None = None
                     ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One expert after the other: the readable form, which tests hold forward against.

        trace   a list to which each layer of each expert appends its attention
                (B, heads, N + tokens so far + 1)
        force   {position from 0: ids (B,)}, an intervention: there these ids are emitted in place
                of the nearest, and the experts after it read them; or {position: a function} that
                chooses the ids from the expert's output, z (B, d) normalised
        """
        rows, emitted, force = as_weights(x_latent, self.embed_code.weight), [], force or {}
        for i, expert in enumerate(self.experts):
            z_i = expert.head(norm(expert(rows, trace)))  # (B, d)
            z_q_i, id_i, z_i = quantizer.quantize(z_i, quantizer.codes())
            if i in force:  # an intervention: these ids in place of the nearest
                z_q_i, id_i = quantizer.emit(z_i, force[i])
            emitted.append((z_q_i, id_i, z_i))
            z_q_i = z_q_i.detach() if self.teacher_forcing else z_q_i
            rows = torch.cat([rows, self.as_prior(z_q_i, expert)], dim=1)  # (B, N+i+1, E)
        return self.joined(emitted, quantizer)

    def as_prior(self, z_q_i: Tensor, expert: Expert) -> Tensor:
        """A token z_q_i (B, d) as the experts after it read it: (B, 1, E)."""
        z_q_i = as_weights(z_q_i, expert.pos)  # the quantizer's codes are float32
        bias = self.embed_code.bias + expert.pos
        return F.linear(z_q_i, self.embed_code.weight, bias)[:, None]

    @staticmethod
    def joined(emitted: list[tuple], quantizer: VectorQuantizer
               ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """[(z_q_i, id_i, z_i) of each expert] -> z_q (B, L, d), ids (B, L), losses."""
        z_q, ids, z = (torch.stack(parts, dim=1) for parts in zip(*emitted))
        return z_q, ids, quantizer.losses(z, ids)

    def grow(self, num_tokens: int) -> None:
        """Append experts until there are num_tokens; what exists is not touched.

        A new expert starts as a copy of one of the newest, with a query and a position of its own
        [ours]. The codebook is frozen by then, so new experts must start near existing codes:
        experts that started from random weights were seen to end with one code for all images
        each. No record of that trial is kept.
        """
        newest = self.newest()
        for i in range(num_tokens - self.num_tokens):
            expert = copy.deepcopy(newest[i % len(newest)])
            with torch.no_grad():
                expert.query.copy_(torch.randn(expert.query.shape))
                expert.pos.copy_(torch.randn(expert.pos.shape))
            self.experts.append(expert)
        self.lengths.append(num_tokens)

    # --------------------------------------------------------------------------------------------
    # the same, fast: for experts in the query form

    def forward(self, x_latent: Tensor, quantizer: VectorQuantizer,
                force: dict[int, Tensor | Callable] | None = None
                ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if any(type(expert) is not Expert for expert in self.experts):
            return self.forward_loop(x_latent, quantizer, force=force)
        x_latent, force = as_weights(x_latent, self.embed_code.weight), force or {}
        if not (self.teacher_forcing and torch.is_grad_enabled()):
            z_q, ids, z = self.one_by_one(x_latent, quantizer, force)
        else:
            with torch.no_grad():
                z_q, ids, z = self.one_by_one(x_latent, quantizer, force)
            # TRAP: autocast of older torch keeps what it has converted here, without a graph, and
            # weights that are used again would get no gradient.
            torch.clear_autocast_cache()
            z = self.all_at_once(x_latent, z_q, z)
            z_q = quantizer.straight_through(z, z_q)
        return z_q, ids, quantizer.losses(z, ids)

    def one_by_one(self, x_latent: Tensor, quantizer: VectorQuantizer,
                   force: dict[int, Tensor | Callable]) -> tuple[Tensor, Tensor, Tensor]:
        """One expert after the other -> z_q (B, L, d), ids (B, L), z (B, L, d) normalised."""
        codes, cx = quantizer.codes(), norm(x_latent)  # (K, d), (B, N, E)
        prior, emitted = cx[:, :0], []  # (B, 0, E), normalised as well
        # One product per growth step, not one for all: growth must not change how old ones round.
        for first, end in pairwise((0, *self.lengths)):
            group = list(self.experts)[first:end]
            for expert, *known in zip(group, *first_scores(group, cx)):
                h = expert.query[None]  # (1, E): all images ask the same
                for layer in expert.layers:
                    h = query_layer_fast(layer, h, cx, prior, expert.heads, *known)
                    known = ()  # for the first layer only
                z_i = expert.head(norm(h))  # (B, d)
                z_q_i, id_i, z_i = quantizer.quantize(z_i, codes)
                if len(emitted) in force:
                    z_q_i, id_i = quantizer.emit(z_i, force[len(emitted)])
                prior = torch.cat([prior, norm(self.as_prior(z_q_i, expert))], dim=1)
                emitted.append((z_q_i, id_i, z_i))
        return tuple(torch.stack(parts, dim=1) for parts in zip(*emitted))

    def all_at_once(self, x_latent: Tensor, z_q: Tensor, z: Tensor) -> Tensor:
        """What all experts put out when the tokens before theirs are known already.

        x_latent (B, N, E), z_q (B, L, d), z (B, L, d) of one_by_one -> z with a graph, up to
        rounding the same numbers. Experts that do not learn keep theirs.
        """
        cx, parts = norm(x_latent), []
        pos = [expert.pos for expert in self.experts][:-1]  # nobody reads the last token
        prior = self.embed_code(as_weights(z_q[:, :-1], self.embed_code.weight))  # (B, L-1, E)
        prior = norm(prior + torch.stack(pos)) if pos else prior
        for first, end in pairwise((0, *self.lengths)):
            group = list(self.experts)[first:end]
            if not (x_latent.requires_grad or group[0].query.requires_grad):
                parts.append(z[:, first:end])
                continue
            rows = torch.cat([cx, prior[:, :end - 1]], dim=1)  # (B, T, E), T = N + end - 1
            # Expert i sees all N patches, the tokens before its own, and its own query.
            n, T = len(group), rows.shape[1]
            sees = torch.ones(n, T, dtype=torch.bool, device=z.device).tril(cx.shape[1] + first - 1)
            sees = torch.cat([sees, torch.eye(n, dtype=torch.bool, device=z.device)], dim=1)
            h = torch.stack([expert.query for expert in group])[:, None]  # (n, 1, E)
            for layers in zip(*(expert.layers for expert in group)):
                h = query_layers(layers, h, rows, sees, group[0].heads)  # (n, B, E)
            own = each([expert.head for expert in group], norm(h)).transpose(0, 1)  # (B, n, d)
            parts.append(F.normalize(own.to(z.dtype), dim=-1))
        return torch.cat(parts, dim=1)


def each(linears: list[nn.Linear], x: Tensor) -> Tensor:
    """x (n, B, in), linear i of n on x[i] -> (n, B, out)."""
    return torch.stack([linear(x_i) for linear, x_i in zip(linears, x)])


def query_layers(layers: tuple[Layer, ...], h: Tensor, rows: Tensor, sees: Tensor, heads: int
                 ) -> Tensor:
    """The same layer of n experts at once, each with its own matrices.

    h (n, B, E), in the first layer (n, 1, E); rows (B, T, E), normalised; sees (n, T+n) bool, what
    of the rows and then of the n queries each may look at -> (n, B, E)
    """
    # (n, E, E) each. The MLP's are four times as large, and to copy them costs more than it saves.
    wq, wk, wv, wo = (torch.stack([getattr(layer, name).weight for layer in layers])
                      for name in ("wq", "wk", "wv", "wo"))
    wq, wk, wv = (w.unflatten(1, (heads, -1)) for w in (wq, wk, wv))  # (n, heads, c, E)
    own = norm(h)
    q = wq @ own[:, None].mT  # (n, heads, c, B)
    u = (q.mT @ wk * q.shape[2] ** -0.5).permute(2, 0, 1, 3).flatten(1, 2)  # (B, n*heads, E)
    rows = torch.cat([rows, own.transpose(0, 1).expand(len(rows), -1, -1)], dim=1)  # (B, T+n, E)
    scores = (u @ rows.mT).unflatten(1, (-1, heads))  # (B, n, heads, T+n)
    a = scores.masked_fill(~sees[:, None], -torch.inf).softmax(dim=-1)
    m = (a.flatten(1, 2) @ rows).unflatten(1, (-1, heads))  # (B, n, heads, E)
    v = (wv @ m.permute(1, 2, 3, 0)).flatten(1, 2)  # (n, E, B)
    bias = torch.stack([layer.wo.bias for layer in layers])[..., None]  # (n, E, 1)
    h = h + torch.baddbmm(bias, wo, v).mT
    hidden = F.gelu(each([layer.w1 for layer in layers], norm(h)))
    return h + each([layer.w2 for layer in layers], hidden)


def first_scores(experts: list[Expert], cx: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Of each expert its query, normalised (1, E), its first u (heads, E), and its scores against
    X_latent (B, heads, N)."""
    n, heads = len(experts), experts[0].heads
    # (n, E, E)
    wq, wk = (torch.stack([getattr(expert.layers[0], name).weight for expert in experts])
              for name in ("wq", "wk"))
    own = norm(torch.stack([expert.query for expert in experts]))  # (n, E)
    u = query_in_context_space(wq, wk, own, heads)  # (n, heads, E)
    scores = cx @ u.flatten(0, 1).T  # (B, N, n*heads)
    scores = scores.transpose(1, 2).unflatten(1, (n, heads))  # (B, n, heads, N)
    return own[:, None].unbind(), u.unbind(), scores.unbind(1)


def query_in_context_space(wq: Tensor, wk: Tensor, own: Tensor, heads: int) -> Tensor:
    """u = Wk^T Wq own / sqrt(E/heads), one row per head.

    own (n, E), wq, wk (n, E, E) -> (n, heads, E)
    """
    q = split_heads((wq @ own[..., None])[..., 0], heads)  # (n, heads, E/heads)
    wk = wk.unflatten(-2, (heads, -1))  # (n, heads, E/heads, E)
    return (q[..., None, :] @ wk)[..., 0, :] * q.shape[-1] ** -0.5


def query_layer_fast(layer: Layer, h: Tensor, cx: Tensor, prior: Tensor, heads: int,
                     own: Tensor | None = None, u: Tensor | None = None,
                     scores_x: Tensor | None = None) -> Tensor:
    """A layer of Expert.forward, without forming keys or values or joining cx and prior.

    h (B, E), cx (B, N, E), prior (B, T, E). In the first layer h (1, E) is the learned query, and
    what it asks is known from first_scores: own (1, E), u (heads, E), scores_x (B, heads, N).
    """
    own = norm(h) if own is None else own
    memory = torch.cat([prior, own.expand(len(cx), -1)[:, None]], dim=1)  # (B, T+1, E)
    # (heads, E/heads, E)
    wk, wv = (w.weight.unflatten(0, (heads, -1)) for w in (layer.wk, layer.wv))
    if u is None:
        q = split_heads(layer.wq(own), heads)  # (B, heads, E/heads)
        u = torch.einsum("bhc,hce->bhe", q, wk) * q.shape[-1] ** -0.5  # (B, heads, E)
        scores_x = u @ cx.transpose(1, 2)  # (B, heads, N)
    scores = (memory @ u.mT).transpose(1, 2)  # (B, heads, T+1)
    a = torch.cat([scores_x, scores], dim=-1).softmax(dim=-1)
    ax, am = a.split([cx.shape[1], memory.shape[1]], dim=-1)
    m = torch.baddbmm(ax @ cx, am, memory)  # (B, heads, E)
    v = torch.einsum("bhe,hce->bhc", m, wv)  # (B, heads, E/heads)
    h = h + layer.wo(v.flatten(1))
    return h + layer.mlp(h)


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    N = E = 256
    heads, x_latent, seconds = 4, torch.randn(2, N, E), {}
    for form in ("block", "query"):
        cfg = TokenizerConfig(expert=form, expert_width=E, expert_heads=heads, expert_depth=1,
                              token_schedule=(8, 16), codebook_size=64)
        quantizer, mocet = VectorQuantizer(cfg).eval(), MoCET(cfg)
        parameters = count_parameters(mocet.experts)
        with torch.no_grad():
            before = mocet(x_latent, quantizer)[1]
            start = time.perf_counter()
            mocet(x_latent, quantizer)
            seconds[form] = time.perf_counter() - start
            mocet.grow(16)
            after = mocet(x_latent, quantizer)[1]
        print(f"{form:5}  x_latent {tuple(x_latent.shape)} -> ids {tuple(before.shape)}, "
              f"{seconds[form] * 1e3:.1f} ms, {parameters:,} parameters in 8 experts")
        print(f"       after grow(16): ids {tuple(after.shape)}, "
              f"the first 8 unchanged: {torch.equal(before, after[:, :8])}")
    macs = (12 * N * E * E + 2 * N * N * E) / (12 * E * E + 2 * N * E * heads)
    print(f"The query form needs {macs:.0f} times fewer multiply-adds in a layer and took "
          f"1/{seconds['block'] / seconds['query']:.0f} of the time.\n"
          "Why not 1/179? Each of its products has one row per image: try more images than 2.")
