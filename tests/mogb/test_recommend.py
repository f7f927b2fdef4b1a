"""Recommendations: from the registry's facts, in the measured order, and the page that is computed from them."""

import importlib.util
import json
import pathlib

import pytest
import torch

import mogb
from mogb.base import Promise
from mogb.cli import main
from mogb.recommend import Facts, Needs, behaviour, facts_of, recommend

pytestmark = pytest.mark.usefixtures("unchecked")
ROOT = pathlib.Path(__file__).parents[2]


def names(**needs):
    return [facts.name for facts in recommend(Needs(**needs)).fitting]


def test_the_methods_of_the_benchmark_exist_and_have_all_figures():
    measured = behaviour()["methods"]  # a new method is missing until the benchmark runs again
    assert len(measured) >= 40
    assert set(measured) <= set(mogb.registered())
    assert all({"rank", "arrived", "failed", "microseconds_4"} <= set(figures) for figures in measured.values())


def test_the_package_holds_the_committed_benchmark():
    committed = json.loads((ROOT / "benchmarks" / "results" / "behaviour.json").read_text())
    assert behaviour() == committed
    assert {"command", "commit", "seed", "machine"} <= set(committed["provenance"])


# --- needs are facts ------------------------------------------------------------------------------------------------


def test_without_needs_only_whole_jacobians_are_left_out():
    readers = {name for name in mogb.registered() if mogb.make(name).reads == "jacobian"}
    assert set(names()) == set(mogb.registered()) - readers
    assert set(names(jacobian_ok=True)) == set(mogb.registered())


@pytest.mark.parametrize(
    ("need", "promise"), [("scale_free", Promise.SCALE_FREE), ("conflict_free", Promise.NON_CONFLICTING)]
)
def test_promises(need, promise):
    expected = {name for name in mogb.registered() if promise in mogb.make(name).keeps}
    assert set(names(jacobian_ok=True, **{need: True})) == expected


def test_cheap_methods_read_only_losses():
    assert set(names(cheap=True)) == {name for name in mogb.registered() if mogb.make(name).reads == "losses"}


def test_methods_that_take_negative_losses_do():
    fitting = names(losses_may_be_negative=True, jacobian_ok=True)
    losses = torch.tensor([-1.0, 2.0, -3.0], dtype=torch.float64)
    rows = torch.eye(3, 4, dtype=torch.float64) + 0.1
    for name in fitting:
        agg = mogb.make(name)
        agg.parameters()
        assert agg(rows, losses).isfinite().all(), name
    for name in set(mogb.registered()) - set(fitting):
        agg = mogb.make(name)
        agg.parameters()
        with pytest.raises(ValueError, match=r"losses|ratios|length of its loss"):
            agg(rows, losses)


def test_stateless_methods_answer_twice_the_same():
    fitting = names(stateless=True, jacobian_ok=True)
    rows, losses = torch.eye(3, 4) + 0.2 * torch.arange(12.0).reshape(3, 4), torch.tensor([1.0, 2.0, 0.5])
    for name in fitting:
        agg = mogb.make(name)
        assert not agg.phases
        first = agg(rows, losses)
        agg(rows.flip(0), losses)
        assert torch.equal(agg(rows, losses), first), name
    assert {"mgda", "upgrad", "weighted_sum", "nash_mtl"} <= set(fitting)
    assert not {"marble", "rlw", "pcgrad", "graddrop", "famo", "uw", "dwa", "moco"} & set(fitting)


@pytest.mark.parametrize(
    ("name", "state"), [("mgda", "none"), ("marble", "small"), ("rlw", "small"), ("moco", "K gradients")]
)
def test_the_size_of_the_state(name, state):
    assert facts_of(name).state == state


def test_preferences():
    fitting = set(names(preference=True))
    assert {"upgrad", "epo", "weighted_sum", "pareto_mtl", "stch"} <= fitting
    assert not {"mgda", "pcgrad", "rlw"} & fitting


def test_needs_add_up():
    both = set(names(scale_free=True, conflict_free=True))
    assert both == set(names(scale_free=True)) & set(names(conflict_free=True))
    answer = recommend(Needs(scale_free=True, conflict_free=True, cheap=True))
    assert answer.fitting == ()
    assert answer.tied == 0
    assert answer.hint
    assert answer.left_out["cheap"] == sum(mogb.make(name).reads != "losses" for name in mogb.registered())


def test_objectives_must_be_a_number():
    with pytest.raises(ValueError, match="objectives must be at least 1, but got 0"):
        Needs(objectives=0)


# --- the order is measured ------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_ranks():
    ranks = [facts.measured["rank"][0] for facts in recommend(Needs(jacobian_ok=True)).fitting if facts.measured]
    assert ranks == sorted(ranks)


def test_noisy_orders_by_held_out_conflicts_and_puts_the_unmeasured_last():
    found = [facts.measured.get("held_out_conflicts") for facts in recommend(Needs(noisy=True)).fitting]
    known = [value for value in found if value is not None]
    assert known == sorted(known)
    assert found == known + [None] * (len(found) - len(known))
    assert "dwa" not in names(noisy=True)[: len(known)]  # its runs on the specialists failed


def test_ties_are_overlapping_intervals():
    answer = recommend(Needs())
    best = answer.fitting[0].measured["rank"]
    assert answer.tied == sum(facts.measured["rank"][1] <= best[2] for facts in answer.fitting if facts.measured)
    assert answer.tied > 1


def test_methods_that_were_not_measured_come_last(monkeypatch):
    monkeypatch.setitem(behaviour()["methods"], "config", {})
    assert "config" not in names()[:30]
    assert facts_of("config").microseconds(4) is None


def test_times_follow_a_power_of_the_size():
    facts = Facts("x", "gramian", (), "K", "none", (), True, False, {"microseconds_4": 10.0, "microseconds_64": 160.0})
    assert facts.microseconds(4) == pytest.approx(10)
    assert facts.microseconds(64) == pytest.approx(160)
    assert facts.microseconds(16) == pytest.approx(40)


# --- the command and the page ---------------------------------------------------------------------------------------


def test_the_command(capsys):
    assert main(["recommend", "--scale-free", "--conflict-free", "--objectives", "8"]) == 0
    printed = capsys.readouterr().out
    assert "nash_mtl" in printed
    assert "fairgrad" in printed
    assert "µs, K = 8" in printed
    assert f"2 of {len(mogb.registered())} methods fit" in printed
    assert "normalized(" in printed
    assert main(["recommend"]) == 0
    assert "the first 10 are shown" in capsys.readouterr().out
    assert main(["recommend", "--all"]) == 0
    assert "are shown" not in capsys.readouterr().out


def test_the_command_as_json(capsys):
    assert main(["recommend", "--cheap", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in answer["fitting"]] == names(cheap=True)
    assert answer["needs"]["cheap"] is True
    assert answer["fitting"][0]["measured"]["rank"]


def test_nothing_fits_is_no_error(capsys):
    assert main(["recommend", "--scale-free", "--conflict-free", "--cheap"]) == 0
    assert f"0 of {len(mogb.registered())} methods fit" in capsys.readouterr().out


def test_bad_input_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["recommend", "--objectives", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert page == generate.with_computed(page), "python docs/generate.py brings it up to date"


def test_the_page_quotes_the_noise_benchmark():
    found = json.loads((ROOT / "benchmarks" / "results" / "noise.json").read_text())["distances"]
    page = (ROOT / "docs" / "choosing.md").read_text()
    problem = ""
    quoted = 0
    for line in page.split("## Noise")[1].splitlines():
        cells = [cell.strip().strip("`*") for cell in line.strip("|").split("|")]
        if len(cells) != 7 or cells[2] not in found["bowls, noise 0.2"]:
            continue
        problem = cells[0] or problem
        ways = ("plain", "unbiased", "unbiased, 0.99", "smoothed weights")
        for way, cell in zip(ways, cells[3:], strict=True):
            values = sorted(found[problem][cells[2]][way])
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            assert float(cell) == pytest.approx(middle, abs=6e-4), (problem, cells[2], way)
            quoted += 1
    assert quoted == 40
