"""Hugging Face models with a ReLU² FFN, in every mode in which they are run: all FFNs are rewritten, and outputs and
all gradients are those of the same model with its activation replaced by the oracle's."""

import copy
from collections import Counter

import pytest
import torch
import transformers
from oracle import ReLU2In24, relative_error
from transformers.activations import ReLUSquaredActivation

import ao_act24

NAMES = ["Nemotron", "Arcee", "Persimmon", "NanoChat"]
MODES = ["eval", "train", "checkpoint", "autocast", "dynamic eval"]
LAYERS, VOCAB = 2, 64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name, mode="eval"):
    """A tiny model with weights large enough for the FFNs, and so the entries that 2:4 drops, to matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, max_position_embeddings=64, num_key_value_heads=4, pad_token_id=0, eos_token_id=None, **sizes
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).train("eval" not in mode)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    if mode == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def ffns(model):
    return [name for name, module in model.named_modules() if name.endswith(".mlp")]


def oracle_of(model):
    """A copy of ``model`` that computes in plain torch what the rewritten model must compute."""
    model = copy.deepcopy(model)
    activations = [name for name, module in model.named_modules() if isinstance(module, ReLUSquaredActivation)]
    assert len(activations) == LAYERS
    for name in activations:
        model.set_submodule(name, ReLU2In24())
    return model


def tokens(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def step(model, ids, mode):
    """Logits and the gradients of all parameters, after one step."""
    model.zero_grad()
    with torch.set_grad_enabled("eval" not in mode), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        output = model(input_ids=ids, labels=ids, use_cache=False)
    if "eval" in mode:
        return {"logits": output.logits}
    output.loss.backward()
    return {"logits": output.logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_computes_24(got, model, ids, mode):
    """``got`` is as close to the fp64 oracle as the oracle in the model's own precision is, and not the dense result.

    Some gradients nearly cancel (a bias on all keys hardly changes a softmax), so a fixed bound would not do for all.
    """
    want = step(oracle_of(model), ids, mode)
    exact = step(oracle_of(model).double(), ids, "train" if mode == "autocast" else mode)
    dense = step(copy.deepcopy(model), ids, mode)
    assert len(got) == len(want) == len(exact)
    for (name, result), reference, truth in zip(got.items(), want.values(), exact.values(), strict=True):
        bound = max(1e-5, 2 * relative_error(reference, truth))
        assert relative_error(result, truth) <= bound, name
        if name == "logits":
            assert relative_error(dense["logits"], truth) > 2 * bound


def ops_run(function):
    """How often each of our operators runs in ``function``, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    counts = Counter()
    for event in profile.events():
        recorded_again = any(child.name == event.name for child in event.cpu_children)  # autocast calls the operator
        if event.name.startswith("ao_act24::") and not recorded_again:
            counts[event.name.removeprefix("ao_act24::")] += 1
    return counts, result


def check_mode(name, mode, backend):
    model = build(name, mode)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True, dynamic="dynamic" in mode)
    shapes = [(2, 12), (3, 20), (2, 9)] if "dynamic" in mode else [(2, 12)]
    step(compiled, tokens(*shapes[0]), mode)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in shapes:
            ids = tokens(*shape)
            counts, got = ops_run(lambda ids=ids: step(compiled, ids, mode))
            recomputes = mode == "checkpoint"
            assert counts["relu2_sparsify"] + counts["relu2_ffn"] == LAYERS * (2 if recomputes else 1)
            assert LAYERS <= counts["sparse_mm"] <= LAYERS * (2 if recomputes else 1)
            assert counts["sampled_mm"] + counts["grad_hidden"] == (0 if "eval" in mode else LAYERS)
            assert (counts["relu2_ffn"] > 0) == (backend == "ao_act24" and "eval" not in mode)
            assert_computes_24(got, model, ids, mode)


def rewrite_only(gm, inputs):
    """The rewrite and AOTAutograd without Inductor, which is what takes long to compile."""
    for module in ao_act24.passes.graph_modules(gm):
        ao_act24.passes.rewrite_graph(module.graph, ao_act24.Act24Config())
        module.recompile()
    return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_mode(name, mode):
    check_mode(name, mode, rewrite_only)


# Every mode and every model once; the compiler has nothing to do with which of them meet.
@pytest.mark.parametrize(
    "name, mode",
    [
        ("Persimmon", "eval"),
        ("Nemotron", "train"),
        ("NanoChat", "checkpoint"),
        ("Arcee", "autocast"),
        ("Nemotron", "dynamic train"),
    ],
)
def test_mode_through_inductor(name, mode):
    check_mode(name, mode, "ao_act24")


@pytest.mark.parametrize("name", NAMES)
def test_reports_name_every_ffn(name):
    model, ids = build(name, "train"), tokens(2, 12)
    report = ao_act24.explain(model, input_ids=ids, use_cache=False)
    assert [verdict.path for verdict in report.rewritten] == ffns(model)
    assert not report.dense and not report.notes
    graphs = ao_act24.capture_graphs(model, input_ids=ids, use_cache=False)
    assert len(graphs.after) == len(graphs.backward) == 1
    for stage, op in (("after", "relu2_ffn"), ("forward", "relu2_ffn"), ("backward", "grad_hidden")):
        assert getattr(graphs, stage)[0].count(f"ao_act24.{op}(") == LAYERS
    assert "ao_act24." not in graphs.before[0]


@pytest.mark.parametrize("mode", ["eval", "train", "checkpoint", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_sparsify_(name, mode):
    model, ids = build(name, mode), tokens(2, 12)
    sparse = copy.deepcopy(model)
    assert [verdict.path for verdict in ao_act24.sparsify_(sparse).rewritten] == ffns(model)
    assert sparse.state_dict().keys() == model.state_dict().keys()
    counts, got = ops_run(lambda: step(sparse, ids, mode))
    assert counts["sparse_mm"] == LAYERS * (2 if mode == "checkpoint" else 1)
    assert_computes_24(got, model, ids, mode)


def test_sparsify_then_compile_with_another_backend():
    model, ids = build("Nemotron", "train"), tokens(2, 12)
    sparse = copy.deepcopy(model)
    ao_act24.sparsify_(sparse)
    compiled = torch.compile(sparse, fullgraph=True)
    step(compiled, ids, "train")
    counts, got = ops_run(lambda: step(compiled, ids, "train"))
    assert counts["relu2_sparsify"] == counts["sparse_mm"] == counts["sampled_mm"] == LAYERS
    assert_computes_24(got, model, ids, "train")


@pytest.mark.parametrize("name, way", [("Nemotron", "sparsify_"), ("NanoChat", "sparsify_"), ("Nemotron", "compile")])
def test_generate(name, way):
    model, prompt = build(name), tokens(2, 8)

    def generate(m):
        mask = torch.ones_like(prompt)
        cache = way != "compile"  # every kind of step has a graph of its own with one, and they take long to compile
        return m.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False, use_cache=cache)

    sparse = copy.deepcopy(model)
    if way == "sparsify_":
        ao_act24.sparsify_(sparse)
    else:
        sparse.compile(backend=rewrite_only, dynamic=True)
    counts, got = ops_run(lambda: generate(sparse))
    assert counts["sparse_mm"] >= 24 * LAYERS
    assert torch.equal(got, generate(oracle_of(model)))
    assert not torch.equal(got, generate(model))
