"""Run a model once through Dynamo with a backend of our own, and leave no trace of it."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def run_captured(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], backend: Any) -> Any:
    """``model(*args, **kwargs)`` with each graph that Dynamo makes of it given to ``backend``.

    Grad mode and training mode are the caller's. Random state and buffers are put back afterwards, and the model's own
    compiled code is neither used nor touched.
    """
    model = getattr(model, "_orig_mod", model)
    # Dynamo's cache hangs on code objects: a copy has an empty one, so every graph is captured anew.
    run = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    limits = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    with _unchanged(model), torch._dynamo.config.patch(limits):
        return torch.compile(run, backend=backend)(model, args, kwargs)


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    tensors = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [(tensor, tensor._version, tensor.clone()) for tensor in tensors]
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    if isinstance(model, nn.Module):
        devices |= {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for tensor, version, copy in saved:
                if tensor._version != version:
                    tensor.copy_(copy)
