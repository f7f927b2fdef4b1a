import dataclasses

import pytest
import torch
from torch import nn

from mogb_diffusion import config
from mogb_diffusion.errors import InputError
from mogb_diffusion.models import tiny
from mogb_diffusion.models.sd3 import SD3Model
from mogb_diffusion.policy import FullPolicy, LoraPolicy, make_policy

LORA = config.Policy(rank=4, alpha=16.0)


def make(kind="lora", dtype=torch.float32):
    pipeline = tiny.build(0)
    with torch.no_grad():
        for param in pipeline.transformer.parameters():
            if param.ndim >= 2 and float(param.abs().max()) == 0:
                param.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model = SD3Model(pipeline, dtype=dtype, max_sequence_length=1)
    return model, make_policy(model.transformer, dataclasses.replace(LORA, kind=kind), 5)


def velocity(model):
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model.velocity(latents, 0.4, model.encode(["a photo of a red square", "a photo of two blue circles"]))


def shake(policy, seed=2):
    with torch.no_grad():
        for param in policy.parameters:
            param += 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))


def only_current_trains(model, policy):
    mine = {id(param) for param in policy.parameters}
    return all(param.requires_grad == (id(param) in mine) for param in model.transformer.parameters())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_three_policies_are_what_they_say(kind):
    model, policy = make(kind)
    with torch.no_grad():
        start = velocity(model)
        shake(policy)
        if kind == "lora":  # B starts at zero: one shake of A and B makes a difference
            assert float((velocity(model) - start).abs().max()) > 1e-3
        with policy.old():
            assert torch.equal(velocity(model), start)
        policy.move_old(0.0)
        now = velocity(model)
        with policy.old():
            assert torch.equal(velocity(model), now)  # on policy, to the bit
        with policy.reference():
            assert torch.equal(velocity(model), start)
        assert torch.equal(velocity(model), now)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_only_the_current_policy_trains_after_every_switch(kind):
    model, policy = make(kind)
    assert only_current_trains(model, policy)
    for switch in (policy.old, policy.reference, policy.old):
        with switch(), torch.no_grad():
            velocity(model)
        assert only_current_trains(model, policy)
    with pytest.raises(KeyError), policy.old():
        raise KeyError
    assert only_current_trains(model, policy)
    velocity(model).square().sum().backward()
    assert all(param.grad is not None for param in policy.parameters)
    assert sum(param.grad is not None for param in model.transformer.parameters()) == len(policy.parameters)


def test_switches_do_not_nest():
    _, policy = make()
    with policy.old(), pytest.raises(RuntimeError, match="The old policy is active"), policy.reference():
        pass


def test_old_moves_by_the_decay():
    _, policy = make()
    before = [param.clone() for param in policy.old_parameters]
    shake(policy)
    policy.move_old(0.25)
    for old, start, now in zip(policy.old_parameters, before, policy.parameters, strict=True):
        torch.testing.assert_close(old, 0.25 * start + 0.75 * now)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_go_into_another_policy_and_no_other_fits(kind):
    model, policy = make(kind)
    shake(policy)
    policy.move_old(0.5)
    saved = {name: tensor.clone() for name, tensor in policy.tensors().items()}
    other_model, other = make(kind)
    other.load(saved)
    with torch.no_grad():
        assert torch.equal(velocity(other_model), velocity(model))
        with policy.old(), other.old():
            assert torch.equal(velocity(other_model), velocity(model))
    with pytest.raises(InputError, match="those of another policy"):
        other.load({"current.x": torch.zeros(1)})


def test_first_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    _, first = make()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    _, second = make()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, second.parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"policy.targets: no layer"):
        LoraPolicy(tiny.build(0).transformer, config.Policy(targets=("attention.q",)), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_trains_is_float32_or_wider(dtype):
    _, policy = make("lora", dtype)
    assert {param.dtype for param in policy.parameters} == {torch.promote_types(dtype, torch.float32)}
    assert {p.dtype for p in FullPolicy(nn.Module.to(tiny.build(0).transformer, dtype)).parameters} == {
        torch.promote_types(dtype, torch.float32)
    }


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_export_gives_equal_pictures_in_a_fresh_pipeline(kind, tmp_path):
    model, policy = make(kind)
    shake(policy)
    policy.export(model.pipeline, tmp_path)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt", "max_sequence_length": 1}
    texts = ["a photo of a red square", "a photo of two blue circles"]
    expected = model.pipeline(texts, latents=noise.clone(), **how).images
    pipeline = tiny.build(0)
    with torch.no_grad():
        for param in pipeline.transformer.parameters():
            if param.ndim >= 2 and float(param.abs().max()) == 0:
                param.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    base = pipeline(texts, latents=noise.clone(), **how).images
    if kind == "lora":
        pipeline.load_lora_weights(tmp_path)
    else:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(tmp_path, subfolder="transformer")
    found = pipeline(texts, latents=noise.clone(), **how).images
    assert torch.equal(found, expected)
    assert float((base - expected).abs().max()) > 0.05
