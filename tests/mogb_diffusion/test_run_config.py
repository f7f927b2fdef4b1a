import dataclasses

import pytest

from mogb_diffusion.config import Balancing, Batch, ConfigError, Run, from_yaml, load_run, override, to_yaml
from mogb_diffusion.errors import InputError
from mogb_diffusion.recipes import RECIPES, recipe

BAD = {
    "epochs=-1": "epochs: must be a whole number >= 0",
    "epochs=ten": "epochs: must be a whole number",
    "epochs=true": "epochs: must be a whole number",
    "epoch=3": "epoch: unknown key. Did you mean 'epochs'?",
    "seed=-1": "seed: must be a whole number >= 0",
    "model.dtype=fp8": "model.dtype: must be one of float32",
    "model.sorce=x": "model.sorce: unknown key. Did you mean 'source'?",
    "model.resolution=0": "model.resolution: must be a whole number >= 1",
    "model=3": "model: must hold keys and values",
    "policy.kind=adapter": "policy.kind: must be one of lora, full",
    "policy.rank=0": "policy.rank: must be a whole number >= 1",
    "policy.ema=1": "policy.ema: must be in [0, 1)",
    "policy.old_hold=1.5": "policy.old_hold: must be in [0, 1]",
    "policy.targets=[]": "policy.targets: must name at least one layer",
    "policy.targets=attn": "policy.targets: must be a list",
    "prompts=[]": "prompts: must name at least one source",
    "prompts.0.weight=0": "prompts.0.weight: must be a number > 0",
    "prompts.7.weight=1": "prompts.7: must be a number from 0 to 1",
    "prompts.0.rewards=[beauty]": "prompts.0.rewards: names no reward of this run",
    "prompts.0.path=a.txt": "prompts.0.path: must name a file, or be left out",
    "rewards.0.label=text": "rewards: must have different names",
    "rewards.0.batch_size=0": "rewards.0.batch_size: must be a whole number >= 1",
    "batch.images_per_prompt=1": "batch.images_per_prompt: must be at least 2",
    "batch.micro_batch=0": "batch.micro_batch: must be a whole number >= 1",
    "batch.updates_per_epoch=1000": "batch.updates_per_epoch: must not exceed the 96 pictures",
    "batch.timesteps=9": "batch.timesteps: must not exceed the 8 times",
    "sampling.solver=heun": "sampling.solver: must be one of euler, dpm2",
    "sampling.guidance=0.5": "sampling.guidance: must be a number >= 1",
    "loss.beta=0": "loss.beta: must be a number > 0",
    "loss.beta=.nan": "loss.beta: must be a finite number",
    "loss.kl_weight=-1": "loss.kl_weight: must be a number >= 0",
    "balancing.mode=marbel": "balancing.mode: there is no balancing mode 'marbel'. Did you mean 'marble'?",
    "balancing.mode=single": "balancing.mode: single needs the name of a reward",
    "balancing.mode=single:beauty": "balancing.mode: names no reward of this run",
    "balancing.mode=sequential": "balancing.stages: belong to mode: sequential, which needs at least one",
    "balancing={mode: sequential, stages: [{share: 1, rewards: [text], sources: [2]}]}": (
        "balancing.stages.0.sources: must be numbers of sources in prompts, 0 to 1"
    ),
    "balancing={mode: sequential, stages: [{share: 1, rewards: [text], sources: []}]}": (
        "balancing.stages.0.sources: must name at least one source"
    ),
    "balancing.normalize=1": "balancing.normalize: must be true or false",
    "balancing={mode: upgrad, normalize: false}": "balancing.normalize: false means nothing in mode: upgrad",
    "balancing={mode: marble_script, normalize: false}": "balancing.normalize: false means nothing in mode: marble_sc",
    "balancing.alpha={text: 1}": "balancing.alpha: belongs to mode: fixed",
    "balancing.decay=1": "balancing.decay: must be in [0, 1)",
    "balancing.refresh_every=10": "balancing.refresh_every: must be 1 or left out in mode: marble_exact",
    "balancing.options={c: 1}": "balancing.options: are those of a method of mogb",
    "balancing.fraction=0": "balancing.fraction: must be in (0, 1]",
    "balancing.coefficients=raw": "balancing.coefficients: 'raw' belongs to modes",
    "optimizer.lr=0": "optimizer.lr: must be a number > 0",
    "optimizer.betas=[0.9]": "optimizer.betas: must be two numbers in [0, 1)",
    "scoring.timeout=0": "scoring.timeout: must be a number > 0",
    "checkpoints.keep_last=-1": "checkpoints.keep_last: must be a whole number >= 0",
    "tracking.tensorboard=1": "tracking.tensorboard: must be true or false",
    "loss.beta=[": "--set loss.beta: this is no YAML",
    "loss.beta": "--set loss.beta: must have the form key.key=value",
}


@pytest.mark.parametrize("assignment", list(BAD))
def test_bad_values_are_one_line_with_the_path_of_the_key(assignment):
    with pytest.raises(InputError) as caught:
        load_run("tiny", [assignment])
    assert str(caught.value).startswith(BAD[assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_yaml(name):
    run = recipe(name)
    assert run.name == name
    assert from_yaml(to_yaml(run)) == run


def test_files_start_from_a_recipe_and_take_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: tiny\nepochs: 3\nloss: {beta: 1e-1}\nbatch:\n  groups: 4\n")
    run = load_run(
        str(path), ["batch.micro_batch=5", "rewards.1.weight=2", "balancing={mode: cagrad, options: {c: 0.2}}"]
    )
    tiny = recipe("tiny")
    assert (run.epochs, run.loss.beta, run.batch.groups, run.batch.micro_batch) == (3, 0.1, 4, 5)
    assert run.batch.images_per_prompt == tiny.batch.images_per_prompt
    assert run.rewards[1] == dataclasses.replace(tiny.rewards[1], weight=2.0)
    assert run.balancing == Balancing(mode="cagrad", options={"c": 0.2})


def test_files_that_are_none_are_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    for text, words in (
        ("a: [", "this is no YAML"),
        ("- 1\n- 2\n", "must be keys and values"),
        ("batch: {groups: 0}\n", "batch.groups: must be a whole number >= 1"),
        ("rewards: [{weight: 1}]\n", "rewards.0.name: is missing"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words) as caught:
            load_run(str(path))
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_run(str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"no recipe 'tinny', and a file must end in .yaml.* Did you mean 'tiny'"):
        load_run("tinny")
    path.write_text("recipe: nothing\n")
    with pytest.raises(InputError, match="no recipe 'nothing'"):
        load_run(str(path))


def test_mistakes_in_python_are_refused_too():
    with pytest.raises(ConfigError, match="images_per_prompt: must be at least 2"):
        Batch(images_per_prompt=1)
    with pytest.raises(ConfigError, match="prompts: must name at least one source"):
        Run()


def test_derived_values_follow_the_mode():
    assert [Balancing(mode=mode).solved_on for mode in ("marble_exact", "marble_every_step", "marble", "cagrad")] == [
        "slope", "full", "slope", "slope",
    ]  # fmt: skip
    assert [Balancing(mode=mode).interval for mode in ("marble", "marble_exact", "upgrad")] == [10, 1, 1]
    assert [Balancing(mode=mode).averaging for mode in ("marble", "marble_spread", "marble_exact")] == [0.7, 0.7, 0.0]
    assert recipe("sd35_marble").trained_timesteps == 24  # DiffusionNFT: int(25 * 0.99)
    assert override(recipe("sd35_marble"), ["sampling.steps=10"]).trained_timesteps == 9
