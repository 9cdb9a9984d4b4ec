"""Every kernel compiles for sm_90a without a GPU, and is the machine code that it is meant to be."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from ao_act24.kernels import compile, plans

NVDISASM = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin/nvdisasm")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("AO_ACT24_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def instructions(code, tmp_path):
    """The SASS of a cubin, an instruction or label a line, addresses and encodings dropped."""
    nvdisasm = shutil.which("nvdisasm") or NVDISASM
    (tmp_path / "kernel.cubin").write_bytes(code)
    text = subprocess.run([nvdisasm, tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    lines = (re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;|(\.L_x_\d+:)", line) for line in text.splitlines())
    return [line.group(1) or line.group(2) for line in lines if line]


def reachable(sass, start):
    """What may run from line ``start`` on."""
    labels = {line: i for i, line in enumerate(sass) if line.endswith(":")}
    seen, queue = set(), [start]
    while queue:
        i = queue.pop()
        if i not in seen and i < len(sass):
            seen.add(i)
            jump = re.search(r"\b(?:BRA\S*|BSSY B\d+,|CALL\S*|WARPSYNC\S* R\d+,) .*?(\.L_x_\d+)", sass[i])
            queue += [labels[f"{jump.group(1)}:"]] if jump else []
            ends = re.match(r"(BRA(?!\.DIV)|EXIT|BRX|RET|BPT\.TRAP)\b", sass[i]) and "!" not in sass[i][:4]
            queue += [] if ends else [i + 1]
    return [sass[i] for i in sorted(seen)]


def check_local_memory(sass):
    assert sass and not [line for line in sass if re.search(r"\b(LDL|STL)\b", line)], "no spills, no local memory"


def matmul(name, dtype):
    return compile.cubin(plans.source(name), plans.matmul_defines(name, dtype))


@pytest.mark.parametrize("dtype", plans.ELEMENTS)
@pytest.mark.parametrize("name", ["feature_wise", "unpack", "densest"])
def test_regrouping_and_unpacking(name, dtype, tmp_path):
    sass = instructions(compile.cubin(name, {"ELEMENT": plans.ELEMENTS[dtype]}), tmp_path)
    check_local_memory(sass)
    assert name == "densest" or any("STG.E.128" in line for line in sass)


@pytest.mark.parametrize("dtype", plans.ELEMENTS)
def test_packing(dtype, tmp_path):
    sass = instructions(compile.cubin("relu2_sparsify", {"ELEMENT": plans.ELEMENTS[dtype]}), tmp_path)
    check_local_memory(sass)
    assert any("LDG.E.EF.128" in line for line in sass) and any("STG.E.128" in line for line in sass)


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("dtype", plans.ELEMENTS)
def test_packing_to_fp8(dtype, each, tmp_path):
    code = compile.cubin("relu2_sparsify_fp8", {"ELEMENT": plans.ELEMENTS[dtype], "EACH": each})
    sass = instructions(code, tmp_path)
    check_local_memory(sass)
    assert any("LDG.E.EF.128" in line for line in sass) and any("STG.E.64" in line for line in sass)
    assert any("F2FP.SATFINITE.E4M3" in line for line in sass)


@pytest.mark.parametrize("dtype", plans.ELEMENTS)
def test_squaring_to_fp8(dtype, tmp_path):
    sass = instructions(compile.cubin("square_to_fp8", {"ELEMENT": plans.ELEMENTS[dtype]}), tmp_path)
    check_local_memory(sass)
    assert any("LDG.E.EF.128" in line for line in sass) and any("STG.E.128" in line for line in sass)
    assert any("F2FP.SATFINITE.E4M3" in line for line in sass)


@pytest.mark.parametrize("fp8", [0, 1])
@pytest.mark.parametrize("column_warps", [1, 8])
@pytest.mark.parametrize("eights", [1, 2])
@pytest.mark.parametrize("dtype", plans.ELEMENTS)
def test_few_tokens(dtype, eights, column_warps, fp8, tmp_path):
    defines = {"FP8": fp8, "EIGHTS": eights, "COLUMN_WARPS": column_warps, "UP_STAGES": 6, "DOWN_STAGES": 7}
    sass = instructions(compile.cubin("active", {"ELEMENT": plans.ELEMENTS[dtype], **defines}), tmp_path)
    check_local_memory(sass)
    # Hopper has no such product of e4m3: it is made of two in f16
    product = "HMMA.16816.F32" + (".BF16" if dtype == torch.bfloat16 and not fp8 else "")
    assert sum(f"{product} " in line for line in sass) == (4 + 4) * eights * (1 + fp8)
    assert sum("LDSM.16.MT88.4" in line for line in sass) == 4 + 1 and sum("ACQBULK" in line for line in sass) == 2
    assert sum("LDGSTS.E.BYPASS.128" in line for line in sass) >= 16, "past the registers, and past L1"
    assert any("F2FP.F16.E4M3.UNPACK_B" in line for line in sass) == bool(fp8)
    # what the kernel before wrote is read after waiting for it, and not as if it never changed
    assert not [line for line in sass if "LDG" in line and "CONSTANT" in line]
    for wait in (i for i, line in enumerate(sass) if "ACQBULK" in line):
        start = max((i for i, line in enumerate(sass[:wait]) if "NOP" in line), default=0)  # behind the other kernel
        assert wait > start + 5 and not [line for line in sass[start:wait] if re.search(r"\bLDG(STS)?\b", line)]


@pytest.mark.parametrize("dtype", plans.ELEMENTS)
@pytest.mark.parametrize("name", plans.DEFINES)
def test_matmuls(name, dtype, tmp_path):
    sparse = plans.DEFINES[name]["A_COLUMNS"] == 32
    # four stages of two steps, unrolled, or two; a stage of four steps
    product, count = ("HGMMA.SP.64x256x32.F32", 8) if sparse else ("HGMMA.64x256x16.F32", 4)
    if name.endswith("_fp8"):
        product = "QGMMA.SP.64x256x64.F32" if sparse else "QGMMA.64x256x32.F32"
        count = 4
    sass = instructions(matmul(name, dtype), tmp_path)
    check_local_memory(sass)
    element = ".E4M3.E4M3" if product.startswith("Q") else {torch.bfloat16: ".BF16", torch.float16: ""}[dtype]
    assert sum(f"{product}{element} " in line for line in sass) == count
    # ptxas would wait for each product by itself where it cannot keep them apart (C7510)
    assert sum("DEPBAR.LE gsb0, 0x0" in line for line in sass) == 1
    # an acquire or release of cluster scope flushes caches at every stage
    products = [i for i, line in enumerate(sass) if "GMMA" in line]
    assert not [line for line in sass[products[0] : products[-1]] if re.search("CCTL|MEMBAR|ERRBAR", line)]


FP8_WORDS = {"sparse_mm_fp8": (4, 8), "linear_relu2_sparsify_fp8": (2,)}


@pytest.mark.parametrize("name", plans.DEFINES)
def test_what_threads_exchange(name, tmp_path):
    """Nothing, where the order in which B is brought in leaves each thread what it stores; else each word once (ptxas
    writes it twice where it does not know that a warp is together). For fp8, four words of metadata, or a row's
    largest."""
    sass = instructions(matmul(name, torch.bfloat16), tmp_path)
    words = range(64, 129) if plans.DEFINES[name]["B_MN"] else FP8_WORDS.get(name, (0,))
    assert sum("SHFL" in line for line in sass) in words
    assert sum("MOVM" in line for line in sass) == (64 if "transposed" in name else 0)
    majors = tuple(bool(plans.DEFINES[name][operand]) for operand in ("A_MN", "B_MN"))
    assert all(("tnspA" in line, "tnspB" in line) == majors for line in sass if "HGMMA" in line)
    assert sum("UTMALDG.5D.MULTICAST" in line for line in sass) == 1


@pytest.mark.parametrize("dtype", plans.ELEMENTS)
@pytest.mark.parametrize("name", [name for name, how in plans.DEFINES.items() if how["A_COLUMNS"] == 32])
def test_metadata_is_not_overwritten_while_it_is_read(name, dtype, tmp_path):
    """wgmma reads its metadata registers while it runs; ptxas does not know, so the source waits in time."""
    sass = instructions(matmul(name, dtype), tmp_path)
    read, groups, seen = set(), [], 0  # by products not yet committed, and by each group of those that were
    for line in sass:
        if product := re.search(
            r"[HQ]GMMA\.SP\S* R\d+, gdesc\[\w+\](?:\.tnsp[AB])*, R\d+, (?:!?UP\w+, )?(R\d+)(?:, 0x[01])?", line
        ):
            read.add(product.group(1))
            seen += 1
            if "gsb0" in line:
                groups, read = [*groups, read], set()
        elif wait := re.search(r"DEPBAR\.LE gsb0, 0x(\d)", line):
            groups = groups[len(groups) - int(wait.group(1)) :]
        written = re.match(r"(?:@!?U?P\w+ )?(?!ST|RED|SYNCS)\S+ (?:U?P\w+, )*(R\d+)", line)
        assert "GMMA" in line or not written or written.group(1) not in read.union(*groups), line
    assert seen == (4 if name == "sparse_mm_fp8" else 8) and not read and not groups


@pytest.mark.parametrize("dtype", plans.ELEMENTS)
@pytest.mark.parametrize("name", plans.DEFINES)
def test_a_block_of_three_consumers_fits(name, dtype, tmp_path):
    """It is launched with 128 registers a thread; what its parts take later adds up to what a multiprocessor has."""
    start = plans.MATMUL_STARTS_WITH
    code = compile.starting_with(matmul(name, dtype), start)
    sass = instructions(code, tmp_path)
    (take,), (give,) = (
        [i for i, line in enumerate(sass) if what in line] for what in ("USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC")
    )
    taken, kept = (int(sass[i].split()[-1], 16) for i in (take, give))
    assert 128 * (3 * taken + kept) <= 65536 == start * plans.MATMUL_THREADS
    for part, registers in ((sass[:take], start), (reachable(sass, take), taken), (reachable(sass, give), kept)):
        assert len(part) > 40
        assert max(int(register) for line in part for register in re.findall(r"\bR(\d+)\b", line)) < registers


def test_register_counts_are_not_looked_for_among_instructions():
    code = matmul("sparse_mm", torch.bfloat16)
    same_bytes = bytes((0x04, 0x2F, 0x08, 0x00, 1, 0, 0, 0, 2, 0, 0, 0))  # of a count, in no section of them
    assert compile.starting_with(code + same_bytes, 128) == compile.starting_with(code, 128) + same_bytes != code
    for without in (b"no cubin", code.replace(b".nv.info", b".no.info")):
        with pytest.raises(RuntimeError, match="must hold one register count, got 0"):
            compile.starting_with(without, 128)
