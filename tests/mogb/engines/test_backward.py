"""mogb.backward against gradients taken one by one, by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mogb
from mogb.base import JacobianAggregator


def two_bowls(scale: float = 1.0):
    point = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    first = (point - torch.tensor([3.0, 0.0])).square().sum()
    second = scale * (point + torch.tensor([1.0, 1.0])).square().sum()
    return point, [first, second]


def two_heads(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    trunk, left, right = nn.Linear(3, 4).double(), nn.Linear(4, 1).double(), nn.Linear(4, 1).double()
    for module in (trunk, left, right):
        for param in module.parameters():
            nn.init.normal_(param, generator=generator)
    inputs = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    hidden = torch.tanh(trunk(inputs))
    return trunk, left, right, [left(hidden).square().mean(), (right(hidden) - 1).square().mean()]


def rows_by_hand(losses, params):
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in grads])


@pytest.mark.parametrize("form", ["list", "tensor", "mapping"])
def test_the_direction_of_two_bowls_is_the_one_computed_by_hand(form):
    # At (1, 2) the gradients are (-4, 4) and (4, 6); |g1|^2 = 32, |g2|^2 = 52, g1.g2 = 8.
    # The min-norm weight of g1 is (52 - 8) / (32 + 52 - 16) = 44/68.
    point, losses = two_bowls()
    given = {"list": losses, "tensor": torch.stack(losses), "mapping": dict(zip("ab", losses, strict=True))}[form]
    report = mogb.backward(given, [point], mogb.make("mgda"))
    weight = 44 / 68
    assert_close(point.grad, torch.tensor([-4 * weight + 4 * (1 - weight), 4 * weight + 6 * (1 - weight)]).double())
    assert_close(report.weights, torch.tensor([weight, 1 - weight], dtype=torch.float64))
    assert_close(report.gramian, torch.tensor([[32.0, 8.0], [8.0, 52.0]], dtype=torch.float64))
    assert report.conflicts == 0
    assert report.backward_passes == 2
    assert report.names == (("a", "b") if form == "mapping" else None)


@pytest.mark.parametrize("name", mogb.registered())
def test_backward_equals_the_aggregator_on_the_stacked_gradients(name):
    trunk, _, _, losses = two_heads()
    params = list(trunk.parameters())
    jacobian = rows_by_hand(losses, params)
    values = torch.stack([loss.detach() for loss in losses])
    expected = mogb.make(name)(jacobian, values)
    mogb.backward(losses, trunk, mogb.make(name))
    assert_close(torch.cat([param.grad.flatten() for param in params]), expected)


@pytest.mark.parametrize("name", ["weighted_sum", "mgda", "graddrop"])
def test_heads_get_the_plain_gradient_and_the_trunk_the_balanced_one(name):
    trunk, left, right, losses = two_heads()
    plain = [
        torch.autograd.grad(losses[0], list(left.parameters()), retain_graph=True),
        torch.autograd.grad(losses[1], list(right.parameters()), retain_graph=True),
    ]
    shared = mogb.make(name)(rows_by_hand(losses, list(trunk.parameters())))
    mogb.backward(losses, None, mogb.make(name))
    for module, grads in zip((left, right), plain, strict=True):
        for param, grad in zip(module.parameters(), grads, strict=True):
            assert_close(param.grad, grad)
    assert_close(torch.cat([param.grad.flatten() for param in trunk.parameters()]), shared)


def test_a_head_whose_loss_has_weight_zero_still_gets_its_plain_gradient():
    _, _, right, losses = two_heads()
    expected = torch.autograd.grad(losses[1], list(right.parameters()), retain_graph=True)
    report = mogb.backward(losses, None, mogb.make("weighted_sum", weights=[1.0, 0.0]))
    assert_close([param.grad for param in right.parameters()], list(expected))
    assert report.backward_passes == 2


def test_the_direction_is_added_to_what_is_already_there():
    point, losses = two_bowls()
    point.grad = torch.tensor([10.0, 20.0], dtype=torch.float64)
    mogb.backward(losses, [point], mogb.make("weighted_sum", weights=[1.0, 1.0]))
    assert_close(point.grad, torch.tensor([10.0, 30.0], dtype=torch.float64))


def test_frozen_parameters_are_skipped():
    trunk, _, _, losses = two_heads()
    trunk.bias.requires_grad_(False)
    mogb.backward(losses, trunk, mogb.make("mgda"))
    assert trunk.bias.grad is None
    assert trunk.weight.grad is not None


@pytest.mark.parametrize("name", ["weighted_sum", "mgda"])
def test_a_parameter_that_no_loss_reaches_gets_a_zero_gradient(name):
    point, losses = two_bowls()
    unused = torch.ones(3, requires_grad=True)
    mogb.backward(losses, [point, unused], mogb.make(name))
    assert_close(unused.grad, torch.zeros(3))


def test_heads_in_half_precision_keep_their_plain_gradient_under_tiny_weights():
    # The gradient 1e-3 times the weight 1e-5 is zero in float16, and stays zero when divided again.
    head, trunk = (torch.ones(2, dtype=torch.float16, requires_grad=True) for _ in range(2))
    losses = [trunk.sum(), trunk.sum() + 1e-3 * head.sum()]
    mogb.backward(losses, None, mogb.make("weighted_sum", weights=[1.0, 1e-5]))
    assert_close(head.grad, torch.full((2,), 1e-3, dtype=torch.float16))


def test_a_custom_function_that_saves_a_variable_is_no_leaf():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = x.detach()
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    point = torch.ones(2, requires_grad=True)
    losses = [Scaled.apply(point).sum(), point.square().sum()]
    mogb.backward(losses, None, mogb.make("weighted_sum", weights=[1.0, 1.0]))
    assert_close(point.grad, torch.full((2,), 4.0))


def test_one_loss_alone_is_its_plain_gradient():
    point, losses = two_bowls()
    expected = torch.autograd.grad(losses[0], point, retain_graph=True)[0]
    mogb.backward(losses[:1], None, mogb.make("mgda"))
    assert_close(point.grad, expected)


def test_a_stack_is_differentiated_below_the_stack():
    """Through the stack, each of the K passes would run the graph of all K losses."""
    visits = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            visits.append(1)
            return grad

    point = torch.ones(3, requires_grad=True)
    losses = torch.stack([Counted.apply(point).sum() * (k + 1) for k in range(4)])
    mogb.backward(losses, [point], mogb.make("mgda"))
    assert len(visits) == 4


class TestReport:
    def test_counts_conflicting_pairs_and_names_the_worst_cosine(self):
        point = torch.zeros(2, requires_grad=True)
        rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]])
        report = mogb.backward(rows @ point, [point], mogb.make("weighted_sum", weights=[1.0, 1.0, 1.0]))
        assert report.gramian is None
        report = mogb.backward(rows @ point, [point], mogb.make("pcgrad", order="index"))
        assert report.conflicts == 1
        direction = report.weights.float() @ rows
        cosines = (rows @ direction) / rows.norm(dim=1) / direction.norm()
        assert report.min_cosine == pytest.approx(float(cosines.min()), abs=1e-6)

    def test_prints_as_one_line(self):
        point, losses = two_bowls()
        line = str(mogb.backward({"speed": losses[0], "range": losses[1]}, [point], mogb.make("mgda")))
        assert "speed" in line
        assert "range" in line
        assert "\n" not in line

    def test_jacobian_readers_report_cosines_too(self):
        point, losses = two_bowls()
        rows = rows_by_hand(losses, [point])
        agg = mogb.make("graddrop")
        assert isinstance(agg, JacobianAggregator)
        report = mogb.backward(losses, [point], agg)
        cosines = rows @ point.grad / rows.norm(dim=1) / point.grad.norm()
        assert report.weights is None
        assert_close(report.cosines, cosines)


class TestBadInput:
    def test_nan_loss_is_named_and_nothing_is_touched(self):
        point, losses = two_bowls()
        losses[1] = losses[1] * float("nan")
        with pytest.raises(mogb.NonFiniteError, match="objective 1") as caught:
            mogb.backward(losses, [point], mogb.make("mgda"))
        assert caught.value.index == 1
        assert point.grad is None

    @pytest.mark.parametrize("name", ["weighted_sum", "mgda", "graddrop"])
    def test_inf_gradient_of_a_finite_loss_is_named(self, name):
        point = torch.zeros(2, requires_grad=True)
        losses = {"fine": point.sum(), "root": point.sqrt().sum()}
        with pytest.raises(mogb.NonFiniteError, match="'root'") as caught:
            mogb.backward(losses, [point], mogb.make(name))
        assert caught.value.index == 1
        assert point.grad is None

    def test_a_freed_graph_hides_which_of_several_losses_was_bad_and_says_so(self):
        point = torch.zeros(2, requires_grad=True)
        losses = [point.square().sum(), point.sqrt().sum()]
        with pytest.raises(mogb.NonFiniteError, match="retain_graph=True") as caught:
            mogb.backward(losses, [point], mogb.make("weighted_sum"))
        assert caught.value.index is None
        losses = [point.square().sum(), point.sqrt().sum()]
        with pytest.raises(mogb.NonFiniteError, match="objective 1"):
            mogb.backward(losses, [point], mogb.make("weighted_sum"), retain_graph=True)
        assert point.grad is None

    def test_a_loss_that_reaches_no_parameter_is_named(self):
        point, losses = two_bowls()
        other = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match=r"losses\[1\] does not depend"):
            mogb.backward([losses[0], other.sum()], [point], mogb.make("mgda"))

    @pytest.mark.parametrize(
        ("losses", "error", "message"),
        [
            ([], ValueError, "empty"),
            (3.0, TypeError, "float"),
            ([torch.ones(())], ValueError, "carries no graph"),
            ([torch.ones(2, requires_grad=True)], ValueError, "one number"),
            (torch.ones(2, 2, requires_grad=True), ValueError, r"shape \[K\]"),
            ([torch.ones((), dtype=torch.int64)], TypeError, "floating-point"),
            (["loss"], TypeError, "must be a tensor"),
        ],
    )
    def test_losses_of_the_wrong_kind(self, losses, error, message, unchecked):
        with pytest.raises(error, match=message):
            mogb.backward(losses, [torch.ones(2, requires_grad=True)], mogb.make("mgda"))

    def test_parameters_of_the_wrong_kind(self, unchecked):
        point, losses = two_bowls()
        agg = mogb.make("mgda")
        with pytest.raises(ValueError, match="none requires a gradient"):
            mogb.backward(losses, [point.detach()], agg)
        with pytest.raises(ValueError, match="is empty"):
            mogb.backward(losses, [], agg)
        with pytest.raises(ValueError, match="no leaf"):
            mogb.backward(losses, [point * 2], agg)
        with pytest.raises(TypeError, match=r"write \[tensor\]"):
            mogb.backward(losses, point, agg)
        with pytest.raises(TypeError, match="complex"):
            mogb.backward(losses, [torch.ones(2, dtype=torch.complex64, requires_grad=True)], agg)
        with pytest.raises(TypeError, match="aggregator must be a method"):
            mogb.backward(losses, [point], "mgda")

    def test_sparse_gradients_are_refused(self):
        table = nn.Embedding(5, 2, sparse=True)
        out = table(torch.tensor([1, 2]))
        with pytest.raises(TypeError, match="sparse"):
            mogb.backward([out.sum(), out.square().sum()], table, mogb.make("mgda"))

    def test_a_freed_graph_is_an_error_and_nothing_is_touched(self):
        point, losses = two_bowls()
        losses[0].backward()
        point.grad = None
        with pytest.raises(RuntimeError, match="second time"):
            mogb.backward(losses, [point], mogb.make("mgda"))
        assert point.grad is None
