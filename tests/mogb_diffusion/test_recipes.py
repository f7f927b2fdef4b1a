"""Every recipe against a table of the paper's settings, written down here and not read from the recipes."""

import dataclasses
import json

import pytest

from mogb_diffusion.cli import main
from mogb_diffusion.config import Balancing, to_plain
from mogb_diffusion.recipes import RECIPES, recipe, summary

FIVE = ["pickscore", "hpsv2", "clip", "ocr", "geneval"]
SD35 = [name for name in RECIPES if name.startswith("sd35")]

# The paper's defaults; what it does not say is the released script's (marked S) or DiffusionNFT's (D).
PAPER = {
    "model.source": "stabilityai/stable-diffusion-3.5-medium",
    "model.resolution": 512,
    "model.max_sequence_length": 128,  # D
    "policy.kind": "lora",
    "policy.rank": 32,
    "policy.alpha": 64.0,
    "policy.old_schedule": "linear",  # D: type 1
    "policy.old_rate": 0.001,  # D
    "policy.old_hold": 0.95,  # S; D has 0.5
    "policy.ema": 0.9,  # D
    "batch.groups": 48,
    "batch.images_per_prompt": 24,
    "batch.micro_batch": 9,  # S, D
    "batch.updates_per_epoch": 1,  # S, D
    "sampling.steps": 25,
    "sampling.solver": "dpm2",  # S, D
    "sampling.guidance": 1.0,  # none
    "loss.beta": 0.1,
    "loss.max_advantage": 5.0,
    "loss.advantage_mode": "all",
    "loss.std": "prompt",  # the paper's equation 3; S has global
    "loss.eps": 1e-4,  # D
    "loss.kl_weight": 1e-4,
    "balancing.mode": "marble",
    "balancing.gradients": "full",
    "balancing.coefficients": "raw",
    "balancing.normalize": True,
    "balancing.refresh_every": 10,
    "balancing.decay": 0.7,
    "balancing.cold_start": "first",
    "balancing.shrinkage": False,
    "balancing.final_uniform": 0.0,
    "balancing.advantage_scale": None,
    "optimizer.lr": 3e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 1e-4,
    "optimizer.max_grad_norm": 1.0,
    "evaluation.steps": 40,  # D
    "evaluation.solver": "euler",  # D
    "evaluation.guidance": None,  # that of sampling: none
}

# What the row of a table changes, and nothing else; a whole "balancing" stands for all of its keys.
CHANGES = {
    "sd35_marble": {},
    "sd35_marble_final_uniform": {"balancing.final_uniform": 0.1},
    "sd35_marble_script": {
        "model.dtype": "float16", "loss.std": "global",
        "balancing": Balancing(mode="marble_script", refresh_every=10, decay=0.7),
    },
    "sd35_exact": {"balancing": Balancing(mode="marble_exact")},
    "sd35_base": {"epochs": 0, "evaluation.guidance": 1.0},
    "sd35_base_cfg": {"epochs": 0, "evaluation.guidance": 4.5},
    "sd35_weighted_sum": {"balancing": Balancing(mode="weighted_sum")},
    "sd35_every_step": {"balancing": Balancing(mode="marble_every_step")},
    "sd35_unnormalized": {"balancing.normalize": False},
    "sd35_fixed": {"balancing": Balancing(mode="fixed")},
    "sd35_reward_dropout": {"balancing": Balancing(mode="reward_dropout", dropout=0.5)},
    "sd35_fixed_11122": {
        "balancing": Balancing(
            mode="fixed", alpha={"pickscore": 1.0, "hpsv2": 1.0, "clip": 1.0, "ocr": 2.0, "geneval": 2.0}
        )
    },
    "sd35_weights_11122": {
        "balancing": Balancing(mode="weighted_sum"), "rewards.3.weight": 2.0, "rewards.4.weight": 2.0,
    },
    **{f"sd35_marble_n{n}": {"balancing.refresh_every": n} for n in (5, 10, 20)},
    **{f"sd35_marble_rho0{tenths}": {"balancing.decay": tenths / 10} for tenths in (1, 3, 5, 7, 9)},
}  # fmt: skip
CHANGES["sd35_script"], CHANGES["sd35_marble_exact"] = CHANGES["sd35_marble_script"], CHANGES["sd35_exact"]


def flat(value, path=""):
    """Every number of a configuration under its path; lists of numbers and of texts as they are."""
    if isinstance(value, dict) and value:
        return {
            key: leaf
            for name, item in value.items()
            for key, leaf in flat(item, f"{path}.{name}"[path == "" :]).items()
        }
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return flat({str(n): item for n, item in enumerate(value)}, path)
    return {path: value}


def settings(name):
    return flat(to_plain(recipe(name)))


def changed(name):
    before, after = settings("sd35_marble"), settings(name)
    return {key: after.get(key) for key in {**before, **after} if before.get(key) != after.get(key)} | {
        key: after[key] for key in after if key not in before
    }


def test_the_main_recipe_has_the_settings_of_the_paper():
    found = settings("sd35_marble")
    assert {key: found[key] for key in PAPER} == PAPER
    assert [reward.name for reward in recipe("sd35_marble").rewards] == FIVE
    assert {reward.weight for reward in recipe("sd35_marble").rewards} == {1.0}


def test_prompts_are_a_third_each_and_specialists_see_their_own():
    run = recipe("sd35_marble")
    assert {source.weight for source in run.prompts} == {1.0}
    assert [source.rewards for source in run.prompts] == [tuple(FIVE[:3]), (*FIVE[:3], "ocr"), (*FIVE[:3], "geneval")]
    assert [reward.name for reward in run.rewards if reward.specialist] == ["ocr", "geneval"]


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_variant_changes_what_its_row_changes(name):
    expected = {}
    for key, value in CHANGES[name].items():
        if key == "balancing":
            wanted, main = (
                flat(to_plain(value), "balancing"),
                flat(to_plain(recipe("sd35_marble").balancing), "balancing"),
            )
            expected |= {path: wanted.get(path) for path in {**wanted, **main} if wanted.get(path) != main.get(path)}
        else:
            expected[key] = value
    if name != "sd35_marble":
        expected["name"] = name
    after, before = settings(name), settings("sd35_marble")
    assert changed(name) == {key: value for key, value in expected.items() if before.get(key) != value}
    assert all(after.get(key) == value for key, value in expected.items())


def test_the_stages_are_the_published_ones():
    run = recipe("sd35_sequential")
    general = ("pickscore", "hpsv2", "clip")
    at = {epoch: run.balancing.stage(epoch, run.epochs) for epoch in range(run.epochs)}
    found = [(at[epoch].rewards, at[epoch].sources) for epoch in range(run.epochs)]
    assert found == (
        [(general, (0,))] * 800 + [(("geneval",), (2,))] * 300 + [(general, (0,))] * 200
        + [(("geneval",), (2,))] * 200 + [(("ocr",), (1,))] * 100
    )  # fmt: skip
    assert "pickscore" in run.prompts[0].path
    assert "ocr" in run.prompts[1].path
    assert "geneval" in run.prompts[2].path


@pytest.mark.parametrize("name", FIVE)
def test_one_reward_alone_trains_on_its_prompts_and_the_others_are_measured(name):
    run = recipe(f"sd35_single_{name}")
    assert run.balancing == Balancing(mode=f"single:{name}")
    assert run.reward_names == (name,)
    assert sorted([name, *(reward.key for reward in run.evaluation.rewards)]) == sorted(FIVE)
    [source] = run.prompts
    assert source.rewards == (name,)
    assert (name if name in ("ocr", "geneval") else "pickscore") in source.path
    main = recipe("sd35_marble")
    same = ("model", "policy", "batch", "sampling", "loss", "optimizer", "epochs", "seed")
    assert all(getattr(run, key) == getattr(main, key) for key in same)


def test_every_recipe_is_in_a_table_of_this_file():
    assert set(SD35) == set(CHANGES) | {"sd35_sequential"} | {f"sd35_single_{name}" for name in FIVE}


@pytest.mark.parametrize("alias", [("sd35_script", "sd35_marble_script"), ("sd35_marble_exact", "sd35_exact")])
def test_aliases_are_the_same_run(alias):
    first, second = map(recipe, alias)
    assert dataclasses.replace(first, name="x") == dataclasses.replace(second, name="x")


def test_the_list_has_one_line_for_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split(maxsplit=1)[1]) > 10 and len(line) <= 110 for line in lines)
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": name, "summary": summary(name)} for name in RECIPES]
    assert len({summary(name) for name in RECIPES}) == len(RECIPES)
