"""``mogb-diffusion evaluate``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogb_diffusion.commands._shared import (
    benchmark_rule,
    chosen_rewards,
    find,
    positive,
    reward_arguments,
    source_arguments,
    tell,
    write_json,
    write_text,
)
from mogb_diffusion.errors import InputError, RewardFailure

if TYPE_CHECKING:
    from mogb_diffusion.config import Reward, Run
    from mogb_diffusion.distributed import Ranks
    from mogb_diffusion.prompts import Prompt
    from mogb_diffusion.results import Record
    from mogb_diffusion.trained import Source

SUMMARY = "rewards of runs, LoRAs and base models on held-out prompts"
EXAMPLE = """
mogb-diffusion evaluate runs/tiny --images 240
mogb-diffusion evaluate runs/tiny --metrics alignment,world_composition --prompts test.jsonl
mogb-diffusion evaluate runs/a runs/b lora --markdown table.md     several at once: with composite z-scores
mogb-diffusion evaluate sd35_marble --set evaluation.guidance=4.5 --name 'base with guidance'
torchrun --nproc_per_node 8 -m mogb_diffusion evaluate runs/sd35_marble --metrics geneval --prompts test_metadata.jsonl
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What, on which prompts, by which rewards."""
    parser.add_argument(
        "targets", metavar="RUN|LORA|RECIPE", nargs="+",
        help="a folder of a run, a checkpoint in one, an exported LoRA, or a recipe for its base model",
    )  # fmt: skip
    source_arguments(parser)
    parser.add_argument("--name", metavar="TEXT", help="in tables, of a single one; default: that of its folder")
    parser.add_argument(
        "--metrics", metavar="A,B", help="rewards, trained on or not; default: all of the configuration"
    )
    reward_arguments(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", action="append", help="instead of the configuration's; may be repeated"
    )
    parser.add_argument(
        "--images", metavar="N", type=positive,
        help="the prompts in turn until there are so many; default: every prompt of --prompts once, or as configured",
    )  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=int, help="of the noise; default: that of the configuration")
    parser.add_argument(
        "--base", action=argparse.BooleanOptionalAction, default=True, help="also the base model; default: yes"
    )
    for kind, where in (("json", "evaluation.json"), ("csv", "evaluation.csv"), ("markdown", "evaluation.md")):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"default, of a single one: {where} in its folder")


def run(options: argparse.Namespace) -> int:
    """Draws, scores, prints tables and writes them."""
    from mogb_diffusion.distributed import start_ranks, stop_ranks

    sources = [find(options, target, recipes=True) for target in options.targets]
    if options.name and len(sources) > 1:
        raise InputError("--name is for a single one.")
    _check_names(sources)
    ranks = start_ranks(sources[0].run.model.device)
    try:
        records: list[Record] = []
        bases: dict[str, dict[str, Any]] = {}
        for source in sources:
            record = _evaluated(source, options, ranks, bases)
            records.append(record)
            if ranks.first:
                _write(record, source, options, single=len(sources) == 1)
        if ranks.first and len(records) > 1:
            _write_table(records, options)
    finally:
        stop_ranks()
    counted = [(reward, counts) for record in records for reward, counts in record["failures"].items()]
    failed = sorted({reward for reward, counts in counted if counts.keys() & {"errors", "timeouts"}})
    if failed:
        raise RewardFailure(f"{', '.join(failed)} failed on some pictures, which are in no mean: see above.")
    return 0


def _check_names(sources: "list[Source]") -> None:
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"Two of them are called {twice[0]!r}: evaluate them one by one with --name, then compare with report."
        )


def _evaluated(
    source: "Source", options: argparse.Namespace, ranks: "Ranks", bases: dict[str, dict[str, Any]]
) -> "Record":
    """The record of one model, the same on every rank; scores of base models are kept in ``bases``."""
    from dataclasses import asdict

    from mogb_diffusion.evaluation import definitions, evaluation_sampling, examine, scores_of
    from mogb_diffusion.results import versions
    from mogb_diffusion.scoring import make_scorer

    prompts, where = _prompts(source, options)
    seed = source.run.seed if options.seed is None else options.seed
    how = evaluation_sampling(source.run)
    known = _known(source, options)
    specs = tuple(
        benchmark_rule(spec, options.option) for spec in chosen_rewards(options.metrics, known, options.option)
    )
    with ranks.together():
        trained = source.load(ranks.local, tell if ranks.first else lambda message: None)
        scorer = make_scorer(specs, source.run.scoring, trained.model.device)
    record: Record = {
        "name": options.name or source.name, "model": source.run.model.source, "epoch": trained.epoch,
        "step": trained.step, "prompts": where, "pictures": len(prompts), "seed": seed, "sampling": asdict(how),
        "trained_on": source.trained_on, "metrics": {}, "failures": {}, "versions": versions(),
    }  # fmt: skip
    key = _base_key(source.run, record)
    if options.base and key in bases:
        record["base"] = bases[key]
    needed = (("base", trained.base), ("trained", trained.weights))
    wanted = {"trained"} if trained.changed else {"base"}
    wanted |= {"base"} if options.base and key not in bases else set()
    try:
        for which, active in needed:
            if which not in wanted:
                continue
            with active():
                found = examine(trained.model, scorer, prompts, how, seed, source.run.evaluation.batch, ranks)
            record[which] = scores_of(found, specs, scorer, prompts)
            record["metrics"] = definitions(specs, record[which])
            for message in dict.fromkeys(found.messages):
                tell(message)
            for reward, counts in found.failures.items():
                total = record["failures"].setdefault(reward, {})
                for kind, count in counts.items():
                    total[kind] = total.get(kind, 0) + count
    finally:
        scorer.close()
    if "base" in record:
        bases[key] = record["base"]
    return record


def _known(source: "Source", options: argparse.Namespace) -> "tuple[Reward, ...]":
    """Rewards of the configuration; with ``--metrics``, nothing that a header calls so is taken for it."""
    from mogb_diffusion.headers import NO_REWARD

    if source.from_header and options.metrics is not None:
        return ()
    return tuple(spec for spec in (*source.run.rewards, *source.run.evaluation.rewards) if spec != NO_REWARD)


def _base_key(run: "Run", record: "Record") -> str:
    """Equal for records whose base model draws and scores the same pictures."""
    from mogb_diffusion.config import to_plain

    same = {name: record[name] for name in ("prompts", "pictures", "seed", "sampling")}
    sources = to_plain(run.evaluation.prompts) if record["prompts"] == "held-out prompts" else None
    return repr((to_plain(run.model), same, sources, to_plain((*run.rewards, *run.evaluation.rewards))))


def _prompts(source: "Source", options: argparse.Namespace) -> "tuple[list[Prompt], str]":
    """The prompts, and what to call them."""
    from mogb_diffusion.datasets import evaluation_prompts, interleaved
    from mogb_diffusion.prompts import read_prompts

    if options.prompts:
        parts = [read_prompts(path) for path in options.prompts]
        whole = [prompt for part in parts for prompt in part]
        return interleaved(parts, options.images) if options.images else whole, ", ".join(options.prompts)
    prompts = evaluation_prompts(source.run, options.images or source.run.evaluation.images)
    if not prompts:
        raise InputError(f"{source.name} has no held-out prompts: name some with --prompts.")
    return prompts, "held-out prompts"


_KINDS = (("json", "json"), ("csv", "csv"), ("markdown", "md"))


def _write(record: "Record", source: "Source", options: argparse.Namespace, *, single: bool) -> None:
    from mogb_diffusion.results import as_csv, as_markdown, as_text

    print(f"{record['name']}: {as_text(record)}", flush=True)
    asked = {kind: Path(getattr(options, kind)) for kind, _ in _KINDS if single and getattr(options, kind)}
    files = {kind: (path, record) for kind, path in asked.items()}
    if source.folder is not None and "json" not in asked:  # the others belong to evaluation.json
        stem = _stem(source)
        whole = _joined(record, source.folder, stem)
        for kind, ending in _KINDS:
            files.setdefault(kind, (source.folder / f"{stem}.{ending}", whole))
    for kind, (path, found) in files.items():
        if kind == "json":
            write_json(path, found)
        else:
            write_text(path, as_csv([found]) if kind == "csv" else as_markdown(found))


def _stem(source: "Source") -> str:
    """``evaluation`` for the newest state of a run and the LoRA of a folder, a name of its own for others."""
    from mogb_diffusion import checkpoint
    from mogb_diffusion.results import EVALUATION
    from mogb_diffusion.trained import WEIGHTS

    assert source.folder is not None
    if source.checkpoint is not None:
        newest = [path.name for path in checkpoint.found(source.folder)[:1]]
        return EVALUATION if newest == [source.checkpoint] else f"{EVALUATION}-{source.checkpoint}"
    is_whole = source.file is None or source.file.name == WEIGHTS
    return EVALUATION if is_whole else f"{EVALUATION}-{source.file.stem}"  # type: ignore[union-attr]


def _joined(record: "Record", folder: Path, stem: str) -> "Record":
    """With scores that were measured alike before; others are kept, under another name."""
    from mogb_diffusion.results import merged, read_record

    path = folder / f"{stem}.json"
    if not path.is_file():
        return record
    try:
        old = read_record(path)
    except InputError:
        old = {}
    if (both := merged(old, record)) is not None:
        return both
    step = old.get("step")
    base = f"{stem}-step-{step}" if isinstance(step, int) and step != record["step"] else f"{stem}-old"
    name, number = base, 1
    while (folder / f"{name}.json").exists():
        number += 1
        name = f"{base}-{number}"
    for _, ending in _KINDS:
        if (folder / f"{stem}.{ending}").is_file():
            (folder / f"{stem}.{ending}").replace(folder / f"{name}.{ending}")
    tell(f"{path} was measured otherwise, and is now {name}.json.")
    return record


def _write_table(records: "list[Record]", options: argparse.Namespace) -> None:
    from mogb_diffusion.comparison import as_csv, as_markdown, as_text, compare
    from mogb_diffusion.results import rows_of

    table = compare(rows_of(records))
    print(as_text(table))
    if options.json:
        write_json(Path(options.json), {"runs": records, "z": table.z, "composite": table.composite})
    if options.csv:
        write_text(Path(options.csv), as_csv(table))
    if options.markdown:
        write_text(Path(options.markdown), as_markdown(table))
