"""``Sparse24Tensor``: 2:4 data where a *tensor* must carry it: eager code, files, other libraries' formats."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchao.utils import TorchAOBaseTensor

from ao_act24 import fp8, ops
from ao_act24.fingerprint import source_digest


class Sparse24Tensor(TorchAOBaseTensor):
    """A ``[..., tokens, hidden_dim]`` tensor of which each row keeps two of every four neighbours.

    The left operand of ``F.linear``, ``mm``, ``addmm`` and ``matmul``; its transpose, of a two-dimensional one, the
    right operand of ``mm`` and ``matmul``. These run ``ao_act24.ops.sparse_mm``, and their gradients reach the other
    operands and, through ``packed``, what the values were made of; not so for a Sparse24Tensor that is the input of a
    compiled function, which is a constant to it. Everything else raises ``NotImplementedError``: nothing densifies
    silently, ``to_dense`` does it openly.

    Attributes:
        packed: the kept values, ``[..., tokens, hidden_dim / 2]``, in row order.
        metadata: which of each four they are, uint8, laid out as ``ao_act24.kernels.layout`` says.
        transposed: whether this is the transpose of what ``packed`` and ``metadata`` describe.
    """

    packed: Tensor
    metadata: Tensor
    transposed: bool

    tensor_data_names = ["packed", "metadata"]  # noqa: RUF012  # torchao's interface
    tensor_attribute_names = ["transposed"]  # noqa: RUF012

    @staticmethod
    def __new__(cls, packed: Tensor, metadata: Tensor, transposed: bool = False) -> "Sparse24Tensor":
        ops._check_packed(packed, metadata)
        shape = (*packed.shape[:-1], packed.shape[-1] * 2)
        if transposed and len(shape) != 2:
            raise ValueError(f"a transposed Sparse24Tensor must have two dimensions, got packed {tuple(packed.shape)}")
        return torch.Tensor._make_wrapper_subclass(
            cls, shape[::-1] if transposed else shape, dtype=packed.dtype, device=packed.device, requires_grad=False
        )

    def __init__(self, packed: Tensor, metadata: Tensor, transposed: bool = False):
        super().__init__()
        self.packed, self.metadata, self.transposed = packed, metadata, transposed

    @classmethod
    def from_dense(cls, dense: Tensor, *, prune: bool = False) -> "Sparse24Tensor":
        """Pack a dense ``[..., hidden_dim]`` tensor, ``hidden_dim`` divisible by 4.

        Args:
            dense: bfloat16, float16, float32 or float64.
            prune: keep the two entries of largest magnitude of every four and drop the others. Without it a tensor
                that has more than two non-zeros in a group of four is refused (a check that waits for the device).

        Raises:
            ValueError: if the last dimension is not divisible by 4, or values would be lost and ``prune`` is not set.
        """
        packed, metadata = ops.sparsify(dense)
        if not prune:
            lost = int(torch.count_nonzero(dense) - torch.count_nonzero(packed))
            if lost:
                raise ValueError(
                    f"dense must have at most two non-zeros in every four neighbours, got {lost} too many: "
                    "prune=True drops the smallest"
                )
        return cls(packed, metadata)

    @classmethod
    def from_hidden(cls, h: Tensor) -> "Sparse24Tensor":
        """``relu(h)**2`` in 2:4 form: of every four neighbours the two with the largest ``relu(h)``."""
        return cls(*ops.relu2_sparsify(h))

    def to_dense(self) -> Tensor:
        """The dense tensor; entries that were not kept are zero."""
        dense = ops.unpack(self.packed, self.metadata)
        return dense.t() if self.transposed else dense

    def __repr__(self) -> str:
        transposed = ", transposed" if self.transposed else ""
        return f"Sparse24Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}{transposed})"

    def _stable_hash_for_caching(self) -> str:
        """What torch's compile caches need to know of an input of this type."""
        inner = [
            (str(t.dtype), str(t.device), t.requires_grad, [str(n) for n in (*t.shape, *t.stride())])
            for t in (self.packed, self.metadata)
        ]
        return f"Sparse24Tensor {source_digest()} {self.transposed} {inner}"

    @classmethod
    def from_torch(cls, sparse: "torch.sparse.SparseSemiStructuredTensor") -> "Sparse24Tensor":
        """From PyTorch's own semi-structured tensor (CUTLASS or cuSPARSELt format). Lossless."""
        if not isinstance(sparse, torch.sparse.SparseSemiStructuredTensor):
            raise TypeError(f"sparse must be a torch.sparse.SparseSemiStructuredTensor, got {type(sparse).__name__}")
        if sparse.dtype not in ops.DTYPES:
            raise TypeError(f"sparse must have dtype bfloat16, float16 or float32, got {sparse.dtype}")
        return cls.from_dense(sparse.to_dense())

    def to_torch(self) -> "torch.sparse.SparseSemiStructuredTensor":
        """To PyTorch's semi-structured tensor, CUTLASS format. Lossless; its kernels run on sm_80 to sm_89 only.

        Raises:
            ValueError: where that format cannot hold the tensor: it takes two dimensions, bfloat16 or float16
                (float32 is one of two there, not two of four), tokens divisible by 32 and ``hidden_dim`` by 64.
        """
        from torch.sparse import SparseSemiStructuredTensorCUTLASS
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        self._require(self.dim() == 2 and not self.transposed, "two dimensions and no transpose", self)
        self._require(self.dtype in (torch.bfloat16, torch.float16), "dtype bfloat16 or float16", self.dtype)
        tokens, hidden_dim = self.shape
        self._require(tokens % 32 == 0 and hidden_dim % 64 == 0, "a shape divisible by (32, 64)", tuple(self.shape))
        packed, meta = sparse_semi_structured_from_dense_cutlass(self.to_dense())
        return SparseSemiStructuredTensorCUTLASS(self.shape, packed, meta, None, None, None)

    @classmethod
    def from_torchao(cls, sparse: TorchAOBaseTensor) -> "Sparse24Tensor":
        """From torchao's ``Float8Sparse2x4_2DData2DMetadataTensor``: values times row scales, in its own dtype."""
        packed, metadata, row_scale = fp8.from_torchao(sparse)
        return cls((packed.float() * row_scale.float().unsqueeze(-1)).to(sparse.dtype), metadata)

    def to_torchao(self) -> TorchAOBaseTensor:
        """To torchao's ``Float8Sparse2x4_2DData2DMetadataTensor``, in e4m3 with one scale a row, ``amax / 448``.

        Raises:
            ValueError: unless two-dimensional, not transposed, tokens divisible by 64 and ``hidden_dim`` by 128.
        """
        self._require(self.dim() == 2 and not self.transposed, "two dimensions and no transpose", self)
        tokens, hidden_dim = self.shape
        self._require(tokens % 64 == 0 and hidden_dim % 128 == 0, "a shape divisible by (64, 128)", tuple(self.shape))
        values, row_scale = fp8.rows_to_fp8(self.packed)
        return fp8.to_torchao(values, self.metadata, row_scale, self.dtype)

    @staticmethod
    def _require(condition: bool, what: str, got: object) -> None:
        if not condition:
            raise ValueError(f"this conversion needs {what}, got {got}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            if kwargs.pop("out", None) is not None:
                _unsupported("out=")
            return _PRODUCTS[func](*args, **kwargs)
        if func in _COPIES:  # above autograd, so that gradients reach packed
            inner = tree_map_only(Sparse24Tensor, lambda sparse: sparse.packed, (args, kwargs))
            packed, self = func(*inner[0], **inner[1]), args[0]
            if not isinstance(self, Sparse24Tensor):  # dense.to(sparse)
                return packed
            _check_dtype(packed.dtype)
            copied = "clone" in func.__name__ or kwargs.get("copy", False)
            metadata = self.metadata.to(packed.device, copy=copied)
            return Sparse24Tensor(packed, metadata, self.transposed)
        if func in _NEED_STORAGE:
            _unsupported(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in cls._ATEN_OP_TABLE[cls]:
            return super().__torch_dispatch__(func, types, args, kwargs)
        _unsupported(str(func))


def _unsupported(what: str) -> NoReturn:
    raise NotImplementedError(
        f"Sparse24Tensor does not support {what}. It is the left operand of F.linear, mm, addmm and matmul; for "
        "anything else call .to_dense() first"
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in ops.DTYPES:
        raise TypeError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")


def _is_left(x: object) -> bool:
    return isinstance(x, Sparse24Tensor) and not x.transposed


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(input, Sparse24Tensor) or input.transposed or isinstance(weight, Sparse24Tensor):
        _unsupported("F.linear as a weight, or transposed")
    return ops.sparse_mm(input.packed, input.metadata, weight, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    left, right = isinstance(input, Sparse24Tensor), isinstance(other, Sparse24Tensor)
    if left and not right and not input.transposed and other.dim() == 2:  # type: ignore[attr-defined]
        return ops.sparse_mm(input.packed, input.metadata, other.t())  # type: ignore[attr-defined]
    if right and not left and other.transposed and input.dim() == 2:  # type: ignore[attr-defined]
        return ops.sparse_mm(other.packed, other.metadata, input).t()  # type: ignore[attr-defined]
    _unsupported("a product of these operands (the other one must be a dense matrix)")


def _mm(input: Tensor, mat2: Tensor) -> Tensor:
    _check_matrices("mm", input, mat2)
    return _matmul(input, mat2)


def _check_matrices(name: str, first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2:
        _unsupported(f"{name} of {first.dim()} and {second.dim()} dimensions: it takes two matrices")


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(input, Sparse24Tensor):
        _unsupported("addmm with a sparse summand")
    if input.dtype != mat1.dtype:
        raise ValueError(f"input must have the dtype of mat1, {mat1.dtype}, got {input.dtype}")
    _check_matrices("addmm", mat1, mat2)
    if _is_left(mat1) and input.dim() == 1 and beta == alpha == 1:
        bias = input.expand(mat2.shape[1])
        return ops.sparse_mm(mat1.packed, mat1.metadata, mat2.t(), bias)  # type: ignore[attr-defined]
    product = alpha * _matmul(mat1, mat2)
    summand = input.expand(product.shape)
    return beta * summand + product if beta else product  # NaN in a summand that does not count is ignored, as in torch


_PRODUCTS: dict[Any, Any] = {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: lambda other, input: _matmul(input, other),
    torch.mm: _mm,
    torch.Tensor.mm: _mm,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
}

_COPIES = {
    getattr(torch.Tensor, name) for name in ("clone", "to", "half", "bfloat16", "float", "double", "cpu", "cuda")
} | {torch.clone}

# torch would crash: the wrapper has no storage
_NEED_STORAGE = {torch.Tensor.share_memory_, torch.Tensor.__dlpack__, torch.Tensor.__dlpack_device__}

implements = Sparse24Tensor.implements
aten = torch.ops.aten


@implements(aten.t.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    (x,) = args
    return Sparse24Tensor(x.packed, x.metadata, not x.transposed)


@implements(aten.transpose.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    x, first, second = args
    x.packed.transpose(first, second)  # torch's own error for dimensions out of range
    if x.dim() != 2 or {first % 2, second % 2} != {0, 1}:
        _unsupported("transpose of other than a matrix's two dimensions")
    return Sparse24Tensor(x.packed, x.metadata, not x.transposed)


@implements(aten.permute.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args
    x.packed.permute(dims)  # torch's own error for dimensions out of range
    if x.dim() != 2 or [d % 2 for d in dims] != [1, 0]:
        _unsupported("permute other than a matrix's transpose")
    return Sparse24Tensor(x.packed, x.metadata, not x.transposed)


@implements(aten._to_copy.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    (x,) = args
    _check_dtype(kwargs.get("dtype") or x.dtype)
    kwargs = {name: value for name, value in kwargs.items() if name in ("dtype", "device", "non_blocking")}
    device = {name: value for name, value in kwargs.items() if name != "dtype"}
    return Sparse24Tensor(x.packed.to(**kwargs), x.metadata.to(**device), x.transposed)


@implements([aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    products: dict[Any, Any] = {aten.linear.default: _linear, aten.addmm.default: _addmm}
    return products.get(func, _matmul)(*args, **kwargs)


torch.serialization.add_safe_globals(
    [Sparse24Tensor]
)  # so that torch.load(weights_only=True) reads files that hold one
