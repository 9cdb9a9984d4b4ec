"""Run-time compilation of CUDA sources and its cache on disk: with the real NVRTC, without a GPU."""

import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import cuda.core
import pytest
import torch
from cuda.bindings import driver, nvrtc

from ao_act24 import fingerprint, kernels
from ao_act24.kernels import compile

ROOT = Path(__file__).parent.parent
SOURCE = """#include "scale.cuh"
extern "C" __global__ void k(float* x) { x[threadIdx.x] = scale(x[threadIdx.x]); }
"""
HEADER = "__device__ float scale(float x) { return x * FACTOR; }"


def write_sources(csrc):
    csrc.mkdir()
    (csrc / "a.cu").write_text(SOURCE)
    (csrc / "scale.cuh").write_text(HEADER)
    return csrc


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory, not made yet, and a tree of two sources."""
    monkeypatch.setattr(compile, "CSRC", write_sources(tmp_path / "csrc"))
    monkeypatch.setattr(compile, "_warned", False)
    monkeypatch.setattr(compile, "SILENT_S", 60)
    monkeypatch.setenv("AO_ACT24_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    compile._kernel.cache_clear()
    compile._library.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """What was compiled, one entry a compilation."""
    names, program = [], cuda.core.Program

    def counting(source, kind, options):
        names.append(options.name)
        return program(source, kind, options)

    monkeypatch.setattr(cuda.core, "Program", counting)
    return names


def cubin(factor=2, **kwargs):
    return compile.cubin("a", {"FACTOR": factor}, **kwargs)


def cubin_and_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return cubin(), [str(warning.message) for warning in caught]


def whole(path):
    data = path.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def test_compiled_once_and_kept(cache, compilations):
    code = cubin()
    assert code[:4] == b"\x7fELF" and b"k" in code
    assert cubin() == code and compilations == ["a.cu"]
    (file,) = cache.iterdir()
    assert re.fullmatch(r"a-[0-9a-f]{64}\.cubin", file.name) and file.read_bytes()[:-32] == code and whole(file)


def change_source(monkeypatch):
    (compile.CSRC / "a.cu").write_text(SOURCE.replace("scale(x", "1 + scale(x"))


def change_header(monkeypatch):
    (compile.CSRC / "scale.cuh").write_text(HEADER.replace("x *", "x +"))


def change_option(monkeypatch):
    options = functools.partial(cuda.core.ProgramOptions, use_fast_math=True)
    monkeypatch.setattr(cuda.core, "ProgramOptions", options)


def change_compiler(monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 13, 99))


@pytest.mark.parametrize("change", [change_source, change_header, change_option, change_compiler])
def test_recompiled_after(change, compilations, monkeypatch):
    cubin()
    change(monkeypatch)
    cubin()
    assert len(compilations) == 2


def test_macros_and_architecture_are_part_of_the_key(compilations):
    codes = [cubin(2), cubin(3), cubin("2.5f"), cubin(2, arch="sm_90"), cubin(2, arch="sm_100a")]
    assert len(set(codes)) == len(compilations) == 5
    assert [cubin(2), cubin(3)] == codes[:2] and len(compilations) == 5


def test_processes_that_start_at_once(cache):
    """Four write the same 4 MB entry, again and again; whoever reads it meanwhile never sees a part."""
    (compile.CSRC / "a.cu").write_text(SOURCE + "__device__ char table[1 << 22] = {FACTOR};")
    script = """if True:
        import sys, pathlib
        from kernels import compile
        compile.CSRC, write = pathlib.Path(sys.argv[1]), compile._write
        compile._write = lambda path, code: [write(path, code) for _ in range(20)]
        print("ready", flush=True)
        sys.stdin.readline()
        print(len(compile.cubin("a", {"FACTOR": 2})))
    """
    command = [sys.executable, "-W", "error", "-c", script, str(compile.CSRC)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)
    ]
    assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 4
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
    reads = 0
    while any(rank.poll() is None for rank in ranks):
        for file in cache.glob("a-*.cubin"):
            assert whole(file)
            reads += 1
        time.sleep(0.001)
    assert reads > 0
    assert [rank.wait() for rank in ranks] == [0] * 4
    lengths = {rank.communicate()[0] for rank in ranks}
    (file,) = cache.iterdir()  # nothing was left aside
    assert lengths == {f"{file.stat().st_size - 32}\n"}


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" + data[1:]],
)
def test_damaged_file_is_replaced(damage, cache, compilations):
    code = cubin()
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert cubin_and_warnings() == (code, []) and len(compilations) == 2
    assert whole(file) and cubin() == code and len(compilations) == 2


def test_directory_that_cannot_be_made(cache, compilations):
    """Below a regular file, where root cannot make one either: the only warning is the first."""
    cache.write_text("")
    os.environ["AO_ACT24_CACHE_DIR"] = str(cache / "below")
    code, (message,) = cubin_and_warnings()
    assert code[:4] == b"\x7fELF" and str(cache / "below") in message and "AO_ACT24_CACHE_DIR" in message
    assert cubin_and_warnings() == (code, []) and len(compilations) == 2


def test_read_only_directory(compilations, monkeypatch):
    """A directory of mode 0500, as a user whom it binds: root becomes nobody. What is in it is still read."""
    user = os.geteuid() or 65534
    cubin()  # whatever is loaded lazily is loaded now: nobody may not be able to
    with tempfile.TemporaryDirectory() as name:  # pytest's are closed to nobody
        root, directory = Path(name), Path(name, "cache")
        root.chmod(0o755)
        monkeypatch.setattr(compile, "CSRC", write_sources(root / "csrc"))
        monkeypatch.setenv("AO_ACT24_CACHE_DIR", str(directory))
        cubin()
        (file,) = directory.iterdir()
        for path in (directory, file):
            os.chown(path, user, -1)
        directory.chmod(0o500)
        before, me = len(compilations), os.geteuid()
        os.seteuid(user)
        try:
            assert cubin_and_warnings()[1] == [] and len(compilations) == before
            with pytest.warns(RuntimeWarning, match="Permission denied"):
                assert cubin(3)[:4] == b"\x7fELF"
        finally:
            os.seteuid(me)
        directory.chmod(0o700)
        assert list(directory.iterdir()) == [file]


def test_full_disk(cache, compilations, monkeypatch):
    """The file being written is /dev/full, whose every write is ENOSPC; what was begun is taken away."""
    aside = cache.parent / "aside"

    def full(**kwargs):
        aside.write_text("")
        return os.open("/dev/full", os.O_WRONLY), str(aside)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    code, (message,) = cubin_and_warnings()
    assert code[:4] == b"\x7fELF" and "No space left" in message
    assert not aside.exists() and list(cache.iterdir()) == []
    assert cubin_and_warnings() == (code, []) and len(compilations) == 2


def test_only_the_user_can_read(cache):
    before = os.umask(0)
    try:
        cubin()
    finally:
        os.umask(before)
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mine, mode, reason", [(False, 0o700, "belongs to user"), (True, 0o777, "can write to it")])
def test_directory_of_others_is_not_trusted(mine, mode, reason, cache, monkeypatch):
    """It holds other code under the right name and checksum, which is neither returned nor replaced."""
    code = cubin()
    (file,) = cache.iterdir()
    poison = b"poison" + hashlib.sha256(b"poison").digest()
    file.write_bytes(poison)
    assert cubin() == b"poison"
    cache.chmod(mode)
    if not mine:
        monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    returned, (message,) = cubin_and_warnings()
    assert returned == code and reason in message and file.read_bytes() == poison


@pytest.mark.parametrize(
    "variables, place",
    [
        ({"AO_ACT24_CACHE_DIR": "mine", "XDG_CACHE_HOME": "xdg", "HOME": "home"}, "mine"),
        ({"XDG_CACHE_HOME": "xdg", "HOME": "home"}, "xdg/ao_act24"),
        ({"AO_ACT24_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "home"}, "home/.cache/ao_act24"),
    ],
)
def test_place(variables, place, tmp_path, monkeypatch):
    monkeypatch.delenv("AO_ACT24_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value and str(tmp_path / value))
    cubin()
    assert len(list((tmp_path / place).iterdir())) == 1


def test_short_compilation_says_nothing(capsys, monkeypatch):
    compiled = SimpleNamespace(compile=lambda kind: SimpleNamespace(code=b"at once"))
    monkeypatch.setattr(cuda.core, "Program", lambda *args: compiled)
    monkeypatch.setattr(compile, "SILENT_S", 0.3)
    assert cubin() == b"at once"
    time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_long_compilation_says_so_once(cache, capsys, monkeypatch):
    monkeypatch.setattr(compile, "SILENT_S", 0)
    cubin(3)
    assert capsys.readouterr().err == f"ao_act24: compiling a for sm_90a, once (cached in {cache})\n"
    cubin(3)
    assert capsys.readouterr().err == ""


def test_bad_source_raises_the_log(cache):
    (compile.CSRC / "a.cu").write_text(SOURCE.replace("scale(x", "missing(x"))
    with pytest.raises(Exception, match=r'a\.cu\(2\): error: identifier "missing" is undefined'):
        cubin()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("missing", ["cuda.core", "cuda.bindings", "libnvrtc"])
def test_missing_compiler(missing, monkeypatch):
    if missing == "libnvrtc":

        def fail():
            raise RuntimeError("Failure finding libnvrtc")

        monkeypatch.setattr(nvrtc, "nvrtcVersion", fail)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(compile.MissingCudaError, match=r"pip install cuda-core .*nvidia-cuda-nvrtc") as raised:
        cubin()
    assert isinstance(raised.value.__cause__, (ImportError, RuntimeError)) and missing in str(raised.value)
    assert compile.missing() == str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_missing_driver():
    with pytest.raises(compile.MissingCudaError, match="NVIDIA driver, 580 or newer") as raised:
        compile.kernel("a", "k", {"FACTOR": 2})
    assert isinstance(raised.value.__cause__, RuntimeError) and compile.missing() == str(raised.value)


class FakeDriver:
    """A driver whose kernels are (library, entry) and have the limits that it was told."""

    def __init__(self, monkeypatch, version=13000, largest=232448):
        self.limits, self.loads, self.largest, result = {}, [], largest, driver.CUresult
        self.success, self.invalid = result.CUDA_SUCCESS, result.CUDA_ERROR_INVALID_VALUE
        monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (self.success, version))
        monkeypatch.setattr(driver, "cuKernelGetAttribute", self.get)
        monkeypatch.setattr(driver, "cuKernelSetAttribute", self.set)
        monkeypatch.setattr(cuda.core, "Device", lambda index: None)
        monkeypatch.setattr(cuda.core, "ObjectCode", SimpleNamespace(from_cubin=self.load))

    def load(self, code, name):
        self.loads.append(name)
        return SimpleNamespace(get_kernel=lambda entry: SimpleNamespace(handle=(code, entry)))

    def get(self, limit, handle, device):
        return self.success, self.limits.get((handle[1], device), 49152)

    def set(self, limit, value, handle, device):
        if value > self.largest:
            return (self.invalid,)
        self.limits[handle[1], device] = value
        return (self.success,)


def test_kernel_is_loaded_once_for_every_device_and_entry(monkeypatch, compilations):
    fake = FakeDriver(monkeypatch)
    first = compile.kernel("a", "k", {"FACTOR": 2})
    assert compile.kernel("a", "k", {"FACTOR": 2}) is first
    compile.kernel("a", "k", {"FACTOR": 2}, device_index=1)
    compile.kernel("a", "other", {"FACTOR": 2})
    assert fake.loads == ["a"] and len(compilations) == 1 and fake.limits == {}
    compile.kernel("a", "k", {"FACTOR": 3})
    assert len(fake.loads) == len(compilations) == 2


def test_shared_memory_is_raised_and_never_lowered(monkeypatch):
    fake = FakeDriver(monkeypatch)
    for device, shared in [(0, 100_000), (0, 60_000), (1, 70_000), (1, 1000)]:
        compile.kernel("a", "k", {"FACTOR": 2}, device, shared)
    assert fake.limits == {("k", 0): 100_000, ("k", 1): 70_000}
    with pytest.raises(RuntimeError, match=r"300000 bytes .* k of a.cu on device 1: CUDA_ERROR_INVALID_VALUE"):
        compile.kernel("a", "k", {"FACTOR": 2}, 1, 300_000)


def test_old_driver(monkeypatch):
    FakeDriver(monkeypatch, version=12080)
    with pytest.raises(compile.MissingCudaError, match=r"NVIDIA driver, 580 or newer.* CUDA up to 12\.8"):
        compile.kernel("a", "k", {"FACTOR": 2})
    assert "CUDA up to 12.8" in compile.missing()
    FakeDriver(monkeypatch)
    assert compile.missing() == ""


def test_threads_that_ask_at_once_get_one_compilation(monkeypatch, compilations):
    fake, kernels, together = FakeDriver(monkeypatch), [], threading.Barrier(4)

    def ask():
        together.wait()
        kernels.append(compile.kernel("a", "k", {"FACTOR": 2}))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == len(fake.loads) == 1 and all(kernel is kernels[0] for kernel in kernels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launch():
    (compile.CSRC / "a.cu").write_text("""extern "C" __global__ void k(float* x) {
        extern __shared__ float last[];
        last[50 * 512 - 1 - threadIdx.x] = x[threadIdx.x];
        x[threadIdx.x] = last[50 * 512 - 1 - threadIdx.x] * FACTOR;
    }""")
    x = torch.ones(32, device="cuda")
    kernel = compile.kernel("a", "k", {"FACTOR": 3}, x.device.index, 100 * 1024)
    stream = cuda.core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
    config = cuda.core.LaunchConfig(grid=1, block=32, shmem_size=100 * 1024)
    cuda.core.launch(stream, config, kernel, x.data_ptr())
    assert torch.equal(x, torch.full_like(x, 3))


def test_import_touches_nothing():
    """Neither CUDA nor torch nor the rest of the package."""
    script = "import sys; from kernels import compile; print(*{name.split('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "kernels" in out.stdout.split() and not {"cuda", "torch", "ao_act24", "passes"} & set(out.stdout.split())


def test_sources_are_part_of_the_fingerprint(tmp_path, monkeypatch):
    (tmp_path / "kernels" / "csrc").mkdir(parents=True)
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
    digests = {fingerprint.source_digest.__wrapped__()}
    for name in ("a.cu", "a.cuh"):
        for text in ("one", "two"):
            (tmp_path / "kernels" / "csrc" / name).write_text(text)
            digests.add(fingerprint.source_digest.__wrapped__())
    assert len(digests) == 5
