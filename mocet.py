"""MoCET, Mixture of Causal Expert Transformer: one small expert per token position.

Paper    z_i = T_i(X_latent, z_<i),   i = 1 .. L: expert i emits token i from the image's features and
         the tokens before it. No gate is learned: the position is the routing.
In       x_latent (B, N, E)   from mit.py, read-only here
Out      z_q (B, L, d), ids (B, L), losses {"codebook", "commitment", "entropy"}
Differs  Experts read the prior tokens quantized, as the generator will see them [ours]. Norms inside an
         expert have no scale and shift of their own: the matrices behind them can hold both [ours].

Two forms of an expert share the same parameters:

    block   a transformer over [X_latent ; prior tokens ; query_i], every layer rewrites every row,
            read at the query's row                                              (as published)
    query   X_latent and prior tokens stay as they are; each layer rewrites the query's row only
            (at depth 1 the same function; about N times cheaper)                (the default)

How the query form is fast. One row asks, so keys need not be formed: with normalised context rows c_j,

    score_j = (Wq h) . (Wk c_j) = u . c_j        with  u = Wk^T Wq h      (one u per head)
    value   = sum_j a_j Wv c_j  = Wv m           with  m = sum_j a_j c_j

so the context is only ever touched by two dot products per head. In the first layer h is the learned
query, the same for every image: all experts' scores against X_latent are one matrix product.

Try      python mocet.py
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import TokenizerConfig
from layers import QUERY_GAIN, count_parameters
from quantizer import VectorQuantizer


def norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and shift."""
    return F.layer_norm(x, x.shape[-1:])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., E) -> (..., heads, E/heads)"""
    return x.unflatten(-1, (heads, -1))


class ExpertGroup(nn.Module):
    """The parameters of the n experts that one growth step adds, stacked as (n, out, in)."""

    def __init__(self, n: int, cfg: TokenizerConfig):
        super().__init__()
        E, d = cfg.expert_width, cfg.code_dim

        def matrices(out, into, gain=1.0):
            bound = gain * (6 / (out + into)) ** 0.5  # Xavier-uniform, like every ViT here
            return nn.Parameter(torch.empty(n, out, into).uniform_(-bound, bound))

        # Unit-scale queries make attention pick some patches from the first step on, others for each expert.
        self.query = nn.Parameter(torch.randn(n, E))
        self.pos = nn.Parameter(torch.randn(n, E))  # the place of token i, for those who read it
        self.layers = nn.ModuleList(nn.ParameterDict(dict(
            wq=matrices(E, E, QUERY_GAIN), wk=matrices(E, E), wv=matrices(E, E),
            wo=matrices(E, E), bo=nn.Parameter(torch.zeros(n, E)),
            w1=matrices(4 * E, E), b1=nn.Parameter(torch.zeros(n, 4 * E)),
            w2=matrices(E, 4 * E), b2=nn.Parameter(torch.zeros(n, E)))) for _ in range(cfg.expert_depth))
        self.head = matrices(d, E)
        self.head_bias = nn.Parameter(torch.zeros(n, d))

    def __len__(self) -> int:
        return len(self.query)

    def unbind(self) -> list[SimpleNamespace]:
        """The experts one by one, as views: .query (E,), .pos (E,), .head (d, E), .layers[j].wq (E, E) ...

        TRAP: self.head[i] inside the loop runs too, but each backward of an index allocates the whole
        stack; one unbind per forward has one backward that puts the pieces together.
        """
        layers = [{name: p.unbind() for name, p in layer.items()} for layer in self.layers]
        return [SimpleNamespace(query=q, pos=p, head=h, head_bias=b,
                                layers=[SimpleNamespace(**{name: parts[i] for name, parts in layer.items()}) for layer in layers])
                for i, (q, p, h, b) in enumerate(zip(*(t.unbind() for t in (self.query, self.pos, self.head, self.head_bias))))]


# ------------------------------------------------------------------------------------------------
# one layer, three ways. w: one expert's parameters of this layer

def mlp(w: SimpleNamespace, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(norm(x), w.w1, w.b1)), w.w2, w.b2)


def record_attention(trace: list | None, q: Tensor, k: Tensor) -> None:
    """Note how the last row of q looks at the rows of k: appends (B, heads, T); for pictures only."""
    if trace is not None:
        trace.append((q[:, :, -1:] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)[:, :, 0])


def block_layer(w: SimpleNamespace, x: Tensor, heads: int, trace: list | None = None) -> Tensor:
    """Published form: all rows x (B, T, E) ask all rows, and all are rewritten."""
    c = norm(x)
    # (B, heads, T, E/heads)
    q, k, v = (split_heads(F.linear(c, m), heads).transpose(1, 2) for m in (w.wq, w.wk, w.wv))
    record_attention(trace, q, k)
    x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), w.wo, w.bo)
    return x + mlp(w, x)


def query_layer(w: SimpleNamespace, h: Tensor, context: Tensor, heads: int, trace: list | None = None) -> Tensor:
    """Query form, written out: h (B, E) asks the rows of context (B, T, E) and itself; only h is rewritten."""
    rows = torch.cat([context, norm(h)[:, None]], dim=1)                      # (B, T+1, E)
    q = split_heads(F.linear(norm(h), w.wq), heads)[:, :, None]  # (B, heads, 1, E/heads)
    # (B, heads, T+1, E/heads)
    k, v = (split_heads(F.linear(rows, m), heads).transpose(1, 2) for m in (w.wk, w.wv))
    record_attention(trace, q, k)
    h = h + F.linear(F.scaled_dot_product_attention(q, k, v).flatten(1), w.wo, w.bo)
    return h + mlp(w, h)


def query_in_context_space(wq: Tensor, wk: Tensor, h: Tensor, heads: int) -> Tensor:
    """u = Wk^T Wq norm(h) / sqrt(E/heads), one row per head: h (..., E), wq, wk (..., E, E) -> (..., heads, E)."""
    q = split_heads((wq @ norm(h)[..., None])[..., 0], heads)  # (..., heads, E/heads)
    wk = wk.unflatten(-2, (heads, -1))  # (..., heads, E/heads, E)
    return (q[..., None, :] @ wk)[..., 0, :] * q.shape[-1] ** -0.5


def query_layer_fast(w: SimpleNamespace, h: Tensor, cx: Tensor, prior: Tensor, heads: int, scores_x: Tensor | None) -> Tensor:
    """query_layer with context = [cx ; prior], without forming keys or values or joining the two.

    h (B, E), cx (B, N, E), prior (B, T, E); scores_x (B, heads, N) where they are known already.
    """
    memory = torch.cat([prior, norm(h)[:, None]], dim=1)                      # (B, T+1, E)
    q = split_heads(F.linear(norm(h), w.wq), heads)                           # (B, heads, E/heads)
    # (B, heads, E)
    u = torch.einsum("bhc,hce->bhe", q, w.wk.unflatten(0, (heads, -1))) * q.shape[-1] ** -0.5
    if scores_x is None:
        scores_x = u @ cx.transpose(1, 2)                                     # (B, heads, N)
    a = torch.cat([scores_x, u @ memory.transpose(1, 2)], dim=-1).softmax(dim=-1)
    ax, am = a.split([cx.shape[1], memory.shape[1]], dim=-1)
    m = ax @ cx + am @ memory                                                 # (B, heads, E)
    v = torch.einsum("bhe,hce->bhc", m, w.wv.unflatten(0, (heads, -1)))       # (B, heads, E/heads)
    h = h + F.linear(v.flatten(1), w.wo, w.bo)
    return h + mlp(w, h)


# ------------------------------------------------------------------------------------------------

class MoCET(nn.Module):
    """x_latent (B, N, E), quantizer -> z_q (B, L, d), ids (B, L), losses {name: scalar}."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.cfg = cfg
        # a prior token, as the experts read it
        self.embed_code = nn.Linear(cfg.code_dim, cfg.expert_width)
        nn.init.normal_(self.embed_code.weight)  # codes have norm 1: this makes them unit scale
        nn.init.zeros_(self.embed_code.bias)
        self.groups = nn.ModuleList()
        self.grow(cfg.token_schedule[0])

    @property
    def num_tokens(self) -> int:
        return sum(len(group) for group in self.groups)

    def grow(self, num_tokens: int) -> None:
        """Append one group of experts, so that there are num_tokens; nothing that exists is touched.

        A new expert starts as a copy of an old one, with a query and a place of its own [ours]. Experts that start
        from random weights talk past the frozen codebook: in trials each of them soon said one code for all images. Copies
        do so less, and the entropy term mends it: experiments/README.md, "What one change does".
        """
        new = ExpertGroup(num_tokens - self.num_tokens, self.cfg).to(self.embed_code.weight.device)
        if self.groups:
            old = dict(self.groups[-1].named_parameters())
            with torch.no_grad():
                for name, p in new.named_parameters():
                    if name not in ("query", "pos"):
                        p.copy_(old[name][torch.arange(len(p)) % len(old[name])])
        self.groups.append(new)

    def forward(self, x_latent: Tensor, quantizer: VectorQuantizer) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cfg, heads = self.cfg, self.cfg.expert_heads
        codes, cx = quantizer.codes(), norm(x_latent)                         # (K, d), (B, N, E)
        prior = cx[:, :0]  # (B, 0, E) query form: prior tokens as context rows
        rows = x_latent  # (B, N, E) block form: everything so far, as it is
        z, z_q, ids = [], [], []
        for group in self.groups:
            # One product per group, not one for all: growing must not change how the old part rounds.
            first = self.first_scores(group, cx) if cfg.expert == "query" else [None] * len(group)
            for expert, scores_x in zip(group.unbind(), first):
                h = expert.query.expand(len(cx), -1)                          # (B, E)
                if cfg.expert == "query":
                    for j, w in enumerate(expert.layers):
                        h = query_layer_fast(w, h, cx, prior, heads, scores_x if j == 0 else None)
                else:
                    x = torch.cat([rows, h[:, None]], dim=1)                  # (B, N+i, E)
                    for w in expert.layers:
                        x = block_layer(w, x, heads)
                    h = x[:, -1]
                q_i, id_i, z_i = quantizer.quantize(F.linear(norm(h), expert.head, expert.head_bias), codes)
                token = (self.embed_code(q_i) + expert.pos)[:, None]          # (B, 1, E)
                if cfg.expert == "query":
                    prior = torch.cat([prior, norm(token)], dim=1)
                else:
                    rows = torch.cat([rows, token], dim=1)
                z.append(z_i), z_q.append(q_i), ids.append(id_i)
        z, z_q, ids = (torch.stack(parts, dim=1) for parts in (z, z_q, ids))
        losses = quantizer.losses(z, ids)
        # Nobody reads the last token. A zero keeps its parameters in the graph, since DistributedDataParallel
        # waits for a gradient of each; it matters where a group has one expert.
        losses["commitment"] = losses["commitment"] + 0 * token.sum()
        return z_q, ids, losses

    def first_scores(self, group: ExpertGroup, cx: Tensor) -> list[Tensor]:
        """Scores of the first layer against X_latent for all experts of a group: a (B, heads, N) for each."""
        n, heads = len(group), self.cfg.expert_heads
        # (n, heads, E)
        u = query_in_context_space(group.layers[0].wq, group.layers[0].wk, group.query, heads)
        scores = cx @ u.flatten(0, 1).T                                       # (B, N, n*heads)
        return scores.transpose(1, 2).unflatten(1, (n, heads)).unbind(1)

    def forward_loop(self, x_latent: Tensor, quantizer: VectorQuantizer, trace: list | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """forward, slowly and in the paper's words: the oracle that tests hold forward against.

        trace   a list to which each layer of each expert appends its attention (B, heads, N + tokens so far + 1)
        """
        heads = self.cfg.expert_heads
        rows = x_latent  # (B, N, E), later followed by the tokens
        z, z_q, ids = [], [], []
        for group in self.groups:
            for i in range(len(group)):
                layers = [SimpleNamespace(**{name: p[i] for name, p in layer.items()}) for layer in group.layers]
                h = group.query[i].expand(len(rows), -1)                      # (B, E)
                if self.cfg.expert == "query":
                    for w in layers:
                        h = query_layer(w, h, norm(rows), heads, trace)
                else:
                    x = torch.cat([rows, h[:, None]], dim=1)
                    for w in layers:
                        x = block_layer(w, x, heads, trace)
                    h = x[:, -1]
                q_i, id_i, z_i = quantizer.quantize(norm(h) @ group.head[i].T + group.head_bias[i], quantizer.codes())
                rows = torch.cat([rows, (self.embed_code(q_i) + group.pos[i])[:, None]], dim=1)
                z.append(z_i), z_q.append(q_i), ids.append(id_i)
        z, z_q, ids = (torch.stack(parts, dim=1) for parts in (z, z_q, ids))
        return z_q, ids, quantizer.losses(z, ids)


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    x_latent, seconds = torch.randn(4, 64, 64), {}
    for form in ("block", "query"):
        cfg = TokenizerConfig(expert=form, expert_width=64, expert_heads=4, token_schedule=(16, 32), codebook_size=64)
        quantizer, mocet = VectorQuantizer(cfg).eval(), MoCET(cfg)
        with torch.no_grad():
            before = mocet(x_latent, quantizer)[1]
            start = time.perf_counter()
            mocet(x_latent, quantizer)
            seconds[form] = time.perf_counter() - start
            mocet.grow(32)
            after = mocet(x_latent, quantizer)[1]
        print(f"{form:5}  x_latent {tuple(x_latent.shape)} -> ids {tuple(before.shape)}, {seconds[form] * 1e3:.1f} ms, "
              f"{count_parameters(mocet.groups[0]):,} parameters in 16 experts")
        print(f"       after grow(32): ids {tuple(after.shape)}, the first 16 unchanged: {torch.equal(before, after[:, :16])}")
    print(f"The query form took 1/{seconds['block'] / seconds['query']:.0f} of the block form's time, "
          "for a function of the same inputs with the same parameters.")
