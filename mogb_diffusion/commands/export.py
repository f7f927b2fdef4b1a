"""``mogb-diffusion export``."""

import argparse
from pathlib import Path

from mogb_diffusion.commands._shared import loaded, run_arguments
from mogb_diffusion.errors import InputError

SUMMARY = "the trained weights of a run, for diffusers"
EXAMPLE = """
mogb-diffusion export runs/tiny --out lora      then: pipe.load_lora_weights('lora')
mogb-diffusion export runs/tiny --out pipeline --merge
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and where to."""
    run_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write")
    parser.add_argument("--merge", action="store_true", help="a whole pipeline with the adapter merged into it")


def run(options: argparse.Namespace) -> int:
    """Writes the weights."""
    trainer = loaded(options)
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: name another --out.")
    out.mkdir(parents=True, exist_ok=True)
    trainer.export(out)
    is_lora = trainer.run.policy.kind == "lora"
    trainer.close()
    if options.merge:
        from mogb_diffusion.models.sd3 import load_model

        pipeline = load_model(trainer.run.model, trainer.model.device).pipeline
        if is_lora:
            pipeline.load_lora_weights(out)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        else:
            pipeline.transformer = type(pipeline.transformer).from_pretrained(out, subfolder="transformer")
        for path in out.glob("*.safetensors"):
            path.unlink()
        pipeline.save_pretrained(out)
        print(f"StableDiffusion3Pipeline.from_pretrained({str(out)!r})")
    elif is_lora:
        print(f"pipe.load_lora_weights({str(out)!r})")
    else:
        print(f"SD3Transformer2DModel.from_pretrained({str(out)!r}, subfolder='transformer')")
    return 0
