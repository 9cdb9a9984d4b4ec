"""The gradients of ``ops``: of the pruned function, the mask being piecewise constant; exact, but for one mode.

With ``y = unpack(packed, metadata)`` and ``out = y W2.T + b2``::

    d packed = gather(dout W2, metadata)                  sampled_mm: the entries that were dropped are not needed
    d W2     = dout.T y                                   dense, exact
    d h      = unpack(d packed * 2 relu(h), metadata)     relu(h) = sqrt(packed), so h itself is not kept

Saved for backward are ``packed``, ``metadata`` and the weight: 1.125 bytes a hidden element in bf16, where the dense
form keeps four. Taking ``sqrt(packed)`` loses nothing in bf16 and fp32 (squaring and rounding moves a value by less
than the root brings back), as long as the square neither overflows nor underflows; in fp16 it underflows gradually
below ``relu(h) = 2**-7``, where the gradient's factor is off by up to ``2**-12``.

``relu2_ffn`` spans both matmuls, so that ``d h`` stays packed::

    d x      = unpack(d h, metadata) W1                   sparse_mm
    d W1     = unpack(d h, metadata).T x
    d W2.T   = y.T dout

With ``feature_wise`` the last two run in 2:4 along tokens, and are approximate: of every four tokens each feature keeps
the two largest entries of ``d h`` and of ``y``. Neighbouring tokens fire the same features, and so do those at one
place of several sequences: groups are made of tokens that are far apart (``reference.group_strides``). And the features
that fire most, of which most would be lost, are done dense: the same ones for both, ``d h`` being zero wherever ``y``
is. Only gradients of weights look across tokens: what a token sees in the forward pass, and sends back, depends on no
later one. Method: arXiv 2503.16672.

An entry that was kept although ``relu(h)`` is zero (a group with fewer than two positive entries) multiplies its
gradient by zero. So a NaN or an infinity in ``dout`` reaches ``d h`` there as NaN, where dense ReLU would drop it; it
reaches no entry that was not kept. With ``feature_wise`` it reaches, on a GPU, the weights of the features that keep
its token, with a zero, too; the reference multiplies what was dropped as zeros, and so it reaches those of all.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ao_act24 import ops


def _matmul_weight_grad(grad: Tensor, dense: Tensor) -> Tensor:
    """``grad.T @ dense`` over all tokens: ``[..., A]`` and ``[..., B]`` to ``[A, B]``."""
    return _rows(grad).t() @ _rows(dense)


def _rows(tokens: Tensor) -> Tensor:
    return tokens.reshape(math.prod(tokens.shape[:-1]), tokens.shape[-1])  # of no features, too


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    packed, metadata = output
    ctx.save_for_backward(packed, metadata)
    ctx.mark_non_differentiable(metadata)


def _relu2_sparsify_backward(ctx: Any, grad_packed: Tensor, _: None) -> Tensor:
    return _grad_hidden(grad_packed, *ctx.saved_tensors)


def _grad_hidden(grad_packed: Tensor, packed: Tensor, metadata: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise _second_derivative("relu2_sparsify")
    return ops.unpack(grad_packed * (packed.sqrt() * 2), metadata)


def _second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"ao_act24::{name} has no second derivative: create_graph=True is not supported through it"
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    packed, metadata = output
    ctx.save_for_backward(*inputs[:2], packed, metadata)
    ctx.mark_non_differentiable(metadata)


def _linear_relu2_sparsify_backward(ctx: Any, grad_packed: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, weight, packed, metadata = ctx.saved_tensors
    grad = _grad_hidden(grad_packed, packed, metadata)
    need_x, need_weight, need_bias = (*ctx.needs_input_grad, False)[:3]
    return (
        grad @ weight if need_x else None,
        _matmul_weight_grad(grad, x) if need_weight else None,
        grad.sum_to_size(grad.shape[-1:]) if need_bias else None,
    )


DENSE_SHARE = 0.05  # of the features, the densest ones
PERMUTED = True  # groups of tokens that are far apart


def _save_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, _, down, _, ctx.feature_wise = inputs
    _, packed, metadata = output
    ctx.save_for_backward(x, up, down, packed, metadata)
    ctx.mark_non_differentiable(packed, metadata)


def _relu2_ffn_backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise _second_derivative("relu2_ffn")
    x, up, down, packed, metadata = ctx.saved_tensors
    need_x, need_up, need_up_bias, need_down, need_down_bias, _ = ctx.needs_input_grad
    hidden: Any = ops.grad_hidden(grad, down, packed, metadata) if need_x or need_up or need_up_bias else None
    weight_grads = _feature_wise_grads if ctx.feature_wise else _exact_grads
    grad_up, grad_up_bias, grad_down = weight_grads(x, grad, hidden, packed, metadata, need_up, need_up_bias, need_down)
    return (
        ops.sparse_mm(hidden, metadata, up.t()) if need_x else None,
        grad_up,
        None if grad_up_bias is None else grad_up_bias.to(up.dtype),
        grad_down,
        grad.sum_to_size(grad.shape[-1:]) if need_down_bias else None,
        None,
    )


_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]  # of up, its bias, down


def _exact_grads(
    x: Tensor, grad: Tensor, hidden: Tensor, packed: Tensor, metadata: Tensor, up: bool, up_bias: bool, down: bool
) -> _Grads:
    dense = ops.unpack(hidden, metadata) if up or up_bias else x
    return (
        _matmul_weight_grad(dense, x) if up else None,
        dense.sum_to_size(dense.shape[-1:]) if up_bias else None,
        _matmul_weight_grad(grad, ops.unpack(packed, metadata)) if down else None,
    )


def _feature_wise_grads(
    x: Tensor, grad: Tensor, hidden: Tensor, packed: Tensor, metadata: Tensor, up: bool, up_bias: bool, down: bool
) -> _Grads:
    if not (up or up_bias or down):
        return None, None, None
    grad_up = sums = grad_down = None
    wise, codes, counts, left = ops.feature_wise(packed, metadata, PERMUTED, True)
    densest, slots = ops.densest(counts, how_many_densest(counts.shape[0]))
    if down:
        exact = _matmul_weight_grad(ops.columns(packed, metadata, densest), grad)
        grad_down = ops.feature_wise_mm(wise, codes, left, grad, exact, slots, PERMUTED, True)
    if up or up_bias:
        wise, codes, sums, left = ops.feature_wise(hidden, metadata, PERMUTED, False)
    if up:
        exact = _matmul_weight_grad(ops.columns(hidden, metadata, densest), x)
        grad_up = ops.feature_wise_mm(wise, codes, left, x, exact, slots, PERMUTED, False)
    return grad_up, sums if up_bias else None, grad_down


def how_many_densest(hidden_dim: int) -> int:
    """``DENSE_SHARE`` of the features, in whole eights."""
    return min(math.ceil(DENSE_SHARE * hidden_dim / 8) * 8, hidden_dim)


def _sparsify_backward(ctx: Any, grad_packed: Tensor, _: None) -> Tensor:
    return ops.unpack(grad_packed, ctx.saved_tensors[1])


def _save_metadata(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx: Any, grad_packed: Tensor) -> tuple[Tensor, None]:
    return ops.unpack(grad_packed, *ctx.saved_tensors), None


def _unpack_backward(ctx: Any, grad_dense: Tensor) -> tuple[Tensor, None]:
    return ops.gather(grad_dense, *ctx.saved_tensors), None


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _sparse_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    packed, metadata, weight = ctx.saved_tensors
    need_packed, _, need_weight, need_bias = (*ctx.needs_input_grad, False)[:4]
    return (
        ops.sampled_mm(grad, weight, metadata) if need_packed else None,
        None,
        _matmul_weight_grad(grad, ops.unpack(packed, metadata)) if need_weight else None,
        grad.sum_to_size(grad.shape[-1:]) if need_bias else None,
    )


def _sampled_mm_backward(ctx: Any, grad_packed: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    grad, weight, metadata = ctx.saved_tensors
    need_grad, need_weight, _ = ctx.needs_input_grad
    return (
        ops.sparse_mm(grad_packed, metadata, weight) if need_grad else None,
        _matmul_weight_grad(grad, ops.unpack(grad_packed, metadata)) if need_weight else None,
        None,
    )


for _name, _backward, _setup in (
    ("relu2_sparsify", _relu2_sparsify_backward, _save_packed),
    ("linear_relu2_sparsify", _linear_relu2_sparsify_backward, _save_linear),
    ("sparsify", _sparsify_backward, _save_packed),
    ("gather", _gather_backward, _save_metadata),
    ("unpack", _unpack_backward, _save_metadata),
    ("sparse_mm", _sparse_mm_backward, _save_inputs),
    ("sampled_mm", _sampled_mm_backward, _save_inputs),
    ("relu2_ffn", _relu2_ffn_backward, _save_ffn),
):
    torch.library.register_autograd(f"ao_act24::{_name}", _backward, setup_context=_setup)


def _active_ffn_backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError("ao_act24::active_ffn has no gradient: it is for inference, under torch.no_grad()")


torch.library.register_autograd("ao_act24::active_ffn", _active_ffn_backward)
