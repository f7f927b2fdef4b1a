"""The page of exported weights: what they are, what they were trained for, how to load them, under which licence."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mogb_diffusion.config import Run
from mogb_diffusion.errors import InputError
from mogb_diffusion.evaluation import evaluation_sampling, own_record
from mogb_diffusion.headers import file_name, is_hub_name, reward_keys, scrubbed
from mogb_diffusion.results import EVALUATION, Record, read_record, table, versions
from mogb_diffusion.tracking import METRICS, read_metrics
from mogb_diffusion.trained import Trained

# License, its name and its page, by the beginning of a base model's name. Those of the weights, not of this package.
LICENSES = {
    "stabilityai/stable-diffusion-3": (
        "other", "stabilityai-ai-community", "https://huggingface.co/{model}/blob/main/LICENSE.md",
    ),
    "tiny": ("apache-2.0", "", ""),
}  # fmt: skip
_PICTURES = (
    ("rewards.png", "Rewards over the epochs"),
    ("samples/before.png", "Before"),
    ("samples/after.png", "After"),
)
_LOADS = {
    "lora": """import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{model}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{place}")
image = pipe("{prompt}", {how}).images[0]""",
    "pipeline": """import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{place}", torch_dtype=torch.bfloat16).to("cuda")
image = pipe("{prompt}", {how}).images[0]""",
    "transformer": """import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

transformer = SD3Transformer2DModel.from_pretrained("{place}", subfolder="transformer", torch_dtype=torch.bfloat16)
pipe = StableDiffusion3Pipeline.from_pretrained("{model}", transformer=transformer, torch_dtype=torch.bfloat16)
image = pipe.to("cuda")("{prompt}", {how}).images[0]""",
    "tiny": """from mogb_diffusion.models import tiny

pipe = tiny.{build}
pipe.load_lora_weights("{place}")
image = pipe("{prompt}", {how}).images[0]""",
}


def write_card(out: Path, trained: Trained, kind: str, place: str, command: str) -> Path:
    """Writes ``README.md``, and copies the pictures of the run that it shows.

    Args:
        out: Folder of the weights.
        trained: What was exported.
        kind: ``lora``, ``pipeline`` (merged) or ``transformer`` (every weight was trained).
        place: What to load the weights from: the name of a repository, or the folder.
        command: That made it.
    """
    folder = trained.folder
    shown = []
    for name, caption in _PICTURES:
        if folder is not None and (folder / name).is_file():
            target = out / "pictures" / Path(name).name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target)
            shown.append((f"pictures/{target.name}", caption))
    path = out / "README.md"
    path.write_text(card(trained, kind, place, command, final_scores(trained), shown), encoding="utf-8")
    return path


def card(
    trained: Trained, kind: str, place: str, command: str, scores: Record | None, pictures: Sequence[tuple[str, str]]
) -> str:
    """The page as Markdown with the head that the hub reads."""
    import yaml

    run, told = trained.run, trained.described
    license, text = license_of(run.model.source)
    settings = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=120)
    heading = "Configuration" if trained.imported is None else "Configuration of the model, not of the training"
    parts = [
        _head(run, license, kind),
        f"# {run.name if trained.imported is None else trained.name}",
        f"{_title(kind, trained)}, {_training(trained, told)}.",
        f"## Use\n\n```python\n{_usage(trained, kind, place)}\n```",
        _scores(scores) if scores else "",
        *(f"![{caption}]({name})\n\n{caption}." for name, caption in pictures),
        f"## License\n\n{text}",
        f"## How it was made\n\n```\n{command}\n```\n\n"
        + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        f"<details><summary>{heading}</summary>\n\n```yaml\n{settings}```\n\n</details>",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def license_of(model: str) -> tuple[dict[str, str], str]:
    """What the head of a page says about the licence of a base model, and what its text says."""
    for prefix, (license, name, link) in LICENSES.items():
        if model.startswith(prefix) and not Path(model).exists():
            if not name:
                return {"license": license}, "Apache-2.0, as the base model, which comes with mogb."
            link = link.format(model=model)
            text = f"The weights derive from [{model}](https://huggingface.co/{model}): its license, [{name}]({link}), "
            return {"license": license, "license_name": name, "license_link": link}, text + "applies to them."
    return {"license": "other"}, f"The license of the base model, `{_public(model)}`, applies to these weights."


def final_scores(trained: Trained) -> Record | None:
    """The evaluation of these weights: that of ``evaluate`` where it is of this step, or else the run's own."""
    if trained.folder is None:
        return None
    plain = trained.folder / f"{EVALUATION}.json"
    others = sorted(path for path in trained.folder.glob(f"{EVALUATION}-checkpoint-*.json"))
    for path in (plain, *others):
        try:
            record = read_record(path) if path.is_file() else {}
        except InputError:
            continue
        if "trained" in record and record.get("step") == trained.step:
            return record
    if not (trained.folder / METRICS).is_file():
        return None
    return own_record(read_metrics(trained.folder), trained.run, trained.name, trained.step)


def _head(run: Run, license: Mapping[str, str], kind: str) -> str:
    import yaml

    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if is_hub_name(run.model.source):
        head["base_model"] = run.model.source
        head["base_model_relation"] = "adapter" if kind == "lora" else "finetune"
    head |= dict(license)
    head["tags"] = ["mogb", "diffusion-rl", "text-to-image", *(["lora"] if kind == "lora" else [])]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _title(kind: str, trained: Trained) -> str:
    run = trained.run
    what = {"lora": "A LoRA for", "pipeline": "A whole pipeline: a LoRA merged into", "transformer": "A transformer of"}
    if kind == "pipeline" and trained.policy is not None and run.policy.kind == "full":
        what["pipeline"] = "A whole pipeline, with the transformer's own weights trained, of"
    is_known = (
        run.policy.kind == "lora" and trained.imported is None
    )  # a recipe's rank is none of a LoRA's from elsewhere
    rank = f" (rank {run.policy.rank}, alpha {run.policy.alpha:g})" if is_known else ""
    return f"{what[kind]} `{_public(run.model.source)}`{rank}"


def _training(trained: Trained, told: Mapping[str, Any]) -> str:
    """What the weights were trained for, where that is known."""
    if trained.imported is not None:
        step = "" if trained.step is None else f", step {trained.step}"
        return f"imported from `{trained.imported}`{step}; what it was trained on is unknown"
    names, balancing = reward_keys(told), told.get("balancing")
    mode = balancing.get("mode", "marble") if isinstance(balancing, Mapping) else "marble"
    after = f" after {trained.epoch} epochs ({trained.step} optimizer steps)" if trained.epoch is not None else ""
    return (
        f"trained on {len(names)} reward{'s' * (len(names) != 1)} ({', '.join(names)}) with DiffusionNFT "
        f"(arXiv 2509.16117), balanced by `{mode}` of [mogb](https://mogb.readthedocs.io){after}"
    )


def _usage(trained: Trained, kind: str, place: str) -> str:
    run, model = trained.run, trained.run.model
    sampling, source = evaluation_sampling(run), model.source
    is_tiny = source in ("tiny", "tiny-random") or source.endswith(".safetensors")
    build = (
        f"build({model.seed})"
        if source == "tiny-random"
        else f"load({'' if source == 'tiny' else repr(_public(source))})"
    )
    size = f", height={model.resolution}, width={model.resolution}" if model.resolution else ""
    how = (
        f"num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance}{size}, "
        f"max_sequence_length={trained.model.max_sequence_length}"
    )
    return _LOADS["tiny" if is_tiny and kind == "lora" else kind].format(
        model=_public(source), place=place, how=how, build=build,
        prompt="a photo of two red squares" if is_tiny else "a photo of two red bicycles",
    )  # fmt: skip


def _scores(record: Record) -> str:
    prompts = ", ".join(map(file_name, str(record["prompts"]).split(", ")))
    lines = [f"## Scores\n\nMeans over {prompts}, with standard errors.\n", *table(record)]
    meanings = scrubbed(record.get("metrics", {}))
    if told := [f"{name}: {meanings[name]}" for name in record["trained"] if meanings.get(name, name) != name]:
        lines.append(f"\nMeasured with {'; '.join(told)}.")
    return "\n".join(lines)


def _public(source: str) -> str:
    """A model's name; of a path its last part."""
    return str(scrubbed(source))
