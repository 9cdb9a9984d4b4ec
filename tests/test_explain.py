"""explain and measure."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from mlp import MLP
from oracle import mask24, relative_error, relu2_24
from torch import nn
from torch.utils.checkpoint import checkpoint

import ao_act24
from ao_act24 import Act24Config, autograd, ops, transform
from ao_act24.measure import across_tokens


class Model(nn.Module):
    """Two FFNs to rewrite, one not; a buffer and random numbers that a run changes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([MLP(), MLP(F.gelu), MLP()])
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(16)
        self.register_buffer("average", torch.zeros(16))
        self.calls = 0

    def forward(self, x):
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        self.calls, self.last = self.calls + 1, x.shape[0]
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return self.norm(x)


def test_report():
    report = ao_act24.explain(Model(), torch.randn(6, 16))
    assert [v.path for v in report] == ["layers.0", "layers.1", "layers.2"]
    assert [v.rewritten for v in report] == [True, False, True] and len(report) == 3
    assert [v.activation for v in report] == ["relu²", "gelu", "relu²"]
    first, second = report.rewritten[0], report.dense[0]
    assert (first.x, first.hidden_dim, first.out) == ((6, 16), 32, (6, 16))
    assert (first.dtype, first.device, first.reason) == ("float32", "cpu", "")
    assert first.source == "return self.down(self.activation(self.up(x)))"
    assert second.reason == "the activation is gelu, not relu²"
    text = str(report)
    assert "2 of 3 FFN-like sites run in 2:4" in text and "layers.1" in text and "[6, 16] → 32 → [6, 16]" in text


@pytest.mark.parametrize("name", ["<string>", "<stdin>"])
def test_code_whose_lines_are_not_known(name):
    """Its class stands for the line."""
    made: dict[str, type[nn.Module]] = {}
    code = "class Made(MLP):\n    def forward(self, x):\n        return self.down(self.activation(self.up(x)))\n"
    exec(compile(code, name, "exec"), {"MLP": MLP}, made)
    (verdict,) = ao_act24.explain(made["Made"](), torch.randn(6, 16))
    assert verdict.source == verdict.name == "Made"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("look", [ao_act24.explain, ao_act24.measure, ao_act24.capture_graphs])
def test_nothing_changes(look, training):
    model = Model().train(training)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(6, 16)
    forward = model.layers[0].forward
    random = torch.get_rng_state()
    look(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert all(p.grad is None for p in model.parameters()) and model.training == training
    assert model.calls == 0 and not hasattr(model, "last")
    assert model.layers[0].forward == forward and "forward" not in model.layers[0].__dict__


def test_caches_play_no_part():
    """Neither what was compiled before, nor earlier calls, nor their shapes."""
    model = Model().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(2, 16))
    reports = [
        ao_act24.explain(m, torch.randn(n, 16)) for m, n in [(model, 6), (compiled, 6), (model, 3), (model, 6)] * 3
    ]
    assert len({str(r) for r in reports[0::4] + reports[1::4] + reports[3::4]}) == 1
    assert reports[2].verdicts[0].x == (3, 16), "no earlier call makes a size symbolic"
    counter = torch._dynamo.testing.CompileCounter()
    again = torch.compile(MLP(), backend=counter)
    again(torch.randn(2, 16))
    ao_act24.explain(again, torch.randn(2, 16))
    again(torch.randn(2, 16))
    assert counter.frame_count == 1, "explain does not disturb compiled code"


class Broken(nn.Module):
    """Graph breaks, checkpointing, and a module that inner frames call self."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"a": Model(), "b": MLP()})

    def forward(self, x):
        x = self.inner["a"](x)
        torch._dynamo.graph_break()
        return checkpoint(self.inner["b"], x, use_reentrant=False)


def test_graph_breaks_and_checkpoints():
    report = ao_act24.explain(Broken(), torch.randn(6, 16))
    paths = ["inner.a.layers.0", "inner.a.layers.1", "inner.a.layers.2", "inner.b"]
    assert [v.path for v in report] == paths
    assert "2 graphs" in report.notes[0] and "2 graphs" in str(report)


def test_graph_breaks_do_not_stop_a_second_measurement():
    model, x = Broken(), torch.randn(6, 16)
    first, second = ao_act24.measure(model, x), ao_act24.measure(model, x)
    assert [layer.error for layer in first.layers] == [layer.error for layer in second.layers]


class BreakingBlock(nn.Module):
    def __init__(me):  # any name will do for self
        super().__init__()
        me.mlp = MLP()

    def forward(me, x):
        x = helper(x)
        torch._dynamo.graph_break()
        return x + me.mlp(x)


def helper(x):
    torch._dynamo.graph_break()
    return x * 2


def test_modules_that_share_a_graph_are_listed_and_measured_one_by_one():
    model, x = nn.ModuleDict({"layers": nn.Sequential(*(BreakingBlock() for _ in range(10)))}), torch.randn(6, 16)
    model.forward = model["layers"].forward
    paths = [f"layers.{number}.mlp" for number in range(10)]
    assert [verdict.path for verdict in ao_act24.explain(model, x)] == paths
    layers = ao_act24.measure(model, x).layers
    assert [layer.path for layer in layers] == paths
    assert {layer.tokens for layer in layers} == {6} and len({layer.error for layer in layers}) == 10


def test_graph_breaks_leave_nothing_in_dynamos_cache():
    """Nine entries would fill it: the user's own compilation would run dense."""
    model, x = nn.Sequential(BreakingBlock(), BreakingBlock()), torch.randn(6, 16)
    for _ in range(9):
        ao_act24.explain(model, x)
        ao_act24.measure(model, x)
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=keep)
    want = compiled(x)
    entered, blocks = len(graphs), [gm for gm in graphs if len(gm.graph.nodes) > 8]
    assert blocks, "what holds the FFN is compiled"
    ao_act24.explain(compiled, x)
    torch.testing.assert_close(compiled(x), want)
    new = graphs[entered:]
    assert all(len(gm.graph.nodes) < 8 for gm in new), "only the helper's own frame is compiled anew"


def test_casts_to_dtypes_without_2_4_are_reasons():
    mlp = MLP()
    for block in (
        lambda x: mlp.down(F.relu(mlp.up(x)).to(torch.int32).square().float()),
        lambda x: mlp.down(F.relu(mlp.up(x)).square().to(torch.float8_e4m3fn).float()),
    ):
        (verdict,) = ao_act24.explain(block, torch.randn(2, 16))
        assert not verdict.rewritten and "is cast to torch." in verdict.reason


def test_brackets_are_printed_and_marks_of_earlier_compilations_ignored(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    weights, x = [torch.randn(32, 16), torch.randn(16, 32)], torch.randn(6, 16)

    def block(x):
        y = F.relu(x @ weights[0].T).square()
        return y @ weights[1].T + len("[/b]")

    torch.compile(block, backend="eager", dynamic=True)(x)
    report = ao_act24.explain(block, x)
    assert report.verdicts[0].x == (6, 16)
    assert "weights[1].T" in str(report) and "[/b]" in str(report) and "[6, 16] → 32 → [6, 16]" in str(report)


def test_functions_and_already_transformed_models():
    weight_1, weight_2 = torch.randn(32, 16), torch.randn(16, 32)
    report = ao_act24.explain(lambda x: F.relu(x @ weight_1.T).square() @ weight_2.T, torch.randn(2, 16))
    assert len(report.rewritten) == 1 and report.verdicts[0].path == ""
    model = Model()
    ao_act24.sparsify_(model)
    assert [v.rewritten for v in ao_act24.explain(model, torch.randn(6, 16))] == [True, False, True]


class OnGpu:
    def __init__(self, tensor):
        self.device, self.shape, self.requires_grad = torch.device("cuda", 0), tensor.shape, tensor.requires_grad


@pytest.fixture
def gpu(monkeypatch):
    """What ``explain`` itself asks of a graph's tensors, it is told as if they lay on a GPU."""
    module = importlib.import_module("ao_act24.explain")
    value = module.value
    monkeypatch.setattr(module, "value", lambda node: OnGpu(value(node)))
    monkeypatch.setattr("ao_act24.kernels.cuda.why_not", lambda device, dtype: "")


def test_what_sparsify_leaves_dense_in_training_is_noted(gpu, monkeypatch):
    model, x = MLP(), torch.randn(6, 16)
    assert ao_act24.explain(model, x).notes == (), "the backend trains it in 2:4"
    ao_act24.sparsify_(model)
    assert ao_act24.explain(model, x).notes == (), "in 2:4 as it is"
    monkeypatch.setattr(transform, "_stays_dense", lambda *_: transform._COMPILED_ONLY)
    report = ao_act24.explain(model, x)
    assert len(report.rewritten) == 1 and "trains dense on a GPU by itself" in report.notes[0]
    with torch.no_grad():
        assert ao_act24.explain(model, x).notes == ()


def test_a_model_that_is_an_ffn_itself_has_a_short_name(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model, x = MLP(), torch.randn(6, 16)
    for name in ("return self.down(self.activation(self.u…", "MLP"):
        assert [layer.path for layer in ao_act24.measure(model, x).layers] == [name]
        table = str(ao_act24.measure(model, x))
        assert f"{ao_act24.measure(model, x).layers[0].zeros:.3%}" in table and name in str(ao_act24.explain(model, x))
        ao_act24.sparsify_(model)


def remark(model, tokens, dim=2048, **config):
    (verdict,) = ao_act24.explain(model, torch.empty(tokens, dim, device="meta"), config=Act24Config(**config))
    assert verdict.rewritten
    return verdict.remark


def test_what_a_dynamic_number_of_tokens_would_change_is_said(gpu, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    with torch.device("meta"):
        model, uneven = MLP(dim=2048, hidden=8192), MLP(dim=832, hidden=832)
    with torch.no_grad():
        assert remark(model, 2048) == "where the number of tokens is dynamic, only from 3201 on"
        assert remark(model, 3201) == "" == remark(model, 2048, emulate=True)
        assert remark(uneven, 4096, 832) == "not where the number of tokens is dynamic"
        x = torch.empty(2048, 2048, device="meta")
        assert "is dynamic, only from 3201 on" in str(ao_act24.explain(model, x))
        torch._dynamo.mark_dynamic(x, 0)
        assert ao_act24.explain(model, x).verdicts[0].remark == ""
    assert remark(model, 5120) == "where the number of tokens is dynamic, only from 11009 on"


def test_whether_gradients_of_weights_are_sparse_is_said(gpu):
    with torch.device("meta"):
        model = MLP(dim=2048, hidden=8192)
    few = "gradients of weights are exact: sparse ones pay from 8192 tokens on at this size, got 8191"
    assert remark(model, 16384) == ""
    assert remark(model, 16384, weight_grads="sparse") == "gradients of weights are sparse"
    assert remark(model, 8191, weight_grads="sparse").endswith(f"11009 on; {few}")
    assert remark(model, 8191, weight_grads="sparse", emulate=True) == "gradients of weights are sparse"
    with torch.no_grad():
        assert remark(model, 16384, weight_grads="sparse") == ""
    model.activation = lambda h: F.relu(h).square().view(-1, 1, 8192)
    assert remark(model, 16384, weight_grads="sparse") == (
        "gradients of weights are exact: view stands between ReLU² and the down projection"
    )


def test_a_hidden_size_that_four_does_not_divide():
    (verdict,) = ao_act24.explain(MLP(hidden=34), torch.randn(2, 16))
    assert not verdict.rewritten and "divisible by 4, got 34" in verdict.reason


def test_measure_equals_what_it_defines(tmp_path):
    model, x = Model().eval(), torch.randn(200, 16)
    result = ao_act24.measure(model, x, loss=lambda out: out.square().mean())
    h = model.layers[0].up(x)
    square, kept = F.relu(h).square(), relu2_24(h)
    first = result.layers[0]
    assert (first.path, first.tokens) == ("layers.0", 200) and len(result.layers) == 2
    assert first.zeros == pytest.approx(float((square == 0).float().mean()))
    dropped = (square > 0) & ~mask24(h)
    assert first.dropped == pytest.approx(float(dropped.sum() / (square > 0).sum())) and first.dropped > 0.1
    energy = square[dropped].double().square().sum() / square.double().square().sum()
    assert first.dropped_energy == pytest.approx(float(energy), rel=1e-5)
    error = relative_error(model.layers[0].down(kept), model.layers[0].down(square))
    assert first.error == pytest.approx(error, rel=1e-4)
    dense = model(x)
    ao_act24.sparsify_(model)
    sparse = model(x)
    assert result.dense_loss == pytest.approx(float(dense.square().mean()))
    assert result.sparse_loss == pytest.approx(float(sparse.square().mean()))
    assert result.output_error == pytest.approx(relative_error(sparse, dense), rel=1e-4)
    again = ao_act24.measure(model, x)
    assert again.layers[0].dropped == first.dropped and again.dense_loss is None
    assert "layers.0" in str(result) and "loss dense" in str(result) and "loss dense" not in str(again)
    result.plot(tmp_path / "measure.png")
    assert (tmp_path / "measure.png").stat().st_size > 10_000


@pytest.mark.parametrize("permuted", [True, False])
def test_what_sparse_gradients_of_weights_drop_of_four_tokens(permuted, monkeypatch):
    monkeypatch.setattr(autograd, "PERMUTED", permuted)
    values = torch.tensor([1.0, 5, 2, 6, 3, 7, 4, 8, 9])[:, None].expand(
        9, 16
    )  # 1 2 3 4 and 5 6 7 8, and one left over
    fires = torch.arange(9)[:, None] < torch.arange(16)  # least in the first eight features: the others are done dense
    energy, dropped = across_tokens(values, fires)
    assert energy == 16 * 285 and dropped == 8 * (1 + 4 + 25 + 36 if permuted else 1 + 4 + 9 + 16)


def test_measure_equals_what_sparse_gradients_of_weights_drop(monkeypatch):
    """Features fire in runs of eight tokens. ``x`` is the identity, and so is the gradient of the output: the weights'
    gradients are what is multiplied by them, pruned or not."""
    runs = (torch.rand(256, 16) < 0.2).repeat_interleave(8, dim=1)
    mlp, x = MLP(dim=128, hidden=256).double(), torch.eye(128, dtype=torch.float64)
    mlp.up.weight.data = torch.where(runs, 1.0, -1.0).double() * torch.rand(256, 128).double()
    nn.init.zeros_(mlp.up.bias)
    shares = {}
    for permuted in (True, False):
        monkeypatch.setattr(autograd, "PERMUTED", permuted)
        (layer,) = ao_act24.measure(mlp, x, loss=lambda out: out.diagonal().sum()).layers
        weights = [mlp.up.weight, mlp.down.weight]
        operands = [x, mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias]
        sparse, dense = (
            torch.autograd.grad(ops.relu2_ffn(*operands, pruned)[0].diagonal().sum(), weights)
            for pruned in (True, False)
        )
        gradient, energy = (float(1 - a.square().sum() / b.square().sum()) for a, b in zip(sparse, dense))
        assert layer.dropped_across_tokens == pytest.approx(energy)
        assert layer.dropped_gradient == pytest.approx(gradient)
        shares[permuted] = energy, gradient
    assert all(0 < apart < 0.1 * near for apart, near in zip(shares[True], shares[False]))


def test_measure_gradients_where_there_is_a_loss_to_differentiate():
    model, x = Broken().eval(), torch.randn(64, 16)

    def gradients(model, **loss):
        return [layer.dropped_gradient for layer in ao_act24.measure(model, x, **loss).layers]

    assert gradients(model) == [None] * 3 == gradients(model, loss=lambda out: float(out.mean()))
    assert ("–" in str(ao_act24.measure(model, x))) and "–" not in str(ao_act24.measure(model, x, loss=torch.mean))
    with torch.no_grad():
        assert gradients(model, loss=torch.mean) == [None] * 3
    found = gradients(model, loss=torch.mean)
    assert all(0 < share < 0.5 for share in found)
    assert gradients(lambda x: model(x).mean()) == found
    with torch.autocast("cpu", torch.bfloat16):
        assert gradients(model, loss=torch.mean) == pytest.approx(found, rel=0.2)
    model.inner["a"].requires_grad_(False)
    assert gradients(model, loss=torch.mean) == [None, None, found[2]]


def test_measured_gradients_leave_no_trace():
    model, x = Broken().eval(), torch.randn(6, 16, requires_grad=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    random = torch.get_rng_state()
    assert ao_act24.measure(model, x, loss=lambda out: out.square().mean()).layers[0].dropped_gradient > 0
    assert x.grad is None and all(parameter.grad.eq(1).all() for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_without_gradients_is_measured_without():
    model, x = Model(), torch.randn(6, 16)  # its buffers, saved for backward, are put back before
    with pytest.warns(ao_act24.Act24Warning, match="measure leaves out the gradients: .* inplace operation"):
        layers = ao_act24.measure(model, x, loss=torch.mean).layers
    assert all(layer.dropped_gradient is None and layer.error > 0 for layer in layers)
    assert not model.norm.running_mean.any()


def test_measure_sums_over_calls_of_a_shared_layer():
    mlp = MLP()
    result = ao_act24.measure(lambda x: mlp(mlp(x)), torch.randn(10, 16))
    assert sum(layer.tokens for layer in result.layers) == 20


def test_measure_shows_progress_on_a_terminal_only(capsys, monkeypatch):
    ao_act24.measure(MLP(), torch.randn(2, 16))
    assert "measuring" not in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    ao_act24.measure(MLP(), torch.randn(2, 16))
    assert "measuring FFNs" in capsys.readouterr().err


def test_measure_without_a_block():
    with pytest.raises(ValueError, match="no Linear→ReLU²→Linear block"):
        ao_act24.measure(MLP(F.gelu), torch.randn(2, 16))


def test_measure_extremes():
    mlp = MLP()
    nn.init.constant_(mlp.up.bias, -100.0)
    (layer,) = ao_act24.measure(mlp, torch.randn(4, 16)).layers
    assert (layer.zeros, layer.dropped, layer.dropped_energy, layer.error) == (1.0, 0.0, 0.0, 0.0)
    assert ao_act24.measure(MLP(), torch.randn(0, 16)).layers[0].tokens == 0
    autocast = MLP()
    with torch.autocast("cpu", torch.bfloat16):
        assert ao_act24.measure(autocast, torch.randn(4, 16)).layers[0].error > 0


def test_nothing_to_list():
    report = ao_act24.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert len(report) == 0 and "No graph holds two linear layers" in str(report) and "site ┃" not in str(report)


def test_bad_arguments_are_named():
    for look in (ao_act24.explain, ao_act24.measure, ao_act24.capture_graphs):
        with pytest.raises(TypeError, match="model must be a module or function, got 3"):
            look(3, torch.randn(2, 16))
    with pytest.raises(TypeError, match="loss must be a function of the model's output, got float"):
        ao_act24.measure(MLP(), torch.randn(2, 16), loss=0.5)
    with pytest.raises(TypeError, match=r"loss must return a scalar, got shape \(2, 16\)"):
        ao_act24.measure(MLP(), torch.randn(2, 16), loss=lambda out: out)


def test_a_config_must_make_sense():
    with pytest.raises(TypeError, match="emulate must be True or False, got 'yes'"):
        ao_act24.Act24Config(emulate="yes")
    for use in (ao_act24.explain, ao_act24.capture_graphs):
        with pytest.raises((TypeError, RuntimeError), match="config must be an Act24Config, got 3"):
            use(MLP(), torch.randn(2, 16), config=3)
    with pytest.raises(TypeError, match="config must be an Act24Config, got 3"):
        ao_act24.sparsify_(MLP(), 3)
