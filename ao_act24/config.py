"""The one set of options, taken by every way in."""

from dataclasses import dataclass
from typing import Literal


def checked(config: object) -> "Act24Config":
    """``config``, or the default for None."""
    if config is None:
        return Act24Config()
    if not isinstance(config, Act24Config):
        raise TypeError(f"config must be an Act24Config, got {config!r}")
    return config


@dataclass(frozen=True)
class Act24Config:
    """Options of the rewrite.

    Attributes:
        emulate: run 2:4 also where it has no fast kernel (through the reference implementation, which computes what a
            kernel would), and where it is slower than dense: for studying accuracy, not for speed. The CPU always runs
            the reference.
        weight_grads: how training computes the gradients of both weights. "dense": exactly. "sparse": in 2:4 along
            tokens but for the features that fire most, which is approximate (``ao_act24.autograd`` says how), where
            that is faster (``ao_act24.when``). Takes effect under ``torch.compile``; a site that cannot be done in one
            operator stays exact.
        dtype: in which the FFNs run, for inference. None: in which their weights are; torchao's ``Float8Tensor`` by
            rows means fp8. "fp8": ``sparsify_`` converts bfloat16 weights of the FFNs that it rewrites, once, to such
            tensors. Elsewhere weights belong to the model, and an FFN of bfloat16 ones stays dense; but with
            ``emulate`` they are converted at each call.
    """

    emulate: bool = False
    weight_grads: Literal["dense", "sparse"] = "dense"
    dtype: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.emulate, bool):
            raise TypeError(f"emulate must be True or False, got {self.emulate!r}")
        if self.weight_grads not in ("dense", "sparse"):
            raise ValueError(f'weight_grads must be "dense" or "sparse", got {self.weight_grads!r}')
        if self.dtype not in (None, "fp8"):
            raise ValueError(f'dtype must be None or "fp8", got {self.dtype!r}')
        if self.dtype == "fp8" and self.weight_grads == "sparse":
            raise ValueError('weight_grads must be "dense" with dtype "fp8", which has no gradients, got "sparse"')
