"""What the rewritten model must compute, written a second time: by comparing every pair instead of sorting, in plain
torch operations whose gradients are autograd's own. Shares no code with the package."""

import torch
from torch import Tensor, nn


def mask24(h: Tensor) -> Tensor:
    """True where ``relu(h)`` is among the two largest of its group; ties go to the lower index, NaN beats all."""
    k = torch.maximum(h.detach(), torch.zeros_like(h)).unflatten(-1, (-1, 4))
    mine, other = k.unsqueeze(-1), k.unsqueeze(-2)
    larger = (other > mine) | (other.isnan() & ~mine.isnan())
    equal = (other == mine) | (other.isnan() & mine.isnan())
    lower_index = torch.ones(4, 4, dtype=torch.bool, device=h.device).tril(-1)
    return ((larger | (equal & lower_index)).sum(-1) < 2).flatten(-2)


def relu2_24(h: Tensor) -> Tensor:
    """``relu(h)**2`` with the entries that 2:4 drops set to zero, dense; squared in fp32 and rounded once."""
    wide = torch.promote_types(h.dtype, torch.float32)
    square = torch.relu(h).to(wide).square().to(h.dtype)
    return torch.where(mask24(h), square, torch.zeros_like(square))


class ReLU2In24(nn.Module):
    """Put in the place of a model's ReLU² module to get the model that the rewrite must equal."""

    def forward(self, h: Tensor) -> Tensor:
        return relu2_24(h)


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in fp64; NaN anywhere gives NaN, which no bound accepts."""
    got, want = got.double(), want.double()
    difference, norm = (got - want).norm(), want.norm()
    return float(difference / norm) if norm > 0 else float(difference)
