"""20 steps, a saved state, and 20 more steps are 40 steps, to the bit."""

import io

import pytest
import torch
from engine_models import losses_of, residual

import mogb
from mogb.engines.groups import has_state

REMEMBERING = [name for name in mogb.registered() if has_state(mogb.make(name))]
FEW = ("marble", "famo", "moco", "gradnorm")
STEPS = 20
LEARN = 1e-3


class Run:
    """A training run with everything that has a state."""

    def __init__(self, name, amp, **options):
        self.net = residual(depth=1, width=4, dtype=torch.float32)
        self.amp = amp
        self.balancer = mogb.Balancer(mogb.make(name), self.net, **options)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LEARN)
        learned = self.balancer.parameters()
        self.other = torch.optim.SGD(learned, lr=LEARN) if learned else None
        self.skipped = 0
        enabled = amp == "float16"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=7, enabled=enabled)

    def losses(self, step):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)
        with torch.autocast("cpu", {"bfloat16": torch.bfloat16, "float16": torch.float16}[self.amp]):
            losses = losses_of(self.net, inputs, targets).float() + 0.5  # positive: some methods take logarithms
        if step == 9 and self.amp == "float16":  # a step that overflows
            losses = losses + (self.net[0].bias.sum() - self.net[0].bias.sum().detach()) * 3e38
        return losses

    def train(self, start):
        for step in range(start, start + STEPS):
            self.optimizer.zero_grad()
            if step % 4 == 3:
                self.balancer.accumulate(self.losses(step) / 2, scaler=self.scaler)
                report = self.balancer.backward(self.losses(step + 1000) / 2, scaler=self.scaler)
            else:
                report = self.balancer.backward(self.losses(step), scaler=self.scaler)
            self.skipped += report.skipped
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.other is not None and not report.skipped:
                self.other.step()
            with torch.no_grad():
                if not report.skipped:
                    self.balancer.update(self.losses(step))
            if step % 5 == 4:
                self.balancer.end_epoch()
        return torch.cat([param.detach().flatten() for param in self.net.parameters()])

    def parts(self):
        found = {"net": self.net, "balancer": self.balancer, "optimizer": self.optimizer, "scaler": self.scaler}
        return found | ({} if self.other is None else {"other": self.other})

    def save(self):
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved):
        for name, state in torch.load(io.BytesIO(saved), weights_only=True).items():
            self.parts()[name].load_state_dict(state)


def check(name, amp, **options):
    first = Run(name, amp, **options)
    first.train(0)
    saved = first.save()
    whole = first.train(STEPS)
    second = Run(name, amp, **options)
    second.load(saved)
    assert torch.equal(second.train(STEPS), whole)
    assert torch.isfinite(whole).all()
    assert first.balancer.step == second.balancer.step == 2 * STEPS - first.skipped
    assert (first.skipped > 0) == (amp == "float16")


@pytest.mark.parametrize("name", REMEMBERING)
def test_every_method_with_a_state_resumes(name, unchecked):
    check(name, "bfloat16")


@pytest.mark.parametrize("name", FEW)
def test_they_resume_under_a_gradient_scaler_that_skips_steps(name, unchecked):
    check(name, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in mogb.registered() if name not in FEW])
def test_all_of_them_resume_under_a_gradient_scaler(name, unchecked):
    check(name, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in mogb.registered() if name not in REMEMBERING])
def test_methods_without_a_state_resume_too(name, unchecked):
    check(name, "bfloat16")


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["marble", "famo"])
def test_amortised_runs_resume(name, amp, unchecked):
    check(name, amp, refresh_every=3, coefficients="raw")


@pytest.mark.parametrize(("name", "groups"), [("marble", "module"), ("gradnorm", "matrix")])
def test_groups_resume_each_with_its_own_state(name, groups, unchecked):
    check(name, "bfloat16", groups=groups)
