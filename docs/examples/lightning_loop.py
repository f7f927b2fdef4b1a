"""A module of Lightning, balanced: ``training_step`` returns K losses, and ``backward`` balances them.

Three outputs of one network are learned, whose scales differ by a factor of 1000. Automatic optimization, clipping,
schedules, loggers and checkpoints stay Lightning's; the balancer's state travels with the checkpoints.

    python docs/examples/lightning_loop.py
"""

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mogb

TASKS = ("small", "medium", "large")
SCALES = torch.tensor([0.03, 1.0, 30.0])


def make_data(samples: int = 512) -> TensorDataset:
    """Inputs, and three smooth functions of them at three scales."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 6, generator=generator)
    mixing = torch.randn(6, 3, generator=generator)
    return TensorDataset(inputs, torch.tanh(inputs @ mixing) * SCALES)


def make_loader(batch_size: int = 32, *, shuffle: bool = True) -> DataLoader:
    """Batches of it."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(make_data(), batch_size=batch_size, shuffle=shuffle, generator=generator)


class Regression(LightningModule):
    """A network with three outputs.

    Args:
        method: A balancing method.
        log: Where to write a line for every step; None keeps them in memory.
    """

    def __init__(self, method: str = "upgrad", log: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        self.balancer = mogb.Balancer(mogb.make(method), self.net)
        self.monitor = mogb.Monitor(log, names=TASKS)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The K losses, where there was one."""
        inputs, targets = batch
        return (self.net(inputs) - targets).square().mean(dim=0)  # [3]; was: .mean()

    def backward(self, losses: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning calls this in place of ``loss.backward()``."""
        self.monitor.log(self.balancer.backward(losses))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As ever."""
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The balancer's state, and the monitor's, beside the weights."""
        checkpoint["balancer"], checkpoint["monitor"] = self.balancer.state_dict(), self.monitor.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written."""
        self.balancer.load_state_dict(checkpoint["balancer"])
        self.monitor.load_state_dict(checkpoint["monitor"])


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, and returns the mean squared errors in units of each task's scale."""
    parser = argparse.ArgumentParser(description="A balanced module of Lightning.")
    parser.add_argument("--method", default="upgrad", help="of mogb list")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--log", help="where to write a line for every step")
    args = parser.parse_args(arguments)

    module = Regression(args.method, args.log)
    loader = make_loader()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    trainer = make_trainer(max_epochs=args.epochs)
    trainer.fit(module, loader)
    print(module.monitor)

    inputs, targets = make_data().tensors
    with torch.no_grad():
        errors = ((module.net(inputs) - targets) / SCALES).square().mean(dim=0)
    print("relative errors:", ", ".join(f"{t} {e:.3g}" for t, e in zip(TASKS, errors.tolist(), strict=True)))
    return dict(zip(TASKS, errors.tolist(), strict=True))


def make_trainer(**options: Any) -> Trainer:
    """A quiet one, on the CPU. Its clipping acts on the balanced direction."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


if __name__ == "__main__":
    main()
