"""Least squares from sums over tokens, with the ridge that does best on tokens held out."""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-2, 1e-1, 1.0)


@dataclass
class NormalEquations:
    """Weighted second moments, in float64, of features x (F,) and what they must add, y (d,)."""

    xx: Tensor  # (F, F)
    xy: Tensor  # (F, d)
    yy: float = 0.0
    tokens: int = 0
    gain: Tensor | float = 1.0  # (d,) y is to be multiplied by it: errors are of what it gives

    @classmethod
    def empty(
        cls, features: int, width: int, device: torch.device, gain: Tensor | float = 1.0
    ) -> "NormalEquations":  # fmt: skip
        """No tokens yet."""
        sums = (torch.zeros(features, n, dtype=torch.float64, device=device) for n in (features, width))
        return cls(*sums, gain=gain)

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: x (n, F), y (n, d), weights (n,)."""
        x, y = x.float() * weights[:, None].sqrt(), y.float() * weights[:, None].sqrt()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float((y * self.gain).double().square().sum())
        self.tokens += len(x)

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        sums = (getattr(self, name) + getattr(other, name) for name in ("xx", "xy", "yy", "tokens"))
        return NormalEquations(*sums, self.gain)

    def solve(self, ridge: float, diagonal: bool = False) -> Tensor:
        """(F, d) argmin over D of E |y - x D|^2 + ridge * sum over features f of E x_f^2 |D_f|^2; or D diagonal.

        Each feature's penalty is in its own unit, for MLP activations differ by orders of magnitude.
        """
        own = self.xx.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
        if diagonal:
            return (self.xy.diagonal() / ((1 + ridge) * own)).diag()
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky(self.xx + (ridge * own).diag()))

    def error(self, solution: Tensor) -> float:
        """E |gain (y - x D)|^2 per token."""
        fitted = (solution * (self.xx @ solution - 2 * self.xy) * self.gain**2).sum()
        return float(fitted + self.yy) / self.tokens


def solved(fitted: NormalEquations, held_out: NormalEquations, diagonal: bool) -> tuple[Tensor, dict[str, float]]:
    """The solution on all tokens at the best of ``RIDGES``, and its row of what is refitted."""
    none = torch.zeros_like(held_out.xy)  # what an endless ridge gives: nothing else may hold on other text
    errors = {float("inf"): held_out.error(none)}
    errors |= {ridge: held_out.error(fitted.solve(ridge, diagonal)) for ridge in RIDGES}
    ridge = min(errors, key=errors.get)
    row = {"ridge": ridge, "error_before": errors[float("inf")], "error_after": errors[ridge]}
    return none if ridge == float("inf") else (fitted + held_out).solve(ridge, diagonal), row
