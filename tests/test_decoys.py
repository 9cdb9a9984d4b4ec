"""What looks like Linear → ReLU² → Linear and is not: no op of ours, the same bits as eager, and the right reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_rewrite import BF16, FFN, HIDDEN_DIM, MODEL_DIM, Compiled, Square, inputs
from torch import nn
from torch.utils._pytree import tree_flatten

import ao_act24
from ao_act24.passes import examine


class Decoy(nn.Module):
    """A forward over the parts that the decoys need."""

    def __init__(self, forward, hidden_dim=HIDDEN_DIM):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.up2 = (nn.Linear(MODEL_DIM, hidden_dim) for _ in range(2))
        self.down, self.down2 = (nn.Linear(hidden_dim, MODEL_DIM) for _ in range(2))
        self.wide, self.middle = nn.Linear(MODEL_DIM, 2 * hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.norm, self.dropout = nn.RMSNorm(hidden_dim), nn.Dropout(0.5)
        self.scale, self.shift = nn.Parameter(torch.full((1,), 0.9)), nn.Parameter(torch.full((1,), -0.4))
        self.vector = nn.Parameter(torch.rand(hidden_dim))
        self.conv_up, self.conv_down = nn.Conv1d(MODEL_DIM, hidden_dim, 1), nn.Conv1d(hidden_dim, MODEL_DIM, 1)
        self.experts_up = nn.Parameter(torch.randn(2, MODEL_DIM, hidden_dim))
        self.experts_down = nn.Parameter(torch.randn(2, hidden_dim, MODEL_DIM))
        self.square_down = nn.Linear(hidden_dim // 2, MODEL_DIM)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def relu2(h):
    return F.relu(h).square()


def check_dense(model, reason, mode="train", shape=(2, 8), dtype=torch.float32):
    """``model`` stays as it is. ``reason``: part of a verdict's reason; None if nothing there looks like an FFN."""
    eager = copy.deepcopy(model)
    compiled, x = Compiled(model), inputs(*shape, grad=mode == "train", dtype=dtype)
    with torch.set_grad_enabled(mode == "train"):
        torch.manual_seed(3)
        want = results(eager, x)
        torch.manual_seed(3)
        got = results(compiled, x)
        assert not compiled.forward and not compiled.backward
        assert got.keys() == want.keys()
        for name in want:  # the gradients only up to the order of sums
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if name.startswith("grad") else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(got[name], want[name], **tolerance)
    reasons = [v.reason for v in compiled.verdicts]
    assert all(reasons)
    assert any(reason in given for given in reasons) if reason is not None else not reasons, reasons


def results(model, x):
    """Every output of ``model``, and the gradients of a weighted sum of them."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    outs = [out for out in tree_flatten(model(x))[0] if isinstance(out, torch.Tensor)]
    result = {f"out {i}": out.detach().clone() for i, out in enumerate(outs)}
    total = sum((out * torch.linspace(1, 2, out.numel()).view(out.shape)).sum() for out in outs)
    if isinstance(total, torch.Tensor) and total.requires_grad:
        total.backward()
        module = model.run._orig_mod if isinstance(model, Compiled) else model
        tensors = {"x": x, **dict(module.named_parameters())}
        result |= {f"grad {name}": tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    return result


class Relu2Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        r = F.relu(h)
        ctx.save_for_backward(r)
        return r.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def attention(m, x):
    q, k, v = m.up(x[0]), m.up2(x[0]), m.middle(m.up(x[0]))
    return relu2(q @ k.T) @ v


def attention_by_linear(m, x):
    q, k, v = m.up(x[0]), m.up2(x[0]), m.middle(m.up(x[0]))
    return F.linear(relu2(F.linear(q, k)), v.t())


def lora_down(m, x):
    y = relu2(m.up(x))
    return m.down(y) + m.down2(y)


def lora_down_after_dropout(m, x):
    y = relu2(m.up(x))
    return m.down(y) + m.down2(F.dropout(y, 0.0))


def lora_chain(m, x):
    y = relu2(m.up(x))
    return m.down(y) + F.linear(F.linear(y, m.middle.weight[:4]), m.down2.weight[:, :4])


def auxiliary_loss(m, x):
    y = relu2(m.up(x))
    return m.down(y), y.abs().mean()


def auxiliary_loss_of_relu(m, x):
    r = F.relu(m.up(x))
    return m.down(r * r), r.mean()


def expanded_by(m, x):
    y = relu2(m.up(x))
    return m.down(y), m.vector.expand_as(y)


def copied_by(m, x):
    y = relu2(m.up(x))
    return m.down(y), m.vector.to(y, copy=True)


def casts_by(m, x):
    r = F.relu(m.up(x))
    y = r.square()
    return m.down(y), r.to(y)


def returned(m, x):
    y = relu2(m.up(x))
    return m.down(y), y


def returned_through_view(m, x):
    y = relu2(m.up(x))
    return m.down(y), y.view(-1)


def in_place_relu_seen(m, x):
    h = m.up(x)
    return m.down(F.relu(h, inplace=True).square()), h


def in_place_relu_seen_by_sum(m, x):
    h = m.up(x)
    r = h.relu_()
    return m.down(r * r) + h.sum()


def in_place_relu_positional_seen(m, x):
    h = m.up(x)
    return m.down(F.relu(h, True).square()), h


def in_place_relu_seen_through_view(m, x):
    h = m.up(x)
    view = h.view(-1, HIDDEN_DIM)
    return m.down(view.relu_().square()), h


def in_place_relu_seen_through_chunk(m, x):
    wide = m.wide(x)
    gate, _ = wide.chunk(2, dim=-1)
    return m.down(gate.relu_().square()), wide


def in_place_threshold_seen(m, x):
    h = m.up(x)
    return m.down(F.threshold(h, 0, 0, True).square()), h


def in_place_mul_of_h_seen(m, x):
    h = m.up(x)
    y = h.mul_(F.relu(h))
    return m.down(y), h


def out_argument(m, x):
    r = F.relu(m.up(x))
    buffer = torch.empty_like(r)
    y = torch.square(r, out=buffer)
    return m.down(y), buffer


def mutated_between(m, x):
    h = m.up(x)
    r = F.relu(h)
    h.zero_()
    return m.down(r * r)


def mutated_through_view(m, x):
    h = m.up(x)
    r = F.relu(h)
    h.view(-1)[3:].zero_()
    return m.down(r * r)


def mutated_through_slice(m, x):
    h = m.up(x)
    r = F.relu(h)
    h[..., :4].zero_()
    return m.down(r * r)


def mutated_by_index(m, x):
    h = m.up(x)
    r = F.relu(h)
    h[..., 0] = 5.0
    return m.down(r * r)


def mutated_source_of_chunk(m, x):
    wide = m.wide(x)
    r = F.relu(wide.chunk(2, dim=-1)[0])
    wide.zero_()
    return m.down(r * r)


def mutated_through_select(m, x):
    h = m.up(x)
    r = F.relu(h)
    h.select(-1, 0).fill_(5.0)
    return m.down(r * r)


def filled_zeros(m, x):
    h = m.up(x)
    floor = torch.zeros_like(h)
    floor.fill_(0.3)
    return m.down(torch.maximum(h, floor).square())


def filled_zeros_by_index(m, x):
    h = m.up(x)
    floor = torch.zeros_like(h)
    floor[..., 1] = 0.3
    return m.down(torch.where(h > 0, h, floor).square())


def gated_from_chunk(m, x):
    gate, up = m.wide(x).chunk(2, dim=-1)
    return m.down(relu2(gate) * up)


def no_grad_between(m, x):
    h = m.up(x)
    with torch.no_grad():
        y = relu2(h)
    return m.down(y)


def no_grad_relu(m, x):
    h = m.up(x)
    with torch.no_grad():
        r = F.relu(h)
    return m.down(r.square())


def convolutions(m, x):
    return m.conv_down(relu2(m.conv_up(x.mT)))


def experts(m, x):
    return torch.bmm(relu2(torch.bmm(x, m.experts_up)), m.experts_down)


DECOYS = {
    # not ReLU²
    "gelu": (lambda m, x: m.down(F.gelu(m.up(x))), "gelu, not relu²"),
    "silu": (lambda m, x: m.down(F.silu(m.up(x))), "silu, not relu²"),
    "relu": (lambda m, x: m.down(F.relu(m.up(x))), "ReLU without the square"),
    "square": (lambda m, x: m.down(m.up(x).square()), "power 2, not relu²"),
    "clamp(0, 6) squared": (lambda m, x: m.down(m.up(x).clamp(0, 6).square()), "clamp to the power 2"),
    "clamp(min=0.1) squared": (lambda m, x: m.down(m.up(x).clamp(min=0.1).square()), "clamp to the power 2"),
    "clamp(max=0) squared": (lambda m, x: m.down(m.up(x).clamp(max=0).square()), "clamp to the power 2"),
    "relu6 squared": (lambda m, x: m.down(F.relu6(m.up(x)).square()), "relu6 to the power 2"),
    "leaky_relu squared": (lambda m, x: m.down(F.leaky_relu(m.up(x)).square()), "leaky_relu to the power 2"),
    "threshold 0.1": (lambda m, x: m.down(F.threshold(m.up(x), 0.1, 0).square()), "threshold to the power 2"),
    "threshold value": (lambda m, x: m.down(F.threshold(m.up(x), 0, 0.1).square()), "threshold to the power 2"),
    "power 3": (lambda m, x: m.down(F.relu(m.up(x)) ** 3), "relu to the power 3"),
    "power 2.5": (lambda m, x: m.down(F.relu(m.up(x)).pow(2.5)), "relu to the power 2.5"),
    "power of a tensor": (lambda m, x: m.down(F.relu(m.up(x)) ** (m.scale + 1.1)), "relu to the power"),
    "2 ** relu": (lambda m, x: m.down(2 ** F.relu(m.up(x))), None),
    "r * r * r": (lambda m, x: m.down((r := F.relu(m.up(x))) * r * r), "power 3"),
    "r * (r * r)": (lambda m, x: m.down((r := F.relu(m.up(x))) * (r * r)), "power 3"),
    "StarReLU": (lambda m, x: m.down(m.scale * relu2(m.up(x)) + m.shift), "scaled or shifted"),
    "scaled": (lambda m, x: m.down(relu2(m.up(x)) * 0.5), "scaled or shifted (mul)"),
    "divided": (lambda m, x: m.down(relu2(m.up(x)) / 2), "scaled or shifted"),
    "shifted": (lambda m, x: m.down(relu2(m.up(x)) - 0.1), "scaled or shifted"),
    "scaled by a vector": (lambda m, x: m.down(relu2(m.up(x)) * m.vector), "scaled or shifted"),
    "scaled before the relu": (
        lambda m, x: m.down(relu2(m.up(x) * 0.5)),
        "does not come from a linear layer but from mul",
    ),
    "where h < 0": (lambda m, x: m.down(torch.where((h := m.up(x)) < 0, h * h, 0.0)), None),
    "where h > 0.1": (lambda m, x: m.down(torch.where((h := m.up(x)) > 0.1, h * h, 0.0)), None),
    "where other": (lambda m, x: m.down(torch.where((h := m.up(x)) > 0, h * h, -0.1)), None),
    "where mask of another": (lambda m, x: m.down(torch.where(m.up2(x) > 0, (h := m.up(x)) * h, 0.0)), None),
    "maximum of two": (lambda m, x: m.down(torch.maximum(m.up(x), m.up2(x)).square()), "maximum to the power 2"),
    "h2 * relu(h)": (lambda m, x: m.down(m.up2(x) * F.relu(m.up(x))), "gated relu"),
    "filled zeros": (filled_zeros, ""),
    "filled zeros by index": (filled_zeros_by_index, None),
    "custom autograd.Function": (lambda m, x: m.down(Relu2Function.apply(m.up(x))), "autograd.Function"),
    # gated
    "relu²(gate) * up": (lambda m, x: m.down(relu2(m.up(x)) * m.up2(x)), "gated ReLU²"),
    "up * relu²(gate)": (lambda m, x: m.down(m.up2(x) * relu2(m.up(x))), "gated ReLU²"),
    "gated from chunk": (gated_from_chunk, "gated ReLU²"),
    # something in between
    "norm between": (lambda m, x: m.down(m.norm(relu2(m.up(x)))), "a norm stands between"),
    "norm by hand between": (
        lambda m, x: m.down((y := relu2(m.up(x))) * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)),
        "norm",
    ),
    "norm before the relu": (
        lambda m, x: m.down(relu2(m.norm(m.up(x)))),
        "does not come from a linear layer but from rms_norm",
    ),
    "dropout": (lambda m, x: m.down(m.dropout(relu2(m.up(x)))), "is active between ReLU²"),
    "dropout before the square": (lambda m, x: m.down(m.dropout(F.relu(m.up(x))).square()), "is active between ReLU²"),
    "detach": (lambda m, x: m.down(relu2(m.up(x)).detach()), "but into detach"),
    "detach before the relu": (lambda m, x: m.down(relu2(m.up(x).detach())), "but from detach"),
    "no_grad between": (no_grad_between, "grad"),
    "no_grad around the relu": (no_grad_relu, "grad"),
    "transposed": (lambda m, x: F.linear(relu2(m.up(x[0])).mT, m.down.weight[:, :8]), "not go straight into a linear"),
    "transposed by transpose": (
        lambda m, x: F.linear(relu2(m.up(x)).transpose(1, 2), m.down.weight[:, :8]),
        "not go straight into a linear layer but into transpose",
    ),
    "regrouped": (
        lambda m, x: m.square_down(relu2(m.up(x)).view(-1, HIDDEN_DIM // 2)),
        "linear layer but into reshape",
    ),
    "sliced": (lambda m, x: m.square_down(relu2(m.up(x))[..., : HIDDEN_DIM // 2]), "linear layer but into getitem"),
    "hidden size": (lambda m, x: m.down(relu2(m.up(x))), "must be divisible by 4, got 18"),
    # somebody else sees it
    "LoRA on down": (lora_down, "feeds another linear layer"),
    "LoRA on down, dropout": (lora_down_after_dropout, "also"),
    "LoRA chain on down": (lora_chain, "feeds another linear layer"),
    "LoRA on up": (lambda m, x: m.down(relu2(m.up(x) + m.up2(x))), "is a sum"),
    "auxiliary loss": (auxiliary_loss, "also used by abs"),
    "auxiliary loss of relu": (auxiliary_loss_of_relu, "also used by mean"),
    "another expanded like it": (expanded_by, "also used by expand_as"),
    "another copied like it": (copied_by, "also used by to"),
    "relu cast like it": (casts_by, "also used by to"),
    "returned": (returned, "also an output"),
    "returned through a view": (returned_through_view, "also used by reshape"),
    "in-place relu, h returned": (in_place_relu_seen, "works in place"),
    "in-place relu, h summed": (in_place_relu_seen_by_sum, "works in place"),
    "in-place relu by position": (in_place_relu_positional_seen, "place"),
    "in-place threshold by position": (in_place_threshold_seen, "place"),
    "in-place relu of a view": (in_place_relu_seen_through_view, "works in place"),
    "in-place relu of a chunk": (in_place_relu_seen_through_chunk, "place"),
    "in-place h *= relu(h)": (in_place_mul_of_h_seen, "place"),
    "h mutated": (mutated_between, "changed in place by zero_"),
    "h mutated through a view": (mutated_through_view, "place"),
    "h mutated through a slice": (mutated_through_slice, "place"),
    "h mutated by index": (mutated_by_index, "changed in place by setitem_"),
    "h mutated through select": (mutated_through_select, "place"),
    "source of the chunk mutated": (mutated_source_of_chunk, "place"),
    # other products
    "attention": (attention, None),
    "attention by F.linear": (attention_by_linear, None),
    "convolutions": (convolutions, None),
    "bmm experts": (experts, None),
    "gram matrix": (lambda m, x: F.linear(y := relu2(m.up(x[0])), y), "but into a product of activations"),
    "up weight made of activations": (
        lambda m, x: F.linear(relu2(F.linear(m.up(x[0]), m.up2(x[0]))), m.down.weight[:, :8]),
        "does not come from a linear layer but from a product of activations",
    ),
    "weight of one dimension": (lambda m, x: F.linear(relu2(m.up(x)), m.vector), "weight"),
    "bias of two dimensions": (lambda m, x: F.linear(relu2(m.up(x[0])), m.down.weight, m.down.bias[None]), "bias"),
    "addmm with a matrix": (
        lambda m, x: torch.addmm(x[0], relu2(m.up(x[0])), m.down.weight.t()),
        "linear layer but into addmm",
    ),
    "addmm with beta": (
        lambda m, x: torch.addmm(m.down.bias, relu2(m.up(x[0])), m.down.weight.t(), beta=2),
        "linear layer but into addmm",
    ),
    "RMSNorm by hand": (lambda m, x: m.up(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), None),
    "no linear before": (
        lambda m, x: m.down(relu2(F.pad(x, (0, HIDDEN_DIM - MODEL_DIM)))),
        "does not come from a linear layer but from pad",
    ),
    "out=": (out_argument, "square writes into the tensor given by out="),
}
NOT_IN_TRAINING = ("in-place relu of a chunk", "source of the chunk mutated", "out=")  # autograd forbids these
IN_INFERENCE_TOO = (
    "gelu",
    "r * r * r",
    "StarReLU",
    "gated from chunk",
    "norm between",
    "returned",
    "h mutated",
    "LoRA on down",
)


@pytest.mark.parametrize("decoy", [name for name in DECOYS if name not in NOT_IN_TRAINING])
def test_decoy(decoy):
    forward, reason = DECOYS[decoy]
    check_dense(Decoy(forward, hidden_dim=18 if decoy == "hidden size" else HIDDEN_DIM), reason)


@pytest.mark.parametrize("decoy", NOT_IN_TRAINING + IN_INFERENCE_TOO)
def test_decoy_in_inference(decoy):
    check_dense(Decoy(DECOYS[decoy][0]), DECOYS[decoy][1], mode="no_grad")


@pytest.mark.parametrize(
    "decoy", ["silu", "power 3", "LoRA on up", "dropout", "returned", "norm between", "bmm experts"]
)
def test_explain(decoy):
    """It sees what the rewrite sees."""
    forward, reason = DECOYS[decoy]
    report = ao_act24.explain(Decoy(forward), inputs(2, 8))
    assert not report.rewritten
    assert [reason in v.reason for v in report] == ([True] if reason else [])


def test_hook_on_the_activation_keeps_it():
    model, seen = FFN(nn.Sequential(nn.ReLU(), Square())), []
    model.activation.register_forward_hook(lambda module, args, out: seen.append(out))
    check_dense(model, "is also an output of the graph: a hook")
    assert len(seen) >= 2


def test_hook_before_the_down_projection_keeps_it():
    model, seen = FFN(relu2), []
    model.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean()))
    check_dense(model, "is also used by mean")


def test_hook_changes_the_activation():
    model = FFN(nn.Sequential(nn.ReLU(), Square()))
    model.activation.register_forward_hook(lambda module, args, out: out * 0.5)
    check_dense(model, "scaled or shifted")


def test_activation_kept_in_an_attribute():
    def activation(h):
        model.last = F.relu(h)
        return model.last.square()

    model = FFN(activation)
    model.last = None
    compiled = Compiled(model)
    with torch.no_grad():
        compiled(inputs())
    assert not compiled.forward
    assert "also an output" in compiled.verdicts[0].reason
    assert torch.equal(model.last, F.relu(model.up(inputs())))


def test_weight_on_another_device():
    """What ``type_as`` does there is more than a cast."""
    verdicts, weight = [], torch.empty(MODEL_DIM, HIDDEN_DIM, device="meta")

    def look(gm, _):
        verdicts.extend(verdict for _, verdict in examine(gm, ao_act24.Act24Config()))
        return lambda *args: (torch.zeros(1),)

    model = FFN(relu2)
    model.down.forward = lambda y: F.linear(y, weight.type_as(y))
    torch.compile(model, backend=look, fullgraph=True)(inputs())
    assert ["also used by type_as" in verdict.reason for verdict in verdicts] == [True]


@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_quantised_down_projection(mode):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = FFN(relu2)
    quantize_(model.down, Int8WeightOnlyConfig())
    check_dense(model, "2:4 works on plain tensors only", mode=mode)


OUT = {
    "relu": lambda h, out: torch.clamp(h, min=0, out=out).square(),
    "maximum": lambda h, out: torch.maximum(h, torch.zeros(()), out=out).square(),
    "square": lambda h, out: torch.square(F.relu(h), out=out),
    "pow": lambda h, out: torch.pow(F.relu(h), 2, out=out),
    "mul": lambda h, out: torch.mul(r := F.relu(h), r, out=out),
    "h * relu(h)": lambda h, out: torch.mul(h, F.relu(h), out=out),
    "where": lambda h, out: torch.where(h > 0, h * h, torch.tensor(0.0), out=out),
}


@pytest.mark.parametrize("step", OUT)
def test_out_is_written(step):
    buffer = torch.zeros(2, 8, HIDDEN_DIM)
    compiled = Compiled(FFN(lambda h: OUT[step](h, buffer)))
    with torch.no_grad():
        compiled(inputs(2, 8))
    assert not compiled.forward and "given by out=" in compiled.verdicts[0].reason
    assert buffer.any()


def test_graph_breaks_around_the_activation():
    """Each part says what it can see; ReLU² that is all of a graph is somebody's loss."""

    def around(h):
        torch._dynamo.graph_break()
        y = F.relu(h.contiguous()).square().contiguous().view(-1, HIDDEN_DIM)
        torch._dynamo.graph_break()
        return y

    report = ao_act24.explain(FFN(around), inputs(grad=False))
    assert ["alone in its graph" in v.reason for v in report] == [True]
    source = report.verdicts[0].source
    assert len(source) > 40 and f"│ {source[:39]}… │" in str(report), "the line of code does not crowd out the reason"

    def forward(m, x):
        h = m.up(x)
        torch._dynamo.graph_break()
        return m.down(relu2(h))

    report = ao_act24.explain(Decoy(forward), inputs(grad=False))
    assert ["is an input of this graph: a graph break" in v.reason for v in report] == [True]
    assert not ao_act24.explain(relu2, inputs(grad=False)).verdicts


def test_symbolic_hidden_size():
    """Nothing may be guarded on, so a hidden size that Dynamo does not know is not known to be divisible by 4."""
    compiled, x = Compiled(lambda x, w1, w2: F.linear(relu2(F.linear(x, w1)), w2), dynamic=True), inputs(grad=False)
    w1, w2 = torch.randn(HIDDEN_DIM, MODEL_DIM), torch.randn(MODEL_DIM, HIDDEN_DIM)
    assert torch.equal(compiled(x, w1, w2), F.linear(relu2(F.linear(x, w1)), w2))
    assert not compiled.forward
    assert "must be divisible by 4, got s" in compiled.verdicts[0].reason


def widened_by_zeros(h):
    return torch.maximum(h, torch.zeros(HIDDEN_DIM)).square()


def widened_by_where(h):
    return torch.where(h > 0, h, torch.zeros(HIDDEN_DIM)).square()


@pytest.mark.parametrize("activation", [widened_by_zeros, widened_by_where])
def test_zeros_of_a_wider_dtype(activation):
    """ReLU of bf16 and fp32 zeros is fp32: it may stay dense, but it must run."""
    model, want, x = FFN(activation), FFN(lambda h: activation(h)), inputs(dtype=BF16)
    for ffn in (model, want):
        ffn.up.to(BF16)
    with torch.no_grad():
        out = Compiled(model)(x)
        assert out.dtype == torch.float32 and out.shape == want(x).shape


@pytest.mark.parametrize(
    "activation",
    [
        lambda h: torch.maximum(h, torch.zeros(3, 1, 1, HIDDEN_DIM)).square(),
        lambda h: torch.where(h > 0, h * h, torch.zeros(3, 1, 1, 1)),
    ],
    ids=["maximum", "where"],
)
def test_zeros_of_more_dimensions(activation):
    """The output has the zeros' leading dimensions, too."""
    with torch.no_grad():
        assert Compiled(FFN(activation))(inputs(2, 8)).shape == (3, 2, 8, MODEL_DIM)
