"""Prompts of a configuration, loaded."""

from collections.abc import Sequence
from dataclasses import replace

from mogb_diffusion import config
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt, PromptMixture, read_prompts
from mogb_diffusion.seeds import keyed_generator

_WORLD_COUNT = 256


def load_source(source: config.Prompts, seed: int, where: str = "prompts") -> list[Prompt]:
    """The prompts of one source, each text once where they are drawn from the tiny world.

    Raises:
        InputError: The file cannot be used.
    """
    if source.path is not None:
        found = read_prompts(source.path, source.format, rewards=source.rewards)
        return found[: source.count]
    from mogb_diffusion.world.captions import sample_prompts

    count = source.count or _WORLD_COUNT
    generator = keyed_generator(seed, "world prompts", where)
    drawn = sample_prompts(count, generator, kind=source.kind, split=source.split)
    unique = list({prompt.text: prompt for prompt in drawn}.values())
    if not unique:
        raise InputError(f"{where}: the tiny world has no such prompts.")
    return unique if source.rewards is None else [replace(prompt, rewards=source.rewards) for prompt in unique]


def load_mixture(run: config.Run) -> PromptMixture:
    """The training prompts of a run."""
    parts = [load_source(source, run.seed, f"prompts.{n}") for n, source in enumerate(run.prompts)]
    return PromptMixture(parts, [source.weight for source in run.prompts])


def evaluation_prompts(run: config.Run, count: int | None = None) -> list[Prompt]:
    """As many held-out prompts as pictures are asked for: the sources in turn, each from its beginning again."""
    sources = run.evaluation.prompts
    parts = [load_source(source, run.seed, f"evaluation.prompts.{n}") for n, source in enumerate(sources)]
    return interleaved(parts, run.evaluation.images if count is None else count)


def interleaved(parts: Sequence[Sequence[Prompt]], count: int) -> list[Prompt]:
    """The first of each part, the second of each part, and so on."""
    if not parts:
        return []
    return [parts[n % len(parts)][n // len(parts) % len(parts[n % len(parts)])] for n in range(count)]
