"""What the doctor says, and its exit status: 0 ready, 1 something is missing, 2 bad input. It asks no network."""

import re
import socket
from pathlib import Path

import pytest
import torch

from mogb_diffusion import readiness
from mogb_diffusion.cli import main
from mogb_diffusion.config import Reward, load_run, override, to_plain
from mogb_diffusion.dry_run import STAND_INS, miniature
from mogb_diffusion.prompts import read_prompts
from mogb_diffusion.recipes import RECIPES, recipe
from mogb_diffusion.rewards import BUILT_IN

PAPER = Path(__file__).parents[2] / "docs" / "paper.md"
CLIP = "openai/clip-vit-large-patch14"


def broken(images, prompts):
    raise ConnectionError("no answer")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, an empty folder to work in, and no network."""
    from huggingface_hub import constants

    def connect(*args, **kwargs):
        raise AssertionError("The doctor asked the network.")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path / "hub"


def put(cache, repository, *files):
    """A repository in the cache, as the hub's libraries lay it out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    for name in files:
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    return snapshot


def doctor(*arguments):
    return main(["doctor", *arguments])


def no_rewards(monkeypatch):
    monkeypatch.setattr(readiness, "try_reward", lambda reward: readiness.Tried(reward.key, "not asked"))


def test_without_weights_it_says_where_they_are_and_status_1(cache, capsys, monkeypatch):
    asked, tried = [], readiness.try_reward

    def ask(reward):
        asked.append(reward.name)
        return readiness.Tried("ocr", "not tried", True) if reward.name == "ocr" else tried(reward)

    monkeypatch.setattr(readiness, "try_reward", ask)
    assert doctor("sd35_marble", "--preset", "8x80gb") == 1
    told = capsys.readouterr().out
    assert "specialists: geneval, ocr" in told
    assert asked == ["pickscore", "hpsv2", "clip", "ocr", "geneval"]
    for words in (
        "48 prompts x 24 pictures = 1152 an epoch",
        "on 8 ranks: 144 pictures an update, 384 micro-steps of up to 9",
        "torchrun --standalone --nproc_per_node 8 -m mogb_diffusion train sd35_marble --preset 8x80gb",
        "2.24 billion weights, 18.8 million in training",
        "GiB  activations of 9 pictures (training)",
        "licence: Stability AI Community",
        "accept its licence at https://huggingface.co/stabilityai/stable-diffusion-3.5-medium, then: hf auth login; ",
        "hf download xswu/HPSv2 HPS_v2.1_compressed.pt",
        "hf download yuvalkirstain/PickScore_v1",
        "pickscore: not tried: yuvalkirstain/PickScore_v1, laion/CLIP-ViT-H-14-laion2B-s32B-b79K missing",
        "GiB of weights to fetch",
        "prompts/pickscore/train.txt is missing: a file with one prompt a line",
        "mogb-diffusion prompts geneval --out prompts/geneval/train_metadata.jsonl --n 2000",
        "this needs 8 on a machine" if torch.cuda.device_count() < 8 else "",
    ):
        assert words in told
    last = told.splitlines()[-1]
    assert last.startswith("not ready, ")
    assert "stabilityai/stable-diffusion-3.5-medium" in last


def test_the_commands_for_prompts_make_files_that_can_be_read(cache, capsys):
    run = recipe("sd35_marble")
    absent = readiness.missing_prompts((*run.prompts, *run.evaluation.prompts))
    assert [path for path, _ in absent] == [source.path for source in (*run.prompts, *run.evaluation.prompts)]
    texts = {}
    for path, remedy in absent:
        found = re.search(r"mkdir -p (\S+); mogb-diffusion (prompts .*)", remedy)
        assert (found is None) == ("pickscore" in path)
        if found:
            Path(found[1]).mkdir(parents=True, exist_ok=True)
            assert main(found[2].split()) == 0
            texts[path] = {prompt.text for prompt in read_prompts(path)}
    assert len(texts) == 4
    assert not texts["prompts/ocr/train.txt"] & texts["prompts/ocr/test.txt"]
    assert not texts["prompts/geneval/train_metadata.jsonl"] & texts["prompts/geneval/test_metadata.jsonl"]
    left = readiness.missing_prompts((*run.prompts, *run.evaluation.prompts))
    assert [path for path, _ in left] == ["prompts/pickscore/train.txt", "prompts/pickscore/test.txt"]


def test_a_recipe_that_can_start_is_ready(cache, capsys):
    assert doctor("tiny_smoke", "--set", "prompts.0.count=8", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "ready: mogb-diffusion train tiny_smoke" in told.splitlines()[-1]
    assert len(re.findall(r"pictures/s; built-in pictures score( -?\d\.\d+){4}", told)) == 5
    assert re.search(r"dry run .*\n  4 optimizer steps, 4 of them solved, 0 skipped", told)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "There is no recipe 'nothing'"),
        (["--dry-run"], "--dry-run and --preset belong to a recipe"),
        (["tiny", "--preset", "1x24g"], "There is no preset '1x24g'. Did you mean '1x24gb'?"),
        (["tiny", "--set", "epochs=-1"], "epochs: must be a whole number >= 0"),
        (["tiny", "--set", "prompts=[{path: bad.jsonl}]"], "bad.jsonl:1: this is no JSON"),
        (["tiny", "--set", "model.device=tpu"], "model.device: 'tpu' cannot be used here"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, cache, capsys):
    Path("bad.jsonl").write_text("{\n")
    assert doctor(*arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_reward_that_fails_is_said_and_status_1(cache, capsys):
    assert doctor("tiny_smoke", "--set", "rewards.0.name=test_doctor:broken") == 1
    told = capsys.readouterr().out
    assert "preference: fails: ConnectionError: no answer" in told
    assert told.splitlines()[-1] == "not ready, 1 missing: reward preference"


def hardware(monkeypatch, *gpus, main=None, disk=1e15):
    """GPUs of so many GiB, and so much free main memory and disk."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (gpus[index] * 2**30,) * 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "made up")
    monkeypatch.setattr(readiness, "free_main_memory", lambda: main)
    monkeypatch.setattr(readiness, "free_bytes", lambda folder: disk)


WORLD = (
    "prompts=[{format: world, kind: mixed, split: train, count: 40}]",
    "evaluation.prompts=[{format: world, kind: mixed, split: held_out, count: 8}]",
)


def settings(*assignments):
    return [word for assignment in (*WORLD, *assignments) for word in ("--set", assignment)]


FULL = ("policy.kind=full", "balancing={mode: fixed}")


def test_full_fine_tuning_is_estimated_and_checked(cache, capsys, monkeypatch):
    no_rewards(monkeypatch)
    hardware(monkeypatch, 80)
    assert doctor("sd35_marble", *settings(*FULL)) == 1
    told = capsys.readouterr().out
    assert "25.1 GiB  transformer, float32: current, old and reference" in told  # 3 x 4 x 2.243 billion
    assert "missing: memory; a GPU here has 80.0 GiB" in told
    assert "model.shard=true on several GPUs" in told
    assert "GPU memory" in told.splitlines()[-1]
    hardware(monkeypatch, *[80] * 8, disk=1e9)
    assert doctor("sd35_marble", "--preset", "8x80gb", *settings(*FULL, "model.shard=true")) == 1
    told = capsys.readouterr().out
    assert "3.1 GiB  transformer, float32: current, old and reference" in told
    assert "GPU memory" not in told.splitlines()[-1]
    assert "GiB of checkpoints, 1 GiB free: too little" in told


def test_a_pipeline_of_unknown_shape_needs_gpus_and_disk_all_the_same(cache, capsys, monkeypatch):
    no_rewards(monkeypatch)
    put(cache, "somebody/sd3", "model_index.json")
    (cache / "models--somebody--sd3" / "snapshots" / "abc" / "model_index.json").write_text("{}")
    put(cache, "somebody/sd3", "a.safetensors")
    wanted = settings("model.source=somebody/sd3", "model.resolution=512", "rewards.1.options.weights=x.pt")
    hardware(monkeypatch)
    assert doctor("sd35_marble", *wanted) == 1
    told = capsys.readouterr().out
    assert "no estimate" in told
    assert "missing: GPUs; this needs 1 on a machine, and here are none" in told
    assert "GPU" in told.splitlines()[-1].split(": ")[1].split(", ")
    hardware(monkeypatch, 80, disk=1e8)
    assert doctor("sd35_marble", *wanted) == 1
    told = capsys.readouterr().out
    assert "missing: GPUs" not in told
    assert "GiB of weights to fetch, 0 GiB free: too little" in told
    assert "disk: checkpoints of a size that is not known here" in told
    assert "disk" in told.splitlines()[-1].split(": ")[1].split(", ")


@pytest.mark.parametrize("where", ["precompute", "offload", "resident"])
def test_main_memory_for_prompts_is_told_and_checked(where, cache, capsys, monkeypatch):
    no_rewards(monkeypatch)
    hardware(monkeypatch, *[80] * 8, main=90e9)
    doctor("sd35_marble", "--preset", "8x80gb", *settings(f"model.text_encoders={where}"))
    told = capsys.readouterr().out
    assert ("main memory of a machine" in told) == (where != "resident")
    if where != "resident":  # eight times 11.2 GB of encoders, and 1.7 MB for 37 + 8 prompts and the empty one
        assert "46 prompts of 1.7 MB, 8 times" in told
        assert "83.7 GiB  at most; 84 GiB are free" in told
    hardware(monkeypatch, *[80] * 8, main=80e9)
    doctor("sd35_marble", "--preset", "8x80gb", *settings(f"model.text_encoders={where}"))
    told = capsys.readouterr().out
    assert ("main memory" in told.splitlines()[-1]) == (where != "resident")


class TestWeights:
    def test_a_whole_snapshot_counts_and_a_part_does_not(self, cache):
        [weights] = readiness.reward_weights(Reward(name="clip"))
        assert weights.where == ""
        snapshot = put(cache, CLIP, "config.json", "tokenizer.json")
        assert weights.where == ""  # the settings came, the weights did not
        put(cache, CLIP, "model.safetensors")
        assert weights.where == str(snapshot)

    def test_a_pipeline_needs_weights_in_each_part(self, cache):
        weights = readiness.pipeline_weights(recipe("sd35_marble").model)
        assert weights.gated
        index = '{"transformer": ["d", "T"], "vae": ["d", "V"], "text_encoder_3": [null, null]}'
        snapshot = put(cache, weights.source, "model_index.json", "transformer/a.safetensors", "vae/config.json")
        (snapshot / "model_index.json").write_text(index)
        assert weights.where == ""
        put(cache, weights.source, "vae/b.safetensors")
        assert weights.where == str(snapshot)

    def test_one_file_of_a_repository(self, cache):
        file, shape = readiness.reward_weights(Reward(name="hpsv2"))
        assert (file.where, shape.where) == ("", "")
        put(cache, "xswu/HPSv2", "HPS_v2.1_compressed.pt")
        put(cache, shape.source, "config.json", "vocab.json")
        assert file.where.endswith("HPS_v2.1_compressed.pt")
        assert shape.where  # settings and a tokenizer are enough

    def test_paths_are_looked_at_as_they_are(self, cache, tmp_path):
        [weights] = readiness.reward_weights(Reward(name="clip", options={"model": str(tmp_path / "clip")}))
        assert (weights.where, weights.remedy) == ("", f"put it at {tmp_path / 'clip'}")
        (tmp_path / "clip").mkdir()
        assert weights.where == str(tmp_path / "clip")
        assert readiness.pipeline_weights(recipe("tiny").model) is None

    @pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"ocr", *readiness.ASK_SERVERS}))
    def test_every_reward_with_weights_says_which(self, name):
        found = readiness.reward_weights(Reward(name=name))
        assert bool(found) == (not name.startswith("world"))
        assert all(weights.licence for weights in found)

    def test_defaults_are_those_of_the_rewards(self):
        import inspect
        from importlib import import_module

        for name in ("pickscore", "clip", "hpsv2", "imagereward", "geneval", "aesthetic"):
            module, _, kind = BUILT_IN[name].partition(":")
            parameters = inspect.signature(getattr(import_module(module), kind)).parameters
            named = {str(p.default) for key, p in parameters.items() if key in ("model", "tokenizer", "config", "clip")}
            assert named <= {weights.source for weights in readiness.reward_weights(Reward(name=name))}


def test_offline_is_for_a_while(monkeypatch):
    import os

    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = constants.HF_HUB_OFFLINE
    with readiness.offline():
        assert (os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE) == ("1", True)
    assert "HF_HUB_OFFLINE" not in os.environ
    assert constants.HF_HUB_OFFLINE is before


def test_the_disk_that_checkpoints_take():
    run = override(recipe("sd35_marble"), ["checkpoints.keep_last=3"])
    assert readiness.checkpoint_bytes(run, 10) == 4 * 6 * 40
    assert readiness.checkpoint_bytes(override(run, ["policy.ema=0"]), 10) == 4 * 5 * 40
    everything = override(run, ["checkpoints.keep_last=0", "checkpoints.every=100"])
    assert readiness.checkpoint_bytes(everything, 10) == 17 * 6 * 40
    assert readiness.free_bytes(Path("/nowhere/at/all")) > 0


def test_a_miniature_keeps_what_the_recipe_is_about():
    run = load_run("sd35_sequential", preset="1x24gb")
    small = miniature(run)
    kept = ("balancing", "loss", "policy", "optimizer", "seed", "scoring")
    assert all(getattr(small, key) == getattr(run, key) for key in kept)
    assert (small.model.gradient_checkpointing, small.model.text_encoders) == (True, "offload")
    assert (small.model.dtype, small.sampling.solver) == (run.model.dtype, "dpm2")
    assert small.reward_names == run.reward_names
    assert {reward.name for reward in small.rewards} == {STAND_INS[name] for name in run.reward_names}
    assert [source.kind for source in small.prompts] == ["mixed", "text", "objects"]
    assert [source.rewards for source in small.prompts] == [source.rewards for source in run.prompts]
    assert small.batch.images > small.batch.micro_batch  # several micro-batches
    own = override(run, ["rewards.0={name: 'mine:Own', label: pickscore}"])
    assert miniature(own).rewards[0].name == "mine:Own"
    assert to_plain(miniature(recipe("tiny")).rewards) == to_plain(recipe("tiny").rewards)


def dry_run(name, capsys, monkeypatch):
    no_rewards(monkeypatch)
    assert doctor(name, "--dry-run") == 1  # weights and prompts are missing
    told = capsys.readouterr().out
    assert "pickscore by world_preference" in told or "single" in name
    if recipe(name).epochs:
        assert re.search(r"2 optimizer steps, \d of them solved, 0 skipped", told)
        solved = int(re.search(r"(\d) of them solved", told)[1])
        mode = recipe(name).balancing.mode
        assert solved == {"marble": 1, "marble_exact": 2, "marble_every_step": 2, "marble_script": 2}.get(mode, 0)
    else:
        assert "measured, as the recipe trains nothing" in told


@pytest.mark.parametrize("name", ["sd35_marble", "sd35_sequential", "sd35_single_ocr"])
def test_a_dry_run(name, cache, capsys, monkeypatch):
    dry_run(name, capsys, monkeypatch)


def commands_of_the_paper():
    return sorted(set(re.findall(r"`(sd35_\w+)`", PAPER.read_text(encoding="utf-8"))))


@pytest.mark.slow
@pytest.mark.parametrize("name", commands_of_the_paper())
def test_every_row_of_the_paper_is_accepted(name, cache, capsys, monkeypatch):
    dry_run(name, capsys, monkeypatch)


def test_the_paper_names_every_recipe_of_the_big_model():
    assert commands_of_the_paper() == sorted(name for name in RECIPES if name.startswith("sd35"))


# Table 1 and Table 3 as published: GenEval, OCR, PickScore, CLIPScore, HPSv2.1, Aesthetic, ImageReward, UnifiedReward.
PUBLISHED = {
    "sd35_base": "0.24 0.12 20.51 0.237 0.204 5.13 -0.58 2.02 -2.319",
    "sd35_base_cfg": "0.63 0.59 22.34 0.285 0.279 5.36 0.85 3.03 -0.255",
    "sd35_sequential": "0.94 0.91 23.80 0.293 0.331 6.01 1.49 3.49 +1.015",
    "sd35_weighted_sum": "0.92 0.91 21.53 0.267 0.300 6.15 1.16 3.04 +0.184",
    "sd35_marble": "0.94 0.96 22.83 0.286 0.355 6.59 1.53 3.52 +1.116",
    "3 sd35_marble": "0.93 0.96 22.62 0.283 0.355 6.59 1.52 3.45",
    "3 sd35_fixed": "0.86 0.89 22.64 0.272 0.346 6.55 1.45 3.42",
    "3 sd35_every_step": "0.92 0.92 21.32 0.267 0.301 5.89 1.17 3.04",
}


@pytest.mark.parametrize("row", list(PUBLISHED))
def test_the_published_numbers_are_those_of_the_tables(row):
    name = row.split()[-1]
    numbers = PUBLISHED[row].split()
    rows = [line for line in PAPER.read_text(encoding="utf-8").splitlines() if f"| `{name}` |" in line]
    assert any([cell.strip() for cell in line.split("|")][-1 - len(numbers) : -1] == numbers for line in rows)
