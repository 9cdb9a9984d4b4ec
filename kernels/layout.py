"""How 2:4 metadata is stored.

A row of ``hidden_dim`` entries is cut into groups of four. Of each group two entries are kept, at positions
``idx0 < idx1``, and one 4-bit code says which::

    code = idx0 | idx1 << 2

    kept    0,1   0,2   1,2   0,3   1,3   2,3
    code     4     8     9    12    13    14         no other code is defined for the hardware

Two codes share a byte, the first group in the low bits. A row with an odd number of groups ends in a byte whose high
half is padding and holds code 4, so that every stored code is a valid one::

    hidden   h0 h1 h2 h3 | h4 h5 h6 h7 | h8 h9 h10 h11          hidden_dim = 12
    packed   p0 p1       | p2 p3       | p4 p5                  hidden_dim / 2 values
    metadata  byte 0: code(group 0) | code(group 1) << 4        ceil(hidden_dim / 8) bytes
              byte 1: code(group 2) | 4 << 4

``metadata`` is ``uint8`` of shape ``[..., tokens, ceil(hidden_dim / 8)]``: row-major, so that slicing tokens slices
metadata. Code outside ``kernels`` treats it as opaque and asks ``metadata_bytes`` for its width.
"""

import torch
from torch import Tensor

VALID_CODES = (4, 8, 9, 12, 13, 14)
PADDING_CODE = 4


def metadata_bytes(hidden_dim):  # type: ignore[no-untyped-def]  # int or SymInt, returned as it came
    """Bytes of metadata in a row of ``hidden_dim`` entries; takes and returns an int or a SymInt."""
    return (hidden_dim + 7) // 8


def encode(index: Tensor) -> Tensor:
    """Positions ``[..., groups, 2]`` (ascending, 0 to 3) to metadata ``[..., ceil(groups / 2)]``, uint8."""
    codes = (index[..., 0] | index[..., 1] << 2).to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=PADDING_CODE)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def codes(metadata: Tensor, groups: int) -> Tensor:
    """Metadata ``[..., bytes]`` to one code a group, ``[..., groups]`` uint8, padding dropped."""
    return torch.stack((metadata & 0xF, metadata >> 4), dim=-1).flatten(-2)[..., :groups]


def decode(metadata: Tensor, groups: int) -> Tensor:
    """Metadata ``[..., bytes]`` to positions ``[..., groups, 2]``, int64, ascending."""
    code = codes(metadata, groups).long()
    return torch.stack((code & 3, code >> 2), dim=-1)


def to_cutlass_sm90_fp8(metadata: Tensor) -> Tensor:
    """Row-major metadata ``[tokens, bytes]`` to the layout that CUTLASS's sm_90 sparse GEMM reads for 8-bit types.

    CUTLASS cuts the columns into slabs of 128 entries (16 bytes) and stores slab after slab: the byte of entry
    ``(m, k)`` lies at ``k // 128 * (tokens * 16) + m * 16 + k % 128 // 8``. The result has the shape of the input.
    Needs ``tokens % 64 == 0`` and ``bytes % 16 == 0``; the caller checks.
    """
    tokens, width = metadata.shape
    return metadata.view(tokens, width // 16, 16).transpose(0, 1).reshape(tokens, width)


def from_cutlass_sm90_fp8(metadata: Tensor) -> Tensor:
    """The inverse of ``to_cutlass_sm90_fp8``."""
    tokens, width = metadata.shape
    return metadata.reshape(width // 16, tokens, 16).transpose(0, 1).reshape(tokens, width)
