import pytest
import torch

from mogb_diffusion import config
from mogb_diffusion.datasets import evaluation_prompts, interleaved, load_mixture, load_source
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt, PromptMixture
from mogb_diffusion.recipes import recipe
from mogb_diffusion.rollouts import Epoch, describe_batch, plan_epoch
from mogb_diffusion.seeds import keyed_noise


def test_each_prompt_comes_images_per_prompt_times():
    run = recipe("tiny")
    mixture = PromptMixture([[Prompt(str(n)) for n in range(50)]])
    plan = plan_epoch(run, mixture, 3)
    assert len(plan) == 96
    rows = [plan.rows[n : n + 12] for n in range(0, 96, 12)]
    assert all(len(set(group)) == 1 for group in rows)
    assert len({group[0] for group in rows}) == 8
    assert plan == plan_epoch(run, mixture, 3)
    assert plan != plan_epoch(run, mixture, 4)


def test_a_stage_draws_from_its_own_sources():
    sources = [{"path": f"{name}.txt"} for name in "abc"]
    stages = [{"share": 3, "rewards": ["text"], "sources": [1]}, {"share": 1, "rewards": ["text"]},
              {"share": 2, "rewards": ["text"], "sources": [0, 2]}]  # fmt: skip
    balancing = {"mode": "sequential", "stages": stages}
    run = config.build(
        config.Run, {"prompts": sources, "rewards": [{"name": "text"}], "epochs": 6, "balancing": balancing}
    )
    mixture = PromptMixture([[Prompt(f"{name}{n}") for n in range(60)] for name in "abc"])
    drawn = [{row // 60 for row in plan_epoch(run, mixture, epoch).rows} for epoch in range(6)]
    assert drawn == [{1}] * 3 + [{0, 1, 2}] + [{0, 2}] * 2


def test_noise_belongs_to_the_sample():
    plan = Epoch(2, (0,) * 6, 5)
    whole = plan.noise(range(6), (2, 3), torch.float32)
    assert torch.equal(plan.noise([4, 1], (2, 3), torch.float32), whole[[4, 1]])
    assert torch.equal(plan.noise([4], (2, 3), torch.float64).float(), whole[4:5])
    other = plan.training_noise([4], 0, (2, 3), torch.float32)
    assert not torch.equal(other, plan.training_noise([4], 1, (2, 3), torch.float32))
    assert len({float(row[0, 0]) for row in whole}) == 6
    many = keyed_noise((1000,), [(n,) for n in range(20)])
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03


def test_times_are_those_of_the_grid_each_once():
    plan = Epoch(0, (0,) * 4, 1)
    grid = torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64)
    times = plan.times(range(4), grid, 4)
    assert all(sorted(row.tolist(), reverse=True) == grid.tolist() for row in times)
    assert torch.equal(plan.times([2], grid, 2), times[2:3, :2])


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_updates_use_every_sample_once(count):
    parts = Epoch(0, tuple(range(7)), 1).updates(count)
    assert sorted(n for part in parts for n in part) == list(range(7))
    assert {len(part) for part in parts} <= {7 // count, -(-7 // count)}


@pytest.mark.parametrize(("size", "words"), [(1, "on 1 rank: 48 pictures"), (5, "on 5 ranks: 10 pictures")])
def test_the_batch_is_described_for_any_number_of_ranks(size, words):
    told = describe_batch(recipe("tiny"), size)
    assert told.startswith("8 prompts x 12 pictures = 96 an epoch, 2 updates of 48 pictures x 2 times; ")
    assert words in told


def test_prompts_of_the_world_are_different_and_depend_on_the_seed():
    source = config.Prompts(format="world", kind="text", count=64, rewards=("text",))
    prompts = load_source(source, 0)
    assert len({prompt.text for prompt in prompts}) == len(prompts) > 20
    assert all(prompt.rewards == ("text",) and prompt.target_text for prompt in prompts)
    assert load_source(source, 0) == prompts
    assert load_source(source, 1) != prompts
    assert len(load_mixture(recipe("tiny"))) > 200


def test_held_out_prompts_take_the_sources_in_turn(tmp_path):
    assert [p.text for p in interleaved([[Prompt("a"), Prompt("b")], [Prompt("c")]], 5)] == ["a", "c", "b", "c", "a"]
    assert interleaved([], 3) == []
    prompts = evaluation_prompts(recipe("tiny"), 8)
    assert [prompt.target_text is None for prompt in prompts] == [True, False] * 4
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    found = load_source(config.Prompts(path=str(tmp_path / "p.txt"), count=2), 0)
    assert [prompt.text for prompt in found] == ["one", "two"]
    with pytest.raises(InputError, match="cannot be read"):
        load_source(config.Prompts(path=str(tmp_path / "none.txt")), 0)
