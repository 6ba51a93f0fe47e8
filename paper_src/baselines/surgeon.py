"""Optimal brain surgery: weights are changed one input after the other, and those behind make up for the error."""

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01  # of the moment's mean diagonal, as in the released code of both papers
Fix = Callable[[Tensor, int], Tensor]  # a column (out,) and its place in the stretch -> that column, fixed


@torch.no_grad()
def compensated(weight: Tensor, moment: Tensor, rule: Callable[[Tensor, Tensor], Fix], width: int = 128) -> Tensor:
    """(out, in) weights in which ``rule`` fixed input after input, each error taken up by the inputs behind it.

    With H = E x x^T + damping and U the upper Cholesky factor of H^-1, fixing input j at q adds to the inputs behind it
    -(w_j - q) / U_jj U_j,: which is the least E |W x - W' x|^2 for weights that are fixed in this order (GPTQ,
    arXiv:2210.17323, equations 2 to 4; SparseGPT, arXiv:2301.00774, equation 3).

    Args:
        weight: (out, in); moment: (in, in) mean of x x^T.
        rule: of a stretch of n inputs, its weights (out, n) as they are when it is reached, and U_jj (n,).
        width: of a stretch.
    """
    moment = moment.double().clone()
    dead = moment.diagonal() == 0
    moment[dead, dead] = 1.0
    moment.diagonal().add_(DAMPING * float(moment.diagonal().mean()))
    # H = R R' with R upper, by the factor of H turned round; then H^-1 = U' U with U = R^-1
    root = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    upper, left = torch.linalg.solve_triangular(root, eye, upper=True).float(), weight.float().clone()
    for start in range(0, len(moment), width):
        stretch = slice(start, min(start + width, len(moment)))
        part, own = left[:, stretch], upper[stretch, stretch]  # part is a view
        fix, errors = rule(part, own.diagonal()), torch.zeros_like(part)
        for j in range(part.shape[1]):
            fixed = fix(part[:, j], j)
            errors[:, j] = (part[:, j] - fixed) / own[j, j]
            part[:, j:] -= errors[:, j, None] * own[j, j:]
            part[:, j] = fixed
        left[:, stretch.stop :] -= errors @ upper[stretch, stretch.stop :]
    return left.to(weight.dtype)
