"""Muon: momentum whose matrices are made orthogonal before each step: every direction learns.

Paper    Jordan 2024, kellerjordan.github.io/posts/muon. W a matrix, g its gradient, b = 0.95:
         m = b m + (1-b) g,   u = b m + (1-b) g,   W = W - lr sqrt(max(1, rows/columns)) NS(u)
         NS(U S V^T) ~ U V^T, by five Newton-Schulz steps
In       hidden matrices (out, in), and stacks of experts' matrices (n, out, in)
Out      the parameters, one step on
Differs  torch.optim.Muon takes single matrices. Here a stack is n matrices, an attention's q, k and
         v are three, all of one shape go through NS in one product, and AdamW has the rest [ours]
Try      python muon.py      (CPU, a few seconds)
"""
import contextlib

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


def matrices_of(model: nn.Module) -> dict[nn.Parameter, int]:
    """{weight: how many hidden matrices it is}, as layers.as_matrices marks them.

    0: it is a matrix and AdamW's, since it reads or writes something other than hidden channels; so
    are convolutions, embeddings and what has no mark. Biases, norms, positions, queries and codes
    are no matrices and not in here.
    """
    found = {}
    for module in model.modules():
        marked = hasattr(module, "matrices")
        for name, p in module.named_parameters(recurse=False):
            if (name == "weight" and p.ndim >= 2) or (marked and p.ndim == 3):
                found[p] = module.matrices if marked else 0
    return found


# ------------------------------------------------------------------------------------------------
# the paper, word for word

A, B, C = 3.4445, -4.7750, 2.0315  # [Jordan] small singular values grow 3.4 times a step


def newton_schulz(u: Tensor, steps: int = 5) -> Tensor:
    """u (n, rows, columns), rows <= columns -> the same directions, singular values near 1."""
    x = u / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # Frobenius: no singular value is above 1
    for _ in range(steps):
        g = x @ x.mT  # (n, rows, rows)
        x = A * x + (B * g + C * g @ g) @ x  # singular value s becomes A s + B s^3 + C s^5
    return x


# ------------------------------------------------------------------------------------------------
# the same, fast

def newton_schulz_fast(u: Tensor, steps: int = 5) -> Tensor:
    """newton_schulz for u of any shape, on the smaller side [tridao.me, Gram Newton-Schulz, 2026].

    A step is x -> z x with z = A + B g + C g g, so g -> z g z, and the end is z_5 .. z_1 x: where
    a matrix is not square, x is touched twice in all.
    TRAP: only in float32, and without TF32. With coarser rounding g gets negative eigenvalues, and
    these explode: a loss that falls, and a model that learns next to nothing.
    """
    if u.shape[-2] > u.shape[-1]:  # NS(u^T) = NS(u)^T
        return newton_schulz_fast(u.mT, steps).mT
    x = u / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.shape[-2] == x.shape[-1]:
        for _ in range(steps):
            g = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(g, g, g, beta=B, alpha=C), x, beta=A)
        return x
    g, total, eye = x @ x.mT, None, torch.eye(x.shape[-2], device=x.device)
    for step in range(steps):
        z = torch.baddbmm(A * eye, g, g, alpha=C).add_(g, alpha=B)
        total = z if total is None else z @ total
        g = z @ g @ z if step < steps - 1 else None  # nobody asks for the last one
    return total @ x


@contextlib.contextmanager
def whole_float32(device: torch.device):
    """Products inside are float32's own, whatever autocast and TF32 are outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


MOMENTUM = 0.95  # b [Jordan]
MUON, ADAMW = ("momentum",), ("exp_avg", "exp_avg_sq", "step")  # what is kept for a parameter


class Muon:
    """groups: dicts of params with `matrices`: 0 AdamW; else Muon, 3 for q, k, v stored as one.

    Used and saved as torch.optim's are, but derived from none of them: making the first of those
    imports torch's compiler, about 3 s at every start [ours: measured].
    """

    def __init__(self, groups: list[dict], betas=(0.9, 0.999)):
        defaults = dict(lr=0.0, matrices=1, betas=betas, weight_decay=0.0)
        self.param_groups = [{**defaults, **g, "params": list(g["params"])} for g in groups]
        self.state = {}  # parameter -> {name: tensor}

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self.muon if group["matrices"] else self.adamw)(params, group)

    def states(self, params: list[nn.Parameter], *names: str) -> list[list[Tensor]]:
        for p in params:
            if p not in self.state:
                self.state[p] = {name: torch.zeros_like(p) for name in names}
                if "step" in names:
                    self.state[p]["step"] = torch.zeros((), device=p.device)
        return [[self.state[p][name] for p in params] for name in names]

    def state_dict(self) -> dict:
        """In torch's form: a parameter is its number, in the order of the groups.

        Before its first step a parameter has moments of zero, so any state can be gone on from.
        """
        for group in self.param_groups:
            self.states(group["params"], *(MUON if group["matrices"] else ADAMW))
        number = {p: i for i, p in enumerate(self.params)}
        return {"state": {number[p]: state for p, state in self.state.items()},
                "param_groups": [{**group, "params": [number[p] for p in group["params"]]}
                                 for group in self.param_groups]}

    def load_state_dict(self, saved: dict) -> None:
        """Raises ValueError when it is the state of other parameters."""
        params, groups = self.params, saved["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("its groups hold other numbers of parameters")
        for i, state in saved["state"].items():
            p = params[i]
            for name, tensor in state.items():
                if name != "step" and tensor.shape != p.shape:
                    raise ValueError(f"{name} of parameter {i} is {tuple(tensor.shape)}, "
                                     f"not {tuple(p.shape)}")
            self.state[p] = {name: t.to(p.device, copy=True) for name, t in state.items()}
        for group, old in zip(self.param_groups, groups):
            group.update({name: value for name, value in old.items() if name != "params"})

    def muon(self, params: list[nn.Parameter], group: dict) -> None:
        m, = self.states(params, *MUON)
        torch._foreach_lerp_(m, [p.grad for p in params], 1 - MOMENTUM)
        same = {}  # (rows, columns) -> [(W, u)], as stacks
        for p, u in zip(params, torch._foreach_lerp([p.grad for p in params], m, MOMENTUM)):
            w, u = (t if t.ndim == 3 else t.unflatten(0, (group["matrices"], -1)) for t in (p, u))
            same.setdefault(u.shape[1:], []).append((w, u))
        for (rows, columns), pairs in same.items():
            with whole_float32(params[0].device):
                done = newton_schulz_fast(torch.cat([u for _, u in pairs]))
            weights, lengths = [w for w, _ in pairs], [len(u) for _, u in pairs]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, done.split(lengths),
                                alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def adamw(self, params: list[nn.Parameter], group: dict) -> None:
        first, second, steps = self.states(params, *ADAMW)
        adamw(params, [p.grad for p in params], first, second, [], steps, fused=True, amsgrad=False,
              maximize=False, eps=1e-8, lr=group["lr"], weight_decay=group["weight_decay"],
              beta1=group["betas"][0], beta2=group["betas"][1])


if __name__ == "__main__":
    torch.manual_seed(0)
    u = torch.randn(1, 64, 256) * torch.logspace(0, -2, 64)[:, None]  # few directions dominate
    for steps in range(6):
        s = torch.linalg.svdvals(newton_schulz(u, steps)[0])
        print(f"after {steps} steps the singular values reach from {s.min():.4f} to {s.max():.4f}")
    print("Gradient descent moves along the first few. How far does Muon move along the last?")
