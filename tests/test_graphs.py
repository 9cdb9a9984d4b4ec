"""Snapshots of rewritten graphs. They are documentation too: this is what runs.

EXPECTTEST_ACCEPT=1 python -m pytest tests/test_graphs.py writes them anew.
"""

import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchao_fp8 import needs_scaled_mm

import ao_act24
from ao_act24 import capture_graphs
from ao_act24.fp8 import to_fp8


class MLP(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16, bias=bias)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class InTwoSteps(MLP):
    def forward(self, x):
        return self.down(F.relu(self.up(x)).square().view(2, 2, 32))


class CastsAndViews(MLP):
    def forward(self, x):
        y = F.relu(self.up(x).float()).square().to(torch.bfloat16)
        return self.down(y.view(-1, 32))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        return x + checkpoint(self.mlp, x, use_reentrant=False)


class Snapshots(TestCase):
    def test_inference(self):
        with torch.no_grad():
            graphs = capture_graphs(MLP(), torch.randn(4, 16))
        self.assertExpectedInline(
            graphs.before[0],
            """\
before(
    up.weight: f32[32, 16],
    arg0: f32[4, 16],
    down.weight: f32[16, 32],
):
    linear = linear(arg0, up.weight, None)        # f32[4, 32]
    relu = relu(linear)                           # f32[4, 32]
    square = square(relu)                         # f32[4, 32]
    linear_1 = linear(square, down.weight, None)  # f32[4, 16]
    return (linear_1,)""",
        )
        self.assertExpectedInline(
            graphs.after[0],
            """\
after(
    up.weight: f32[32, 16],
    arg0: f32[4, 16],
    down.weight: f32[16, 32],
):
    linear = linear(arg0, up.weight, None)                               # f32[4, 32]
    packed, metadata = ao_act24.relu2_sparsify(linear)                   # f32[4, 16], u8[16, 32]
    sparse_mm = ao_act24.sparse_mm(packed, metadata, down.weight, None)  # f32[4, 16]
    return (sparse_mm,)""",
        )
        self.assertExpectedInline(
            graphs.forward[0],
            """\
forward(
    up.weight: f32[32, 16],
    arg0: f32[4, 16],
    down.weight: f32[16, 32],
):
    t = aten.t(up.weight)                                          # f32[16, 32]
    mm = aten.mm(arg0, t)                                          # f32[4, 32]
    packed, metadata = ao_act24.relu2_sparsify(mm)                 # f32[4, 16], u8[16, 32]
    sparse_mm = ao_act24.sparse_mm(packed, metadata, down.weight)  # f32[4, 16]
    return (sparse_mm,)""",
        )
        self.assertEqual(graphs.backward, ())

    @needs_scaled_mm
    def test_fp8(self):
        mlp = MLP()
        for linear in (mlp.up, mlp.down):
            linear.weight = nn.Parameter(to_fp8(linear.weight.detach().bfloat16()), requires_grad=False)
        with torch.no_grad():
            graphs = capture_graphs(mlp, torch.randn(4, 16).bfloat16())
        self.assertExpectedInline(
            graphs.after[0],
            """\
after(
    up.weight: Float8Tensor[32, 16],
    arg0: bf16[4, 16],
    down.weight: Float8Tensor[16, 32],
):
    linear = linear(arg0, up.weight, None)                                                            # bf16[4, 32]
    packed, metadata, row_scale = ao_act24.relu2_sparsify_fp8(linear)                                 # f8e4m3fn[4, 16], u8[16, 32], f32[4]
    qdata = down.weight.qdata                                                                         # f8e4m3fn[16, 32]
    scale = down.weight.scale                                                                         # f32[16, 1]
    flatten = flatten(scale)                                                                          # f32[16]
    sparse_mm_fp8 = ao_act24.sparse_mm_fp8(packed, metadata, row_scale, qdata, flatten, None, torch.bfloat16)  # bf16[4, 16]
    return (sparse_mm_fp8,)""",
        )

    def test_training(self):
        graphs = capture_graphs(MLP(), torch.randn(4, 16))
        self.assertExpectedInline(
            graphs.forward[0],
            """\
forward(
    up.weight: f32[32, 16],
    arg0: f32[4, 16],
    down.weight: f32[16, 32],
):
    out, packed, metadata = ao_act24.relu2_ffn(arg0, up.weight, None, down.weight, None, False)  # f32[4, 16], f32[4, 16], u8[16, 32]
    view = aten.view(arg0, [4, 16])                                                              # f32[4, 16]
    return (out, down.weight, packed, metadata, view)""",
        )
        self.assertExpectedInline(
            graphs.backward[0],
            """\
backward(
    down.weight: f32[16, 32],
    packed: f32[4, 16],
    metadata: u8[16, 32],
    view: f32[4, 16],
    tangents_1: f32[4, 16],
):
    grad_hidden = ao_act24.grad_hidden(tangents_1, down.weight, packed, metadata)  # f32[4, 16]
    unpack = ao_act24.unpack(grad_hidden, metadata)                                # f32[4, 32]
    view_1 = aten.view(unpack, [4, 32])                                            # f32[4, 32]
    t = aten.t(view_1)                                                             # f32[32, 4]
    mm = aten.mm(t, view)                                                          # f32[32, 16]
    unpack_1 = ao_act24.unpack(packed, metadata)                                   # f32[4, 32]
    view_2 = aten.view(tangents_1, [4, 16])                                        # f32[4, 16]
    t_1 = aten.t(view_2)                                                           # f32[16, 4]
    view_3 = aten.view(unpack_1, [4, 32])                                          # f32[4, 32]
    mm_1 = aten.mm(t_1, view_3)                                                    # f32[16, 32]
    return (mm, None, mm_1)""",
        )

    def test_bias(self):
        graphs = capture_graphs(MLP(bias=True), torch.randn(4, 16))
        self.assertExpectedInline(
            graphs.after[0],
            """\
after(
    up.weight: f32[32, 16],
    up.bias: f32[32],
    arg0: f32[4, 16],
    down.weight: f32[16, 32],
    down.bias: f32[16],
):
    out = ao_act24.relu2_ffn(arg0, up.weight, up.bias, down.weight, down.bias, False)  # f32[4, 16]
    return (out,)""",
        )
        self.assertExpectedInline(
            graphs.backward[0],
            """\
backward(
    down.weight: f32[16, 32],
    packed: f32[4, 16],
    metadata: u8[16, 32],
    view: f32[4, 16],
    tangents_1: f32[4, 16],
):
    grad_hidden = ao_act24.grad_hidden(tangents_1, down.weight, packed, metadata)  # f32[4, 16]
    unpack = ao_act24.unpack(grad_hidden, metadata)                                # f32[4, 32]
    view_1 = aten.view(unpack, [4, 32])                                            # f32[4, 32]
    t = aten.t(view_1)                                                             # f32[32, 4]
    mm = aten.mm(t, view)                                                          # f32[32, 16]
    sum = aten.sum(unpack, [0], True)                                              # f32[1, 32]
    view_2 = aten.view(sum, [32])                                                  # f32[32]
    unpack_1 = ao_act24.unpack(packed, metadata)                                   # f32[4, 32]
    view_3 = aten.view(tangents_1, [4, 16])                                        # f32[4, 16]
    t_1 = aten.t(view_3)                                                           # f32[16, 4]
    view_4 = aten.view(unpack_1, [4, 32])                                          # f32[4, 32]
    mm_1 = aten.mm(t_1, view_4)                                                    # f32[16, 32]
    sum_1 = aten.sum(tangents_1, [0], True)                                        # f32[1, 16]
    view_5 = aten.view(sum_1, [16])                                                # f32[16]
    return (mm, view_2, None, mm_1, view_5)""",
        )

    def test_dynamic_shape(self):
        graphs = capture_graphs(MLP(), torch.randn(2, 5, 16), dynamic=True)
        self.assertExpectedInline(
            graphs.after[0],
            """\
after(
    up.weight: f32[32, 16],
    s0: SymInt,
    s1: SymInt,
    arg0: f32[s0, s1, 16],
    down.weight: f32[16, 32],
):
    out = ao_act24.relu2_ffn(arg0, up.weight, None, down.weight, None, False)  # f32[s0, s1, 16]
    return (out,)""",
        )
        self.assertExpectedInline(
            graphs.forward[0],
            """\
forward(
    up.weight: f32[32, 16],
    s0: SymInt,
    s1: SymInt,
    arg0: f32[s0, s1, 16],
    down.weight: f32[16, 32],
):
    out, packed, metadata = ao_act24.relu2_ffn(arg0, up.weight, None, down.weight, None, False)  # f32[s0, s1, 16], f32[s0, s1, 16], u8[16*(((s0*s1 + 15)//16)), 32]
    mul = mul(s0, s1)                                                                          # SymInt
    view = aten.view(arg0, [mul, 16])                                                            # f32[s0*s1, 16]
    return (out, down.weight, packed, metadata, view, s0, s1, mul)""",
        )

    def test_checkpointed_body(self):
        graphs = capture_graphs(Checkpointed(), torch.randn(4, 16))
        self.assertExpectedInline(
            graphs.after[0],
            """\
after(
    arg0: f32[4, 16],
    mlp.up.weight: f32[32, 16],
    mlp.down.weight: f32[16, 32],
):
    getitem = tag_activation_checkpoint(wrap_body_0, arg0, mlp.up.weight, mlp.down.weight, use_reentrant=False)  # f32[4, 16]
    add = add(arg0, getitem)                                                                          # f32[4, 16]
    return (add,)

wrap_body_0(
    arg0: f32[4, 16],
    mlp.up.weight: f32[32, 16],
    mlp.down.weight: f32[16, 32],
):
    out = ao_act24.relu2_ffn(arg0, mlp.up.weight, None, mlp.down.weight, None, False)  # f32[4, 16]
    return (out,)""",
        )
        self.assertExpectedInline(
            graphs.forward[0],
            """\
forward(
    arg0: f32[4, 16],
    mlp.up.weight: f32[32, 16],
    mlp.down.weight: f32[16, 32],
):
    out = ao_act24.relu2_ffn(arg0, mlp.up.weight, None, mlp.down.weight, None, False)  # f32[4, 16]
    add = aten.add(arg0, out)                                                          # f32[4, 16]
    return (add, arg0, mlp.up.weight, mlp.down.weight)""",
        )
        self.assertExpectedInline(
            graphs.backward[0],
            """\
backward(
    arg0: f32[4, 16],
    mlp.up.weight: f32[32, 16],
    mlp.down.weight: f32[16, 32],
    tangents_1: f32[4, 16],
):
    packed, metadata = ao_act24.relu2_ffn(arg0, mlp.up.weight, None, mlp.down.weight, None, False)  # f32[4, 16], u8[16, 32]
    grad_hidden = ao_act24.grad_hidden(tangents_1, mlp.down.weight, packed, metadata)               # f32[4, 16]
    unpack = ao_act24.unpack(grad_hidden, metadata)                                                 # f32[4, 32]
    view = aten.view(unpack, [4, 32])                                                               # f32[4, 32]
    t = aten.t(view)                                                                                # f32[32, 4]
    view_1 = aten.view(arg0, [4, 16])                                                               # f32[4, 16]
    mm = aten.mm(t, view_1)                                                                         # f32[32, 16]
    unpack_1 = ao_act24.unpack(packed, metadata)                                                    # f32[4, 32]
    view_2 = aten.view(tangents_1, [4, 16])                                                         # f32[4, 16]
    t_1 = aten.t(view_2)                                                                            # f32[16, 4]
    view_3 = aten.view(unpack_1, [4, 32])                                                           # f32[4, 32]
    mm_1 = aten.mm(t_1, view_3)                                                                     # f32[16, 32]
    return (None, mm, mm_1)""",
        )

    def test_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            graphs = capture_graphs(MLP(), torch.randn(4, 16))
        self.assertExpectedInline(
            graphs.forward[0],
            """\
forward(
    up.weight: f32[32, 16],
    arg0: f32[4, 16],
    down.weight: f32[16, 32],
):
    _to_copy = aten._to_copy(arg0, dtype=torch.bfloat16)                                             # bf16[4, 16]
    _to_copy_1 = aten._to_copy(up.weight, dtype=torch.bfloat16)                                      # bf16[32, 16]
    _to_copy_2 = aten._to_copy(down.weight, dtype=torch.bfloat16)                                    # bf16[16, 32]
    out, packed, metadata = ao_act24.relu2_ffn(_to_copy, _to_copy_1, None, _to_copy_2, None, False)  # bf16[4, 16], bf16[4, 16], u8[16, 32]
    view = aten.view(_to_copy, [4, 16])                                                              # bf16[4, 16]
    return (out, _to_copy_2, packed, metadata, view)""",
        )

    def test_casts_and_views_in_between(self):
        with torch.no_grad():
            graphs = capture_graphs(CastsAndViews().bfloat16(), torch.randn(2, 3, 16).bfloat16())
        self.assertExpectedInline(
            graphs.before[0],
            """\
before(
    up.weight: bf16[32, 16],
    arg0: bf16[2, 3, 16],
    down.weight: bf16[16, 32],
):
    linear = linear(arg0, up.weight, None)      # bf16[2, 3, 32]
    float = float(linear)                       # f32[2, 3, 32]
    relu = relu(float)                          # f32[2, 3, 32]
    square = square(relu)                       # f32[2, 3, 32]
    to = to(square, torch.bfloat16)             # bf16[2, 3, 32]
    view = view(to, -1, 32)                     # bf16[6, 32]
    linear_1 = linear(view, down.weight, None)  # bf16[6, 16]
    return (linear_1,)""",
        )
        self.assertExpectedInline(
            graphs.after[0],
            """\
after(
    up.weight: bf16[32, 16],
    arg0: bf16[2, 3, 16],
    down.weight: bf16[16, 32],
):
    linear = linear(arg0, up.weight, None)                               # bf16[2, 3, 32]
    reshape = reshape(linear, -1, 32)                                    # bf16[6, 32]
    packed, metadata = ao_act24.relu2_sparsify(reshape)                  # bf16[6, 16], u8[16, 32]
    sparse_mm = ao_act24.sparse_mm(packed, metadata, down.weight, None)  # bf16[6, 16]
    return (sparse_mm,)""",
        )


def test_selective_checkpointing_keeps_what_its_policy_lists():
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def backward(kind, *listed):
        def policy(context, op, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if op in listed else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)
        mlp = kind()
        model = lambda x: checkpoint(mlp, x, use_reentrant=False, context_fn=contexts).sin()  # noqa: E731
        return capture_graphs(model, torch.randn(4, 16)).backward[0]

    for kind, names in ((MLP, ["relu2_ffn"]), (InTwoSteps, ["relu2_sparsify", "sparse_mm"])):
        recomputed = backward(kind)
        kept = backward(kind, *(getattr(torch.ops.ao_act24, name).default for name in names))
        assert all(f"ao_act24.{name}(" in recomputed and f"ao_act24.{name}(" not in kept for name in names)


def test_exported_programs_compile():
    mlp, x = MLP(bias=True).eval(), torch.randn(4, 16)
    module = torch.export.export(mlp, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}}).module()
    (verdict,) = ao_act24.explain(module, x)
    assert verdict.rewritten
    sparsified = MLP(bias=True).eval()
    sparsified.load_state_dict(mlp.state_dict())
    ao_act24.sparsify_(sparsified)
    for tokens in (4, 7):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(torch.compile(module, backend="ao_act24")(x), sparsified(x))
        assert not torch.equal(module(x), sparsified(x))


def test_aten_graphs_are_rewritten_in_place():
    """The pass on an exported program's own graph: ATen overloads instead of torch functions."""
    mlp, x = MLP(bias=True).eval(), torch.randn(4, 16)
    exported = torch.export.export(mlp, (x,))
    dense = exported.module()(x)
    ao_act24.Act24Pass()(exported.graph)
    exported.graph_module.recompile()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("ao_act24.sparse_mm.default") == 1 and not any("relu.default" in t for t in targets)
    sparse = exported.module()(x)
    assert not torch.equal(sparse, dense)
    ao_act24.sparsify_(mlp)
    torch.testing.assert_close(sparse, mlp(x))
    traced = torch.export.export(mlp, (x,))  # and a transformed model exports with the operators in it
    assert any("sparse_mm" in str(node.target) for node in traced.graph.nodes)


def test_files(tmp_path):
    graphs = capture_graphs(MLP(), torch.randn(4, 16))
    paths = graphs.save(tmp_path / "graphs")
    assert [path.name for path in paths] == ["before_0.txt", "after_0.txt", "forward_0.txt", "backward_0.txt"]
    assert paths[1].read_text() == graphs.after[0] + "\n" and graphs.after[0] in str(graphs)
