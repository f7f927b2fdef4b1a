"""Old-policy decay and the parameter average, against the reference's tables and traces."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mogb_diffusion import old_policy_decay
from mogb_diffusion.policy_schedule import ParameterEMA, move_towards, warmup_decay

CASES = json.loads((Path(__file__).parents[1] / "cases" / "diffusion.json").read_text())
SCHEDULES = ("copy", "linear", "delayed_linear")


@pytest.mark.parametrize("case", CASES["old_policy_decay"], ids=SCHEDULES)
def test_the_reference_decays_are_reproduced(case):
    schedule = SCHEDULES[case["decay_type"]]
    assert [old_policy_decay(step, schedule) for step in case["steps"]] == pytest.approx(case["expected"], rel=1e-12)


def test_the_default_is_on_policy():
    assert old_policy_decay(10_000) == 0


def test_overrides_change_one_thing_each():
    assert old_policy_decay(900, "linear", hold=0.95) == pytest.approx(0.9)
    assert old_policy_decay(2000, "linear", hold=0.95) == 0.95
    assert old_policy_decay(60, "linear", flat=50) == pytest.approx(0.01)
    assert old_policy_decay(20, "linear", rate=0.01) == pytest.approx(0.2)
    assert old_policy_decay(80, "delayed_linear", flat=0) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((-1,), {}, "step must be a finite number >= 0"),
        ((1, "cosine"), {}, "schedule must be one of copy, linear, delayed_linear, but got 'cosine'"),
        ((1, "copy"), {"hold": 0.5}, "schedule='copy' has no flat, rate or hold"),
        ((1, "linear"), {"hold": 1.5}, "hold must be a finite number >= 0 and <= 1"),
        ((1, "linear"), {"rate": -0.1}, "rate"),
        ((1, "linear"), {"flat": float("nan")}, "flat"),
    ],
)
def test_bad_schedules_are_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        old_policy_decay(*args, **options)


def test_the_warm_up_of_the_reference():
    for step, expected in CASES["ema_of_params"]["warmup_decays"].items():
        assert warmup_decay(int(step), CASES["ema_of_params"]["decay"]) == pytest.approx(expected, rel=1e-12)


def test_the_reference_trace_of_the_average_is_reproduced():
    case = CASES["ema_of_params"]
    parameter = torch.nn.Parameter(torch.tensor(case["init"], dtype=torch.float64))
    ema = ParameterEMA([parameter], case["decay"])
    for entry in case["trace"]:
        with torch.no_grad():
            parameter.copy_(torch.tensor(entry["param"]))
        ema.update()
        assert ema.step == entry["global_step"]
        assert_close(ema.averages[0], torch.tensor(entry["ema"], dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_without_warm_up_the_decay_is_constant():
    parameter = torch.zeros(1, dtype=torch.float64)
    ema = ParameterEMA([parameter], 0.75, warmup=False)
    parameter += 1
    for expected in (0.25, 0.4375):
        ema.update()
        assert ema.averages[0].item() == expected


def trained():
    """A model after one step, its average, and both of their values."""
    model = torch.nn.Linear(3, 2)
    ema = ParameterEMA(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update()
    own = [parameter.detach().clone() for parameter in model.parameters()]
    return model, ema, own, [average.clone() for average in ema.averages]


def test_evaluation_on_the_cpu_gives_the_trained_weights_back():
    model, ema, own, averages = trained()
    with ema.applied():
        assert all(map(torch.equal, model.parameters(), averages))
        with torch.no_grad():
            model.weight.fill_(99.0)  # whatever happens inside stays inside
    assert all(map(torch.equal, model.parameters(), own))
    assert all(map(torch.equal, ema.averages, averages))
    with torch.no_grad():
        model.weight.fill_(7.0)
    assert all(map(torch.equal, ema.averages, averages))


def test_the_weights_come_back_after_an_error_too():
    model, ema, own, _ = trained()
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(map(torch.equal, model.parameters(), own))
    ema.update()


def test_updating_or_nesting_inside_is_refused():
    _, ema, _, _ = trained()
    with ema.applied():
        with pytest.raises(RuntimeError, match=r"update\(\) inside applied\(\)"):
            ema.update()
        with pytest.raises(RuntimeError, match="does not nest"), ema.applied():
            pass


def test_a_saved_average_continues_to_the_bit_and_shares_no_memory():
    model, ema, _, averages = trained()
    state = ema.state_dict()
    other = ParameterEMA(model.parameters())
    other.load_state_dict(state)
    ema.update()
    assert torch.equal(state["averages.0"], averages[0])
    assert torch.equal(other.averages[0], averages[0])
    other.update()
    assert other.step == ema.step == 2
    assert all(map(torch.equal, ema.averages, other.averages))
    with pytest.raises(ValueError, match="must hold step and 2 averages"):
        other.load_state_dict({"step": 1})
    with pytest.raises(ValueError, match=r"parameters\[1\] must have the shape of averages\[1\]"):
        other.load_state_dict(state | {"averages.1": torch.zeros(5)})
    assert all(map(torch.equal, ema.averages, other.averages))


def test_averages_of_half_precision_are_kept_in_float32():
    # In bfloat16 an average at 1 would never move towards 1.0078, its next number, at a decay of 0.99.
    parameter = torch.ones(1, dtype=torch.bfloat16)
    ema = ParameterEMA([parameter], 0.99, warmup=False)
    parameter.fill_(1.0078125)
    for _ in range(100):
        ema.update()
    assert ema.averages[0].dtype == torch.float32
    assert ema.averages[0].item() == pytest.approx(1 + 0.0078125 * (1 - 0.99**100), rel=1e-6)
    with ema.applied():
        assert parameter.dtype == torch.bfloat16
    assert parameter.item() == 1.0078125


def test_an_average_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        ParameterEMA([])
    with pytest.raises(ValueError, match="decay"):
        ParameterEMA([torch.zeros(1)], 1.5)


def test_the_old_policy_moves_in_place_and_a_copy_is_exact():
    old, current = torch.tensor([0.0, 8.0], requires_grad=True), torch.tensor([4.0, 0.1], requires_grad=True)
    move_towards([old], [current], 0.75)
    assert_close(old.detach(), torch.tensor([1.0, 6.025]))
    with torch.no_grad():
        old.fill_(torch.inf)
    move_towards([old], [current], 0.0)
    assert torch.equal(old, current)
    move_towards([old], [torch.zeros(2)], 1.0)
    assert torch.equal(old, current)
    with pytest.raises(ValueError, match="there are 1 and 2"):
        move_towards([old], [current, current], 0.5)
