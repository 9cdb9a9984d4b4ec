"""How 2:4 metadata is stored.

A row of ``hidden_dim`` entries is cut into groups of four. Of each group two entries are kept, at positions
``idx0 < idx1``, and one 4-bit code says which::

    code = idx0 | idx1 << 2

    kept    0,1   0,2   1,2   0,3   1,3   2,3
    code     4     8     9    12    13    14         no other code is defined for the hardware

In row-major form (``to_rows``, ``from_rows``) two codes share a byte, the first group in the low bits::

    hidden   h0 h1 h2 h3 | h4 h5 h6 h7 | h8 h9 h10 h11          hidden_dim = 12
    packed   p0 p1       | p2 p3       | p4 p5                  hidden_dim / 2 values
    bytes     byte 0: code(group 0) | code(group 1) << 4        ceil(hidden_dim / 8) bytes
              byte 1: code(group 2) | 4 << 4                    padding is code 4: every stored code is a valid one

``metadata`` holds these bytes in the order in which a warp hands them to ``wgmma.sp`` (16-bit types), so that each
thread reads what it needs at once and all threads together read whole lines. All leading dimensions count as tokens.
16 tokens by 256 entries make a block of 512 bytes; blocks follow each other along ``hidden_dim``, then along tokens::

    in a block, lane 4 g + q (g < 8, q < 4) holds 16 bytes: four words, one for each 64 entries
    word s:  low half   the codes of token g,     entries 64 s + 16 q ... + 15
             high half  the codes of token g + 8, the same entries

so ``metadata`` is ``uint8`` of shape ``[tokens, hidden_dim / 8]``, rounded up to multiples of 16 and 32; but its bytes
do not lie in rows. Code outside ``kernels`` treats it as opaque and asks ``metadata_shape``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

VALID_CODES = (4, 8, 9, 12, 13, 14)
PADDING_CODE = 4
_PADDING_BYTE = PADDING_CODE | PADDING_CODE << 4


def metadata_shape(dense_shape):  # type: ignore[no-untyped-def]  # ints or SymInts, returned as they came
    """The shape of the metadata of a ``[..., hidden_dim]`` tensor; takes and returns ints or SymInts."""
    *tokens, hidden_dim = dense_shape
    return (math.prod(tokens) + 15) // 16 * 16, (hidden_dim + 255) // 256 * 32


def encode(index: Tensor) -> Tensor:
    """Positions ``[..., groups, 2]`` (ascending, 0 to 3) to metadata."""
    codes = (index[..., 0] | index[..., 1] << 2).to(torch.uint8).reshape(math.prod(index.shape[:-2]), index.shape[-2])
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=PADDING_CODE)
    return from_rows(codes[:, 0::2] | codes[:, 1::2] << 4)


def codes(metadata: Tensor, dense_shape: Sequence[int]) -> Tensor:
    """The metadata of a ``[..., hidden_dim]`` tensor to one code a group, ``[..., hidden_dim / 4]`` uint8."""
    *tokens, hidden_dim = dense_shape
    rows, groups = to_rows(metadata, math.prod(tokens), hidden_dim), hidden_dim // 4
    return torch.stack((rows & 0xF, rows >> 4), dim=-1).flatten(-2)[:, :groups].reshape(*tokens, groups)


def decode(metadata: Tensor, dense_shape: Sequence[int]) -> Tensor:
    """The metadata of a ``[..., hidden_dim]`` tensor to positions ``[..., hidden_dim / 4, 2]``, int64, ascending."""
    code = codes(metadata, dense_shape).long()
    return torch.stack((code & 3, code >> 2), dim=-1)


def from_rows(rows: Tensor) -> Tensor:
    """Row-major codes ``[tokens, ceil(hidden_dim / 8)]``, uint8, to metadata."""
    tokens, width = rows.shape
    rows = torch.nn.functional.pad(rows, (0, -width % 32, 0, -tokens % 16), value=_PADDING_BYTE)
    halves = rows.view(-(-tokens // 16), 2, 8, -(-width // 32), 4, 4, 2)  # block, half, g, block, word, q, byte
    return halves.permute(0, 3, 2, 5, 4, 1, 6).reshape(rows.shape)


def to_rows(metadata: Tensor, tokens: int, hidden_dim: int) -> Tensor:
    """The inverse of ``from_rows``: ``[tokens, ceil(hidden_dim / 8)]``."""
    height, width = metadata.shape
    lanes = metadata.reshape(height // 16, width // 32, 8, 4, 4, 2, 2)  # block, block, g, q, word, half, byte
    return lanes.permute(0, 5, 2, 1, 4, 3, 6).reshape(height, width)[:tokens, : -(-hidden_dim // 8)]


def to_cutlass_sm90_fp8(rows: Tensor) -> Tensor:
    """Row-major codes ``[tokens, bytes]`` to the layout that CUTLASS's sm_90 sparse GEMM reads for 8-bit types.

    CUTLASS cuts the columns into slabs of 128 entries (16 bytes) and stores slab after slab: the byte of entry
    ``(m, k)`` lies at ``k // 128 * (tokens * 16) + m * 16 + k % 128 // 8``. The result has the shape of the input.
    Needs ``tokens % 64 == 0`` and ``bytes % 16 == 0``; the caller checks.
    """
    tokens, width = rows.shape
    return rows.reshape(tokens, width // 16, 16).transpose(0, 1).reshape(tokens, width)


def from_cutlass_sm90_fp8(metadata: Tensor) -> Tensor:
    """The inverse of ``to_cutlass_sm90_fp8``."""
    tokens, width = metadata.shape
    return metadata.reshape(width // 16, tokens, 16).transpose(0, 1).reshape(tokens, width)
