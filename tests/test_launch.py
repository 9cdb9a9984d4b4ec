"""What reaches the driver, on a machine that has none: a stand-in reads the launches of ``kernels.cuda``."""

import ctypes
import itertools
import math
import threading

import pytest
import torch
from cuda.bindings import driver

from ao_act24.kernels import cuda, reference, schedule

KERNEL = 0x7FFF12345678
STREAM = 0x7FFF00000040
SUCCESS = (driver.CUresult.CUDA_SUCCESS,)
BF16 = torch.bfloat16


class Driver:
    """Notes what is launched. A tensor map's first word is its pointer here."""

    def __init__(self):
        self.launches, self.maps = 0, []

    def __getattr__(self, name):
        return getattr(driver, name)

    def cuLaunchKernel(self, kernel, x, y, z, threads, threads_y, threads_z, shared, stream, parameters, extra):
        assert (kernel, z, threads_y, threads_z, stream, extra) == (KERNEL, 1, 1, 1, STREAM, 0)
        self.launches, self.blocks = self.launches + 1, x * y
        self.arguments = (ctypes.c_void_p * (7 if threads > 256 else 6)).from_address(parameters)[:]
        self.words = [ctypes.c_int64.from_address(address).value for address in self.arguments]
        return SUCCESS

    def cuTensorMapEncodeTiled(self, dtype, rank, address, sizes, strides, box, *_):
        self.maps.append([[int(number) for number in numbers] for numbers in (sizes, strides, box)])
        assert rank == len(sizes) == len(strides) + 1 == len(box)
        return *SUCCESS, driver.CUtensorMap()

    def cuTensorMapReplaceAddress(self, tensor_map, pointer):
        assert tensor_map.getPtr() % 64 == 0
        ctypes.c_int64.from_address(tensor_map.getPtr()).value = pointer
        return SUCCESS


@pytest.fixture
def launched(monkeypatch):
    stand_in = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: stand_in)
    monkeypatch.setattr(cuda, "_set_current", lambda index: None)
    monkeypatch.setattr(cuda, "_packing_kernel", lambda *_: KERNEL)
    monkeypatch.setattr(cuda, "_matmul_kernel", lambda *_: (KERNEL, 66))
    monkeypatch.setattr(cuda, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(cuda, "_plans", cuda._Plans())
    return stand_in


def test_packing(launched):
    for h in (torch.randn(2, 24, 64).to(BF16), torch.randn(2, 24, 64).to(BF16), torch.randn(9, 128).to(BF16)[:, 64:]):
        packed, metadata = cuda.relu2_sparsify(h)
        assert [t.shape for t in (packed, metadata)] == [t.shape for t in reference.relu2_sparsify(h)]
        assert packed.is_contiguous() and metadata.is_contiguous()
        sizes = [64, 48, 64] if h.is_contiguous() else [128, 9, 64]
        assert launched.words == [h.data_ptr(), sizes[0], packed.data_ptr(), metadata.data_ptr(), *sizes[1:]]
    assert launched.launches == 3


@pytest.mark.parametrize("tokens", [384 * 66, 500])
def test_sparse_mm(tokens, launched):
    for bias in (torch.randn(256).to(BF16), None):
        packed, metadata = reference.relu2_sparsify(torch.randn(tokens, 512).to(BF16))
        weight = torch.randn(256, 512).to(BF16)
        out = cuda.sparse_mm(packed.view(2, -1, 256), metadata, weight, bias)
        assert out.shape == (2, tokens // 2, 256) and out.is_contiguous()
        assert launched.words[:4] == [*[packed.data_ptr()] * 2, weight.data_ptr(), metadata.data_ptr()]
        assert launched.words[4:6] == [0 if bias is None else bias.data_ptr(), out.data_ptr()]
        check_work(launched, tokens)


def check_work(launched, tokens):
    shape, clusters = schedule.share_out(tokens, 256, 8, 66)
    assert bytes(schedule.Shape.from_address(launched.arguments[6])) == bytes(shape)
    assert launched.blocks == schedule.CLUSTER * clusters


@pytest.mark.parametrize("tokens", [384 * 66, 500])
def test_linear_relu2_sparsify(tokens, launched):
    for bias in (torch.randn(256).to(BF16), None):
        x, weight = torch.randn(2, tokens // 2, 512).to(BF16), torch.randn(256, 512).to(BF16)
        packed, metadata = cuda.linear_relu2_sparsify(x, weight, bias)
        assert packed.shape == (2, tokens // 2, 128) and metadata.shape == (-(-tokens // 16) * 16, 32)
        assert packed.is_contiguous() and metadata.is_contiguous()
        assert launched.words[:4] == [*[x.data_ptr()] * 2, weight.data_ptr(), 0 if bias is None else bias.data_ptr()]
        assert launched.words[4:6] == [packed.data_ptr(), metadata.data_ptr()]
        check_work(launched, tokens)


@pytest.mark.parametrize("name", cuda.DEFINES)
def test_what_is_brought_in(name, launched):
    """A's rows for whole tiles and for lower ones; B's so that a thread gets neighbouring columns, see tiles.cuh."""
    tokens, columns, depth = 1168, 4608, 576  # 54 tiles of 192 rows, then 18 of 64
    operand, weight = torch.randn(tokens, depth).to(BF16), torch.randn(columns, depth).to(BF16)
    if name == "sparse_mm":
        cuda.sparse_mm(*reference.relu2_sparsify(operand), weight)
    else:
        cuda.linear_relu2_sparsify(operand, weight)
    shape = schedule.Shape.from_address(launched.arguments[6])
    assert (shape.whole, shape.lower, shape.lower_height) == (3, 1, 1)
    assert shape.stages == (12 if name == "sparse_mm" else 9)
    a_columns, run = cuda.DEFINES[name]["A_COLUMNS"], cuda.DEFINES[name]["RUN"]
    width = depth * a_columns // 64
    *whole_and_lower, (sizes, strides, box) = launched.maps
    assert whole_and_lower == [[[width, tokens], [2 * width], [a_columns, 64 * height]] for height in (3, 1)]
    assert sizes[0] == depth and math.prod(sizes[1:]) == columns and box[0] == 64
    assert math.prod(box[1:]) == schedule.TILE_COLUMNS // schedule.CLUSTER
    places = itertools.product(*(range(length) for length in reversed(box[1:])))  # as they lie in shared memory
    rows = [sum(at * stride for at, stride in zip(reversed(place), strides)) / (2 * depth) for place in places]
    for a, q, b in itertools.product(range(16), range(4), range(2)):  # of all columns 8 a + 2 q + b thread q gets
        s, a_of_run = divmod(a, run // 8)
        assert rows[8 * a + 2 * q + b] == run * s + run // 4 * q + 2 * a_of_run + b


def test_each_thread_has_its_own_arguments(launched):
    h, seen = torch.randn(8, 64).to(BF16), []

    def run():
        cuda.relu2_sparsify(h)
        seen.append(set(launched.arguments))

    for thread in [threading.Thread(target=run) for _ in range(3)]:
        run()
        thread.start()
        thread.join()
    assert seen[0] == seen[2] == seen[4] and not seen[0] & seen[1]


def test_each_thread_makes_the_context_current(launched, monkeypatch):
    """Threads that follow each other have the same identity, as Python counts."""
    current, h = [], torch.randn(8, 64).to(BF16)
    monkeypatch.setattr(cuda, "_set_current", current.append)
    for _ in range(3):
        thread = threading.Thread(target=cuda.relu2_sparsify, args=(h,))
        thread.start()
        thread.join()
    assert current == [-1] * 3


def test_an_error_is_named(launched, monkeypatch):
    monkeypatch.setattr(Driver, "cuLaunchKernel", lambda *_: (driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,))
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed: CUDA_ERROR_LAUNCH_FAILED"):
        cuda.relu2_sparsify(torch.randn(8, 64).to(BF16))


def test_what_is_missing_is_a_reason_to_stay_dense(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda.compile, "missing", lambda: "no compiler: install it")
    cuda._why_not_gpu.cache_clear()
    try:
        assert cuda.why_not(torch.device("cuda", 0), BF16) == "no compiler: install it"
    finally:
        cuda._why_not_gpu.cache_clear()
