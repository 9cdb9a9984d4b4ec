"""Schedules: dense steps, then 2:4 ones, each phase compiled once."""

import itertools
import warnings

import pytest
import torch
from mlp import Residual, oracle
from oracle import relative_error
from torch import nn
from torch._dynamo.utils import counters

import ao_act24
from ao_act24 import Act24Config, Schedule
from ao_act24.phases import PHASE


@pytest.fixture(autouse=True)
def closed():
    yield
    from ao_act24 import phases

    if phases._open:
        phases._open.close()


def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(Residual(dim=8), Residual(dim=8))


def in_24(ffns, x):
    for ffn in ffns:
        x = x + oracle(ffn, x)
    return x


@pytest.mark.parametrize("way", ["backend", "regions", "sparsify_", "both"])
def test_phases(way):
    ffns = model()
    schedule = Schedule(warmup_steps=2, dense_from=5)
    if way in ("sparsify_", "both"):
        ao_act24.sparsify_(ffns)
    run = ffns
    if way in ("backend", "both"):
        run = torch.compile(ffns, backend="ao_act24", fullgraph=True)
    if way == "regions":
        for ffn in ffns:
            ffn.compile(backend="ao_act24", fullgraph=True)
    x, phases, compiled = torch.randn(6, 8), [], []
    optimizer = torch.optim.SGD(ffns.parameters(), lr=1e-3)
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ao_act24.Act24Warning)  # that a dense phase is dense is no news
        for _ in range(7):
            assert schedule.dense == PHASE.dense
            for part in x.split(3):  # gradients accumulate within a phase
                run(part).square().sum().backward()
            with torch.no_grad():
                out = run(x)
            sparse = in_24(ffns, x)
            phases.append(relative_error(out, sparse) < 1e-6)
            compiled.append(counters["stats"]["unique_graphs"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert phases == [False] * 2 + [True] * 3 + [False] * 2
    new = [later - earlier for earlier, later in itertools.pairwise(compiled)]
    at_changes, others = [new.pop(4), new.pop(1)], new
    assert not any(others) and (all(at_changes) or way == "sparsify_"), "each phase is compiled once"


@pytest.mark.parametrize("weight_grads", ["dense", "sparse"])
@pytest.mark.parametrize("stop", [3, 6])  # in the warm-up, after it
def test_a_resumed_run_gives_the_same_losses(stop, weight_grads, tmp_path):
    data = torch.randn(8, 64, 8)

    def start(how=weight_grads):
        ffns = model()
        backend = ao_act24.Act24Backend(Act24Config(weight_grads=how))
        parts = {
            "ffns": ffns,
            "optimizer": torch.optim.AdamW(ffns.parameters(), lr=1e-2),
            "schedule": Schedule(warmup_steps=4),
        }
        return torch.compile(ffns, backend=backend, fullgraph=True), parts

    def train(run, parts, batches):
        losses = []
        for x in batches:
            loss = run(x).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            parts["optimizer"].step()
            parts["optimizer"].zero_grad()
            parts["schedule"].step()
        return losses

    run, parts = start()
    want = train(run, parts, data[:stop])
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint")
    want += train(run, parts, data[stop:])
    parts["schedule"].close()

    run, parts = start()
    for name, state in torch.load(tmp_path / "checkpoint").items():
        parts[name].load_state_dict(state)
    assert parts["schedule"].steps == stop and parts["schedule"].dense == (stop < 4)
    assert train(run, parts, data[stop:]) == want[stop:]
    parts["schedule"].close()

    if weight_grads == "sparse":  # which the losses show
        exact = train(*start("dense"), data)
        assert exact[:5] == want[:5] and exact[6:] != want[6:]


def test_models_that_were_compiled_before_or_are_others():
    before, other, x = model(), model(), torch.randn(6, 8)
    run, another = (torch.compile(ffns, backend="ao_act24", fullgraph=True) for ffns in (before, other))
    with torch.no_grad():
        assert relative_error(run(x), in_24(before, x)) < 1e-6
        schedule = Schedule(warmup_steps=1)
        assert relative_error(run(x), in_24(before, x)) > 1e-3 and relative_error(another(x), in_24(other, x)) > 1e-3
        schedule.step()
        assert relative_error(run(x), in_24(before, x)) < 1e-6 and relative_error(another(x), in_24(other, x)) < 1e-6


def test_reports():
    ffns, x = model(), torch.randn(6, 8)
    Schedule()
    report = ao_act24.explain(ffns, x)
    assert [verdict.rewritten for verdict in report] == [True] * 2, "which blocks 2:4 will take"
    assert report.notes == ("The schedule has a dense phase now: all of it runs dense until that ends.",)
    assert ao_act24.measure(ffns, x, loss=lambda out: out.sum()).layers[0].dropped > 0, "measure looks at 2:4"
    assert PHASE.dense


def test_errors():
    for arguments, message in (
        ({"warmup_steps": -1}, "warmup_steps must be an integer from 0 on, got -1"),
        ({"warmup_steps": 2.5}, "warmup_steps must be an integer from 0 on, got 2.5"),
        ({"warmup_steps": 10, "dense_from": 9}, "dense_from must be an integer from 10 on, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule(**arguments)
    schedule = Schedule()
    with pytest.raises(ValueError, match="steps must be an integer"):
        schedule.load_state_dict({"steps": None})
    schedule.close()
    assert not PHASE.dense
    with pytest.raises(RuntimeError, match="closed"):
        schedule.step()


def test_another_schedule_takes_the_place_of_one_that_was_lost():
    lost = Schedule(warmup_steps=5)
    schedule = Schedule(warmup_steps=0)
    assert not PHASE.dense
    with pytest.raises(RuntimeError, match="another one took its place"):
        lost.step()
    lost.close()
    assert Schedule(warmup_steps=1).dense and PHASE.dense, "the lost one no longer decides"
    with pytest.raises(RuntimeError, match="another one took its place"):
        schedule.load_state_dict({"steps": 0})


def test_gradient_scaling():
    """A step that the scaler skips, its gradients having overflown, counts for the schedule as for any other."""
    ffns, x = model(), torch.randn(6, 8)
    run, schedule = torch.compile(ffns, backend="ao_act24", fullgraph=True), Schedule(warmup_steps=2)
    optimizer, scaler = torch.optim.SGD(ffns.parameters(), lr=1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(4):
        loss = run(x).square().mean()
        out = ffns(x) if step < 2 else in_24(ffns, x)
        (exact,) = torch.autograd.grad(out.square().mean(), ffns[0].up.weight)
        scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
        before = ffns[0].up.weight.clone()
        scaler.unscale_(optimizer)
        if step != 2:
            assert relative_error(ffns[0].up.weight.grad, exact) < 1e-5, step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        assert torch.equal(ffns[0].up.weight, before) == (step == 2)
    assert scaler.get_scale() == 2.0**3 and not schedule.dense
