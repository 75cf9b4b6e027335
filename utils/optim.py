"""Muon: momentum with singular values of one, for the matrices of the blocks."""

import itertools

import torch

from utils.training import adamw


def newton_schulz_factor(A):
    """What X is multiplied by in an iteration, for A = X Xᵀ, (N, rows, rows): aI + bA + cAA."""
    a, b, c = 3.4445, -4.7750, 2.0315
    B = torch.baddbmm(A, A, A, beta=b, alpha=c)
    B.diagonal(dim1=1, dim2=2).add_(a)
    return B


def newton_schulz_product(A, iterations):
    """The factors of all iterations multiplied, same shape: A becomes BAB when X becomes BX."""
    B = product = newton_schulz_factor(A)
    for _ in range(iterations - 1):
        A = B @ A @ B
        B = newton_schulz_factor(A)
        product = B @ product
    return product


def newton_schulz(matrices, iterations=5):
    """(N, rows, columns) -> same, with singular values near 1 (Newton-Schulz iteration)."""
    rows, columns = matrices.shape[1:]
    if rows > columns:  # transposed, the products are smaller
        return newton_schulz(matrices.mT, iterations).mT
    X = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if columns > 2 * rows:
        return newton_schulz_product(X @ X.mT, iterations) @ X
    for _ in range(iterations):
        X = newton_schulz_factor(X @ X.mT) @ X
    return X


def group_by_shape(weights):
    """Lists of weights of one shape: moved together, they need few large products."""
    shapes = {}
    for weight in weights:
        shapes.setdefault(weight.shape, []).append(weight)
    return shapes.values()


def nesterov_momentum(average, gradient, momentum, broken):
    """Update the running `average` -> it, with the newest gradient mixed in once more (Nesterov).

    Matrices of one shape. Where `broken` is 1, the average stays as it was.
    """
    gradient = torch.where(broken == 0, gradient, average)
    average.lerp_(gradient, 1 - momentum)
    return gradient.lerp(average, momentum)


class Muon(torch.optim.Optimizer):
    """Momentum with singular values of one (Jordan et al. 2024; scaled as Liu et al. 2025).

    Equals `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but in float32. Where
    `found_inf` is 1, a step does nothing, as in the fused AdamW.
    """

    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.95, iterations=5):
        settings = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, iterations=iterations)
        super().__init__(matrices, settings)
        self.found_inf = torch.zeros(())
        for weight in itertools.chain(*(group["params"] for group in self.param_groups)):
            self.state[weight]["average"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        """Move all weights by their `grad`."""
        for group in self.param_groups:
            for weights in group_by_shape(group["params"]):
                self.move(weights, group)

    def move(self, weights, group):
        """One step of N weights of one shape."""
        rate = group["lr"] * (self.found_inf == 0)  # zero where nothing should move
        averages = [self.state[weight]["average"] for weight in weights]
        pairs = zip(averages, weights, strict=True)
        ahead = [nesterov_momentum(a, w.grad, group["momentum"], self.found_inf) for a, w in pairs]
        length = rate * 0.2 * max(weights[0].shape) ** 0.5
        steps = length * newton_schulz(
            torch.stack(ahead), group["iterations"]
        )  # (N, rows, columns)
        kept = 1 - rate * group["weight_decay"]
        for weight, step in zip(weights, steps, strict=True):
            weight.mul_(kept).sub_(step)


def muon_and_adamw(model, args):
    """Muon for the matrices of the blocks, AdamW for all other weights -> list of both."""
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    matrices = [p for name, p in named if "blocks." in name]
    ids, [rest] = set(map(id, matrices)), adamw(model, args)
    for group in rest.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    return [rest, Muon(matrices, args.max_lr, args.weight_decay_optim, iterations=4)]
