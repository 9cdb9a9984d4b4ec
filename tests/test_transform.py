"""``sparsify_``: the model's own modules in 2:4, in eager and under any compiler, and back again."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from ffn import FFN, Inline, OracleInline, assert_bit_equal, assert_close, check, data, oracle, outcome
from oracle import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import ao_act24
from ao_act24 import Act24Warning, sparsify_, unsparsify_


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_forward_and_gradients(shape, bias, train):
    report = check(FFN(bias=bias).train(train), x=data(*shape))
    assert report.summary() == "1 of 1 FFN-like sites run in 2:4"


def test_inline_activation():
    check(Inline(), want=OracleInline())


def test_no_grad_and_inference_mode():
    model, x = FFN(), data(grad=False)
    want, dense = oracle(model)(x).detach(), model(x).detach()
    sparsify_(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(model(x), want) <= 1e-5 < relative_error(dense, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype):
    check(FFN().to(dtype), x=data(dtype=dtype), tolerance=1e-12 if dtype == torch.float64 else 1e-2)


def test_dtype_changed_afterwards():
    model = FFN()
    sparsify_(model)
    model.to(torch.float64)
    assert_close(outcome(model, data(dtype=torch.float64)), outcome(oracle(model), data(dtype=torch.float64)), 1e-12)


def test_autocast():
    model, x = FFN(), data()
    with torch.autocast("cpu", torch.bfloat16):
        check(model, x=x, tolerance=2e-2)
        assert model(x).dtype == torch.bfloat16


def test_state_is_untouched():
    model = FFN()
    keys, parameters, children = list(model.state_dict()), dict(model.named_parameters()), dict(model.named_modules())
    sparsify_(model)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert dict(model.named_modules()) == children
    assert "sparse_mm" in inspect.getsource(model.forward)


def test_unsparsify():
    model, plain, x = FFN(), FFN(), data()
    sparsify_(model)
    assert not torch.equal(model(x), plain(x))
    assert unsparsify_(model) == 1
    assert "forward" not in vars(model)
    assert_bit_equal(outcome(model, x), outcome(plain, x))
    assert unsparsify_(model) == 0
    assert len(sparsify_(model).rewritten) == 1
    assert_close(outcome(model, x), outcome(oracle(plain), x))


def test_second_call_is_harmless():
    model, x = FFN(), data()
    sparsify_(model)
    once = outcome(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify_(model)
    assert_bit_equal(outcome(model, x), once)
    assert unsparsify_(model) == 1
    assert_bit_equal(outcome(model, x), outcome(FFN(), x))


def test_second_call_does_not_claim_that_nothing_runs_in_24():
    model = FFN()
    sparsify_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Act24Warning)
        sparsify_(model)


def test_deepcopy_is_independent():
    model, x = FFN(), data()
    sparsify_(model)
    before = outcome(model, x)
    twin = copy.deepcopy(model)
    assert_bit_equal(outcome(twin, x), before)
    with torch.no_grad():
        twin.down.weight.mul_(2), twin.down.bias.zero_()
    assert_close(outcome(twin, x), outcome(oracle(twin), x))
    assert_bit_equal(outcome(model, x), before)
    unsparsify_(twin)
    assert not torch.equal(twin(x), oracle(twin)(x))
    assert_bit_equal(outcome(model, x), before)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [pickled, saved])
def test_pickled_module_loads_dense(through):
    model, x = FFN(), data()
    sparsify_(model)
    loaded = through(model)
    assert_bit_equal(outcome(loaded, x), outcome(FFN(), x))
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("through", [pickled, saved])
def test_loaded_module_can_be_sparsified(through):
    model = FFN()
    sparsify_(model)
    check(through(model))


def test_load_state_dict():
    model, x, other = FFN(), data(), FFN()
    with torch.no_grad():
        other.up.weight.mul_(3), other.down.weight.neg_()
    sparsify_(model)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    assert_close(outcome(model, x), outcome(oracle(other), x))
    meta = FFN().to("meta")
    sparsify_(meta)
    meta.load_state_dict(other.state_dict(), assign=True)
    assert_close(outcome(meta, x), outcome(oracle(other), x))


def test_frozen_weights():
    model = FFN()
    model.down.requires_grad_(False)
    check(model)
    assert model.down.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = FFN()

        def forward(self, x):
            return checkpoint(self.ffn, x, use_reentrant=use_reentrant)

    check(Checkpointed())


def ops_in_graphs(model, x):
    """Runs ``model`` under torch.compile and returns the ATen graphs' targets."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    targets = []

    def compiler(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler), fullgraph=True)
    return compiled, targets


def test_compiled_afterwards():
    model, x = nn.Sequential(FFN(), FFN()), data()
    sparsify_(model)
    want = outcome(oracle(model), x)
    compiled, targets = ops_in_graphs(model, x)
    got = {name.removeprefix("_orig_mod."): tensor for name, tensor in outcome(compiled, x).items()}
    assert_close(got, want)
    counts = {op: targets.count(f"ao_act24.{op}.default") for op in ("relu2_sparsify", "sparse_mm", "sampled_mm")}
    assert counts == {"relu2_sparsify": 2, "sparse_mm": 2, "sampled_mm": 2}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "ao_act24"])
def test_compiled_by_backend(backend):
    model, x = FFN(), data(grad=False)
    sparsify_(model)
    want = oracle(model)(x).detach()
    torch._dynamo.reset()
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert relative_error(got, want) <= 1e-5
    assert "ao_act24::sparse_mm" in {event.key for event in profile.key_averages()}
    report = ao_act24.explain(model, x)
    assert [v.rewritten for v in report] == [True]


def test_trained_by_our_backend():
    """Which joins the operators that it finds."""
    model, x = nn.Sequential(FFN(), FFN()), data()
    sparsify_(model)
    want = outcome(oracle(model), x)
    got = outcome(torch.compile(model, backend="ao_act24", fullgraph=True), x)
    assert_close({name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}, want)
    assert ao_act24.capture_graphs(model, x).after[0].count("ao_act24.relu2_ffn") == 2


def test_falls_back_under_compile():
    model, x = FFN(p=0.5).eval(), data(grad=False)
    sparsify_(model)
    compiled, targets = ops_in_graphs(model, x)
    assert relative_error(compiled(x), oracle(model)(x)) <= 1e-5
    assert "ao_act24.sparse_mm.default" in targets
    targets.clear()
    model.train()
    compiled(x)
    assert targets and "ao_act24.sparse_mm.default" not in targets


@pytest.mark.parametrize(
    "wrong, type_name", [(torch.relu, "builtin"), (None, "NoneType"), ([FFN()], "list"), (FFN, "type")]
)
def test_not_a_module(wrong, type_name):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got .*{type_name}"):
        sparsify_(wrong)


def test_compiled_already():
    with pytest.raises(TypeError, match="model must not be compiled yet"):
        sparsify_(torch.compile(FFN()))


def test_wrong_config():
    with pytest.raises(TypeError, match="emulate"):
        sparsify_(FFN(), ao_act24.Act24Config(emulate="yes"))
