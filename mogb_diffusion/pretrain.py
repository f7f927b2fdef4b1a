r"""Pre-training of the tiny world's model by flow matching: ``python -m mogb_diffusion.pretrain --out DIR``.

.. math::  \min_\theta \; E\, \| v_\theta(x_t, t, caption) - (\epsilon - x_0) \|^2

on pictures by a careless hand (:mod:`mogb_diffusion.world.drawing`): the model learns to imitate imperfect data well,
and where its data err it errs as often, which is what reinforcement learning is to improve. Most signs carry random
letters instead of words, so that the only way to write is to read the letters. Held-out words and combinations never
occur.

Every draw is keyed by the seed and the step: the same command gives the same weights on the same machine, and an
interrupted run continues from the newest checkpoint in its directory as if nothing had happened. The matrices of the
blocks are trained by Muon (Jordan et al. 2024), everything else by AdamW.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mogb_diffusion import flow
from mogb_diffusion.models import tiny
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.seeds import keyed_generator
from mogb_diffusion.world.captions import Split, sample_prompts, sign_prompt
from mogb_diffusion.world.drawing import Nuisances, draw
from mogb_diffusion.world.vocabulary import CARRIERS, HELD_OUT_WORDS, LETTERS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the base model is trained.

    Attributes:
        seed: Of the initial weights and of every draw.
        steps: Of the optimizer, ``batch`` pictures each.
        batch: Pictures per step.
        learning_rate: After ``warmup`` steps, and until the last ``cooldown`` of the run, where it falls to nothing.
        warmup: Steps in which the learning rate rises.
        cooldown: The share of the run in which the learning rate falls.
        ema: The decay of the average of the weights, which is what is saved.
        signs: The share of pictures that are signs.
        no_caption: The share of pictures without a caption, for guidance without a classifier.
        random_letters: The share of signs with random letters.
    """

    seed: int = 0
    steps: int = 800
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.25
    ema: float = 0.98
    signs: float = 0.3125
    no_caption: float = 0.08
    random_letters: float = 0.75


def training_batch(settings: Settings, step: int) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """The clean latents, captions, noise and times of one step."""
    generator = keyed_generator(settings.seed, "pretrain", step)
    prompts = _training_prompts(settings, generator)
    latents = tiny.to_latents(draw(prompts, generator, nuisances=Nuisances()))
    texts = [prompt.text for prompt in prompts]
    uniform = torch.rand(settings.batch, generator=generator).tolist()
    captions = ["" if u < settings.no_caption else text for u, text in zip(uniform, texts, strict=True)]
    within = torch.rand(settings.batch, generator=generator)
    strata = torch.randperm(settings.batch, generator=generator)
    return latents, captions, torch.randn(latents.shape, generator=generator), (strata + within) / settings.batch


def _training_prompts(settings: Settings, generator: torch.Generator) -> list[Prompt]:
    signs = round(settings.signs * settings.batch)
    prompts = sample_prompts(signs, generator, kind="text")
    letters = torch.randint(len(LETTERS), (signs, 3), generator=generator).tolist()
    uniform = torch.rand(2, signs, generator=generator).tolist()
    for index in range(signs):
        word = "".join(LETTERS[letter] for letter in letters[index])
        if uniform[0][index] < settings.random_letters and word not in HELD_OUT_WORDS:
            prompts[index] = sign_prompt(word, CARRIERS[int(uniform[1][index] * len(CARRIERS))])
    return prompts + sample_prompts(settings.batch - signs, generator, kind="objects")


@torch.no_grad()
def prepare(transformer: nn.Module) -> None:
    """Starts every block as the identity and the output as zero, as is usual; diffusers leaves both random."""
    for name, layer in transformer.named_modules():
        modulation = name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
        if isinstance(layer, nn.Linear) and (modulation or name == "proj_out"):
            layer.weight.zero_()
            layer.bias.zero_()


class Trainer:
    """The model, its average and its optimizers; ``step()`` makes one step."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.pipeline = cast(Any, tiny.build(settings.seed))  # diffusers adds its parts at run time
        self.model = self.pipeline.transformer
        self.model.set_attn_processor(tiny.MatmulAttention())
        prepare(self.model)
        self.model.train().requires_grad_(True)
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.optimizers = self._optimizers()
        self.done = 0

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"Pre-training needs torch.optim.Muon, of torch 2.9 or later; this is {torch.__version__}."
            )
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            inner = name.startswith("transformer_blocks.") and parameter.ndim == 2 and ".norm" not in name
            (matrices if inner else others).append(parameter)
        rate = self.settings.learning_rate
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]

    def step(self) -> float:
        """One step of the optimizers; the loss before it."""
        clean, captions, noise, time_ = training_batch(self.settings, self.done)
        embeds, pooled = encode(self.pipeline, captions)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.model(
                hidden_states=flow.noised(clean, noise, time_),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=1000 * time_,
            ).sample
        loss = (velocity.float() - flow.velocity_target(clean, noise)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self._warmth()
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        decay = min(self.settings.ema, self.done / (self.done + 10))
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                self.average[name].lerp_(value, 1 - decay)
        return loss.item()

    def _warmth(self) -> float:
        settings = self.settings
        left = (settings.steps - self.done) / max(settings.cooldown * settings.steps, 1)
        return min((self.done + 1) / settings.warmup, left, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "settings": asdict(self.settings),
            "done": self.done,
            "model": dict(self.model.named_parameters()),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state; it must have been made with the same settings, but for the number of steps."""
        for key, value in asdict(self.settings).items():
            if key != "steps" and state["settings"][key] != value:
                raise ValueError(
                    f"The checkpoint was made with {key}={state['settings'][key]!r}, not {value!r}. "
                    "Choose another directory, or the same settings."
                )
        for name, value in self.model.named_parameters():
            value.copy_(state["model"][name])
            self.average[name].copy_(state["average"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.done = state["done"]


@torch.no_grad()
def encode(pipeline: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The text embeddings ``[B, L, C]`` and the pooled ones ``[B, C]``."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(captions), None, None, do_classifier_free_guidance=False, max_sequence_length=tiny.MAX_SEQUENCE_LENGTH
    )
    return embeds, pooled


def train(settings: Settings, out: Path, *, save_every: int = 50, quiet: bool = False) -> Path:
    """Trains until ``settings.steps``, from the newest state in ``out``; the file of the final weights.

    Every ``save_every`` steps ``out`` gets ``weights-<step>.safetensors`` (the average, in float16, with the text
    encoders: :func:`mogb_diffusion.models.tiny.load` reads it), ``state.pt`` to continue from, and a line of
    ``metrics.jsonl``.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer, state = Trainer(settings), out / "state.pt"
    if state.exists():
        trainer.load_state_dict(torch.load(state, weights_only=True))
    began, losses = time.time(), []
    for _ in _progress(range(trainer.done, settings.steps), settings.steps, quiet):
        losses.append(trainer.step())
        if trainer.done % save_every == 0 or trainer.done == settings.steps:
            _save(trainer, out)
            record = {"step": trainer.done, "loss": sum(losses) / len(losses), "seconds": round(time.time() - began, 1)}
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            losses.clear()
    return out / f"weights-{trainer.done}.safetensors"


def _save(trainer: Trainer, out: Path) -> None:
    tiny.save_weights(trainer.pipeline, out / f"weights-{trainer.done}.safetensors", transformer=trainer.average)
    staged = out / "state.tmp"
    torch.save(trainer.state_dict(), staged)
    staged.replace(out / "state.pt")


def _progress(steps: range, total: int, quiet: bool) -> Iterator[int]:
    from rich.progress import track

    return iter(track(steps, "pre-training", total=total, completed=steps.start, disable=quiet))


def measure(
    pipeline: Any, *, split: Split = "held_out", count: int = 480, steps: int = 8, seed: int = 1, batch: int = 120
) -> dict[str, dict[str, float]]:
    """Mean rewards of a model's pictures, their standard errors, and their spread among pictures of one prompt.

    Half of the prompts are signs, half objects; of each prompt drawn there are four pictures. Sampling is the
    pipeline's own, without guidance.
    """
    from mogb_diffusion.rewards.world import REWARDS

    drawn = sample_prompts(count // 4, keyed_generator(seed, "prompts"), split=split)
    prompts = [prompt for prompt in drawn for _ in range(4)]
    images = sample(pipeline, prompts, keyed_generator(seed, "noise"), steps=steps, batch=batch)
    table = {}
    for name, reward in REWARDS.items():
        groups = reward()(images, prompts).double().view(-1, 4)
        groups = groups[~groups.isnan().any(dim=1)]
        means = groups.mean(dim=1)
        table[name] = {
            "mean": means.mean().item(),
            "standard_error": (means.std() / len(means) ** 0.5).item(),
            "spread": groups.var(dim=1).mean().sqrt().item(),
        }
    return table


@torch.no_grad()
def sample(
    pipeline: Any, prompts: Sequence[Prompt], generator: torch.Generator, *, steps: int = 8, batch: int = 120
) -> Tensor:
    """Pictures ``[B, 3, 16, 16]`` in [0, 1] by the pipeline itself: Euler steps, no guidance."""
    pictures = []
    for start in range(0, len(prompts), batch):
        result = pipeline(
            prompt=[prompt.text for prompt in prompts[start : start + batch]],
            num_inference_steps=steps,
            guidance_scale=1.0,
            max_sequence_length=tiny.MAX_SEQUENCE_LENGTH,
            generator=generator,
            output_type="pt",
        )
        pictures.append(result.images)
    return torch.cat(pictures)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m mogb_diffusion.pretrain",
        description="Pre-train the model of the tiny world by flow matching, and measure its rewards.",
        epilog="example: python -m mogb_diffusion.pretrain --out runs/pretrain --seed 0",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoints; continued if it has any")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="pictures per step (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=960, help="to measure the rewards on (default: %(default)s)")
    given = parser.parse_args(arguments)
    settings = Settings(seed=given.seed, steps=given.steps, batch=given.batch)
    weights = train(settings, given.out, save_every=given.save_every)
    described = weights.with_suffix(".json")
    described.write_text(json.dumps(describe(weights, settings, given.pictures), indent=2) + "\n")
    print(f"{weights}\n{described}")


def describe(weights: Path, settings: Settings, pictures: int) -> dict[str, Any]:
    """How a file of weights was made and what its pictures are worth."""
    command = f"python -m mogb_diffusion.pretrain --out DIR --seed {settings.seed} --steps {settings.steps}"
    pipeline = tiny.load(weights)
    return {
        "command": f"{command} --batch {settings.batch}",
        "torch": torch.__version__,
        "settings": asdict(settings),
        "nuisances": asdict(Nuisances()),
        "sampling": {"steps": 8, "guidance_scale": 1.0, "pictures": pictures, "pictures_per_prompt": 4},
        "rewards": {split: measure(pipeline, split=split, count=pictures) for split in ("held_out", "train")},
    }


if __name__ == "__main__":
    main()
