"""MoCET, Mixture of Causal Expert Transformer: one small expert per token position.

Paper    z_i = T_i(X_latent, z_<i),   i = 1 .. L: expert i emits token i from the image's features
         and the tokens before it. No gate is learned: the position is the routing.
In       x_latent (B, N, E)   from mit.py, read-only here
Out      z_q (B, L, d), ids (B, L), losses {"codebook", "commitment", "entropy"}
Differs  Experts read the prior tokens quantized and with a place, as the generator will see them,
         and each has a head of its own [ours]. In the first author's earlier public experiments
         they read each other's outputs as they are, share one head, and all is quantized at the
         end: prior "hidden" and head "shared". What the paper does is not known to us. With
         "hidden" later experts no longer see what the ids say: they read what no generator will
         ever see, and forcing an id moves no later one. Norms inside an expert have no scale and
         shift of their own: the matrices behind them can hold both [ours].

Two forms of an expert share the same parameters:

    block   a transformer over [X_latent ; prior tokens ; query_i], every layer rewrites every row,
            read at the query's row                                              (as published)
    query   X_latent and prior tokens stay as they are; each layer rewrites the query's row only;
            at depth 1 the same function                                         (the default)

A layer over N rows of width E costs 12 N E^2 + 2 N^2 E multiply-adds in the block form, and
12 E^2 + 2 N E heads in the query form: at N = E = 256 and 4 heads that is 179 times fewer. In time
it is less, because small products fill a processor badly: 32 experts ran 14.6 times faster on two
CPU cores (experiments/README.md, "Speed").

How the query form is fast. One row asks, so keys need not be formed: with normalised rows c_j,

    score_j = (Wq h) . (Wk c_j) = u . c_j        with  u = Wk^T Wq h      (one u per head)
    value   = sum_j a_j Wv c_j  = Wv m           with  m = sum_j a_j c_j

so the context is only ever touched by two dot products per head. In the first layer h is the
learned query, the same for every image: all experts' scores against X_latent are one product.

Try      python mocet.py      (CPU, a few seconds)
"""
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import TokenizerConfig
from layers import as_matrices, count_parameters
from quantizer import VectorQuantizer


def norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and shift."""
    return F.layer_norm(x, x.shape[-1:])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., E) -> (..., heads, E/heads)"""
    return x.unflatten(-1, (heads, -1))


# ------------------------------------------------------------------------------------------------
# what an expert has learned

class ExpertGroup(nn.Module):
    """The parameters of the n experts that one growth step adds, stacked as (n, out, in).

    What all experts of all groups share (cfg.experts, cfg.head) is a stack of one, and lies in the
    first group; hence `first` below.
    """

    def __init__(self, n: int, cfg: TokenizerConfig, is_first: bool):
        super().__init__()
        E, d = cfg.expert_width, cfg.code_dim

        def matrices(n, out, into):
            bound = (6 / (out + into)) ** 0.5  # Xavier-uniform, like every ViT here
            return nn.Parameter(torch.empty(n, out, into).uniform_(-bound, bound))

        # Unit-scale queries make attention pick other patches for each expert from the first step.
        self.query = nn.Parameter(torch.randn(n, E))
        if cfg.prior == "codes":  # the place of token i, for those who read it
            self.pos = nn.Parameter(torch.randn(n, E))
        own = n if cfg.experts == "own" else int(is_first)
        self.layers = nn.ModuleList(nn.ParameterDict(dict(
            wq=matrices(own, E, E), wk=matrices(own, E, E), wv=matrices(own, E, E),
            wo=matrices(own, E, E), bo=nn.Parameter(torch.zeros(own, E)),
            w1=matrices(own, 4 * E, E), b1=nn.Parameter(torch.zeros(own, 4 * E)),
            w2=matrices(own, E, 4 * E), b2=nn.Parameter(torch.zeros(own, E)),
        )) for _ in range(cfg.expert_depth if own else 0))
        own = n if cfg.head == "own" else int(is_first)
        if own:
            self.head = matrices(own, d, E)
            self.head_bias = nn.Parameter(torch.zeros(own, d))
        as_matrices(self, 0)  # its head
        for layer in self.layers:
            as_matrices(layer)

    def __len__(self) -> int:
        return len(self.query)

    def stacks(self, first: "ExpertGroup") -> list[dict[str, Tensor]]:
        """Its stacks, and from the first group what it shares, {name: (n or 1, ...)}.

        query, pos, head and head_bias in one dictionary; then one for each layer
        """
        named = {**dict(first.named_parameters(recurse=False)),
                 **dict(self.named_parameters(recurse=False))}
        return [named, *(dict(layer) for layer in self.layers or first.layers)]

    def expert(self, i: int, first: "ExpertGroup") -> SimpleNamespace:
        """Expert i as views: .query (E,), .pos (E,), .head (d, E), .layers[j].wq (E, E) ..."""
        return assemble(self.stacks(first), i)

    def unbind(self, first: "ExpertGroup") -> list[SimpleNamespace]:
        """All experts, each as expert(i) gives it.

        TRAP: expert(i) in a training loop runs too, but each backward of an index allocates the
        whole stack; one unbind per forward has one backward that puts the pieces together.
        """
        pieces = [{name: stack.unbind() for name, stack in part.items()}
                  for part in self.stacks(first)]
        return [assemble(pieces, i) for i in range(len(self))]


def assemble(stacks: list[dict], i: int) -> SimpleNamespace:
    """The i-th pieces of stacks as stacks() gives them; of a stack of one, that one."""
    named, *layers = (SimpleNamespace(**{name: stack[i % len(stack)]
                                         for name, stack in part.items()}) for part in stacks)
    named.layers = layers  # each with .wq .wk .wv .wo .bo .w1 .b1 .w2 .b2
    return named


# ------------------------------------------------------------------------------------------------
# the paper, word for word; w holds one expert's parameters of one layer

def block_layer(w: SimpleNamespace, x: Tensor, heads: int, trace: list | None = None) -> Tensor:
    """Published form: all rows x (B, T, E) ask all rows, and all are rewritten."""
    c = norm(x)
    # (B, heads, T, E/heads)
    q, k, v = (split_heads(F.linear(c, m), heads).transpose(1, 2) for m in (w.wq, w.wk, w.wv))
    record_attention(trace, q, k)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, E)
    x = x + F.linear(mixed, w.wo, w.bo)
    return x + mlp(w, x)


def query_layer(w: SimpleNamespace, h: Tensor, context: Tensor, heads: int,
                trace: list | None = None) -> Tensor:
    """Query form: h (B, E) asks the rows of context (B, T, E) and itself; only h is rewritten."""
    rows = torch.cat([context, norm(h)[:, None]], dim=1)  # (B, T+1, E)
    q = split_heads(F.linear(norm(h), w.wq), heads)[:, :, None]  # (B, heads, 1, E/heads)
    # (B, heads, T+1, E/heads)
    k, v = (split_heads(F.linear(rows, m), heads).transpose(1, 2) for m in (w.wk, w.wv))
    record_attention(trace, q, k)
    mixed = F.scaled_dot_product_attention(q, k, v).flatten(1)  # (B, E)
    h = h + F.linear(mixed, w.wo, w.bo)
    return h + mlp(w, h)


def mlp(w: SimpleNamespace, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(norm(x), w.w1, w.b1)), w.w2, w.b2)


def record_attention(trace: list | None, q: Tensor, k: Tensor) -> None:
    """Append how the last row of q looks at the rows of k, (B, heads, T); for pictures only."""
    if trace is not None:
        scores = q[:, :, -1:] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        trace.append(scores.softmax(dim=-1)[:, :, 0])


class MoCET(nn.Module):
    """x_latent (B, N, E), quantizer -> z_q (B, L, d), ids (B, L), losses {name: scalar}.

    detach_prior   True: a code is a constant for the experts after it, so they cannot teach the
                   expert that emits it what to say (a trial of experiments/trials.py)
    """
    detach_prior = False

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.cfg = cfg
        if cfg.prior == "codes":  # a prior token, as the experts read it
            self.embed_code = nn.Linear(cfg.code_dim, cfg.expert_width)
            nn.init.normal_(self.embed_code.weight)  # codes have norm 1: this makes them unit scale
            nn.init.zeros_(self.embed_code.bias)
        self.groups = nn.ModuleList()
        self.grow(cfg.token_schedule[0])

    @property
    def num_tokens(self) -> int:
        return sum(len(group) for group in self.groups)

    def forward_loop(self, x_latent: Tensor, quantizer: VectorQuantizer,
                     trace: list | None = None, force: dict[int, Tensor | Callable] | None = None
                     ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One expert after the other, slowly: the reading that tests hold forward against.

        trace   a list to which each layer of each expert appends its attention
                (B, heads, N + tokens so far + 1)
        force   {position from 0: ids (B,)}, an intervention: there these ids are said, whatever the
                expert wanted, and the experts after it answer to them; or {position: a function}
                that makes the ids of what it wanted, z (B, d) normalised
        """
        cfg, heads, said, force = self.cfg, self.cfg.expert_heads, [], force or {}
        rows = x_latent  # (B, N, E), later followed by the tokens
        experts = [(group, i) for group in self.groups for i in range(len(group))]
        for expert in [group.expert(i, self.groups[0]) for group, i in experts]:
            h = expert.query.expand(len(rows), -1)  # (B, E)
            if cfg.expert == "query":
                for w in expert.layers:
                    h = query_layer(w, h, norm(rows), heads, trace)
            else:
                x = torch.cat([rows, h[:, None]], dim=1)  # (B, N+i, E)
                for w in expert.layers:
                    x = block_layer(w, x, heads, trace)
                h = x[:, -1]
            z_i = F.linear(norm(h), expert.head, expert.head_bias)  # (B, d)
            z_q_i, id_i, z_i = quantizer.quantize(z_i, quantizer.codes())
            if len(said) in force:  # an intervention: whatever it wanted to say, it says this
                z_q_i, id_i = quantizer.say(z_i, force[len(said)])
            if cfg.prior == "codes":
                rows = torch.cat([rows, self.as_prior(z_q_i, expert)], dim=1)
            else:  # its output as it is; nobody reads the codes, so all could be chosen at the end
                rows = torch.cat([rows, h[:, None]], dim=1)
            said.append((z_q_i, id_i, z_i))
        z_q, ids, z = (torch.stack(parts, dim=1) for parts in zip(*said))
        return z_q, ids, quantizer.losses(z, ids)

    def as_prior(self, z_q_i: Tensor, expert: SimpleNamespace) -> Tensor:
        """A token z_q_i (B, d) as the experts after it read it: (B, 1, E)."""
        if self.detach_prior:
            z_q_i = z_q_i.detach()
        return (self.embed_code(z_q_i) + expert.pos)[:, None]

    def grow(self, num_tokens: int) -> None:
        """Append one group of experts, so that there are num_tokens; what exists is not touched.

        A new expert starts as a copy of an old one, with a query and a place of its own [ours].
        The codebook no longer learns when it comes, so it has to start near what the codes can
        say: experts that started from random weights were seen to end with one code for all images
        each. No record of that trial is kept.
        """
        new = ExpertGroup(num_tokens - self.num_tokens, self.cfg, is_first=not self.groups)
        if self.groups:
            old = dict(self.groups[-1].named_parameters())
            new.to(old["query"].device)
            with torch.no_grad():
                for name, p in new.named_parameters():
                    if name not in ("query", "pos"):
                        p.copy_(old[name][torch.arange(len(p)) % len(old[name])])
        self.groups.append(new)

    # --------------------------------------------------------------------------------------------
    # the same, fast

    def forward(self, x_latent: Tensor, quantizer: VectorQuantizer,
                force: dict[int, Tensor | Callable] | None = None
                ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        query_form, said, force = self.cfg.expert == "query", [], force or {}
        codes, cx = quantizer.codes(), norm(x_latent)  # (K, d), (B, N, E)
        # What grows with each expert: in the query form (B, 0, E) prior tokens as context rows,
        # in the block form (B, N, E) everything so far, as it is.
        rows = cx[:, :0] if query_form else x_latent
        for group in self.groups:
            # One product per group, not one for all: growth must not change how old ones round.
            first = self.first_scores(group, cx) if query_form else [()] * len(group)
            for expert, known in zip(group.unbind(self.groups[0]), first):
                *word, token = self.run_expert(self, expert, known, cx, rows, quantizer, codes,
                                               force.get(len(said)))
                rows = torch.cat([rows, token], dim=1)
                said.append(word)
        z_q, ids, z = (torch.stack(parts, dim=1) for parts in zip(*said))
        losses = quantizer.losses(z, ids)
        # Nobody reads the last token. A zero keeps its parameters in the graph, since
        # DistributedDataParallel waits for a gradient of each; it matters where a group has one
        # expert.
        losses["commitment"] = losses["commitment"] + 0 * token.sum()
        return z_q, ids, losses

    def one_expert(self, expert: SimpleNamespace, known: tuple, cx: Tensor, rows: Tensor,
                   quantizer: VectorQuantizer, codes: Tensor, forced: Tensor | Callable | None
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> z_q_i (B, d), id_i (B,), z_i (B, d), and the row (B, 1, E) that the next ones read.

        known   what first_scores says of this expert
        rows    as they are before it, see forward
        """
        h, heads = expert.query[None], self.cfg.expert_heads  # (1, E): all images ask the same
        if self.cfg.expert == "query":
            for w in expert.layers:
                h = query_layer_fast(w, h, cx, rows, heads, *known)
                known = ()  # for the first layer only
        else:
            x = torch.cat([rows, h.expand(len(cx), 1, -1)], dim=1)  # (B, N+i, E)
            for w in expert.layers:
                x = block_layer(w, x, heads)
            h = x[:, -1]
        z_i = F.linear(norm(h), expert.head, expert.head_bias)  # (B, d)
        z_q_i, id_i, z_i = quantizer.quantize(z_i, codes)
        if forced is not None:
            z_q_i, id_i = quantizer.say(z_i, forced)
        token = h[:, None]
        if self.cfg.prior == "codes":
            token = self.as_prior(z_q_i, expert)  # (B, 1, E)
        return z_q_i, id_i, z_i, norm(token) if self.cfg.expert == "query" else token

    run_expert = staticmethod(one_expert)

    def compile(self) -> None:
        """From now on forward runs one_expert compiled: one code for all of them.

        Compiled as a whole, forward would be the code of each expert after that of the last.
        """
        compiled = torch.compile(MoCET.one_expert)

        def run_expert(self, expert, known, cx, rows, *more):
            if rows.shape[1] < 2:  # 0 and 1 rows would each be compiled as a case of its own
                return self.one_expert(expert, known, cx, rows, *more)
            torch._dynamo.mark_dynamic(rows, 1)
            return compiled(self, expert, known, cx, rows, *more)
        self.run_expert = run_expert

    def first_scores(self, group: ExpertGroup, cx: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each expert its first u (heads, E), and its scores against X_latent (B, heads, N)."""
        n, heads = len(group), self.cfg.expert_heads
        named, layer, *_ = group.stacks(self.groups[0])
        # TRAP: a shared stack of one would be broadcast, and torch rounds that product in another
        # way as soon as the stack is frozen.
        wq, wk = (layer[name].expand(n, -1, -1) for name in ("wq", "wk"))  # (n, E, E)
        u = query_in_context_space(wq, wk, named["query"], heads)  # (n, heads, E)
        scores = cx @ u.flatten(0, 1).T  # (B, N, n*heads)
        scores = scores.transpose(1, 2).unflatten(1, (n, heads))
        return list(zip(u.unbind(), scores.unbind(1)))


def query_in_context_space(wq: Tensor, wk: Tensor, h: Tensor, heads: int) -> Tensor:
    """u = Wk^T Wq norm(h) / sqrt(E/heads), one row per head.

    h (..., E), wq, wk (..., E, E) -> (..., heads, E)
    """
    q = split_heads((wq @ norm(h)[..., None])[..., 0], heads)  # (..., heads, E/heads)
    wk = wk.unflatten(-2, (heads, -1))  # (..., heads, E/heads, E)
    return (q[..., None, :] @ wk)[..., 0, :] * q.shape[-1] ** -0.5


def query_layer_fast(w: SimpleNamespace, h: Tensor, cx: Tensor, prior: Tensor, heads: int,
                     u: Tensor | None = None, scores_x: Tensor | None = None) -> Tensor:
    """query_layer with context = [cx ; prior], without forming keys or values or joining the two.

    h (B, E), cx (B, N, E), prior (B, T, E). In the first layer h (1, E) is the learned query, and
    what it asks is known: u (heads, E), and scores_x (B, heads, N), from first_scores.
    """
    own = norm(h).expand(len(cx), -1)[:, None]  # (B, 1, E)
    memory = torch.cat([prior, own], dim=1)  # (B, T+1, E)
    wk, wv = (m.unflatten(0, (heads, -1)) for m in (w.wk, w.wv))  # (heads, E/heads, E)
    if u is None:
        q = split_heads(F.linear(norm(h), w.wq), heads)  # (B, heads, E/heads)
        u = torch.einsum("bhc,hce->bhe", q, wk) * q.shape[-1] ** -0.5  # (B, heads, E)
        scores_x = u @ cx.transpose(1, 2)  # (B, heads, N)
    scores = (memory @ u.mT).transpose(1, 2)  # (B, heads, T+1)
    a = torch.cat([scores_x, scores], dim=-1).softmax(dim=-1)
    ax, am = a.split([cx.shape[1], memory.shape[1]], dim=-1)
    m = torch.baddbmm(ax @ cx, am, memory)  # (B, heads, E)
    v = torch.einsum("bhe,hce->bhc", m, wv)  # (B, heads, E/heads)
    h = h + F.linear(v.flatten(1), w.wo, w.bo)
    return h + mlp(w, h)


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    N = E = 256
    heads, x_latent, seconds = 4, torch.randn(2, N, E), {}
    for form in ("block", "query"):
        cfg = TokenizerConfig(expert=form, expert_width=E, expert_heads=heads, expert_depth=1,
                              token_schedule=(8, 16), codebook_size=64)
        quantizer, mocet = VectorQuantizer(cfg).eval(), MoCET(cfg)
        with torch.no_grad():
            before = mocet(x_latent, quantizer)[1]
            start = time.perf_counter()
            mocet(x_latent, quantizer)
            seconds[form] = time.perf_counter() - start
            mocet.grow(16)
            after = mocet(x_latent, quantizer)[1]
        print(f"{form:5}  x_latent {tuple(x_latent.shape)} -> ids {tuple(before.shape)}, "
              f"{seconds[form] * 1e3:.1f} ms, "
              f"{count_parameters(mocet.groups[0]):,} parameters in 8 experts")
        print(f"       after grow(16): ids {tuple(after.shape)}, "
              f"the first 8 unchanged: {torch.equal(before, after[:, :8])}")
    macs = (12 * N * E * E + 2 * N * N * E) / (12 * E * E + 2 * N * E * heads)
    print(f"The query form needs {macs:.0f} times fewer multiply-adds in a layer and took "
          f"1/{seconds['block'] / seconds['query']:.0f} of the time.\n"
          "Why not 1/179? Each of its products has one row per image: try more images than 2.")
