"""Weights that lie on the CPU between calls; the time that rewards take."""

import threading

import pytest
import torch
from torch import nn

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import load
from mogb_diffusion.rewards._weights import Weights
from mogb_diffusion.rewards.throughput import PROMPTS, examples, measure

META = torch.device("meta")  # a device apart from the CPU that every machine has; tensors there hold no numbers


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.again = self.inner[0]  # shared

    def devices(self):
        return {tensor.device.type for tensor in (*self.parameters(), *self.buffers())}


class TestOffload:
    def test_weights_are_on_the_device_while_they_are_used_and_come_back_as_they_were(self):
        network = Network()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        weights = Weights(network, META, offload=True)
        assert network.devices() == {"cpu"}
        with weights.on_device() as model:
            assert model is network
            assert network.devices() == {"meta"}
            assert network.again.weight is network.inner[0].weight
        assert network.devices() == {"cpu"}
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name])

    def test_without_it_they_stay_on_the_device(self):
        network = Network()
        weights = Weights(network, META)
        assert network.devices() == {"meta"}
        with weights.on_device():
            pass
        assert network.devices() == {"meta"}

    def test_they_leave_after_the_last_user(self):
        network = Network()
        weights = Weights(network, META, offload=True)
        inside, leave = threading.Event(), threading.Event()

        def other():
            with weights.on_device():
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        with weights.on_device(), weights.on_device():
            pass
        assert network.devices() == {"meta"}  # the other one is at work
        leave.set()
        thread.join(10)
        assert network.devices() == {"cpu"}

    def test_they_leave_when_a_call_fails(self):
        network = Network()
        weights = Weights(network, META, offload=True)
        with pytest.raises(ZeroDivisionError), weights.on_device():
            raise ZeroDivisionError
        assert network.devices() == {"cpu"}

    def test_a_full_device_is_left_empty(self, monkeypatch):
        network = Network()
        weights = Weights(network, META, offload=True)
        moved = []

        def to(tensor, device):
            moved.append(tensor)
            if len(moved) == 3:
                raise RuntimeError("out of memory")
            return torch.empty_like(tensor, device=device)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", to)
            with pytest.raises(RuntimeError, match="out of memory"), weights.on_device():
                pass
        assert network.devices() == {"cpu"}
        with weights.on_device():  # and can be tried again
            assert network.devices() == {"meta"}

    def test_weights_are_frozen(self):
        network = Weights(Network().train(), torch.device("cpu")).model
        assert not network.training
        assert not any(param.requires_grad for param in network.parameters())

    def test_another_value_is_refused(self):
        with pytest.raises(InputError, match="offload must be true or false, but got 'yes'"):
            Weights(Network(), META, offload="yes")


class TestThroughput:
    def test_it_is_that_of_the_second_call(self):
        calls = []

        def reward(images, prompts):
            calls.append((images, list(prompts)))
            return images.mean((1, 2, 3))

        found = measure(reward, pictures=3, seed=1)
        assert len(calls) == 2
        assert torch.equal(calls[0][0], calls[1][0])
        assert found.pictures_per_second == pytest.approx(3 / found.seconds)
        assert torch.equal(found.scores, calls[1][0].mean((1, 2, 3)))
        assert calls[0][1] == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]

    def test_the_pictures_are_those_of_the_seed_in_8_bits(self):
        first = examples(PROMPTS, 64, seed=1)
        assert first.shape == (2, 3, 64, 64)
        assert torch.equal(first, examples(PROMPTS, 64, seed=1))
        assert not torch.equal(first, examples(PROMPTS, 64, seed=2))
        assert torch.equal(first, (first * 255).round() / 255)

    @pytest.mark.parametrize("name", ["preference", "aesthetic", "alignment", "text", "composition"])
    def test_every_reward_of_the_world_gets_pictures_that_it_applies_to(self, name):
        found = measure(load(f"world_{name}"), pictures=5)
        assert found.scores.shape == (5,)
        assert found.scores.isfinite().all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pictures": 0}, "pictures must be a positive whole number, but got 0"),
            ({"prompts": [Prompt("a cat")]}, "applies to none of the prompts"),
        ],
    )
    def test_what_cannot_be_measured_is_said(self, options, message):
        with pytest.raises(InputError, match=message):
            measure(load("world_text"), **options)
