"""The semantics of every op in plain torch: slow, readable, and the oracle for every kernel.

Shapes: ``h`` is ``[..., H]`` with H divisible by 4, ``packed`` ``[..., H / 2]``, ``metadata`` as in ``layout``,
``weight`` ``[D, H]``. Leading dimensions are tokens. Inputs are floating point and already checked (``ops`` does it).

Method: "Accelerating Transformer Inference and Training with 2:4 Activation Sparsity", arXiv 2503.16672.
"""

import torch
from torch import Tensor

from . import layout


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything up to fp32, fp64 for fp64 (which only gradient checks use)."""
    return torch.promote_types(dtype, torch.float32)


def two_largest(key: Tensor) -> Tensor:
    """Positions of the two largest magnitudes of every four: ``[..., H]`` to ``[..., H / 4, 2]``, ascending.

    On a tie the lower position wins. NaN counts as larger than anything.
    """
    # Magnitudes are ordered as their bits are, and integers have no NaN: where a float sort puts those depends on the
    # device.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[key.dtype.itemsize]
    bits = torch.where(key.isnan(), torch.iinfo(integer).max, key.abs().view(integer))
    order = bits.unflatten(-1, (key.shape[-1] // 4, 4)).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :2].sort(dim=-1).values


def relu2(h: Tensor) -> Tensor:
    """``relu(h)**2``, dense: squared in fp32, rounded once to the dtype of ``h``. Zeros are ``+0``; NaN is any NaN."""
    return h.clamp_min(0).to(accumulation_dtype(h.dtype)).square().to(h.dtype)


def relu2_sparsify(h: Tensor) -> tuple[Tensor, Tensor]:
    """``relu2(h)``, of every four neighbours the two with the largest ``relu(h)``. Returns ``packed, metadata``."""
    index = two_largest(h.clamp_min(0))
    return take(relu2(h), index), layout.encode(index)


def active_ffn(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    """``relu2(x @ up.T + up_bias) @ down.T + down_bias``, nothing dropped: ``[..., D]``, ``[H, D]``, ``[D, H]``.

    ``h``, ``relu2(h)`` and the result are rounded to the dtype of ``x``, as they are dense; sums are in fp32.
    """
    wide = accumulation_dtype(x.dtype)
    h = torch.nn.functional.linear(x.to(wide), up.to(wide), None if up_bias is None else up_bias.to(wide)).to(x.dtype)
    y, bias = relu2(h).to(wide), None if down_bias is None else down_bias.to(wide)
    return torch.nn.functional.linear(y, down.to(wide), bias).to(x.dtype)


E4M3 = torch.float8_e4m3fn
E4M3_MAX, E4M3_FLOOR = torch.finfo(E4M3).max, 1e-12  # of what is scaled, as torchao has it


def active_ffn_fp8(
    x: Tensor,
    x_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``active_ffn`` of e4m3 with scales, its activation scaled to e4m3 as ``relu2_sparsify_fp8`` does; none dropped.

    ``x [..., D]``, ``x_scale [...]``, ``up [H, D]``, ``up_scale [H]``, ``down [D, H]``, ``down_scale [D]``; scales are
    fp32, biases and the result of ``dtype``, which ``h`` is rounded to.
    """
    relu = scaled_linear(x, x_scale, up, up_scale, up_bias, dtype).clamp_min(0)
    return scaled_linear(*scale_to_e4m3(relu.float().square()), down, down_scale, down_bias, dtype)


def scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x_scale * (x @ weight.T) * weight_scale + bias`` of e4m3, or of what fp32 holds, rounded once to ``dtype``."""
    out = torch.nn.functional.linear(x.float(), weight.float()) * x_scale.unsqueeze(-1) * weight_scale
    return (out if bias is None else out + bias.float()).to(dtype)


def scale_to_e4m3(squares: Tensor) -> tuple[Tensor, Tensor]:
    """``squares [..., H]`` times ``1 / row_scale``, rounded to e4m3, and ``row_scale [...]``: the largest over 448."""
    largest = squares.amax(-1) if squares.shape[-1] else squares.new_zeros(squares.shape[:-1])
    row_scale = largest.clamp_min(E4M3_FLOOR) / largest.new_full((), E4M3_MAX)  # by a number, a GPU would multiply
    return (squares * row_scale.reciprocal().unsqueeze(-1)).clamp_max(E4M3_MAX).to(E4M3), row_scale


def relu2_sparsify_fp8(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``relu2_sparsify`` of 16-bit ``h`` to e4m3, with a scale for each row: ``packed, metadata, row_scale``.

    ``row_scale [...]``, fp32, is the row's largest ``relu(h)**2`` (at least 1e-12) over 448; ``packed`` is what is kept
    of ``relu(h)**2``, in fp32, times ``1 / row_scale``, rounded once. Infinity or NaN make NaN of all a row's products.
    """
    relu = h.clamp_min(0)
    index = two_largest(relu)
    packed, row_scale = scale_to_e4m3(take(relu, index).float().square())
    return packed, layout.encode(index), row_scale


def linear_relu2_sparsify(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``relu2_sparsify`` of ``x @ weight.T + bias``, accumulated in fp32 and rounded once: ``[..., D]``, ``[H, D]``."""
    wide = accumulation_dtype(x.dtype)
    h = torch.nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return relu2_sparsify(h.to(x.dtype))


def linear_relu2_sparsify_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``relu2_sparsify_fp8`` of ``x_scale * (x @ weight.T) * weight_scale + bias``, rounded once to ``dtype``.

    ``x [..., D]`` and ``weight [H, D]`` are e4m3, ``x_scale [...]`` and ``weight_scale [H]`` fp32.
    """
    return relu2_sparsify_fp8(scaled_linear(x, x_scale, weight, weight_scale, bias, dtype))


def sparsify(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Of every four neighbours the two of largest magnitude, values unchanged. Returns ``packed, metadata``."""
    index = two_largest(dense)
    return take(dense, index), layout.encode(index)


def take(dense: Tensor, index: Tensor) -> Tensor:
    """The entries of ``dense [..., H]`` at ``index [..., H / 4, 2]``, as ``[..., H / 2]``."""
    return dense.unflatten(-1, (dense.shape[-1] // 4, 4)).gather(-1, index).flatten(-2)


def gather(dense: Tensor, metadata: Tensor) -> Tensor:
    """The entries of ``dense [..., H]`` that ``metadata`` keeps, as ``[..., H / 2]``."""
    return take(dense, layout.decode(metadata, dense.shape))


def unpack(packed: Tensor, metadata: Tensor) -> Tensor:
    """The dense ``[..., H]`` tensor of ``packed, metadata``; entries that were not kept are ``+0``."""
    pairs = packed.unflatten(-1, (packed.shape[-1] // 2, 2))
    dense = packed.new_zeros(*pairs.shape[:-1], 4)
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    return dense.scatter(-1, layout.decode(metadata, shape), pairs).flatten(-2)


def sparse_mm(packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``unpack(packed, metadata) @ weight.T + bias``: accumulated in fp32, rounded once. Returns ``[..., D]``."""
    wide = accumulation_dtype(packed.dtype)
    dense = unpack(packed, metadata).to(wide)
    out = torch.nn.functional.linear(dense, weight.to(wide), None if bias is None else bias.to(wide))
    return out.to(packed.dtype)


def sparse_mm_fp8(
    packed: Tensor,
    metadata: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``row_scale * (unpack(packed, metadata) @ weight.T) * weight_scale + bias``, rounded once to ``dtype``.

    ``packed`` and ``weight [D, H]`` are e4m3, ``row_scale`` has the shape of ``packed`` without its last dimension,
    ``weight_scale`` is ``[D]``, both fp32, ``bias [D]`` of ``dtype``. Accumulated in fp32.
    """
    return scaled_linear(unpack(packed.float(), metadata), row_scale, weight, weight_scale, bias, dtype)


def sampled_mm(grad: Tensor, weight: Tensor, metadata: Tensor) -> Tensor:
    """``grad @ weight`` at the entries that ``metadata`` keeps: ``[..., D]`` and ``[D, H]`` to ``[..., H / 2]``."""
    wide = accumulation_dtype(grad.dtype)
    return gather(grad.to(wide) @ weight.to(wide), metadata).to(grad.dtype)


def relu2_ffn(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, feature_wise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The two matmuls and the packing in between: ``out, packed, metadata``. (``feature_wise`` is for gradients.)"""
    packed, metadata = relu2_sparsify(torch.nn.functional.linear(x, up, up_bias))
    return sparse_mm(packed, metadata, down, down_bias), packed, metadata


def grad_hidden(grad: Tensor, weight: Tensor, packed: Tensor, metadata: Tensor) -> Tensor:
    """The gradient by ``h`` at the entries that ``metadata`` keeps, all others being zero: ``[..., H / 2]``.

    ``sampled_mm(grad, weight, metadata)``, rounded, times ``2 relu(h)``, rounded; ``relu(h) = sqrt(packed)``.
    """
    return sampled_mm(grad, weight, metadata) * (packed.sqrt() * 2)


def feature_wise(
    packed: Tensor, metadata: Tensor, permuted: bool, counted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token-wise 2:4 to feature-wise: of every four tokens the two entries of largest magnitude, for each feature.

    The tokens of a group are ``group_strides`` apart, which have little to do with each other, or, not ``permuted``,
    neighbours. Groups are in the order of their first tokens. Up to three tokens are left over.

    Returns:
        packed: ``[2 Q, H]``, Q being ``tokens // 4``: rows 2 j and 2 j + 1 are what was kept of group j.
        metadata: of ``[H, 4 Q]``, a row a feature: as in ``layout``.
        totals: ``[H]``: of each feature, over all tokens, before: if ``counted`` the number of non-zeros, int32, else
            the sum, fp32 (fp64 of fp64).
        left: ``[3, H]``, dense: the tokens left over, then zeros. (Of one size: no graph depends on it.)
    """
    dense = unpack(packed, metadata)
    dense = dense.reshape(-1, dense.shape[-1])
    whole = dense.shape[0] // 4 * 4
    rows = in_groups(dense[:whole], permuted).flatten(0, 1).t()
    index = two_largest(rows)
    left = torch.cat([dense[whole:], dense.new_zeros(3 - dense[whole:].shape[0], dense.shape[1])])
    return take(rows, index).t().contiguous(), layout.encode(index), total(dense, counted), left


def total(dense: Tensor, counted: bool) -> Tensor:
    """``totals`` of ``feature_wise``, of ``[tokens, H]``."""
    if counted:
        return (dense != 0).sum(0, dtype=torch.int32)
    return dense.sum(0, dtype=accumulation_dtype(dense.dtype))


def group_strides(tokens: int) -> tuple[int, int]:
    """How far apart the four tokens of a group are, of ``tokens``, whole fours: of the first ones, and of the last.

    A quarter of all tokens would be a whole number of sequences in the usual batch, and what fires at a place, such as
    a first token, would fire in all four. So the first is an odd number of sixteens, which kernels bring in together,
    some 240 less than a quarter, or of few tokens half of it. (For sequences of 128 tokens or more, all four are then
    at one place only where it happens to be a whole number of these: nine of 1000, say.) What that leaves over, 960
    tokens of many, makes groups a quarter of that apart.
    """
    quarter = tokens // 4
    first = (quarter - min(240, quarter // 2)) // 32 * 32 + 16 if quarter >= 32 else 0
    return first, quarter - first


def in_groups(tokens: Tensor, permuted: bool) -> Tensor:
    """``[4 Q, ...]`` to ``[Q, 4, ...]``: tokens ``group_strides`` apart, or neighbours."""
    if not permuted or tokens.shape[0] == 0:
        return tokens.unflatten(0, (tokens.shape[0] // 4, 4))
    first, last = group_strides(tokens.shape[0])
    parts = (tokens[: 4 * first], first), (tokens[4 * first :], last)
    return torch.cat([part.unflatten(0, (4, stride)).transpose(0, 1) for part, stride in parts if stride])


def densest(counts: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Which ``chosen`` of ``counts [H]`` are the largest, ties to the lower.

    Returns:
        index: ``[chosen]``, int64, ascending.
        slots: ``[H]``, int32: where in ``index`` each is, or -1.
    """
    index = counts.sort(descending=True, stable=True).indices[:chosen].sort().values
    slots = torch.full_like(counts, -1, dtype=torch.int32)
    return index, slots.index_copy(0, index, torch.arange(chosen, dtype=torch.int32, device=counts.device))


def feature_wise_mm(
    packed: Tensor,
    metadata: Tensor,
    left: Tensor,
    dense: Tensor,
    exact: Tensor,
    slots: Tensor,
    permuted: bool,
    transposed: bool,
) -> Tensor:
    """``y.T @ dense`` of a ``feature_wise`` y and ``[..., D]``: ``[H, D]``; ``transposed``: ``[D, H]``.

    But the row of a feature whose ``slots [H]`` is not negative is that row of ``exact [K, D]``.
    """
    wide = accumulation_dtype(packed.dtype)
    rows = unpack(packed.t(), metadata).to(wide)
    dense = dense.reshape(-1, dense.shape[-1])
    whole = dense.shape[0] // 4 * 4
    groups, rest = in_groups(dense[:whole].to(wide), permuted), dense[whole:].to(wide)
    out = (rows @ groups.flatten(0, 1) + left[: rest.shape[0]].to(wide).t() @ rest).to(packed.dtype)
    out[slots >= 0] = exact[slots[slots >= 0]]
    return out.t().contiguous() if transposed else out


def columns(packed: Tensor, metadata: Tensor, index: Tensor) -> Tensor:
    """Columns ``index [K]`` of ``unpack(packed, metadata)``: ``[..., K]``."""
    return unpack(packed, metadata).index_select(-1, index)
