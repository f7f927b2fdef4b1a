"""``mogb-diffusion export``."""

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mogb_diffusion.commands._shared import empty_folder, find, source_arguments, tell, write_json
from mogb_diffusion.errors import InputError

if TYPE_CHECKING:
    from mogb_diffusion.trained import Source, Trained

SUMMARY = "trained weights for diffusers, with a page about them, to a folder or to the hub"
EXAMPLE = """
mogb-diffusion export runs/tiny --out lora      then: pipe.load_lora_weights('lora')
mogb-diffusion export runs/tiny --out pipeline --merge
mogb-diffusion export runs/sd35_marble --out lora --to hub --repo me/sd35-marble --private
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights, and where to."""
    parser.add_argument("target", metavar="RUN|LORA", help="as for evaluate")
    source_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write")
    parser.add_argument("--merge", action="store_true", help="a whole pipeline with the adapter merged into it")
    parser.add_argument("--to", choices=("dir", "hub"), default="dir", help="hub sends the folder there, too")
    parser.add_argument("--repo", metavar="USER/NAME", help="on the hub; made if there is none")
    parser.add_argument("--private", action="store_true", help="a new repository is private")


def run(options: argparse.Namespace) -> int:
    """Writes weights and page."""
    from mogb_diffusion.cards import write_card
    from mogb_diffusion.hub import check_hub, upload

    if options.to == "dir" and (options.repo or options.private):
        raise InputError("--repo and --private belong to --to hub.")
    repo = check_hub(options.repo) if options.to == "hub" else None
    source = find(options, options.target)
    out = empty_folder(options.out)
    trained = source.load(tell=tell)
    out.mkdir(parents=True, exist_ok=True)
    kind = "lora" if trained.policy is None or source.run.policy.kind == "lora" else "transformer"
    if options.merge:
        _merge(trained, out, kind)
        kind = "pipeline"
    else:
        _write(source, trained, out, kind)
    _without_paths(out)
    write_card(out, trained, kind, repo or str(out), _command(options))
    print(_line(kind, str(out)))
    if repo is not None:
        print(upload(out, repo, private=options.private, message=f"{trained.name}: {kind} and page"))
    return 0


def _write(source: "Source", trained: "Trained", out: Path, kind: str) -> None:
    from mogb_diffusion.trained import WEIGHTS, header_of, write_header

    if trained.policy is None:
        assert source.file is not None
        shutil.copyfile(source.file, out / WEIGHTS)
    else:
        with trained.weights():
            trained.policy.export(trained.model.pipeline, out)
    if kind == "lora":
        write_header(out / WEIGHTS, header_of(trained))


def _merge(trained: "Trained", out: Path, kind: str) -> None:
    """A pipeline whose transformer has the trained weights as its own."""
    from mogb_diffusion.models.sd3 import load_model

    pipeline = load_model(trained.run.model, trained.model.device).pipeline
    if kind == "transformer":
        with trained.weights():
            pipeline.transformer.load_state_dict(trained.model.transformer.state_dict())
    else:
        aside = out / ".lora"
        if trained.policy is None:
            pipeline = trained.model.pipeline
        else:
            with trained.weights():
                trained.policy.export(pipeline, aside)
            pipeline.load_lora_weights(aside)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        shutil.rmtree(aside, ignore_errors=True)
    pipeline.save_pretrained(out)


def _without_paths(out: Path) -> None:
    """The files of diffusers say where a model was loaded from: of a path only the last part stays."""
    from mogb_diffusion.headers import scrubbed

    for path in (*out.rglob("config.json"), *out.rglob("model_index.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        name = found.get("_name_or_path")
        if (told := scrubbed(name)) != name:
            write_json(path, found | {"_name_or_path": told})


def _line(kind: str, place: str) -> str:
    return {
        "lora": f"pipe.load_lora_weights({place!r})",
        "pipeline": f"StableDiffusion3Pipeline.from_pretrained({place!r})",
        "transformer": f"SD3Transformer2DModel.from_pretrained({place!r}, subfolder='transformer')",
    }[kind]


def _command(options: argparse.Namespace) -> str:
    """As it was given, without secrets and without the folders of this machine."""
    from mogb_diffusion.headers import scrubbed, shareable_assignment

    words = ["mogb-diffusion", "export", scrubbed(options.target)]
    for name in ("checkpoint", "recipe", "device", "out", "repo"):
        if value := getattr(options, name):
            words += [f"--{name}", str(value) if name == "repo" else scrubbed(str(value))]
    words += [word for assignment in options.set for word in ("--set", shareable_assignment(assignment))]
    words += ["--merge"] * options.merge + ["--to", "hub"] * (options.to == "hub") + ["--private"] * options.private
    return shlex.join(words)
