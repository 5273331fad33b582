"""What a change of the weights is: its size, where it points, how it acts. For any method, from two
matrices alone.

W: a linear layer's pretrained weight, dW = W_tuned - W, both in nn.Linear's layout. Axes: O
outputs, I inputs, R = min(O, I) singular directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gain_cl.models import families

EXACT = 1e-6
"""By how much of ||W_tuned|| a matrix may differ from a diagonal times W and still be one: rounding
to fp32."""


class Scaling(NamedTuple):
    """W_tuned is W with its columns (side input) or rows (output) times these gains, (I,) or (O,)
    float64."""

    side: str
    s: Tensor


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every linear layer (nn.Linear, Conv1D) with its name, once; not an output head that
    shares the input embedding's weight."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, layer in model.named_modules():
        linear = isinstance(layer, nn.Linear) or families.is_conv1d(layer)
        if linear and id(layer.weight) not in tied:
            yield name, layer


def out_in(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Return a linear layer's weight, or another tensor of its shape, as (O, I): Conv1D stores the
    transpose."""
    found = cast("Tensor", layer.weight) if weight is None else weight
    return found.T if families.is_conv1d(layer) else found


def left_vectors(weight_OI: Tensor) -> Tensor:
    """Return U (O, R): left singular vectors, the largest singular value first. Of a wide matrix
    they are those of the triangle L in W = L Q, which are the same and two to three times as fast
    (LAPACK's own reduction, forced)."""
    w = weight_OI.cpu() if weight_OI.device.type == "mps" else weight_OI  # which has no SVD
    if w.shape[0] < w.shape[1]:
        w = torch.linalg.qr(w.T).R.T
    return torch.linalg.svd(w, full_matrices=False).U.to(weight_OI.device)


def residual_energies(change_OI: Tensor, left_OR: Tensor) -> Tensor:
    """Return (R + 1,) float64: entry k is ||(I - P_k) dW||_F^2, P_k the projector on the first k
    left singular vectors of W, k = 0 .. R.

    dW = U C + outside; its parts are orthogonal, so the squares add: no small difference of large
    numbers.
    """
    inside_RI = left_OR.T @ change_OI
    outside = (change_OI - left_OR @ inside_RI).double().square().sum()
    energies_R = inside_RI.double().square().sum(1)
    return torch.cat([energies_R.flip(0).cumsum(0).flip(0), energies_R.new_zeros(1)]) + outside


def closest_cosines(tuned_OK: Tensor, left_OR: Tensor) -> Tensor:
    """Return (K,) largest |cosine| of each of the first K left singular vectors of W_tuned with any
    of the R of W. Below a threshold (0.5) it is an intruder dimension: Shuttleworth et al. 2024,
    2410.21228, section 3, where U is the reduced SVD's, as here."""
    return (tuned_OK.T @ left_OR).abs().max(dim=1).values


def scaling(base_OI: Tensor, tuned_OI: Tensor) -> Scaling | None:
    """Return the gains that make W_tuned from W, by least squares; None where no diagonal does.
    Where W has an empty column (or row) the gain is 1."""
    w, t = base_OI.double(), tuned_OI.double()
    for side, dim in (("input", 0), ("output", 1)):
        energy = w.square().sum(dim, keepdim=True)
        s = torch.where(energy > 0, (w * t).sum(dim, keepdim=True) / energy, 1.0)
        left_over = (t - w * s).norm()
        if left_over <= EXACT * t.norm() and left_over <= 0.1 * (t - w).norm():
            return Scaling(side, s.flatten())
    return None
