"""Groups of parameters that are balanced apart."""

import pytest
import torch
from engine_models import batch, losses_of, residual, rows_by_hand
from torch.testing import assert_close

import mogb


def layers(net):
    """The names of the layers that own parameters, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in net.named_parameters()))


@pytest.mark.parametrize("name", ["mgda", "upgrad", "cagrad", "krum"])
@pytest.mark.parametrize("groups", ["module", "matrix", "list", "mapping"])
def test_each_group_is_balanced_by_its_own_gradients(name, groups):
    net = residual(depth=2)
    losses = losses_of(net, *batch())
    by_layer = {layer: list(net.get_submodule(layer).parameters()) for layer in layers(net)}
    expected_groups = {
        "module": by_layer,
        "matrix": {name: [param] for name, param in net.named_parameters()},
        "list": {"groups[0]": list(net[:2].parameters()), "groups[1]": list(net[2:].parameters())},
        "mapping": {"top": list(net[2:].parameters()), "bottom": list(net[:2].parameters())},
    }[groups]
    given = {"list": [net[:2], list(net[2:].parameters())], "mapping": {"top": net[2:], "bottom": net[:2]}}
    expected = {}
    for group, params in expected_groups.items():
        rows = rows_by_hand(losses, params)
        expected[group] = (rows @ rows.T, mogb.make(name)(rows))
    report = mogb.backward(losses_of(net, *batch()), net, mogb.make(name), groups=given.get(groups, groups))
    assert set(report.groups) == set(expected_groups)
    for group, params in expected_groups.items():
        gramian, direction = expected[group]
        assert_close(torch.cat([param.grad.flatten() for param in params]), direction, rtol=1e-8, atol=1e-11)
        assert_close(report.groups[group].gramian, gramian)
    assert report.backward_passes == 3


def test_the_report_of_the_whole_is_about_the_whole_direction():
    net = residual(depth=2)
    rows = rows_by_hand(losses_of(net, *batch()), list(net.parameters()))
    report = mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda"), groups="module")
    direction = torch.cat([param.grad.flatten() for param in net.parameters()])
    cosines = rows @ direction / rows.norm(dim=1) / direction.norm()
    assert report.weights is None
    assert_close(report.gramian, rows @ rows.T)
    assert_close(report.cosines, cosines)
    assert report.min_cosine == pytest.approx(float(cosines.min()))


def test_one_group_of_everything_is_the_whole():
    net = residual(depth=1)
    mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"))
    expected = [param.grad.clone() for param in net.parameters()]
    net.zero_grad()
    mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"), groups=[net])
    assert_close([param.grad for param in net.parameters()], expected, rtol=0, atol=0)


def test_heads_that_belong_to_no_group_get_their_plain_gradient():
    net, left, right = residual(depth=1), *(torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = net(batch()[0])
    losses = [(out * left).square().mean(), (out * right).square().mean()]
    plain = torch.autograd.grad(losses[0], left, retain_graph=True)[0]
    mogb.backward(losses, None, mogb.make("mgda"), groups=[net[0], net[1:]])
    assert_close(left.grad, plain)


def test_each_group_has_its_own_state():
    net = residual(depth=1)
    balancer = mogb.Balancer(mogb.make("marble", decay=0.5), net, groups=[net[0], net[1:]])
    first = balancer.backward(losses_of(net, *batch()))
    second = balancer.backward(losses_of(net, *batch(seed=2)))
    for part, group in ((net[0], "groups[0]"), (net[1:], "groups[1]")):
        alone = mogb.make("marble", decay=0.5)
        for seed, report in ((1, first), (2, second)):
            rows = rows_by_hand(losses_of(net, *batch(seed=seed)), list(part.parameters()))
            assert_close(report.groups[group].weights, alone.weights(rows @ rows.T), rtol=1e-7, atol=1e-10)
    other = mogb.Balancer(mogb.make("marble", decay=0.5), net, groups=[net[0], net[1:]])
    other.load_state_dict(balancer.state_dict())
    assert other.state_dict().keys() == balancer.state_dict().keys()
    assert any(key.startswith("groups.groups[1]:") for key in balancer.state_dict())


def test_a_failed_step_leaves_the_state_of_every_group():
    net = residual(depth=1)
    balancer = mogb.Balancer(mogb.make("marble"), net, groups="matrix")
    balancer.backward(losses_of(net, *batch()))
    before = balancer.state_dict()
    last = net[2].bias.sum() - net[2].bias.sum().detach()
    with pytest.raises(mogb.NonFiniteError):  # of the last group alone
        balancer.backward(losses_of(net, *batch(seed=2)) + last.sqrt())
    after = balancer.state_dict()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)


def test_methods_that_read_losses_give_all_groups_the_same_weights():
    net = residual(depth=1)
    report = mogb.backward(losses_of(net, *batch()), net, mogb.make("weighted_sum"), groups="module")
    assert (report.backward_passes, report.engine) == (1, "weighted")


class TestRefusals:
    def test_groups_that_do_not_fit(self, unchecked):
        net = residual(depth=1)
        losses, method = losses_of(net, *batch()), mogb.make("mgda")
        with pytest.raises(ValueError, match="must be 'whole', 'module', 'matrix'"):
            mogb.backward(losses, net, method, groups="layer")
        with pytest.raises(ValueError, match="pass params=module"):
            mogb.backward(losses, list(net.parameters()), method, groups="module")
        with pytest.raises(ValueError, match="must not overlap"):
            mogb.backward(losses, net, method, groups=[net, net[0]])
        with pytest.raises(ValueError, match="belongs to no group"):
            mogb.backward(losses, net, method, groups=[net[0]])
        with pytest.raises(ValueError, match="groups is empty"):
            mogb.backward(losses, net, method, groups=[])

    def test_states_need_a_balancer(self):
        net = residual(depth=1)
        for name in ("marble", "pcgrad", "gradnorm"):
            with pytest.raises(ValueError, match=r"use mogb\.Balancer"):
                mogb.backward(losses_of(net, *batch()), net, mogb.make(name), groups="module")

    def test_what_one_set_of_weights_is_needed_for(self):
        net = residual(depth=1)
        with pytest.raises(ValueError, match="refresh_every=1"):
            mogb.Balancer(mogb.make("mgda"), net, groups="module", refresh_every=2)
        with pytest.raises(ValueError, match="one set per group"):
            mogb.Balancer(mogb.make("mgda"), net, groups="module", engine="streaming")
