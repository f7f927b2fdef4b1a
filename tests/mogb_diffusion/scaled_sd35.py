"""The recipe ``sd35_marble`` on a scaled-down Stable Diffusion 3.5, with its five rewards: everything but the sizes.

``python -m tests.mogb_diffusion.scaled_sd35 --out DIR`` writes the checkpoints and the configuration, then trains two
epochs on one process, the same on two, and once more with a kill after the first epoch; it prints every command, so
that each can be repeated by hand. The pictures are noise: all weights are random. What is real is the way through the
code: three text encoders, dual attention, an autoencoder of four levels, CLIP, HPSv2's own file, Mask2Former and a
reader of text.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

import tiny_checkpoints

EPOCHS, STEPS = 2, 12  # optimizer steps of both epochs: MARBLE is solved at the first and at the eleventh
OBJECTS = ("wine glass", "bottle", "stop sign", "orange", "person", "scissors")  # which this detector sees now and then
TEXT = ("a photo of the sea", "two men in a boat", "a red house on a hill", "the old town at night")
SIGNS = ('a sign that says "OPEN"', 'a cup with the text "SUN"')


def write(folder, *, side=128):
    """All checkpoints and prompt files, and the configuration ``folder/run.yaml``; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = tiny_checkpoints.write_pipeline(folder, side=side)
    tiny_checkpoints.write_clip(folder / "clip")
    weights, architecture = tiny_checkpoints.write_hpsv2(folder / "hpsv2")
    detector = tiny_checkpoints.write_mask2former(folder / "mask2former")
    (folder / "text.txt").write_text("\n".join(TEXT))
    (folder / "signs.txt").write_text("\n".join(SIGNS))
    (folder / "objects.jsonl").write_text("\n".join(map(json.dumps, _objects())))
    path = folder / "run.yaml"
    chosen = configuration(folder, pipeline, weights, architecture, detector)
    path.write_text(yaml.safe_dump(chosen, sort_keys=False))
    return path


def _objects():
    lines = []
    for first, second in zip(OBJECTS, (*OBJECTS[1:], OBJECTS[0]), strict=True):
        include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        lines.append({"tag": "two_object", "include": include, "prompt": f"a photo of a {first} and a {second}"})
        colored = [{"class": first, "count": 1, "color": "blue"}]
        lines.append({"tag": "colors", "include": colored, "prompt": f"a photo of a blue {first}"})
    return lines


def configuration(folder, pipeline, weights, architecture, detector):
    """What differs from the recipe: where things are, and how large they are."""
    clip = str(folder / "clip")
    general = ["pickscore", "hpsv2", "clip"]
    sources = [
        {"path": str(folder / "text.txt"), "format": "text", "rewards": general},
        {"path": str(folder / "signs.txt"), "format": "text", "rewards": [*general, "ocr"]},
        {"path": str(folder / "objects.jsonl"), "format": "geneval", "rewards": [*general, "geneval"], "weight": 2.0},
    ]
    return {
        "recipe": "sd35_marble",
        "name": "scaled_sd35",
        "epochs": EPOCHS,
        "model": {"source": str(pipeline), "resolution": None, "max_sequence_length": 16},
        "policy": {"rank": 4, "alpha": 8.0},
        "prompts": sources,
        "rewards": [
            {"name": "pickscore", "options": {"model": clip, "tokenizer": clip}},
            {"name": "hpsv2", "options": {"weights": str(weights), "config": str(architecture)}},
            {"name": "clip", "options": {"model": clip}},
            {"name": "ocr", "specialist": True, "options": {"threads": 1}},
            {
                "name": "geneval",
                "specialist": True,
                "options": {"model": str(detector), "clip": clip, "short_side": 64, "long_side": 96},
            },
        ],
        "batch": {
            "groups": 8, "images_per_prompt": 3, "micro_batch": 2, "sampling_batch": 6,
            "updates_per_epoch": STEPS // EPOCHS,
        },
        "sampling": {"steps": 4},
        "evaluation": {
            "every": 1, "prompts": [{**source, "rewards": None} for source in sources], "images": 9, "batch": 3,
            "steps": 4,
        },
        "checkpoints": {"every": 1},
        "tracking": {"samples_every": 1, "samples": 9},
    }  # fmt: skip


def train_command(path, out, *extra, processes=1):
    """The command line of a run, and its environment."""
    launcher = [sys.executable, "-m", "mogb_diffusion"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher = [sys.executable, *torchrun, "-m", "mogb_diffusion"]
    return [*launcher, "train", str(path), "--out", str(out), *extra]


def start(command):
    """A process of one thread each, which shares the machine with others."""
    print("$", shlex.join(map(str, command)), flush=True)
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})


def kill_after_first_epoch(command, out):
    """Starts a run and kills it with SIGKILL as soon as the checkpoint of its first epoch is there."""
    process = start(command)
    while process.poll() is None and not (out / "latest").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    print(f"  killed; there is {(out / 'latest').read_text().strip()}", flush=True)


def main(arguments=None):
    """Everything, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints and the runs; is kept")
    out = parser.parse_args(arguments).out.resolve()
    path = write(out)
    print(f"{path}: the configuration", flush=True)
    for name, processes in (("one", 1), ("two", 2)):
        if start(train_command(path, out / name, processes=processes)).wait():
            return 1
    kill_after_first_epoch(train_command(path, out / "resumed"), out / "resumed")
    return start(train_command(path, out / "resumed", "--resume")).wait()


if __name__ == "__main__":
    sys.exit(main())
