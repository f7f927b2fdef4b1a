"""``mogb-diffusion import-peer``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mogb_diffusion.commands._shared import empty_folder, set_argument, write_text
from mogb_diffusion.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from mogb_diffusion.config import Run
    from mogb_diffusion.peers import Peer

SUMMARY = "a LoRA of DiffusionNFT, Flow-GRPO or another user of PEFT, for diffusers"
EXAMPLE = """
mogb-diffusion import-peer logs/nft/sd3/checkpoints/checkpoint-900 --out nft --recipe sd35_marble
mogb-diffusion evaluate nft --prompts drawbench.txt
"""
_PAGE = """# {name}

A LoRA of rank {rank} and alpha {alpha:g} for {model}, from `{source}`: {layers} layers, weights as they were, in the
form that diffusers loads with its alpha.

```python
pipe.load_lora_weights("{place}")
```
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and where to."""
    parser.add_argument("source", metavar="FILE|DIR", help="weights, or a folder at or above lora/")
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write")
    parser.add_argument("--adapter", metavar="NAME", help="where there are several, such as old; default: default")
    parser.add_argument("--alpha", metavar="X", type=float, help="where no adapter_config.json says it")
    parser.add_argument(
        "--recipe", metavar="RECIPE|FILE", help="of the model: its layers are checked, and evaluate needs no --recipe"
    )
    set_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Reads, checks and writes."""
    from mogb_diffusion.config import load_run, to_plain
    from mogb_diffusion.peers import check_fit, read_peer, write_peer
    from mogb_diffusion.trained import write_header

    if options.set and options.recipe is None:
        raise InputError("--set changes the configuration of --recipe: name one.")
    out = empty_folder(options.out)
    peer = read_peer(Path(options.source), adapter=options.adapter, alpha=options.alpha)
    configuration = load_run(options.recipe, options.set) if options.recipe else None
    if configuration is not None:
        check_fit(peer, _transformer(configuration), configuration.model.source)
    out.mkdir(parents=True, exist_ok=True)
    file = write_peer(peer, out)
    model = peer.base_model
    if configuration is not None:
        model = configuration.model.source
        header = {"config": to_plain(configuration), "epoch": None, "step": peer.step, "imported": str(peer.source)}
        write_header(file, header)
    write_text(out / "README.md", _page(peer, out, model))
    print(f"{len(peer.layers)} layers, rank {peer.options['r']}, alpha {peer.options['lora_alpha']:g}")
    print(f"pipe.load_lora_weights({str(out)!r})")
    return 0


def _transformer(configuration: "Run") -> "nn.Module":
    """Its layers, without weights where its shapes are known."""
    import torch

    from mogb_diffusion.models.architectures import SD35_MEDIUM, build_transformer
    from mogb_diffusion.models.sd3 import load_model

    if configuration.model.source == SD35_MEDIUM:
        found: nn.Module = build_transformer()
        return found
    return load_model(configuration.model, torch.device("cpu")).transformer


def _page(peer: "Peer", out: Path, model: str | None) -> str:
    return _PAGE.format(
        name=out.resolve().name, rank=peer.options["r"], alpha=peer.options["lora_alpha"], source=peer.source,
        model=f"`{model}`" if model else "a Stable Diffusion 3 pipeline", layers=len(peer.layers), place=out,
    )  # fmt: skip
