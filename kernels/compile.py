"""The CUDA kernels in ``csrc``: compiled when first launched, with NVRTC, and kept on disk.

    cubin(name, defines)                                       csrc/<name>.cu as machine code; needs no GPU
    kernel(name, entry, defines, device_index, shared_bytes)   the same, loaded, for cuda.core.launch

A file of the cache is ``<name>-<key>.cubin``: the cubin, which cuobjdump and nvdisasm read, and its SHA-256. The key
hashes the source, every header beside it, the options, the macros, the architecture and NVRTC's version. Files are
written aside and renamed, so processes that start at once need no lock: they compile the same thing, and each reads
whole files only. Where the cache cannot be read, written or trusted, kernels are compiled, with one warning.

The key is cuda.core's ``make_program_cache_key``. The files are not its ``FileStreamProgramCache``: that returns
truncated files as they are, trusts a directory of any owner, creates it open to reading, and raises on a read-only or
full disk; checks around it would be longer than a read and a write of our own.

Importing this module loads neither cuda.core nor NVRTC nor the driver: the functions do.
"""

import functools
import hashlib
import os
import struct
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuda.core import Kernel, ObjectCode

CSRC = Path(__file__).parent / "csrc"
ARCH = "sm_90a"
SILENT_S = 1.0  # a compilation that takes longer says so
CHECKSUM_BYTES = hashlib.sha256().digest_size

_lock = threading.Lock()
_warned = False


class MissingCudaError(RuntimeError):
    """cuda.core, NVRTC or the NVIDIA driver is missing or too old; the message says what to install."""


def missing() -> str:
    """What the kernels need and this machine lacks, in words; empty if it has all."""
    try:
        with _compiler():
            pass
        with _driver():
            pass
    except MissingCudaError as error:
        return str(error)
    return ""


def cubin(name: str, defines: Mapping[str, int | str] = {}, arch: str = ARCH) -> bytes:
    """``csrc/<name>.cu`` with the macros ``defines``, for ``arch``: from the cache, or compiled and put there.

    A source that does not compile raises cuda.core's ``NVRTCError``, which holds the compiler's log.
    """
    with _compiler():
        from cuda.core import Program, ProgramOptions
        from cuda.core.utils import make_program_cache_key

    source = (CSRC / f"{name}.cu").read_text()
    macros = [(macro, str(value)) for macro, value in sorted(defines.items())]
    options = ProgramOptions(name=f"{name}.cu", arch=arch, std="c++17", include_path=[str(CSRC)], define_macro=macros)
    headers = _headers_digest()
    key = make_program_cache_key(
        code=source, code_type="c++", options=options, target_type="cubin", extra_digest=headers
    )
    directory = _cache_directory()
    path = directory and directory / f"{name}-{key.hex()}.cubin"
    cached = path and _read(path)
    if cached:
        return cached
    place = f"cached in {directory}" if directory else "not cached"
    with _says(f"ao_act24: compiling {name} for {arch}, once ({place})"):
        code = bytes(Program(source, "c++", options).compile("cubin").code)
    if path:
        _write(path, code)
    return code


def kernel(
    name: str,
    entry: str,
    defines: Mapping[str, int | str] = {},
    device_index: int = 0,
    shared_bytes: int = 0,
    starts_with: int | None = None,
) -> "Kernel":
    """The function ``entry`` (``extern "C"``) of ``cubin(name, defines)``, loaded once in this process.

    ``shared_bytes``: the dynamic shared memory that a launch on this device may ask for, where it is above 48 KB.
    ``starts_with``: registers that a thread starts with, where its warps give and take some before they need more.
    """
    with _lock:
        return _kernel(name, entry, tuple(sorted(defines.items())), device_index, shared_bytes, starts_with)


@functools.cache
def _kernel(
    name: str,
    entry: str,
    defines: tuple[tuple[str, int | str], ...],
    device_index: int,
    shared_bytes: int,
    starts_with: int | None,
) -> "Kernel":
    with _driver():
        from cuda.bindings import driver
        from cuda.core import Device

    Device(device_index)  # initialises CUDA, where torch has not yet
    found = _library(name, defines, starts_with).get_kernel(entry)
    # A kernel has one limit on a device, whoever asked for it: it is raised, never lowered.
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    status, allowed = driver.cuKernelGetAttribute(limit, found.handle, device_index)
    if status == driver.CUresult.CUDA_SUCCESS and shared_bytes > allowed:
        (status,) = driver.cuKernelSetAttribute(limit, shared_bytes, found.handle, device_index)
    if status != driver.CUresult.CUDA_SUCCESS:
        what = f"{shared_bytes} bytes of dynamic shared memory for {entry} of {name}.cu on device {device_index}"
        raise RuntimeError(f"{what}: {status.name}")
    return found


@functools.cache
def _library(name: str, defines: tuple[tuple[str, int | str], ...], starts_with: int | None) -> "ObjectCode":
    """The loaded cubin. It belongs to no device: each one's context takes it at the first launch there."""
    from cuda.core import ObjectCode

    code = cubin(name, dict(defines))
    return ObjectCode.from_cubin(code if starts_with is None else starting_with(code, starts_with), name=name)


def starting_with(code: bytes, registers: int) -> bytes:
    """``code``, the cubin of one kernel, with another count of registers to start with.

    ptxas writes the highest count that any part of a kernel needs. Where ``setmaxnreg`` gives and takes registers, a
    thread may start with fewer, and a block of more threads fits.
    """
    attribute = bytes((0x04, 0x2F, 0x08, 0x00))  # EIATTR_REGCOUNT: the kernel's symbol and the count, 4 bytes each
    begin, end = _section(code, b".nv.info")  # instructions may hold the same bytes
    if code.count(attribute, begin, end) != 1:
        raise RuntimeError(f"the cubin must hold one register count, got {code.count(attribute, begin, end)}")
    at = code.index(attribute, begin, end) + 8
    return code[:at] + registers.to_bytes(4, "little") + code[at + 4 :]


def _section(elf: bytes, name: bytes) -> tuple[int, int]:
    """Where a section of an ELF file (64 bits, little-endian) begins and ends; nowhere if there is none."""
    if elf.startswith(b"\x7fELF"):
        (table,), (size, count, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<3H", elf, 58)
        # of each: where its name is, type, flags, address, offset, size
        headers = [struct.unpack_from("<2I4Q", elf, table + i * size) for i in range(count)]
        for at, _, _, _, offset, length in headers:
            first = headers[names][4] + at
            if elf[first : elf.index(b"\0", first)] == name:
                return offset, offset + length
    return 0, 0


@contextmanager
def _compiler() -> Iterator[None]:
    with _requires("cuda-core and NVRTC: pip install cuda-core cuda-bindings==13.* nvidia-cuda-nvrtc==13.*"):
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library is loaded here, or not found
        yield


@contextmanager
def _driver() -> Iterator[None]:
    with _requires("the NVIDIA driver, 580 or newer"):
        from cuda.bindings import driver

        _, version = driver.cuDriverGetVersion()
        if version < 13000:
            raise RuntimeError(f"the driver supports CUDA up to {version // 1000}.{version % 1000 // 10}")
        yield


@contextmanager
def _requires(what: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError) as error:
        raise MissingCudaError(f"ao_act24's CUDA kernels need {what}. ({error})") from error


@contextmanager
def _says(what: str) -> Iterator[None]:
    """Print ``what`` if the block takes longer than ``SILENT_S``."""
    timer = threading.Timer(SILENT_S, print, [what], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _headers_digest() -> bytes:
    digest = hashlib.sha256()
    for header in sorted(CSRC.glob("*.cuh")):
        digest.update(hashlib.sha256(header.name.encode()).digest() + hashlib.sha256(header.read_bytes()).digest())
    return digest.digest()


def _cache_directory() -> Path | None:
    """``$AO_ACT24_CACHE_DIR``, ``$XDG_CACHE_HOME/ao_act24`` or ``~/.cache/ao_act24``; None where not to be trusted.

    Cubins are code: a directory that another user owns, or that others can write to, may hold anything.
    """
    root = os.environ.get("AO_ACT24_CACHE_DIR")
    root = root or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ao_act24")
    try:
        directory = Path(root).expanduser().absolute()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _warn(root, error)
        return None
    foreign, shared = status.st_uid != os.geteuid(), status.st_mode & 0o022
    if foreign or shared:
        _warn(root, f"it belongs to user {status.st_uid}" if foreign else "other users can write to it (chmod go-w)")
        return None
    return directory


def _read(path: Path) -> bytes | None:
    """The cubin at ``path``, or None if there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> None:
    try:
        file, aside = tempfile.mkstemp(dir=path.parent, prefix=path.stem)  # readable by the user only
        try:
            with os.fdopen(file, "wb") as writing:
                writing.write(code + hashlib.sha256(code).digest())
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        _warn(str(path.parent), error)


def _warn(directory: str, reason: object) -> None:
    global _warned
    if not _warned:
        _warned = True
        message = f"ao_act24 cannot keep compiled kernels in {directory}: {reason}. Every process compiles them again; "
        warnings.warn(message + "AO_ACT24_CACHE_DIR names another directory.", RuntimeWarning, stacklevel=3)
