"""The per-sample engine against K ordinary backward passes."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import mogb
from mogb.engines.per_sample import FactoredJacobian, PerSample, PerSampleError, gram
from mogb.engines.per_sample.contributions import Outer
from mogb.jacobian import Jacobian

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.before, self.after = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.before(x))
        return x + self.feed(self.after(x))


class Transformer(nn.Module):
    """Tokens in, a vector per token out."""

    def __init__(self, width: int = 8, depth: int = 2, dropout: float = 0.0, recompute: bool | str = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            if self.recompute == "tape" and torch.is_grad_enabled():
                x = self.engine.checkpoint(block, x)
            elif self.recompute:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x))


def with_lora(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            for name in ("query", "key", "value", "out"):
                setattr(module, name, Lora(getattr(module, name)))
    return model


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)
        )
        self.down = nn.Conv2d(4, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


class Tied(nn.Module):
    """The table of the embedding is the matrix of the head, and one layer is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(3):
            x = torch.tanh(self.middle(x))
        return self.head(x)


def tokens(generator, samples, vocabulary=11):
    return torch.randint(vocabulary, (samples, 5), generator=generator)


MODELS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        lambda g, b: torch.randn(b, 6, generator=g, dtype=torch.float64),
    ),
    "cnn": lambda: (Convolutional(), lambda g, b: torch.randn(b, 2, 6, 6, generator=g, dtype=torch.float64)),
    "transformer": lambda: (Transformer(), tokens),
    "lora": lambda: (with_lora(Transformer()), tokens),
    "checkpointed lora": lambda: (with_lora(Transformer(recompute=True)), tokens),
    "dropout": lambda: (Transformer(dropout=0.5), tokens),
    "taped lora": lambda: (with_lora(Transformer(recompute="tape")), tokens),
    "taped dropout": lambda: (Transformer(dropout=0.5, recompute="tape"), tokens),
    "checkpointed dropout": lambda: (Transformer(dropout=0.5, recompute=True), tokens),
    "tied": lambda: (Tied(), lambda g, b: tokens(g, b, 7)),
}


def make(name, dtype=torch.float64, samples=4, seed=0):
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    x = inputs(torch.Generator().manual_seed(seed), samples)
    return model.to(dtype), x.to(dtype) if x.is_floating_point() else x


def two_terms(output, step=0.3):
    """Squared distances to a target, of points on either side of the output of an old policy."""
    v = output.double()
    generator = torch.Generator().manual_seed(5)
    old = v.detach() + 0.2 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
    target = torch.randn(v.shape, generator=generator, dtype=v.dtype)
    near, far = old + step * (v - old), old - step * (v - old)
    return torch.stack([(near - target).flatten(1).square().mean(1), (far - target).flatten(1).square().mean(1)], 1)


def coefficients(objectives, samples, terms=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(objectives, samples, terms, generator=generator, dtype=torch.float64)
    share[:, :, 1:2] = 1 - share[:, :, :1]
    return share / samples


def k_backward_passes(terms, weights, params):
    """What the engine is compared with: one ordinary backward pass per objective."""
    losses = torch.einsum("kbj,bj->k", weights.to(terms.dtype), terms)
    rows = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
    return [
        torch.stack([torch.zeros_like(param) if row[n] is None else row[n] for row in rows])
        for n, param in enumerate(params)
    ]


def deviation(jacobian, truth):
    """The largest deviation of an entry, relative to the largest entry of its gradient."""
    found = torch.cat([block.flatten(1) for block in jacobian.blocks], 1)
    exact = torch.cat([block.flatten(1) for block in truth], 1)
    return float(((found - exact).abs().amax(1) / exact.abs().amax(1)).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("store", ["dense", "factored"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_one_backward_pass_per_objective(name, store, dtype):
    model, x = make(name, dtype)
    weights = coefficients(5, len(x))
    with PerSample(model, on_failure="error") as engine:
        object.__setattr__(model, "engine", engine)
        for _ in range(2):  # the first one with the self-check, the second one without
            terms = two_terms(model(x))
            truth = k_backward_passes(terms, weights, engine.params)
            jacobian = engine.gradients(terms, weights, store=store)
            assert deviation(jacobian, truth) <= TOLERANCE[dtype]
    assert engine.report.passes == engine.report.rank == 2
    assert len(jacobian) == 5
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_gramians_equal_those_of_one_backward_pass_per_objective(name, dtype):
    model, x = make(name, dtype)
    weights = coefficients(5, len(x))
    with PerSample(model, on_failure="error") as engine:
        object.__setattr__(model, "engine", engine)
        for _ in range(2):
            terms = two_terms(model(x))
            rows = torch.cat([row.flatten(1) for row in k_backward_passes(terms, weights, engine.params)], 1).double()
            gramian = engine.gramian(terms, weights)
            truth = (rows @ rows.T).numpy()
            lengths = np.sqrt(truth.diagonal())
            assert np.abs((gramian - truth) / np.outer(lengths, lengths)).max() <= TOLERANCE[dtype]
    assert engine.report.store == "gramian"


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_gramian_of_a_matrix_is_the_same_by_tokens_and_by_rows(tokens, monkeypatch):
    # One token a sample: inner products of tokens are cheaper. Forty tokens and a small matrix: forming it is.
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(7, tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = coefficients(3, 7, 1)
    found = []
    for by_tokens in (False, True):
        monkeypatch.setattr("mogb.engines.per_sample.gram._tokens_are_cheaper", lambda outers, by=by_tokens: by)
        with PerSample(model) as engine:
            found.append(engine.gramian(torch.sin(model(x)).sum((1, 2)), weights))
    assert np.abs(found[0] - found[1]).max() <= 1e-13 * np.abs(found[0]).max()
    monkeypatch.undo()
    parts = [[(0, Outer(torch.randn(7, tokens, 6), torch.randn(7, tokens, 5)))]]
    assert gram._tokens_are_cheaper([parts[0][0][1]]) == (tokens == 1)


def test_autocast_is_no_less_accurate_than_one_backward_pass_per_objective():
    model, x = make("lora", torch.float32, samples=8)
    weights = coefficients(5, 8)
    reference = k_backward_passes(two_terms(model(x)), weights, [p for p in model.parameters() if p.requires_grad])
    exact = torch.cat([row.flatten(1) for row in reference], 1)

    def error(rows):
        found = torch.cat([row.flatten(1) for row in rows], 1)
        return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())

    with PerSample(model, on_failure="error") as engine:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        terms = two_terms(output)
        ordinary = error(k_backward_passes(terms, weights, engine.params))
        jacobian = engine.gradients(terms, weights)
    assert all(block.dtype == torch.float32 for block in jacobian.blocks)
    assert 1e-4 < error(jacobian.blocks) <= 1.1 * ordinary


def test_half_precision_parameters_get_float32_rows():
    model = nn.Linear(4, 3).bfloat16()
    with PerSample(model, on_failure="error") as engine:
        jacobian = engine.gradients(model(torch.randn(5, 4).bfloat16()).float().sum(1), torch.eye(5))
    assert [block.dtype for block in jacobian.blocks] == [torch.float32] * 2


# How few passes


def passes_for(terms_of, name="transformer", dtype=torch.float64, objectives=5, **options):
    model, x = make(name, dtype)
    engine = PerSample(model, self_check="off").attach()
    terms = terms_of(model(x))
    weights = coefficients(objectives, len(x), terms.shape[1])
    truth = k_backward_passes(terms, weights, engine.params)
    jacobian = engine.gradients(terms, weights, **options)
    engine.detach()
    return engine.report, deviation(jacobian, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parallel_terms_cost_one_pass(dtype):
    # On the policy's own output, both points move along the same line: the cotangents are p and -p, up to rounding.
    def at_the_old_policy(v):
        old, target = v.detach(), torch.ones_like(v)
        near, far = old + 0.3 * (v - old), old - 0.3 * (v - old)
        return torch.stack([(near - target).flatten(1).square().mean(1), (far - target).flatten(1).square().mean(1)], 1)

    report, error = passes_for(at_the_old_policy, dtype=dtype)
    assert (report.rank, report.passes) == (1, 1)
    assert error <= TOLERANCE[dtype]


def test_functions_of_one_number_per_sample_cost_one_pass_however_many_there_are():
    def terms(v):
        ratio = v.flatten(1).mean(1)
        return torch.stack([ratio.clamp(max=0.1), ratio.clamp(min=-0.1), ratio.exp(), 0 * ratio, ratio.square()], 1)

    report, error = passes_for(terms, objectives=7)
    assert report.rank == 1
    assert error <= 1e-12


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_nearly_parallel_terms_are_not_taken_for_parallel(gap):
    def terms(v):
        wave = torch.sin(torch.arange(v[0].numel(), dtype=v.dtype))
        first, second = v.flatten(1).square().sum(1), (v.flatten(1) * wave).sum(1)
        return torch.stack([first, -first + gap * second], 1)

    # The difference of the terms is all that the coefficients keep: a dropped part of it would be an error of 1.
    model, x = make("transformer")
    engine = PerSample(model, self_check="off").attach()
    found = terms(model(x))
    weights = torch.rand(5, len(x), 1, dtype=torch.float64).expand(-1, -1, 2)
    truth = k_backward_passes(found, weights, engine.params)
    assert deviation(engine.gradients(found, weights), truth) <= 1e-10 / gap * 1e-2
    assert engine.report.rank == 2


def test_an_explicit_basis_is_used_and_a_vanishing_combination_is_left_out():
    basis = torch.tensor([[0.5, -0.5], [0.5, 0.5]])
    report, error = passes_for(two_terms, basis=basis)
    assert report.rank == 2
    assert error <= 1e-12
    report, error = passes_for(lambda v: torch.stack([v.flatten(1).sum(1), -v.flatten(1).sum(1)], 1), basis=basis)
    assert report.rank == 1
    assert error <= 1e-12


def test_a_basis_must_span_the_coefficients():
    with pytest.raises(ValueError, match="does not span the coefficients"):
        passes_for(two_terms, basis=torch.tensor([[1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"\[R, J\] = \[R, 2\]"):
        passes_for(two_terms, basis=torch.eye(3))


def test_a_basis_that_spans_only_the_coefficients_passes_the_self_check():
    model, x = make("lora")
    weights = torch.rand(5, 4, 1, dtype=torch.float64) * torch.tensor([1.0, -1.0], dtype=torch.float64)
    with PerSample(model, on_failure="error") as engine:
        terms = two_terms(model(x))
        truth = k_backward_passes(terms, weights, engine.params)
        assert deviation(engine.gradients(terms, weights, basis=torch.tensor([[1.0, -1.0]])), truth) <= 1e-12
    assert engine.report.rank == 1
    assert engine.report.check_error < 1e-12


def test_terms_that_bypass_the_output_of_the_model_are_taken_as_they_are():
    model, x = make("tied")
    with PerSample(model, on_failure="error") as engine:
        regularized = model(x).flatten(1).sum(1) + torch.tanh(model.middle(torch.ones(4, 4).double())).sum(1)
        terms = torch.stack([regularized, -regularized], 1)
        truth = k_backward_passes(terms, coefficients(3, 4), engine.params)
        assert deviation(engine.gradients(terms, coefficients(3, 4)), truth) <= 1e-12
    assert engine.report.rank == 2


def test_k_backward_passes_are_used_where_they_are_not_more():
    report, error = passes_for(two_terms, objectives=2)
    assert (report.passes, report.rank, report.reason) == (2, None, "")
    assert error <= 1e-12


def test_a_zero_gradient_is_zero():
    report, _ = passes_for(lambda v: 0 * torch.stack([v.sum((1, 2)), v.sum((1, 2))], 1) + 0 * v.sum())
    assert report.rank == 1


# Rows, dense and factored


def test_rows_are_factored_where_samples_are_fewer_than_objectives():
    for objectives, store in ((8, "dense"), (9, "factored")):
        assert passes_for(two_terms, objectives=objectives)[0].store == store


def test_factored_rows_answer_as_dense_ones_do():
    model, x = make("transformer")
    weights = coefficients(11, len(x))
    with PerSample(model) as engine:
        terms = two_terms(model(x))
        dense = engine.gradients(terms, weights, store="dense", retain_graph=True)
        factored = engine.gradients(terms, weights)
    assert isinstance(factored, FactoredJacobian)
    assert len(factored) == len(dense) == 11
    mixture = np.random.default_rng(0).standard_normal(11)
    assert np.allclose(factored.gramian(), dense.gramian(), rtol=1e-12, atol=1e-13)
    assert_close(factored.combine(mixture), dense.combine(mixture), rtol=1e-10, atol=1e-12)
    assert np.allclose(factored.products(dense.combine(mixture)), dense.products(dense.combine(mixture)), rtol=1e-10)
    assert_close(factored.map(lambda rows: rows.amax(0)), dense.map(lambda rows: rows.amax(0)), rtol=1e-10, atol=1e-12)
    assert_close(factored.dense().blocks, dense.blocks, rtol=1e-10, atol=1e-12)
    assert factored.first_non_finite() is None
    factored.basis.blocks[0][3, 0] = torch.nan
    assert factored.first_non_finite() == 0
    with pytest.raises(TypeError, match="store='dense'"):
        factored + dense


def test_micro_batches_add_up_to_the_batch():
    model, x = make("lora", samples=9)
    weights = coefficients(5, 9)
    with PerSample(model) as engine:
        whole = k_backward_passes(plain(model(x)), weights, engine.params)
        rows = None
        for part in (slice(0, 4), slice(4, 8), slice(8, 9)):
            rows = engine.gradients(plain(model(x[part])), weights[:, part], add_to=rows, store="dense")
        assert deviation(rows, whole) <= 1e-12


@pytest.mark.parametrize("name", ["lora", "mlp"])
@pytest.mark.parametrize("second", [[4], [0], [1, 3], [0, 4]], ids=str)
def test_objectives_that_a_pass_says_nothing_about_are_left_alone(name, second, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    model, x = make(name, samples=9)
    weights = coefficients(5, 9)
    weights[[k for k in range(5) if k not in second], :, 1] = 0
    weights[[0, 2], :, 0] = 0
    with PerSample(model, self_check="off") as engine:
        whole = k_backward_passes(two_terms(model(x)), weights, engine.params)
        once = engine.gradients(two_terms(model(x)), weights, basis="terms", store="dense")
        twice = engine.gradients(two_terms(model(x)), weights, basis="terms", store="dense", add_to=once)
        assert engine.report.passes == 2
    for found, exact in zip(twice.blocks, whole, strict=True):
        assert_close(found, 2 * exact, rtol=1e-11, atol=1e-13)


def test_rows_of_micro_batches_add_up_in_place():
    model, x = make("mlp")
    with PerSample(model) as engine:
        engine.gradients(model(x).sum(1), coefficients(3, 4, 1))
        first = engine.gradients(model(x).sum(1), coefficients(3, 4, 1))
        kept = first.blocks[0]
        before = kept.clone()
        again = engine.gradients(model(x).sum(1), coefficients(3, 4, 1), add_to=first)
        assert again.blocks[0].data_ptr() == kept.data_ptr()
        assert_close(kept, 2 * before)
        with pytest.raises(ValueError, match="only in the dense form"):
            engine.gradients(model(x).sum(1), coefficients(3, 4, 1), add_to=first, store="factored")
        with pytest.raises(ValueError, match="does not fit 5 objectives"):
            engine.gradients(model(x).sum(1), coefficients(5, 4, 1), add_to=first)


# What does not split, and is found


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden - 0.5 * hidden.mean(0))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return F.linear(
            torch.tanh(F.linear(self.first(x), self.first.weight.T)) @ self.first.weight.T, self.last.weight
        )


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.first(x) * self.scale


class Positions(nn.Module):
    """The positions are looked up once and broadcast; there happen to be as many as samples."""

    def __init__(self, length=4):
        super().__init__()
        self.first, self.position = nn.Linear(6, 3), nn.Embedding(length, 3)

    def forward(self, x):
        return self.first(x)[:, None] * self.position(torch.arange(self.position.num_embeddings))


class Called(nn.Module):
    """Calls the forward method of a layer instead of the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first.forward(x)))


def plain(output):
    return torch.stack([output.flatten(1).square().sum(1), torch.sin(output).flatten(1).sum(1)], 1)


def contrastive(output):
    similarity = output.flatten(1) @ output.flatten(1).T
    return torch.stack([torch.logsumexp(similarity, 1), similarity.diagonal()], 1)


FAULTS = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), plain),
    "frozen batch norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)),
        plain,
    ),
    "centred batch": (Centred, plain),
    "contrastive terms": (lambda: nn.Linear(6, 3), contrastive),
    "functional use": (Functional, plain),
    "raw parameter": (Raw, plain),
    "as many positions as samples": (Positions, plain),
    "fewer positions than samples": (lambda: Positions(3), plain),
    "twice as many positions": (lambda: Positions(8), plain),
    "forward method": (Called, plain),
    "reshaped across samples": (
        lambda: nn.Sequential(
            nn.Linear(6, 4),
            nn.Flatten(0),
            nn.Unflatten(0, (8, 2)),
            nn.Linear(2, 3),
            nn.Flatten(0),
            nn.Unflatten(0, (6, 4)),
            nn.Flatten(0),
            nn.Unflatten(0, (4, 6)),
        ),
        contrastive,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("method", ["gradients", "gramian"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_does_not_split_is_found_and_done_in_ordinary_passes(name, method, dtype):
    torch.manual_seed(0)
    make_model, loss = FAULTS[name]
    model = make_model().to(dtype)
    x = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    weights = coefficients(5, 4)
    engine = PerSample(model).attach()
    for attempt in range(2):
        terms = loss(model(x))
        truth = k_backward_passes(terms, weights, engine.params)
        if attempt == 0 and "batch norm" not in name:
            with pytest.warns(UserWarning, match="falls back to one backward pass per objective"):
                found = getattr(engine, method)(terms, weights)
        else:
            found = getattr(engine, method)(terms, weights)
        rows = torch.cat([row.flatten(1) for row in truth], 1).double()
        gramian = (rows @ rows.T).numpy()
        if method == "gradients":
            assert deviation(found, truth) <= TOLERANCE[dtype]
        else:
            assert np.allclose(found, gramian, rtol=0, atol=TOLERANCE[dtype] * gramian.max())
        assert engine.report.reason
        assert (engine.report.passes, engine.report.rank) == (5, None)


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_split_is_an_error_on_request(name):
    make_model, loss = FAULTS[name]
    model = make_model()
    engine = PerSample(model, on_failure="error").attach()
    for _ in range(2):
        with pytest.raises(PerSampleError):
            engine.gradients(loss(model(torch.randn(4, 6))), coefficients(5, 4))


def test_the_self_check_names_the_parameter_and_the_remedy():
    model = Called()
    engine = PerSample(model, on_failure="error").attach()
    with pytest.raises(PerSampleError, match=r"worst: first\.weight .* outside of the forward pass of its own layer"):
        engine.gradients(plain(model(torch.randn(4, 6))), coefficients(5, 4))
    assert engine.unsupported == {}
    raw = PerSample(Raw())
    assert raw.unsupported == {"scale": "it belongs to the model itself, which also holds layers with parameters"}


def test_the_self_check_runs_for_new_layers_and_batch_sizes_only():
    model, x = make("mlp", samples=6)
    with PerSample(model) as engine:
        spent = []
        for samples in (4, 4, 6, 4):
            engine.gradients(two_terms(model(x[:samples])), coefficients(5, samples))
            spent.append(engine.report.passes)
        assert spent == [3, 2, 3, 2]
    for setting, expected in (("always", [3, 3]), ("off", [2, 2])):
        with PerSample(model, self_check=setting) as engine:
            spent = []
            for _ in range(2):
                engine.gradients(two_terms(model(x)), coefficients(5, 6))
                spent.append(engine.report.passes)
            assert spent == expected


def test_a_parameter_without_a_rule_does_no_harm_where_no_loss_needs_it():
    model = Raw()
    with PerSample(model, on_failure="error") as engine:
        jacobian = engine.gradients(plain(model.first(torch.randn(4, 6))), coefficients(5, 4))
    assert not jacobian.blocks[0].any()  # the scale
    assert jacobian.blocks[1].any()


def test_a_module_that_uses_its_layers_functionally_is_one_unit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Functional()).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    with PerSample(model, units=[Functional], on_failure="error") as engine:
        terms = plain(model(x))
        truth = k_backward_passes(terms, coefficients(5, 4), engine.params)
        assert deviation(engine.gradients(terms, coefficients(5, 4)), truth) <= 1e-12
    assert engine.report.rank == 2


def test_random_numbers_in_a_layer_without_a_rule_are_found():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return F.dropout(x * self.scale, 0.5)

    model = nn.Sequential(nn.Linear(6, 6), Noisy())
    with PerSample(model, on_failure="error") as engine, pytest.raises(PerSampleError, match="one sample at a time"):
        engine.gradients(plain(model(torch.randn(4, 6))), coefficients(5, 4))


# Attached and detached


def test_an_attached_model_trains_as_before():
    model, x = make("transformer", torch.float32)
    expected = torch.autograd.grad(two_terms(model(x)).sum(), list(model.parameters()))
    engine = PerSample(model).attach()
    engine.attach()  # once is enough
    found = torch.autograd.grad(two_terms(model(x)).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    two_terms(model(x)).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))
    engine.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(PerSampleError, match="not attached"):
        engine.gradients(two_terms(model(x)), coefficients(5, 4))


def test_second_derivatives_go_through_taps():
    model, _ = make("mlp")
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for engine in (None, PerSample(model).attach()):
        (slope,) = torch.autograd.grad(model[:2](x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), model[0].weight)[0])
        assert engine is None or engine._attachment.attached
    assert torch.equal(*results)


def test_a_copy_of_an_attached_model_is_not_attached():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.layer(x)

    model, x = Encoder(), torch.randn(3, 5, 4)
    with PerSample(model) as engine:
        twin = copy.deepcopy(model)
        stored = io.BytesIO()
        torch.save(nn.Sequential(nn.Linear(2, 2)), stored)
        with torch.no_grad():
            for param in twin.parameters():
                param.add_(1)
        with torch.no_grad():
            expected = copy.deepcopy(twin)(x)
        assert_close(twin(x), expected)
        assert not torch.allclose(twin(x), model(x))
        twin(x).sum().backward()
        with pytest.raises(PerSampleError, match="no tapped layer"):
            engine.gradients(plain(twin(x)), coefficients(5, 3))


def test_the_forward_pass_must_come_after_attach():
    model, x = make("mlp")
    terms = two_terms(model(x))
    with PerSample(model) as engine, pytest.raises(PerSampleError, match="run the forward pass after attach"):
        engine.gradients(terms, coefficients(5, 4))


def test_replaced_and_frozen_parameters_are_noticed():
    model, x = make("mlp")
    with PerSample(model) as engine:
        model[0].weight.requires_grad_(False)
        with pytest.raises(PerSampleError, match=r"'0.weight' was replaced or frozen"):
            engine.gradients(two_terms(model(x)), coefficients(5, 4))
        model[0].weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        with pytest.raises(PerSampleError, match=r"'0.weight' was replaced or frozen"):
            engine.gradients(two_terms(model(x)), coefficients(5, 4))


def test_the_graph_is_freed_unless_it_is_to_be_kept():
    model, x = make("mlp")
    with PerSample(model, self_check="off") as engine:
        terms = two_terms(model(x))
        first = engine.gradients(terms, coefficients(5, 4), retain_graph=True)
        assert_close(engine.gradients(terms, coefficients(5, 4)).blocks, first.blocks)
        with pytest.raises(RuntimeError, match="second time"):
            engine.gradients(terms, coefficients(5, 4))


def test_reentrant_checkpointing_is_refused_by_torch_and_repeated_calls_stay_right():
    model, x = make("transformer")
    x = x.clone()

    def run():
        return model.head(checkpoint(model.blocks[0], model.embed(x), use_reentrant=True))

    with PerSample(model, self_check="off") as engine:
        terms = plain(run())
        with pytest.raises(RuntimeError, match="incompatible with"):
            engine.gradients(terms, coefficients(5, 4))
        engine.gradients(two_terms(model(x)), coefficients(5, 4))


def test_a_taped_model_computes_each_segment_once_more_for_all_passes():
    model, x = make("taped lora")
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    with PerSample(model, self_check="off") as engine:
        object.__setattr__(model, "engine", engine)
        terms = two_terms(model(x))
        assert len(calls) == 1
        engine.gradients(terms, coefficients(5, 4), retain_graph=True)
        assert (len(calls), engine.report.passes) == (2, 2)
        engine.gramian(terms, coefficients(5, 4))
        assert len(calls) == 3


def test_a_taped_model_trains_as_an_ordinary_one():
    torch.manual_seed(0)
    model = Transformer(recompute="tape").double()
    x = tokens(torch.Generator().manual_seed(0), 4)
    model.recompute = False
    expected = torch.autograd.grad(two_terms(model(x)).sum(), list(model.parameters()))
    model.recompute = "tape"
    object.__setattr__(model, "engine", PerSample(model))
    assert_close(torch.autograd.grad(two_terms(model(x)).sum(), list(model.parameters())), expected)


def test_segments_may_branch_share_inputs_and_return_more_than_tensors():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.shift = nn.Linear(6, 4), nn.Linear(6, 4)
            self.left, self.right, self.last = (nn.Linear(4, 4) for _ in range(3))
            self.engine = None

        def call(self, function, *args, **kwargs):
            return (
                function(*args, **kwargs) if self.engine is None else self.engine.checkpoint(function, *args, **kwargs)
            )

        def step(self, state, *, power):
            inner = self.call(self.left, state["x"])  # a segment inside a segment
            return {"x": torch.tanh(inner) * state["c"] ** power, "label": "a", "top": inner.argmax()}

        def forward(self, x):
            condition = torch.sigmoid(self.shift(x))
            h = torch.sin(self.lift(x))
            first = self.call(self.step, {"x": h, "c": condition}, power=2)["x"]
            second = self.call(lambda a, b: self.right(a) - b.square(), first + h, condition)
            return self.last(second * condition + first)

    torch.manual_seed(0)
    model = Branching().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    plain_truth = k_backward_passes(two_terms(model(x)), coefficients(5, 4), list(model.parameters()))
    with PerSample(model, on_failure="error") as engine:
        object.__setattr__(model, "engine", engine)
        terms = two_terms(model(x))
        assert deviation(Jacobian.of(k_backward_passes(terms, coefficients(5, 4), engine.params)), plain_truth) <= 1e-12
        for _ in range(2):
            jacobian = engine.gradients(two_terms(model(x)), coefficients(5, 4))
            assert deviation(jacobian, plain_truth) <= 1e-12
        gramian = engine.gramian(two_terms(model(x)), coefficients(5, 4))
    assert np.allclose(gramian, Jacobian.of(plain_truth).gramian(), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by the compiler, of the outputs of taps
def test_a_compiled_model_must_be_compiled_after_attach():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with PerSample(model, on_failure="error") as engine:
        for _ in range(2):
            terms = plain(compiled(x))
            truth = k_backward_passes(terms, coefficients(5, 4), engine.params)
            assert deviation(engine.gradients(terms, coefficients(5, 4)), truth) <= 1e-12
        assert engine.report.rank == 2
    torch.compiler.reset()
    compiled(x)
    with PerSample(model, on_failure="error") as engine, pytest.raises(PerSampleError, match=r"compiler\.reset"):
        engine.gradients(plain(compiled(x)), coefficients(5, 4))
    torch.compiler.reset()


# Balancing


@pytest.mark.parametrize("rows", ["keep", "drop"])
@pytest.mark.parametrize("objectives", [3, 20])
@pytest.mark.parametrize("name", ["mgda", "upgrad", "aligned_mtl", "weighted_sum"])
def test_balancing_equals_the_method_on_the_gradients(name, objectives, rows):
    model, x = make("lora")
    params = [param for param in model.parameters() if param.requires_grad]
    weights = coefficients(objectives, len(x))
    truth = k_backward_passes(two_terms(model(x)), weights, params)
    jacobian = torch.cat([row.flatten(1) for row in truth], 1)
    losses = torch.einsum("kbj,bj->k", weights, two_terms(model(x)).detach())
    expected = mogb.make(name)(jacobian, losses)
    with PerSample(model) as engine:
        for _ in range(2):
            for param in params:
                param.grad = None
            report = engine.backward(two_terms(model(x)), weights, mogb.make(name), rows=rows)
            found = torch.cat([param.grad.flatten() for param in params])
            assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert_close(report.losses, losses)
    assert report.backward_passes == (1 if name == "weighted_sum" else 2 + (rows == "drop"))
    if name != "weighted_sum":
        assert_close(report.gramian, jacobian @ jacobian.T)


def test_balancing_adds_to_what_is_in_grad_and_reads_whole_rows_where_needed():
    model, x = make("mlp")
    params = list(model.parameters())
    weights = coefficients(5, 4)
    truth = torch.cat([row.flatten(1) for row in k_backward_passes(two_terms(model(x)), weights, params)], 1)
    with PerSample(model) as engine:
        for param in params:
            param.grad = torch.ones_like(param)
        report = engine.backward(two_terms(model(x)), weights, mogb.make("graddrop", seed=3), names=list("abcde"))
    expected = mogb.make("graddrop", seed=3)(truth) + 1
    assert_close(torch.cat([param.grad.flatten() for param in params]), expected)
    assert report.names == tuple("abcde")


def test_balancing_drops_the_rows_where_that_is_cheaper():
    # One token a sample: K rows are K products of matrices, and their Gramian needs products of tokens alone.
    x = torch.randn(16, 6)
    for model, inputs, store in (
        (nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)), x, "gramian"),
        (make("lora", torch.float32)[0], torch.randint(11, (16, 40)), "dense"),
        # Many samples: their products with each other cost more than the rows.
        (nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(2000, 6), "dense"),
    ):
        with PerSample(model) as engine:
            engine.backward(two_terms(model(inputs)), coefficients(12, len(inputs)), mogb.make("mgda"))
            assert engine.report.store == store


def test_a_bad_number_is_named_and_nothing_changes():
    model, x = make("mlp")
    weights = coefficients(3, 4)
    with PerSample(model) as engine:
        with pytest.raises(mogb.NonFiniteError, match="objective 0"):
            engine.backward(two_terms(model(x)) * torch.inf, weights, mogb.make("mgda"))
        for rows in ("keep", "drop", "keep", "drop"):
            terms = two_terms(model(x)) + (0 * model(x)).abs().sqrt().sum(1, keepdim=True)  # 0, with the slope NaN
            with pytest.raises(mogb.NonFiniteError, match=r"gradient of objective 0 \('left'\)"):
                engine.backward(terms, weights, mogb.make("mgda"), rows=rows, names=["left", "b", "c"])
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, w: (t.detach(), w), ValueError, "carries no graph"),
        (lambda t, w: (t, w[:, :3]), ValueError, r"\[K, B, J\] = \[K, 4, 2\]"),
        (lambda t, w: (t, w[0]), ValueError, r"\[K, B, J\] = \[K, 4, 2\]"),
        (lambda t, w: (t, w.requires_grad_()), TypeError, "must be constant"),
        (lambda t, w: (t, w / 0), ValueError, r"coefficients\[0\] holds NaN or Inf"),
        (lambda t, w: ([], w), ValueError, "terms is empty"),
        (lambda t, w: ([t, t], w), ValueError, r"terms\[0\] must have the shape \[B\]"),
        (lambda t, w: ([t[:, 0], t[:3, 1]], w), ValueError, r"terms\[1\] must have one number for each"),
        (lambda t, w: (t[:, :, None], w), ValueError, r"terms must have the shape \[B\], or \[B, J\]"),
    ],
)
def test_errors_say_what_was_wrong(change, error, message):
    model, x = make("mlp")
    with PerSample(model) as engine:
        terms, weights = change(two_terms(model(x)), coefficients(5, 4))
        with pytest.raises(error, match=message):
            engine.gradients(terms, weights)


def test_options_are_checked():
    model, x = make("mlp")
    with pytest.raises(ValueError, match="self_check"):
        PerSample(model, self_check="sometimes")
    with pytest.raises(ValueError, match="on_failure"):
        PerSample(model, on_failure="ignore")
    with PerSample(model) as engine:
        terms = two_terms(model(x))
        for name in ("basis", "store"):
            with pytest.raises(ValueError, match=f"{name} must be one of 'auto', .* but got 'best'"):
                engine.gradients(terms, coefficients(5, 4), **{name: "best"})
        with pytest.raises(ValueError, match="rows must be one of 'auto', 'keep', 'drop', but got 'best'"):
            engine.backward(terms, coefficients(5, 4), mogb.make("mgda"), rows="best")
        with pytest.raises(TypeError, match="aggregator"):
            engine.backward(terms, coefficients(5, 4), "mgda")
        with pytest.raises(ValueError, match="names must have one entry per objective, 5"):
            engine.backward(terms, coefficients(5, 4), mogb.make("mgda"), names=["a"])
        with pytest.raises(ValueError, match="weights must have one number per objective, 5"):
            engine.weighted_backward(terms, coefficients(5, 4), np.ones((5, 1)))


# Uses


def test_group_robust_training_costs_one_pass():
    # The losses are means over groups (J = 1): rows of the membership matrix, each divided by its size.
    model, x = make("transformer", samples=9)
    labels = torch.randint(3, (9, 5), generator=torch.Generator().manual_seed(1))
    membership = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])].T
    with PerSample(model, self_check="off") as engine:
        losses = F.cross_entropy(model(x).transpose(1, 2), labels, reduction="none").mean(1)
        groups = [losses[membership[k] > 0].mean() for k in range(3)]
        truth = [
            torch.stack([torch.autograd.grad(loss, param, retain_graph=True)[0] for loss in groups])
            for param in engine.params
        ]
        jacobian = engine.gradients(losses, membership / membership.sum(1, keepdim=True))
    assert deviation(jacobian, truth) <= 1e-12
    assert engine.report.passes == 1


@pytest.mark.parametrize("inner_step", [0, 1])
def test_clipped_policy_gradients_with_many_rewards(inner_step):
    # PPO's and GRPO's loss per token is -min(r A, clip(r, 1 - e, 1 + e) A) with the ratio r of probabilities. For
    # A > 0 that is -A min(r, 1 + e), for A < 0 it is -A max(r, 1 - e): two terms, whatever the number of rewards.
    # At the first inner step r = 1 nothing is clipped and the terms are parallel.
    model, x = make("transformer", samples=6)
    actions = torch.randint(3, (6, 5), generator=torch.Generator().manual_seed(1))
    advantages = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def log_probability():
        return torch.log_softmax(model(x), 2).gather(2, actions[..., None])[..., 0]

    old = log_probability().detach()
    if inner_step:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(3)))
    with PerSample(model, self_check="off") as engine:
        ratio = (log_probability() - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        truth = []
        for advantage in advantages[..., None]:
            loss = -torch.minimum(ratio * advantage, clipped * advantage).mean(1).mean()
            truth.append(torch.autograd.grad(loss, engine.params, retain_graph=True))
        truth = [torch.stack(rows) for rows in zip(*truth, strict=True)]
        terms = torch.stack([ratio.clamp(max=1.2).mean(1), ratio.clamp(min=0.8).mean(1)], 1)
        weights = torch.stack([-advantages.clamp(min=0), -advantages.clamp(max=0)], 2) / 6
        jacobian = engine.gradients(terms, weights)
    assert deviation(jacobian, truth) <= 1e-12
    assert engine.report.passes == 1 + inner_step
    if inner_step:
        assert float((ratio != clipped).double().mean()) > 0.1
