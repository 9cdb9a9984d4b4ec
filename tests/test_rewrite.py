"""Every way to write Linear → ReLU² → Linear, in every way to run it: our ops in the forward and the backward graph,
outputs and gradients of the oracle. Graphs run as AOTAutograd makes them; only the last test goes through Inductor."""

import copy
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from oracle import ReLU2In24, relative_error, relu2_24
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from ao_act24 import Act24Config, Verdict
from ao_act24.passes import examine, graph_modules, rewrite_graph

TOKENS, MODEL_DIM, HIDDEN_DIM = (
    6,
    8,
    64,
)  # so wide that packed and metadata, padded, take less than the dense activation
BF16 = torch.bfloat16


class Compiled:
    """``model`` after the rewrite and AOTAutograd, with what became of it: our ops in each graph, and the verdicts."""

    def __init__(self, model, dynamic=None):
        self.forward, self.backward = Counter(), Counter()
        self.verdicts: list[Verdict] = []
        self.graphs = 0
        self.run = torch.compile(model, backend=self._backend, dynamic=dynamic, fullgraph=True)

    def __call__(self, *args):
        return self.run(*args)

    def _backend(self, gm, example_inputs):
        config = Act24Config()
        self.graphs += 1
        self.forward.clear(), self.backward.clear()  # Dynamo may start over with the same graph: the last one counts
        self.verdicts = [verdict for _, verdict in examine(gm, config)]
        for module in graph_modules(gm):
            rewrite_graph(module.graph, config)
            module.graph.lint()
            module.recompile()
        assert [v.rewritten for _, v in examine(gm, config)] == [v.rewritten for v in self.verdicts]

        def compiler(counter):
            def compiled(graph, _):
                names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
                counter.update(name.split(".")[1] for name in names if name.startswith("ao_act24."))
                return make_boxed_func(graph.forward)

            return compiled

        forward, backward = compiler(self.forward), compiler(self.backward)
        stages = {"fw_compiler": forward, "bw_compiler": backward, "inference_compiler": forward}
        return aot_autograd(**stages, partition_fn=min_cut_rematerialization_partition)(gm, example_inputs)


def outcome(model, x, *more, autocast=False):
    """The output and, where there is a graph, the gradients of ``x``, ``more`` and the parameters, by name."""
    x, more = x.detach().clone().requires_grad_(x.requires_grad), [tensor.detach().clone() for tensor in more]
    for tensor in more:
        tensor.requires_grad_(torch.is_grad_enabled())
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = model(x, *more)
    result = {"out": out.detach()}
    if out.requires_grad:
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape).to(out.dtype))
        owner = getattr(getattr(model, "run", model), "_orig_mod", model)
        parameters = dict(owner.named_parameters()) if isinstance(owner, nn.Module) else {}
        inputs = {"x": x, **{f"input {i}": tensor for i, tensor in enumerate(more)}}
        result |= {name: tensor.grad for name, tensor in (inputs | parameters).items() if tensor.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
    return result


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert relative_error(got[name], want[name]) <= tolerance, name


def assert_rewritten(compiled, sites=1, backward=("sampled_mm", "unpack", "unpack")):
    """Each site once in the forward graph, and exactly these ops for it in the backward graph."""
    assert [v.reason for v in compiled.verdicts] == [""] * sites
    assert compiled.forward == {"relu2_sparsify": sites, "sparse_mm": sites}
    assert compiled.backward == Counter(backward * sites)


class FFN(nn.Module):
    def __init__(self, activation, bias=True, up=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.up = up(MODEL_DIM, HIDDEN_DIM, bias)
        self.down = nn.Linear(HIDDEN_DIM, MODEL_DIM, bias)
        self.activation = activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


def inputs(*shape, dtype=torch.float32, grad=True):
    torch.manual_seed(2)
    return torch.randn(*(shape or (2, TOKENS)), MODEL_DIM).to(dtype).requires_grad_(grad)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def dense_relu2(h):
    return F.relu(h).square()


def check(model, x, reference=relu2_24, tolerance=1e-5, mode="train", autocast=False, dynamic=None, sites=1):
    """Compile and run ``model`` in ``mode``; compare with the same model around ``reference`` for its activation."""
    backward = ("sampled_mm", "unpack", "unpack")
    if "x" in mode:
        x = x.detach()
    if "up" in mode:
        model.up.requires_grad_(False)
    if "down" in mode:
        model.down.requires_grad_(False)
        backward = ("sampled_mm", "unpack")
    if "x" in mode and "up" in mode:
        backward = backward[2:]
    want, dense = copy.deepcopy(model), copy.deepcopy(model)
    want.activation = ReLU2In24() if reference is relu2_24 else Function(reference)
    compiled = Compiled(model, dynamic)
    with ExitStack() as stack:
        if mode in ("no_grad", "inference_mode"):
            stack.enter_context(getattr(torch, mode)())
            x, backward = x.detach(), ()
        expected = outcome(want, x, autocast=autocast)
        got = outcome(compiled, x, autocast=autocast)
        assert_rewritten(compiled, sites, backward)
        assert_close(got, expected, tolerance)
    with torch.no_grad():  # the test can fail: 2:4 changes this output
        assert relative_error(outcome(dense, x, autocast=autocast)["out"], expected["out"]) > max(0.01, 3 * tolerance)
    return compiled


class Square(nn.Module):
    def forward(self, r):
        return r * r


def imul(h):
    r = torch.relu(h)
    r *= r
    return r


def ipow(h):
    r = torch.relu(h)
    r **= 2
    return r


def imul_h(h):
    r = F.relu(h)
    r *= h
    return r


@torch.jit.script
def scripted(h):
    return torch.pow(torch.relu(h), 2)


SPELLINGS = {
    # the square
    "square method": lambda h: F.relu(h).square(),
    "torch.square": lambda h: torch.square(F.relu(h)),
    "** 2": lambda h: F.relu(h) ** 2,
    "** 2.0": lambda h: F.relu(h) ** 2.0,
    "pow method": lambda h: F.relu(h).pow(2),
    "pow method 2.0": lambda h: F.relu(h).pow(2.0),
    "pow method keyword": lambda h: F.relu(h).pow(exponent=2),
    "torch.pow": lambda h: torch.pow(F.relu(h), 2),
    "r * r": lambda h: (r := F.relu(h)) * r,
    "torch.mul": lambda h: torch.mul(r := F.relu(h), r),
    "torch.multiply": lambda h: torch.multiply(r := F.relu(h), r),
    "mul method": lambda h: (r := F.relu(h)).mul(r),
    "h * relu(h)": lambda h: h * F.relu(h),
    "relu(h) * h": lambda h: F.relu(h) * h,
    "torch.mul(h, relu(h))": lambda h: torch.mul(h, torch.relu(h)),
    # the relu
    "torch.relu": lambda h: torch.relu(h).square(),
    "relu method": lambda h: h.relu().square(),
    "nn.ReLU": nn.Sequential(nn.ReLU(), Square()),
    "torch.jit.script": lambda h: scripted(h),
    "clamp_min": lambda h: h.clamp_min(0) ** 2,
    "clamp_min 0.0": lambda h: torch.clamp_min(h, 0.0).square(),
    "clamp(min=0)": lambda h: h.clamp(min=0).square(),
    "clamp(0)": lambda h: h.clamp(0).square(),
    "torch.clamp": lambda h: torch.clamp(h, min=0.0).square(),
    "torch.clip": lambda h: torch.clip(h, 0).square(),
    "clip(0, None)": lambda h: h.clip(0, None).square(),
    "maximum": lambda h: torch.maximum(h, torch.zeros_like(h)).square(),
    "maximum mirrored": lambda h: torch.maximum(torch.zeros_like(h), h).square(),
    "maximum tensor(0)": lambda h: torch.maximum(h, torch.tensor(0.0)).square(),
    "maximum method": lambda h: h.maximum(h.new_zeros(())).square(),
    "max": lambda h: torch.max(h, torch.zeros_like(h)).square(),
    "max method": lambda h: h.max(torch.zeros(1).to(h)).square(),
    "threshold": lambda h: F.threshold(h, 0, 0).square(),
    "torch.threshold": lambda h: torch.threshold(h, 0.0, 0.0).square(),
    "nn.Threshold": nn.Sequential(nn.Threshold(0.0, 0.0), Square()),
    # where, whole or as the relu
    "where(h > 0, h * h, 0)": lambda h: torch.where(h > 0, h * h, 0),
    "where(h > 0, h ** 2, zeros)": lambda h: torch.where(h > 0, h**2, torch.zeros_like(h)),
    "where(h >= 0, square, 0.0)": lambda h: torch.where(h >= 0, h.square(), 0.0),
    "where(h < 0, 0, h * h)": lambda h: torch.where(h < 0, 0.0, h * h),
    "where(0 < h, h * h, 0)": lambda h: torch.where(0 < h, h * h, 0.0),  # noqa: SIM300
    "where(torch.gt)": lambda h: torch.where(torch.gt(h, 0), torch.mul(h, h), torch.tensor(0.0)),
    "where(h > 0, h, 0) ** 2": lambda h: torch.where(h > 0, h, 0.0) ** 2,
    "where(h <= 0, 0, h) ** 2": lambda h: torch.where(h <= 0, 0.0, h) ** 2,
    "where(h.gt(0), h, 0)": lambda h: torch.where(h.gt(0), h, torch.full_like(h, 0)).square(),
    # in place
    "relu(inplace=True)": lambda h: F.relu(h, inplace=True).square(),
    "relu(h, True)": lambda h: F.relu(h, True).square(),
    "torch.relu_": lambda h: torch.relu_(h).square(),
    "relu_ method": lambda h: h.relu_().square(),
    "nn.ReLU(inplace=True)": nn.Sequential(nn.ReLU(inplace=True), Square()),
    "square_": lambda h: torch.relu(h).square_(),
    "pow_": lambda h: torch.relu(h).pow_(2),
    "r **= 2": ipow,
    "r *= r": imul,
    "r *= h": imul_h,
    "clamp_": lambda h: h.clamp_(min=0).square(),
    "clamp_min_": lambda h: h.clamp_min_(0).square(),
}


class TwoFFNs(nn.Module):
    """One with biases, one without, side by side in one graph."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.ffns = nn.ModuleList([FFN(None, bias=True), FFN(None, bias=False)])

    def forward(self, x):
        return torch.stack([ffn.down(self.activation(ffn.up(x))) for ffn in self.ffns])


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling, mode):
    check(TwoFFNs(SPELLINGS[spelling]), inputs(), mode=mode, sites=2)


MODES = ("inference_mode", "frozen up", "frozen down", "x without grad", "x without grad, frozen up")


@pytest.mark.parametrize("spelling", ["where(h > 0, h * h, 0)", "r *= r"])
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode, spelling):
    check(FFN(SPELLINGS[spelling]), inputs(), mode=mode)


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("dtype", [BF16, "autocast", torch.float16, torch.float64])
@pytest.mark.parametrize("spelling", ["r * r", "maximum", "where(h > 0, h * h, 0)"])
def test_dtype(spelling, dtype, mode):
    """In autocast the parameters are fp32, and the two linear layers run in bf16."""
    autocast = dtype == "autocast"
    model, x = FFN(SPELLINGS[spelling]), inputs(dtype=torch.float32 if autocast else dtype)
    tolerance = {torch.float64: 1e-12, torch.float16: 4e-3}.get(dtype, 2e-2)
    check(model if autocast else model.to(dtype), x, tolerance=tolerance, mode=mode, autocast=autocast)


class AutocastInside(FFN):
    def forward(self, x):
        with torch.autocast("cpu", BF16):
            return super().forward(x)


@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_autocast_inside(mode):
    check(AutocastInside(dense_relu2), inputs(), tolerance=2e-2, mode=mode)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)], ids=["1-D", "2-D", "3-D", "4-D"])
@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_shape(shape, mode):
    torch.manual_seed(2)
    check(FFN(dense_relu2), torch.randn(*shape, MODEL_DIM, requires_grad=True), mode=mode)


def test_no_tokens():
    compiled = Compiled(FFN(dense_relu2))
    with torch.no_grad():
        assert compiled(torch.zeros(0, MODEL_DIM)).shape == (0, MODEL_DIM)
    assert_rewritten(compiled, backward=())


@pytest.mark.parametrize("mode", ["train", "no_grad", "frozen up"])
@pytest.mark.parametrize("spelling", ["square method", "maximum"])
def test_dynamic(spelling, mode):
    model = FFN(SPELLINGS[spelling])
    want = copy.deepcopy(model)
    want.activation = ReLU2In24()
    compiled = check(model, inputs(2, TOKENS), mode=mode, dynamic=True)
    with torch.set_grad_enabled(mode != "no_grad"):
        want.up.requires_grad_(mode != "frozen up")
        x = inputs(3, TOKENS + 5, grad=mode != "no_grad")
        assert_close(outcome(compiled, x), outcome(want, x), 1e-5)
    assert compiled.graphs == 1


def test_one_dynamic_dim():
    compiled, want = Compiled(FFN(lambda h: F.relu(h).view(-1, HIDDEN_DIM).square().view(h.shape))), FFN(relu2_24)
    for tokens in (6, 11):
        x = inputs(2, tokens)
        torch._dynamo.mark_dynamic(x, 1)
        assert_close({"out": compiled(x)}, {"out": want(x)}, 1e-5)
    compiled(x).sum().backward()
    assert_rewritten(compiled)
    assert compiled.graphs == 1


def relu2_t(h):
    return relu2_24(h).transpose(0, 1)


def relu2_t_flat(h):
    return relu2_t(h).reshape(-1, HIDDEN_DIM)


# What may stand in between: as written, and the reference if it is not relu2_24 itself.
BETWEEN = {
    "dropout p=0": (lambda h: F.dropout(F.relu(h).square(), 0.0, True),),
    "dropout in eval": (lambda h: F.dropout(F.relu(h).square(), 0.5, training=False),),
    "dropout before the square": (lambda h: torch.dropout(F.relu(h), 0.5, False).square(),),
    "nn.Dropout(0)": (nn.Sequential(nn.ReLU(), Square(), nn.Dropout(0.0)),),
    "nn.Dropout in eval": (nn.Sequential(nn.ReLU(), nn.Dropout(0.5), Square(), nn.Dropout(0.5)).eval(),),
    "nn.Identity": (nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity(), Square(), nn.Identity()),),
    "* 1.0": (lambda h: F.relu(h * 1.0).square() * 1.0,),
    "1 * and / 1": (lambda h: 1 * (F.relu(h) / 1).square(),),
    "contiguous": (lambda h: F.relu(h.contiguous()).contiguous().square().contiguous(),),
    "clone": (lambda h: F.relu(h).clone().square(),),
    "to the same dtype": (lambda h: F.relu(h).to(h.dtype).square().type_as(h),),
    "view": (lambda h: (F.relu(h).view(-1, h.shape[-1]) ** 2).view(h.shape),),
    "view after the square": (lambda h: F.relu(h).square().view(-1, HIDDEN_DIM).view(*h.shape),),
    "view before the relu": (lambda h: F.relu(h.view(-1, HIDDEN_DIM)).square().view_as(h),),
    "reshape": (lambda h: F.relu(h).reshape(-1, h.size(-1)).square().reshape(h.shape),),
    "flatten, unflatten": (lambda h: F.relu(h).flatten(0, 1).square().unflatten(0, h.shape[:2]),),
    "flatten, reshape_as": (lambda h: F.relu(h).square().flatten(0, -2).reshape_as(h),),
    "unsqueeze, squeeze": (lambda h: F.relu(h).unsqueeze(0).square().squeeze(0),),
    "transpose": (lambda h: F.relu(h).transpose(0, 1).square(), relu2_t),
    "transpose after the square": (lambda h: F.relu(h).square().transpose(1, 0).contiguous(), relu2_t),
    "permute": (lambda h: F.relu(h).permute(1, 0, 2).square().permute(1, 0, 2),),
    "keywords": (lambda h: F.relu(h).transpose(dim0=0, dim1=1).square().permute(dims=(1, 0, 2)),),
    "permute, then view": (lambda h: F.relu(h).square().permute(1, 0, 2).reshape(-1, HIDDEN_DIM), relu2_t_flat),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_between(between):
    check(FFN(BETWEEN[between][0]), inputs(), *BETWEEN[between][1:])


@pytest.mark.parametrize("between", ["view", "flatten, unflatten", "permute, then view", "nn.Dropout in eval"])
def test_between_dynamic_in_inference(between):
    check(FFN(BETWEEN[between][0]), inputs(), *BETWEEN[between][1:], dynamic=True, mode="no_grad")


# Dtypes of up and down, the activation as written, the reference.
CASTS = {
    "wide square": (BF16, BF16, lambda h: F.relu(h).float().square().to(BF16), relu2_24),
    "wide square, .to(h)": (BF16, BF16, lambda h: F.relu(h).to(torch.float32).pow(2).to(h), relu2_24),
    "wide relu": (BF16, BF16, lambda h: F.relu(h.float()).square().bfloat16(), relu2_24),
    "wide relu, type_as": (BF16, BF16, lambda h: F.relu(h.double()).square().type_as(h), relu2_24),
    "wide, viewed": (
        BF16,
        BF16,
        lambda h: F.relu(h).float().view(-1, HIDDEN_DIM).square().to(BF16).view(h.shape),
        relu2_24,
    ),
    "narrow output": (torch.float32, BF16, lambda h: F.relu(h).square().to(BF16), lambda h: relu2_24(h).to(BF16)),
    "narrow square": (torch.float32, BF16, lambda h: F.relu(h).to(BF16).square(), lambda h: relu2_24(h.to(BF16))),
    "narrow relu": (torch.float32, BF16, lambda h: F.relu(h.to(BF16)).square(), lambda h: relu2_24(h.to(BF16))),
    "there and back": (torch.float32,) * 2
    + (lambda h: F.relu(h).bfloat16().square().float(), lambda h: relu2_24(h.bfloat16()).float()),
    "wide output": (BF16, torch.float32, lambda h: F.relu(h).square().float(), lambda h: relu2_24(h).float()),
    "wide down": (BF16, torch.float32, lambda h: F.relu(h).float().square(), lambda h: relu2_24(h.float())),
    "half": (torch.float32, torch.float16, lambda h: F.relu(h).square().half(), lambda h: relu2_24(h).half()),
}


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("cast", CASTS)
def test_cast(cast, mode):
    up, down, activation, reference = CASTS[cast]
    model = FFN(activation)
    model.up.to(up), model.down.to(down)
    check(model, inputs(dtype=up), reference, tolerance=2e-2, mode=mode)


OTHER_USES = {
    "returned": lambda h: h,
    "averaged": lambda h: h.mean(),
    "sliced": lambda h: h[..., :MODEL_DIM] * 2,
    "gelu": F.gelu,
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_pre_activation_has_other_uses(use):
    """``h`` stays dense and whole, so anybody may see it."""

    class TwoOutputs(FFN):
        def forward(self, x):
            h = self.up(x)
            other = OTHER_USES[use](h)
            return self.down(self.activation(h)) + other.sum() / 1000

    check(TwoOutputs(dense_relu2), inputs())


class Wide(nn.Module):
    """One wide linear layer of which a part is the hidden activation: its rows lie apart in memory."""

    def __init__(self, part):
        super().__init__()
        self.linear, self.part = nn.Linear(MODEL_DIM, 2 * HIDDEN_DIM), part

    def forward(self, x):
        return self.part(self.linear(x))


PARTS = {
    "chunk": lambda wide: wide.chunk(2, dim=-1)[0],
    "torch.chunk": lambda wide: torch.chunk(wide, 2, -1)[1],
    "split": lambda wide: wide.split(HIDDEN_DIM, dim=-1)[1],
    "torch.split": lambda wide: torch.split(wide, [HIDDEN_DIM, HIDDEN_DIM], -1)[0],
}


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("part", PARTS)
def test_strided_hidden(part, mode):
    check(FFN(dense_relu2, up=lambda *_: Wide(PARTS[part])), inputs(), mode=mode)


# An FFN of weights [H, D], [D, H] and biases, in formulas.
FORMULAS = {
    "F.linear": lambda a, x, w1, w2, b1, b2: F.linear(a(F.linear(x, w1, b1)), w2, b2),
    "bias keyword": lambda a, x, w1, w2, b1, b2: F.linear(a(F.linear(x, w1, bias=b1)), weight=w2, bias=b2),
    "+ bias": lambda a, x, w1, w2, b1, b2: F.linear(a(F.linear(x, w1) + b1), w2) + b2,
    "bias +": lambda a, x, w1, w2, b1, b2: b2 + F.linear(a(b1 + F.linear(x, w1)), w2),
    "@ .T": lambda a, x, w1, w2, b1, b2: a(x @ w1.T + b1) @ w2.T + b2,
    "@ .mT": lambda a, x, w1, w2, b1, b2: a(x @ w1.mT + b1) @ w2.mT + b2,
    "matmul .t()": lambda a, x, w1, w2, b1, b2: torch.matmul(a(torch.matmul(x, w1.t()) + b1), w2.t()) + b2,
    "method matmul": lambda a, x, w1, w2, b1, b2: (
        a(x.matmul(w1.transpose(0, 1)) + b1).matmul(w2.transpose(-1, -2)) + b2
    ),
    "permute": lambda a, x, w1, w2, b1, b2: a(x @ w1.permute(1, 0) + b1) @ torch.permute(w2, (1, 0)) + b2,
    "mm": lambda a, x, w1, w2, b1, b2: torch.mm(a(torch.mm(x, w1.t()) + b1), w2.t()) + b2,
    "method mm": lambda a, x, w1, w2, b1, b2: a(x.mm(w1.t()) + b1).mm(mat2=w2.t()) + b2,
    "addmm": lambda a, x, w1, w2, b1, b2: torch.addmm(b2, a(torch.addmm(b1, x, w1.t())), w2.t()),
    ".to(dtype)": lambda a, x, w1, w2, b1, b2: F.linear(a(F.linear(x, w1.to(x.dtype), b1)), w2.to(x.dtype), b2),
    ".T.type_as": lambda a, x, w1, w2, b1, b2: a(x @ w1.T.type_as(x) + b1) @ w2.T.type_as(x) + b2,
    ".to().t()": lambda a, x, w1, w2, b1, b2: a(x @ w1.to(x).t() + b1) @ w2.to(x.dtype).t().contiguous() + b2,
    "type_as(y)": lambda a, x, w1, w2, b1, b2: F.linear(y := a(F.linear(x, w1.type_as(x), b1)), w2.type_as(y), b2),
    ".to(y)": lambda a, x, w1, w2, b1, b2: F.linear(y := a(x @ w1.to(x).T + b1), w2.to(y)) + b2.to(y),
    ".T.type_as(y)": lambda a, x, w1, w2, b1, b2: (y := a(x @ w1.T.type_as(x) + b1)) @ w2.T.type_as(y) + b2,
    "type_as(h)": lambda a, x, w1, w2, b1, b2: F.linear(a(h := F.linear(x, w1.type_as(x), b1)), w2.type_as(h), b2),
    "scaled weight": lambda a, x, w1, w2, b1, b2: F.linear(a(F.linear(x, w1 * 2, b1)), w2 * 0.5, b2),
    "low-rank update": lambda a, x, w1, w2, b1, b2: F.linear(
        a(F.linear(x, w1 + b1[:, None] @ b2[None], b1)), w2 + b2[:, None] @ b1[None], b2
    ),
    "tied weights": lambda a, x, w1, w2, b1, b2: F.linear(a(F.linear(x, w1, b1)), w1.t(), b2) + 0 * w2.sum(),
}
KN_FORMULAS = {  # weights [D, H], [H, D]
    "@": lambda a, x, w1, w2, b1, b2: a(x @ w1 + b1) @ w2 + b2,
    "torch.mm": lambda a, x, w1, w2, b1, b2: torch.mm(a(torch.mm(x, w1) + b1), w2) + b2,
    "addmm stored": lambda a, x, w1, w2, b1, b2: torch.addmm(b2, a(torch.addmm(b1, x, w1)), w2),
    "linear .t()": lambda a, x, w1, w2, b1, b2: F.linear(a(F.linear(x, w1.t(), b1)), w2.t(), b2),
    "linear .T.type_as(y)": lambda a, x, w1, w2, b1, b2: F.linear(
        y := a(F.linear(x, w1.T.type_as(x), b1)), w2.T.type_as(y), b2
    ),
    "matmul .to": lambda a, x, w1, w2, b1, b2: torch.matmul(a(x @ w1.to(x) + b1), other=w2.to(x)) + b2,
}


def weights(formula, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(HIDDEN_DIM, MODEL_DIM), (MODEL_DIM, HIDDEN_DIM)]
    if formula in KN_FORMULAS:
        shapes.reverse()
    shapes += [(HIDDEN_DIM,), (MODEL_DIM,)]
    return [torch.randn(shape).to(dtype) / 4 for shape in shapes]


class Formula(nn.Module):
    """The formula over weights that are parameters, buffers, or plain tensors in attributes."""

    def __init__(self, formula, activation, kind):
        super().__init__()
        self.formula, self.activation = (FORMULAS | KN_FORMULAS)[formula], activation
        for name, tensor in zip(("w1", "w2", "b1", "b2"), weights(formula)):
            if kind == "parameter":
                self.register_parameter(name, nn.Parameter(tensor))
            elif kind == "buffer":
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, tensor)

    def forward(self, x):
        return self.formula(self.activation, x, self.w1, self.w2, self.b1, self.b2)


@pytest.mark.parametrize("formula", FORMULAS | KN_FORMULAS)
def test_formula(formula):
    check(Formula(formula, dense_relu2, "parameter"), inputs(5))


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("formula", ["F.linear", "@ .T", "@"])
def test_weights_that_are_not_parameters(formula, kind):
    model, x = Formula(formula, dense_relu2, kind), inputs()
    compiled = Compiled(model)
    assert_close(outcome(compiled, x), outcome(Formula(formula, relu2_24, kind), x), 1e-5)
    assert_rewritten(compiled, backward=("sampled_mm", "unpack"))


@pytest.mark.parametrize("formula", ["F.linear", "@ .mT", "mm", "addmm", "scaled weight", "@", "linear .t()"])
def test_weights_as_inputs(formula):
    function, x = (FORMULAS | KN_FORMULAS)[formula], inputs(5)
    compiled = Compiled(lambda *args: function(dense_relu2, *args))
    want = outcome(lambda *args: function(relu2_24, *args), x, *weights(formula))
    assert_close(outcome(compiled, x, *weights(formula)), want, 1e-5)
    assert_rewritten(compiled)


CAST_BY_ACTIVATION = ["type_as(y)", ".to(y)", ".T.type_as(y)", "type_as(h)", "linear .T.type_as(y)"]


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("formula", [".to(dtype)", ".T.type_as", ".to().t()", "matmul .to", *CAST_BY_ACTIVATION])
def test_fp32_weights_cast_to_bf16(formula, mode):
    class Cast(Formula):
        def forward(self, x):
            return self.formula(self.activation, x, self.w1, self.w2, self.b1.to(x), self.b2.to(x))

    check(Cast(formula, dense_relu2, "parameter"), inputs(5, dtype=BF16), tolerance=1e-2, mode=mode)


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("cast", ["wide down", "narrow output", "wide square"])
def test_weight_cast_by_an_activation_of_another_dtype(cast, mode):
    up, down, activation, reference = CASTS[cast]

    class Cast(FFN):
        def forward(self, x):
            y = self.activation(self.up(x))
            return F.linear(y, self.down.weight.type_as(y), self.down.bias.to(down))

    model = Cast(activation)
    model.up.to(up)
    check(model, inputs(dtype=up), reference, tolerance=2e-2, mode=mode)


class Blocks(nn.Module):
    """Two FFNs behind norms (which square, too), with residuals."""

    def __init__(self, activation, through=lambda ffn, x: ffn(x)):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(MODEL_DIM) for _ in range(2))
        self.ffns = nn.ModuleList(FFN(activation) for _ in range(2))
        self.through = through

    def forward(self, x):
        for norm, ffn in zip(self.norms, self.ffns):
            x = x + self.through(ffn, norm(x))
        return x


def through_checkpoint(ffn, x):
    return checkpoint(ffn, x, use_reentrant=False)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("through", [None, through_checkpoint], ids=["plain", "checkpoint"])
def test_blocks(through, autocast):
    kwargs = {} if through is None else {"through": through}
    x, compiled = inputs(), Compiled(Blocks(dense_relu2, **kwargs))
    want = outcome(Blocks(relu2_24, **kwargs), x, autocast=autocast)
    assert_close(outcome(compiled, x, autocast=autocast), want, 2e-2 if autocast else 1e-5)
    assert compiled.forward == {"relu2_sparsify": 2, "sparse_mm": 2}
    recomputed = compiled.backward.pop("relu2_sparsify", 0), compiled.backward.pop("sparse_mm", 0)
    assert recomputed in ([(2, 0), (2, 1)] if through else [(0, 0)])  # the last block's output is never needed again
    assert compiled.backward == {"sampled_mm": 2, "unpack": 4}
    assert [v.hidden_dim for v in compiled.verdicts] == [HIDDEN_DIM] * 2


def test_linears_before_and_behind():
    """A chain of linear layers and blocks: only the blocks change, each once."""

    def model(activation):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 8),
            FFN(activation),
            nn.Linear(8, 16),
            activation,
            nn.Linear(16, 32),
            activation,
            nn.Linear(32, 8),
        )

    compiled = Compiled(model(nn.Sequential(nn.ReLU(), Square())))
    assert_close(outcome(compiled, inputs()), outcome(model(ReLU2In24()), inputs()), 1e-5)
    assert_rewritten(compiled, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0])
def test_special_values(value):
    """What the plain spelling gives: NaN and infinity pass, -inf and -0 become +0."""
    model, want = FFN(dense_relu2), FFN(relu2_24)
    for ffn in (model, want):
        ffn.up.weight.data[:, 1] = 0
        ffn.up.bias.data[5] = value
    with torch.no_grad():
        got, expected = Compiled(model)(inputs()), want(inputs())
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("mode, dynamic", [("train", None), ("no_grad", True)])
def test_inductor(mode, dynamic):
    """The real backend: its code calls our ops, and the numbers are the oracle's."""
    from torch._inductor.utils import run_and_get_code

    model, want, x = Blocks(dense_relu2), Blocks(relu2_24), inputs(grad=mode == "train")
    compiled = torch.compile(model, backend="ao_act24", dynamic=dynamic, fullgraph=True)
    with torch.set_grad_enabled(mode == "train"):
        got, codes = run_and_get_code(outcome, compiled, x)
        assert_close(got, outcome(want, x), 1e-5)
    code = "\n".join(codes)
    training = {"relu2_ffn": 2, "grad_hidden": 2, "sparse_mm": 2, "relu2_sparsify": 0}
    for op, calls in (training if mode == "train" else {"relu2_sparsify": 2, "sparse_mm": 2, "relu2_ffn": 0}).items():
        assert code.count(f"= torch.ops.ao_act24.{op}.default(") == calls, op
