"""What ``mogb-diffusion train tiny`` reaches: held-out rewards before and after, and where the seconds went.

    mogb-diffusion train tiny --out runs/tiny
    python benchmarks/tiny.py --run runs/tiny

Reads the metrics of a finished run, and trains nothing.
"""

import argparse
from collections import Counter
from pathlib import Path

from _common import provenance, table, write

from mogb_diffusion.config import from_yaml
from mogb_diffusion.tracking import read_metrics


def main() -> None:
    """Writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/tiny", help="folder of the finished run (default: %(default)s)")
    folder = Path(parser.parse_args().run)
    run = from_yaml((folder / "config.yaml").read_text(), str(folder))
    lines = read_metrics(folder)
    scores = {line["name"]: line["scores"] for line in lines if line["kind"] == "evaluation"}
    if not {"before", "after"} <= scores.keys():
        parser.error(f"{folder} has no evaluation before and after: let the run finish.")
    seconds: Counter[str] = Counter()
    for line in lines:
        if line["kind"] == "epoch":
            seconds.update(line["seconds"])
    seconds.pop("scoring", None)  # in the background, beside the sampling
    names = list(run.reward_names)
    rows = [
        [name, *(f"{scores[name][key]['mean']:.3f} ± {scores[name][key]['error']:.3f}" for key in names)]
        for name in ("before", "after")
    ]
    spent = ", ".join(f"{what} {value:.0f}" for what, value in seconds.most_common() if value >= 0.5)
    text = (
        f"{run.name}, {run.balancing.mode}, {run.epochs} epochs of {run.batch.images} pictures. Held-out rewards on "
        f"{run.evaluation.images} pictures with the same noise, ± one standard error:\n\n"
        f"{table(['', *names], rows)}\n\nSeconds up to the last epoch: {spent}."
    )
    write("tiny", {"provenance": provenance(run.seed), "scores": scores, "seconds": dict(seconds)}, text)


if __name__ == "__main__":
    main()
