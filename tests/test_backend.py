"""torch.compile(backend="ao_act24"), the pass object, caches, and what importing the package does."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from mlp import MLP, check, oracle
from oracle import relative_error
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.fx import Graph

from ao_act24 import Act24Backend, Act24Config, Act24Pass

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fullgraph": True, "dynamic": True},
        {"mode": "reduce-overhead"},
        {"mode": "lite"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"epilogue_fusion": False, "act24": Act24Config(emulate=True)}},
        {"backend": Act24Backend(Act24Config(emulate=True)), "mode": "default", "dynamic": False},
    ],
    ids=str,
)
def test_options_compose(options):
    mlp = MLP()
    compiled = torch.compile(mlp, **{"backend": "ao_act24", **options})
    check(compiled, mlp, torch.randn(6, 16))
    check(compiled, mlp, torch.randn(9, 16))


def test_dynamic_sizes_share_one_graph():
    mlp, counter = MLP(), torch._dynamo.utils.counters
    compiled = torch.compile(mlp, backend="ao_act24", dynamic=True, fullgraph=True)
    counter.clear()
    with torch.no_grad():
        for tokens in (5, 8, 13, 64):
            x = torch.randn(tokens, 16)
            assert relative_error(compiled(x), oracle(mlp, x)) < 1e-5
    assert counter["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"act24": 3}, "must be an Act24Config, got 3"),
        ({"emulate": True}, r"options=\{'act24': Act24Config\(emulate=True\)\}"),
        ({"no_such": 1}, "no_such"),
        ({"use_pre_grad_passes": False}, "must be True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        torch.compile(MLP(), backend="ao_act24", options=options)(torch.randn(2, 16))


@pytest.mark.parametrize("make", [Act24Backend, Act24Pass])
def test_bad_config(make):
    with pytest.raises(TypeError, match="config must be an Act24Config, got True"):
        make(True)


def test_checkpoint_around_a_compiled_model():
    """Compilation happens under checkpoint's saved-tensor hooks then."""
    mlp, x = MLP(), torch.randn(6, 16)
    compiled = torch.compile(mlp, backend="ao_act24")
    with fresh_cache():
        check(lambda x: torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False), mlp, x)


def count_ops(graph: Graph) -> int:
    return sum("ao_act24" in str(node.target) for node in graph.nodes)


class Seen(CustomGraphPass):
    """Another library's pass: notes how many of our operators are there when it runs."""

    def __init__(self):
        self.found = []

    def __call__(self, graph):
        self.found.append(count_ops(graph))

    def uuid(self):
        return "seen"


def test_composes_with_other_passes():
    for as_option in (False, True):
        torch._dynamo.reset()
        mlp, other = MLP(), Seen()
        with fresh_cache(), torch._inductor.config.patch(pre_grad_custom_pass=None if as_option else other):
            given = {"options": {"pre_grad_custom_pass": other}} if as_option else {}
            check(torch.compile(mlp, backend="ao_act24", **given), mlp, torch.randn(6, 16))
            assert torch._inductor.config.pre_grad_custom_pass is (None if as_option else other)
        assert other.found == [0], "theirs ran, before ours"


def test_pass_object_with_plain_inductor():
    mlp = MLP()
    check(torch.compile(mlp, options={"pre_grad_custom_pass": Act24Pass()}), mlp, torch.randn(6, 16))
    torch._dynamo.reset()
    with torch._inductor.config.patch(pre_grad_custom_pass=Act24Pass()):
        check(torch.compile(mlp), mlp, torch.randn(7, 16))


def checkpointed(mlp):
    return lambda x: torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=False)


@pytest.mark.parametrize(
    "around, options",
    [
        (lambda mlp: mlp, {"fullgraph": True, "dynamic": True}),
        (lambda mlp: mlp, {"mode": "reduce-overhead"}),
        (checkpointed, {"fullgraph": True}),
    ],
    ids=["fullgraph, dynamic", "mode", "checkpoint"],
)
def test_pass_object_composes(around, options):
    mlp = MLP()
    with torch._inductor.config.patch(pre_grad_custom_pass=Act24Pass()):
        check(torch.compile(around(mlp), **options), mlp, torch.randn(6, 16))


@pytest.mark.parametrize("compiling", [{"backend": "ao_act24"}, {"options": {"pre_grad_custom_pass": Act24Pass()}}])
def test_inference_mode_and_autocast(compiling):
    mlp, x = MLP(), torch.randn(64, 16)
    with torch.inference_mode():
        assert relative_error(torch.compile(mlp, **compiling)(x), oracle(mlp, x)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = torch.compile(mlp, **compiling)(x)
        assert got.dtype == torch.bfloat16
        exact = oracle(mlp.double(), x.double())
        reference = relative_error(oracle(mlp.float(), x), exact)
        assert relative_error(got, exact) <= 1.5 * reference


def test_autocast_inside():
    mlp, x = MLP(), torch.randn(64, 16)

    @torch.compile(backend="ao_act24", fullgraph=True)
    def compiled(x):
        with torch.autocast("cpu", torch.bfloat16):
            return mlp(x)

    def outcome(function, x):
        out = function(x.requires_grad_())
        return out.detach(), *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])

    got = outcome(compiled, x)
    with torch.autocast("cpu", torch.bfloat16):
        want = outcome(lambda x: oracle(mlp, x), x)
    exact = outcome(lambda x: oracle(mlp.double(), x), x.detach().double())
    assert got[0].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in got[1:])
    for g, w, e in zip(got, want, exact):
        assert relative_error(g, e) <= 1.5 * relative_error(w, e)


def test_pass_identity():
    import pickle

    assert pickle.loads(pickle.dumps(Act24Pass())) == Act24Pass()
    assert Act24Pass().uuid() == Act24Pass(Act24Config()).uuid() != Act24Pass(Act24Config(emulate=True)).uuid()


def test_the_pass_is_pure():
    """A second run over a rewritten graph changes nothing."""
    graph_module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Square(), nn.Linear(8, 8)))
    Act24Pass()(graph_module.graph)
    once = str(graph_module.graph)
    Act24Pass()(graph_module.graph)
    assert count_ops(graph_module.graph) == 2 and str(graph_module.graph) == once


class Square(nn.Module):
    def forward(self, x):
        return x * x


def run(code, **environment):
    """Run ``code`` in a new process, in which nothing of this one is imported. Returns its last line of output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
        cwd="/",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().rpartition("\n")[2]


def test_gradients_where_a_folder_of_our_name_hides_the_package(tmp_path):
    """Above a clone, ``import ao_act24`` finds the folder: a namespace package, whose ``__init__`` does not run."""
    (tmp_path / "ao_act24").mkdir()
    norm = run(
        """
        import sys, torch, torch.nn.functional as F
        sys.path.insert(0, PATH)
        up, down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        compiled = torch.compile(lambda x: down(F.relu(up(x)).square()), backend="ao_act24")
        compiled(torch.randn(6, 16)).square().sum().backward()
        print(float(up.weight.grad.norm()))
        """.replace("PATH", repr(str(tmp_path))),
        TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache",
    )
    assert float(norm) > 0


CACHED = """
    import torch, torch.nn.functional as F
    {prelude}
    torch.manual_seed(0)
    up, down, x = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), torch.randn(6, 16)
    {compile}
    compiled(x).square().sum().backward()
    hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    print(hits, f"{{up.weight.grad.double().norm():.6f}}")
"""
BACKEND = (
    """compiled = torch.compile(lambda x: down(F.relu(up(x)).square()), backend="ao_act24", options={{{options}}})"""
)
PASS = """import ao_act24
    options = {"pre_grad_custom_pass": ao_act24.Act24Pass()}
    compiled = torch.compile(lambda x: down(F.relu(up(x)).square()), options=options)"""
TRANSFORM = """import ao_act24
    class Square(torch.nn.Module):
        def forward(self, h):
            return F.relu(h).square()
    model = torch.nn.Sequential(up, Square(), down)
    ao_act24.sparsify_(model)
    compiled = torch.compile(model)"""


@pytest.mark.parametrize("way", ["backend", "pass", "transform"])
def test_caches_across_processes(way, tmp_path):
    """Unchanged hits; a changed setting misses; a changed gradient, in Python source only, misses and takes effect."""
    for part in ("ao_act24", "passes", "kernels", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)

    def go(options=""):
        compile_it = {"backend": BACKEND.format(options=options), "pass": PASS, "transform": TRANSFORM}[way]
        prelude = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ao_act24"
        code = CACHED.format(prelude=prelude, compile=compile_it)
        hits, norm = run(code, TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache").split()
        return int(hits), float(norm)

    hits, norm = go()
    assert hits == 0
    assert go() == (1, norm)
    if way == "backend":
        assert go('"act24": __import__("ao_act24").Act24Config(emulate=True)') == (0, norm)
    source = tmp_path / "ao_act24" / "autograd.py"
    doubling = {
        "(packed.sqrt() * 2)": "(packed.sqrt() * 4)",
        "_matmul_weight_grad(dense, x) if up": "2 * _matmul_weight_grad(dense, x) if up",
    }
    text = source.read_text()
    for old, new in doubling.items():
        assert old in text
        text = text.replace(old, new)
    source.write_text(text)
    hits, doubled = go()
    assert hits == 0 and doubled == pytest.approx(2 * norm)
    assert go() == (1, doubled)


def test_backend_is_found_without_importing_us():
    assert (
        run("""
        import sys, torch
        assert "ao_act24" in torch._dynamo.list_backends()
        assert not any(name.startswith("ao_act24") for name in sys.modules)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        torch.compile(model, backend="ao_act24")
        print("ao_act24.backend" in sys.modules)
    """)
        == "True"
    )


def test_importing_is_quiet_quick_and_leaves_no_trace():
    out = run("""
        import contextlib, io, logging, time, warnings
        import torch, torchao, torch._inductor.config, torch._dynamo.config, torch._functorch.config

        def state():
            configs = (torch._inductor.config, torch._dynamo.config, torch._functorch.config)
            return ([str(c.get_config_copy()) for c in configs], list(warnings.filters), logging.root.level,
                    logging.root.handlers, torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
                    torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled())

        before, text = state(), io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            with warnings.catch_warnings(record=True) as said:
                start = time.perf_counter()
                import ao_act24
                seconds = time.perf_counter() - start
        assert state() == before
        assert text.getvalue() == "" and not said, (text.getvalue(), said)
        assert not torch.cuda.is_initialized()
        print(seconds)
    """)
    assert float(out) < 0.5


@pytest.mark.parametrize("version, fails", [("2.10.1", True), ("2.14.0", True), ("2.11.0+cu130", False)])
def test_unsupported_torch_is_named(version, fails):
    out = run(f"""
        import torch, torchao
        torch.__version__ = {version!r}
        try:
            import ao_act24
            print("imported")
        except ImportError as error:
            print(error)
    """)
    assert out == (f"ao_act24 supports torch >= 2.11 and < 2.14, got torch {version}" if fails else "imported")
