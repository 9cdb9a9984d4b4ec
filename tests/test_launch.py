"""What reaches the driver, on a machine that has none: a stand-in reads the launches of ``kernels.cuda``."""

import ctypes
import itertools
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from cuda.bindings import driver

from ao_act24.kernels import cuda, launch, plans, reference, schedule

KERNELS = {
    "matmul": 1,
    "sparse_mm": 15,
    "densest": 8,
    "relu2_sparsify": 2,
    "relu2_sparsify_any": 3,
    "unpack": 5,
    "columns": 6,
}
KERNELS |= {"feature_wise_counts": 4, "feature_wise_sums": 4}
KERNELS |= {"relu2_sparsify_fp8": 9, "relu2_sparsify_fp8_any": 10, "sparse_mm_fp8": 7}
KERNELS |= {"linear_relu2_sparsify_fp8": 11, "square_to_fp8": 12, "active_relu2": 13, "active_mm": 14}
ARGUMENTS = {
    1: 7,
    2: 6,
    3: 6,
    4: 10,
    5: 5,
    6: 7,
    7: 9,
    8: 5,
    9: 7,
    10: 7,
    11: 10,
    12: 6,
    13: 11,
    14: 11,
    15: 10,
}  # how many each has
STREAM = 0x7FFF00000040
SUCCESS = (driver.CUresult.CUDA_SUCCESS,)
BF16 = torch.bfloat16


class Driver:
    """Notes what is launched. A tensor map's first word is its pointer here."""

    def __init__(self):
        self.launches, self.maps, self.last, self.all_shared = 0, [], [], set()

    def __getattr__(self, name):
        return getattr(driver, name)

    def cuLaunchKernelEx(self, config, kernel, parameters, extra):
        assert (config.gridDimZ, config.blockDimY, config.blockDimZ, int(config.hStream)) == (1, 1, 1, STREAM)
        assert extra == 0
        self.launches, self.blocks = self.launches + 1, config.gridDimX * config.gridDimY
        self.threads, self.shared = config.blockDimX, config.sharedMemBytes
        self.attributes = {attribute.id: attribute.value for attribute in config.attrs}
        self.arguments = (ctypes.c_void_p * ARGUMENTS[kernel]).from_address(parameters)[:]
        self.words = [ctypes.c_int64.from_address(address).value for address in self.arguments]
        self.before, self.last = self.last, self.words
        return SUCCESS

    def cuFuncSetAttribute(self, kernel, attribute, value):
        assert attribute == driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        self.all_shared.add((kernel, value))
        return SUCCESS

    def cuOccupancyMaxActiveClusters(self, kernel, config):
        """As an H100 that has one such block on a multiprocessor answers."""
        (attribute,) = config.attrs
        return *SUCCESS, {2: 66, 3: 39, 4: 31, 5: 23, 6: 19, 7: 16, 8: 15}[attribute.value.clusterDim.x]

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
    monkeypatch.setattr(launch, "driver", lambda: stand_in)
    monkeypatch.setattr(launch, "set_current", lambda index: None)
    monkeypatch.setattr(plans, "_simple_kernel", lambda source, entry, *_: KERNELS[entry])
    monkeypatch.setattr(plans, "_matmul_kernel", lambda name, *_: (KERNELS.get(plans.source(name), 1), 66))
    monkeypatch.setattr(cuda, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(cuda, "PLANS", plans.Plans())
    return stand_in


def test_packing(launched):
    for h in (torch.randn(2, 24, 64).to(BF16), torch.randn(2, 24, 64).to(BF16), torch.randn(9, 128).to(BF16)[:, 64:]):
        packed, metadata = cuda.relu2_sparsify(h)
        assert [t.shape for t in (packed, metadata)] == [t.shape for t in reference.relu2_sparsify(h)]
        assert packed.is_contiguous() and metadata.is_contiguous()
        sizes = [64, 48, 64] if h.is_contiguous() else [128, 9, 64]
        assert launched.words == [h.data_ptr(), sizes[0], packed.data_ptr(), metadata.data_ptr(), *sizes[1:]]
    assert launched.launches == 3


@pytest.mark.parametrize(
    "hidden_dim, blocks, threads, fast",
    [(64, 16, 32, True), (8192, 16, 512, True), (8208, 16, 288, True), (32768, 16, 512, True), (32784, 32, 256, False)],
)
def test_packing_to_fp8(hidden_dim, blocks, threads, fast, launched):
    """Up to 32768 columns lie in the registers of a block of up to 512 threads, a pair of rows each."""
    wide = torch.randn(3, 7, hidden_dim + 8).to(BF16)
    for h, is_fast in ((wide[..., 8:], fast), (wide[..., 4:-4], False), (wide[..., 8:].contiguous(), fast)):
        packed, metadata, scale = cuda.relu2_sparsify_fp8(h)
        want = reference.relu2_sparsify_fp8(h)
        assert [(t.shape, t.dtype) for t in (packed, metadata, scale)] == [(t.shape, t.dtype) for t in want]
        outputs = [t.data_ptr() for t in (packed, metadata, scale)]
        assert launched.words == [h.data_ptr(), h.stride(1), *outputs, 21, hidden_dim]
        assert (launched.blocks, launched.threads) == ((blocks, threads) if is_fast else (32, 256))


@pytest.mark.parametrize("hidden_dim", [512, 448, 64])
def test_sparse_mm_fp8(hidden_dim, launched):
    """Two e4m3 are one element of the maps; stages of 128 entries come by two."""
    for bias in (torch.randn(256).to(BF16), None):
        packed, metadata, scale = reference.relu2_sparsify_fp8(torch.randn(2, 250, hidden_dim).to(BF16))
        weight, weight_scale = torch.randn(256, hidden_dim).to(packed.dtype), torch.ones(256)
        out = cuda.sparse_mm_fp8(packed, metadata, scale, weight, weight_scale, bias, BF16)
        assert out.shape == (2, 250, 256) and out.dtype == BF16
        assert launched.words[:4] == [*[packed.data_ptr()] * 2, weight.data_ptr(), metadata.data_ptr()]
        pointers = 0 if bias is None else bias.data_ptr(), out.data_ptr(), scale.data_ptr(), weight_scale.data_ptr()
        assert launched.words[4:8] == [*pointers]
        shape = schedule.Shape.from_address(launched.arguments[-1])
        assert (shape.tokens, shape.columns, shape.stages) == (500, 256, -(-hidden_dim // 256) * 2)
        (sizes, strides, box), *_, (b_sizes, b_strides, b_box) = launched.maps[:3]
        assert (sizes, strides[0], box[:2]) == ([hidden_dim // 4, 500, 1], hidden_dim // 2, [32, 192])
        assert (b_sizes, b_strides[0], b_box[0]) == ([hidden_dim // 2, 2, 4, 4, 8], hidden_dim, 64)
        assert sizes[0] * 2 == packed.shape[-1] and b_sizes[0] * 2 == weight.shape[-1]
        launched.maps.clear()
        cuda.PLANS.sparse_mm_fp8.cache_clear()


@pytest.mark.parametrize("hidden_dim", [64, 576, 16384, 32768])
def test_linear_relu2_sparsify_fp8(hidden_dim, launched):
    """Two kernels: the second has the largest of each row and tile from the first, and as many threads as it needs."""
    for bias in (torch.randn(hidden_dim).to(BF16), None):
        x, weight = torch.randn(2, 250, 48).to(torch.float8_e4m3fn), torch.randn(hidden_dim, 48).to(torch.float8_e4m3fn)
        x_scale, weight_scale = torch.ones(2, 250), torch.ones(hidden_dim)
        packed, metadata, scale = cuda.linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, BF16)
        assert (packed.shape, packed.dtype) == ((2, 250, hidden_dim // 2), torch.float8_e4m3fn)
        assert metadata.shape == (512, -(-hidden_dim // 256) * 32) and (scale.shape, scale.dtype) == (
            (2, 250),
            torch.float32,
        )
        first, second = launched.before, launched.last
        assert first[:4] == [*[x.data_ptr()] * 2, weight.data_ptr(), 0 if bias is None else bias.data_ptr()]
        assert first[5:8] == [metadata.data_ptr(), x_scale.data_ptr(), weight_scale.data_ptr()]
        assert second == [
            first[4],
            first[8],
            packed.data_ptr(),
            scale.data_ptr(),
            hidden_dim // 2,
            -(-hidden_dim // 256),
        ]
        assert (launched.blocks, launched.threads) == (500, min(512, -(-hidden_dim // 1024) * 32))
        (sizes, strides, box), *_, (b_sizes, b_strides, b_box) = launched.maps[:3]
        assert (sizes, strides[0], box) == ([24, 500, 1], 48, [64, 192, 1])
        assert (b_sizes, b_strides[0], b_box[0]) == ([24, 2, 4, 8, hidden_dim // 64], 48, 64)
        launched.maps.clear()
        cuda.PLANS.linear_relu2_sparsify_fp8.cache_clear()


@pytest.mark.parametrize(
    "tokens, hidden_dim, out_dim, padded, cluster, blocks, shared",
    [
        (1, 1024, 128, 8, 8, 16, 131072),
        (8, 1024, 1024, 8, 7, 112, 131072),  # sixteen clusters of eight would not run at a time
        (9, 16384, 4096, 16, 2, 128, 176128),
        (4, 8192, 8192, 8, 1, 128, 145408),
        (4, 128, 16384, 8, 1, 128, 129280),  # 128 columns a block
        (1, 65536, 5120, 8, 1, 80, 223232),  # fewer stages: numbers of neurons are 128 KB
    ],
)
def test_active_ffn(tokens, hidden_dim, out_dim, padded, cluster, blocks, shared, launched):
    """Neurons are rows of down in memory. Both kernels may start early; of the second many blocks run at a time."""
    x, up = torch.randn(1, tokens, 192).to(BF16), torch.randn(hidden_dim, 192).to(BF16)
    by_neurons, biases = torch.zeros(hidden_dim, out_dim).to(BF16), (torch.randn(hidden_dim).to(BF16), None)
    out = cuda.active_ffn(x, up, biases[0], by_neurons.t(), biases[1])
    assert out.shape == (1, tokens, out_dim) and launched.launches == 2
    first, second = launched.before, launched.last
    assert first[:5] == [x.data_ptr(), up.data_ptr(), biases[0].data_ptr(), 0, 0]
    assert second[:7] == [*first[5:8], by_neurons.data_ptr(), 0, 0, out.data_ptr()]
    sizes = [ctypes.c_int.from_address(address).value for address in launched.arguments[7:]]
    assert sizes == [tokens, hidden_dim, out_dim, min(132, hidden_dim // 16)]
    assert (launched.blocks, launched.threads, launched.shared) == (blocks, 256, shared)
    kinds = driver.CUlaunchAttributeID
    assert launched.attributes[kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION]
    assert launched.all_shared == {(KERNELS["active_relu2"], 100), (KERNELS["active_mm"], 100)}
    of_cluster = launched.attributes.get(kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
    assert cluster == (of_cluster.clusterDim.x if of_cluster else 1)
    y, active, largest = cuda.PLANS.active_ffn(x.shape, by_neurons.t().shape, False, BF16, -1).between
    assert y[0] == (hidden_dim, padded) and active[0] == (hidden_dim // 8,) and largest[0] == (0, padded)
    dense = cuda.active_ffn(x, up, biases[0], by_neurons.t().contiguous(), biases[1])
    assert launched.launches == 2
    torch.testing.assert_close(dense, reference.active_ffn(x, up, biases[0], by_neurons.t(), None), rtol=0.02, atol=1)


@pytest.mark.parametrize(
    ("tokens", "hidden_dim", "out_dim", "blocks"), [(1, 1024, 128, 8), (9, 16384, 8192, 128), (3, 4096, 32768, 128)]
)
def test_active_ffn_fp8(tokens, hidden_dim, out_dim, blocks, launched):
    """Two e4m3 count as one of 16 bits. The largest of each of the first kernel's blocks, by token, is kept."""
    x, up, by_neurons = (
        torch.zeros(size).to(torch.float8_e4m3fn) for size in ((tokens, 384), (hidden_dim, 384), (hidden_dim, out_dim))
    )
    scales, bias = [torch.ones(n) for n in (tokens, hidden_dim, out_dim)], torch.zeros(out_dim).to(BF16)
    out = cuda.active_ffn_fp8(x, scales[0], up, scales[1], None, by_neurons.t(), scales[2], bias, BF16)
    assert out.shape == (tokens, out_dim) and out.dtype == BF16 and launched.launches == 2
    first, second = launched.before, launched.last
    pointers = [x, up, None, *scales[:2]]
    assert first[:5] == [0 if t is None else t.data_ptr() for t in pointers]
    assert second[:7] == [*first[5:8], *(t.data_ptr() for t in (by_neurons, scales[2], bias, out))]
    sizes = [ctypes.c_int.from_address(address).value for address in launched.arguments[7:]]
    assert sizes == [tokens, hidden_dim, out_dim // 2, min(132, hidden_dim // 16)] and launched.blocks == blocks
    largest = cuda.PLANS.active_ffn(x.shape, by_neurons.t().shape, True, BF16, -1).between[2]
    assert largest[0] == (min(132, hidden_dim // 16), -(-tokens // 8) * 8)
    arguments = [tensor[:, :320] for tensor in (x, up)]  # 320 is no multiple of 128
    out = cuda.active_ffn_fp8(
        arguments[0], scales[0], arguments[1], scales[1], None, by_neurons.t(), scales[2], bias, BF16
    )
    assert launched.launches == 2 and not out.any()


@pytest.mark.parametrize(
    ("tokens", "model_dim", "hidden_dim"),
    [(17, 64, 64), (0, 64, 64), (4, 72, 64), (4, 64, 96), (1, 64, 65600), (16, 8192, 64)],
)
def test_active_ffn_of_sizes_that_the_kernels_do_not_take(tokens, model_dim, hidden_dim, launched):
    x, up = torch.randn(tokens, model_dim).to(BF16), torch.randn(hidden_dim, model_dim).to(BF16)
    by_neurons = torch.randn(hidden_dim, model_dim).to(BF16)
    out = cuda.active_ffn(x, up, None, by_neurons.t(), None)
    assert launched.launches == 0 and out.shape == x.shape
    torch.testing.assert_close(out, reference.active_ffn(x, up, None, by_neurons.t(), None), rtol=0.02, atol=1)


@pytest.mark.parametrize("tokens", [384 * 66, 500])
def test_sparse_mm(tokens, launched):
    for bias in (torch.randn(256).to(BF16), None):
        packed, metadata = reference.relu2_sparsify(torch.randn(tokens, 512).to(BF16))
        weight = torch.randn(256, 512).to(BF16)
        out = cuda.sparse_mm(packed.view(2, -1, 256), metadata, weight, bias)
        assert out.shape == (2, tokens // 2, 256) and out.is_contiguous()
        assert launched.words[:5] == [*[packed.data_ptr()] * 2, *[weight.data_ptr()] * 2, metadata.data_ptr()]
        assert launched.words[5:7] == [0 if bias is None else bias.data_ptr(), out.data_ptr()]
        check_work(launched, tokens)


def check_work(launched, tokens):
    shape, clusters = schedule.share_out(tokens, 256, 8, 66)
    assert bytes(schedule.Shape.from_address(launched.arguments[-1])) == bytes(shape)
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


@pytest.mark.parametrize("name", ["sparse_mm", "linear_relu2_sparsify"])
def test_what_is_brought_in(name, launched):
    """A's rows for whole tiles and for lower ones; B's so that a thread gets neighbouring columns, see tiles.cuh."""
    tokens, columns, depth = 1168, 4608, 576  # 54 tiles of 192 rows, then 18 of 64
    operand, weight = torch.randn(tokens, depth).to(BF16), torch.randn(columns, depth).to(BF16)
    if name == "sparse_mm":
        cuda.sparse_mm(*reference.relu2_sparsify(operand), weight)
    else:
        cuda.linear_relu2_sparsify(operand, weight)
    shape = schedule.Shape.from_address(launched.arguments[-1])
    assert (shape.whole, shape.lower, shape.lower_height) == (3, 1, 1)
    assert shape.stages == (12 if name == "sparse_mm" else 9)
    a_columns, run = plans.DEFINES[name]["A_COLUMNS"], plans.DEFINES[name]["RUN"]
    width = depth * a_columns // 64
    *whole_and_lower, (sizes, strides, box) = launched.maps
    assert whole_and_lower == [
        [[width, tokens, 1], [2 * width, 2 * width], [a_columns, 64 * height, 1]] for height in (3, 1)
    ]
    assert sizes[0] == depth and math.prod(sizes[1:]) == columns and box[0] == 64
    assert math.prod(box[1:]) == schedule.TILE_COLUMNS // schedule.CLUSTER
    places = itertools.product(*(range(length) for length in reversed(box[1:])))  # as they lie in shared memory
    rows = [sum(at * stride for at, stride in zip(reversed(place), strides)) / (2 * depth) for place in places]
    for a, q, b in itertools.product(range(16), range(4), range(2)):  # of all columns 8 a + 2 q + b thread q gets
        s, a_of_run = divmod(a, run // 8)
        assert rows[8 * a + 2 * q + b] == run * s + run // 4 * q + 2 * a_of_run + b


def addresses(strides, box):
    """In elements, of what a box brings in, as it lies in shared memory."""
    places = itertools.product(*(range(length) for length in reversed(box)))
    return [sum(at * stride for at, stride in zip(reversed(place), [2, *strides])) // 2 for place in places]


WISE = [name for name in plans.DEFINES if "wise" in name]


@pytest.mark.parametrize(
    "name, depth", [("sparse_mm_mn", 512), ("grad_hidden", 512), *itertools.product(WISE, (512, 1088, 1292))], ids=str
)
def test_what_is_brought_in_mn_major(name, depth, launched):
    """B as [K, N]: 64 rows of K by 64 columns of N, one such block after another. By groups, rows a stride apart."""
    columns, rows = 320, 192
    weight = torch.randn(depth, columns).to(BF16)
    if name == "sparse_mm_mn":
        packed, metadata = reference.relu2_sparsify(torch.randn(rows, depth).to(BF16))
        out = cuda.sparse_mm(packed, metadata, weight.t())
        assert launched.words[:4] == [*[packed.data_ptr()] * 2, *[weight.data_ptr()] * 2]
        assert launched.words[4:7] == [metadata.data_ptr(), 0, out.data_ptr()]
    elif name == "grad_hidden":
        packed, metadata = reference.relu2_sparsify(torch.randn(rows, columns).to(BF16))
        grad = torch.randn(rows, depth).to(BF16)
        out = cuda.grad_hidden(grad, weight, packed, metadata)
        pointers = [tensor.data_ptr() for tensor in (grad, grad, weight, packed, metadata, out)]
        assert launched.words[:6] == pointers and out.shape == packed.shape
    else:
        permuted, transposed = "in_order" not in name, "transposed" in name
        packed, metadata, _, left = reference.feature_wise(
            *reference.relu2_sparsify(torch.randn(depth, rows).to(BF16)), permuted, True
        )
        exact, slots = weight[:8].clone(), torch.full((rows,), -1, dtype=torch.int32)
        out = cuda.feature_wise_mm(packed, metadata, left, weight, exact, slots, permuted, transposed)
        assert launched.words[7:9] == [exact.data_ptr(), slots.data_ptr()]
        assert out.shape == ((columns, rows) if transposed else (rows, columns)) and out.is_contiguous()
        first, last = reference.group_strides(depth)
        begin = weight.data_ptr() + (8 * first * columns if permuted else 0)
        assert launched.words[:4] == [*[packed.data_ptr()] * 2, weight.data_ptr(), begin]
        assert launched.words[4:7] == [metadata.data_ptr(), 0, out.data_ptr()]
        assert schedule.Shape.from_address(launched.arguments[-1]).stride == first * permuted
        strides = [stride for stride in (first, last) if stride] if permuted else [depth]
        assert [sizes[2] for sizes, *_ in launched.maps[2:]] == strides
        for (sizes, apart, box), stride in zip(launched.maps[2:], strides):
            rows_of_k = [j + i * stride if permuted else 4 * j + i for j in range(16) for i in range(4)]
            assert math.prod(sizes) == (4 * stride if permuted else depth) * columns
            assert addresses(apart, box) == [
                k * columns + 64 * block + n for block in range(2) for k in rows_of_k for n in range(64)
            ]
        for (_, strides, box), height in zip(launched.maps, (3, 1)):  # A: 32 rows that were kept, by 64 features
            want = [row * rows + 64 * block + m for block in range(height) for row in range(32) for m in range(64)]
            assert addresses(strides, box) == want
    if name not in WISE:
        sizes, strides, box = launched.maps[-1]
        assert math.prod(sizes) == depth * columns
        assert addresses(strides, box) == [
            k * columns + 64 * block + n for block in range(2) for k in range(64) for n in range(64)
        ]
    schedule_of = schedule.Shape.from_address(launched.arguments[-1])
    assert (schedule_of.tokens, schedule_of.columns, schedule_of.stages) == (rows, columns, -(-depth // 256) * 4)


def test_regrouping_and_unpacking(launched):
    packed, metadata = reference.relu2_sparsify(torch.randn(2, 35, 192).to(BF16))
    for counted in (True, False):
        got, want = (each.feature_wise(packed, metadata, True, counted) for each in (cuda, reference))
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want] and torch.equal(
            got[3][:2], want[3][:2]
        )
        first, left = [tensor.data_ptr() for tensor in (packed, metadata, *got[:2])], got[3].data_ptr()
        assert launched.words[:4] == first and launched.words[5:] == [left, 17, 192, 0, 17]
    counts = got[2].int()
    index, slots = cuda.densest(counts, 16)
    assert (index.shape, index.dtype, slots.shape, slots.dtype) == ((16,), torch.int64, (192,), torch.int32)
    assert launched.words == [counts.data_ptr(), index.data_ptr(), slots.data_ptr(), 192, 16] and launched.blocks == 1
    dense = cuda.unpack(packed, metadata)
    assert dense.shape == (2, 35, 192)
    assert launched.words[:5] == [packed.data_ptr(), metadata.data_ptr(), dense.data_ptr(), 70, 192]
    chosen = torch.tensor([3, 190, 3])
    some = cuda.columns(packed, metadata, chosen)
    assert some.shape == (2, 35, 3) and launched.words[4:7] == [70, 192, 3]
    assert launched.words[:4] == [t.data_ptr() for t in (packed, metadata, chosen, some)]


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
    monkeypatch.setattr(launch, "set_current", current.append)
    for _ in range(3):
        thread = threading.Thread(target=cuda.relu2_sparsify, args=(h,))
        thread.start()
        thread.join()
    assert current == [-1] * 3


def test_an_error_is_named(launched, monkeypatch):
    monkeypatch.setattr(Driver, "cuLaunchKernelEx", lambda *_: (driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,))
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed: CUDA_ERROR_LAUNCH_FAILED"):
        cuda.relu2_sparsify(torch.randn(8, 64).to(BF16))


def test_what_is_missing_is_a_reason_to_stay_dense(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda.compile, "missing", lambda: "no compiler: install it")
    cuda._why_not_gpu.cache_clear()
    try:
        assert cuda.why_not(torch.device("cuda", 0), BF16) == "no compiler: install it"
    finally:
        cuda._why_not_gpu.cache_clear()
