"""The page of exported weights: what they are, what they were trained for, how to load them, under which licence."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mogb_diffusion.config import Run, to_yaml
from mogb_diffusion.errors import InputError
from mogb_diffusion.results import EVALUATION, Record, change, read_record, versions
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
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}{size}).images[0]""",
    "pipeline": """import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{place}", torch_dtype=torch.bfloat16).to("cuda")
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}{size}).images[0]""",
    "transformer": """import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

transformer = SD3Transformer2DModel.from_pretrained("{place}", subfolder="transformer", torch_dtype=torch.bfloat16)
pipe = StableDiffusion3Pipeline.from_pretrained("{model}", transformer=transformer, torch_dtype=torch.bfloat16)
image = pipe.to("cuda")("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}{size}).images[0]""",
    "tiny": """from mogb_diffusion.models import tiny

pipe = tiny.{build}
pipe.load_lora_weights("{place}")
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}, max_sequence_length=1).images[0]""",
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
    run = trained.run
    license, text = license_of(run.model.source)
    after = f" after {trained.epoch} epochs ({trained.step} optimizer steps)" if trained.epoch is not None else ""
    parts = [
        _head(run, license, kind),
        f"# {run.name}",
        f"{_title(kind, run)} on {len(run.rewards)} reward{'s' * (len(run.rewards) > 1)} "
        f"({', '.join(run.reward_names)}) with DiffusionNFT (arXiv 2509.16117), balanced by `{run.balancing.mode}` "
        f"of [mogb](https://mogb.readthedocs.io){after}.",
        f"## Use\n\n```python\n{_usage(run, kind, place)}\n```",
        _scores(scores) if scores else "",
        *(f"![{caption}]({name})\n\n{caption}." for name, caption in pictures),
        f"## License\n\n{text}",
        f"## How it was made\n\n```\n{command}\n```\n\n"
        + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        f"<details><summary>Configuration</summary>\n\n```yaml\n{to_yaml(run)}```\n\n</details>",
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
    return {"license": "other"}, f"The license of the base model, `{model}`, applies to these weights."


def final_scores(trained: Trained) -> Record | None:
    """The evaluation of these weights: that of ``evaluate`` where it is of this step, or else the run's own."""
    if trained.folder is None:
        return None
    path = trained.folder / f"{EVALUATION}.json"
    if path.is_file():
        try:
            record = read_record(path)
        except InputError:
            record = {}
        if "trained" in record and record.get("step") == trained.step:
            return record
    if not (trained.folder / METRICS).is_file():
        return None
    rows = [row for row in read_metrics(trained.folder) if row["kind"] == "evaluation"]
    last = [row for row in rows if row["step"] == trained.step]
    if not last:
        return None
    first = [row for row in rows if row["step"] == 0]
    trained_on = list(trained.run.reward_names)
    record = {"prompts": "held-out prompts", "trained_on": trained_on, "trained": last[-1]["scores"]}
    return record | ({"base": first[0]["scores"]} if first else {})


def _head(run: Run, license: Mapping[str, str], kind: str) -> str:
    import yaml

    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if not Path(run.model.source).exists() and "/" in run.model.source:
        head["base_model"] = run.model.source
        head["base_model_relation"] = "adapter" if kind == "lora" else "finetune"
    head |= dict(license)
    head["tags"] = ["mogb", "diffusion-rl", "text-to-image", *(["lora"] if kind == "lora" else [])]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _title(kind: str, run: Run) -> str:
    what = {"lora": "A LoRA for", "pipeline": "A whole pipeline: a LoRA merged into", "transformer": "A transformer of"}
    rank = f" (rank {run.policy.rank}, alpha {run.policy.alpha:g})" if run.policy.kind == "lora" else ""
    return f"{what[kind]} `{run.model.source}`{rank}, trained"


def _usage(run: Run, kind: str, place: str) -> str:
    from mogb_diffusion.evaluation import evaluation_sampling

    how, source = evaluation_sampling(run), run.model.source
    is_tiny = source in ("tiny", "tiny-random") or source.endswith(".safetensors")
    build = (
        f"build({run.model.seed})" if source == "tiny-random" else f"load({'' if source == 'tiny' else repr(source)})"
    )
    size = f", height={run.model.resolution}, width={run.model.resolution}" if run.model.resolution else ""
    return _LOADS["tiny" if is_tiny and kind == "lora" else kind].format(
        model=source, place=place, steps=how.steps, guidance=how.guidance, size=size, build=build,
        prompt="a photo of two red squares" if is_tiny else "a photo of two red bicycles",
    )  # fmt: skip


def _scores(record: Record) -> str:
    before = record.get("base")
    lines = [f"## Scores\n\nMeans over {record['prompts']}, with standard errors.\n"]
    lines += ["| reward | trained on | before | after | change | pictures |", "|---|---|---:|---:|---:|---:|"]
    for name, score in record["trained"].items():
        start = before.get(name) if before else None
        cells = [name, "yes" if name in record["trained_on"] else "no", _number(start), _number(score)]
        lines.append(f"| {' | '.join([*cells, change(start, score), str(score['count'])])} |")
    return "\n".join(lines)


def _number(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f}" + ("" if score["error"] is None else f" ± {score['error']:.3f}")
