import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import SMALL

from mogb_diffusion import commands
from mogb_diffusion.cli import main
from mogb_diffusion.comparison import title
from mogb_diffusion.config import to_plain
from mogb_diffusion.models import tiny
from mogb_diffusion.trained import find_source, read_header

STRONG = ("optimizer.lr=0.05", "policy.ema=0.0", "tracking.samples_every=0", "checkpoints.every=0")
SQUARE = "a photo of a red square"


def settings(*assignments):
    return [word for assignment in (*SMALL, *assignments) for word in ("--set", assignment)]


class Red:
    """The mean of the red channel; counts its instances."""

    made = 0

    def __init__(self, metric="score"):
        type(self).made += 1
        self.metric = metric

    def __call__(self, images, prompts):
        return images[:, 0].mean(dim=(1, 2)) + (10 if self.metric == "correct" else 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs from one base model."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        extra = (*STRONG, f"seed={seed}", "evaluation.rewards=[{name: 'test_commands:Red', label: red}]")
        assert main(["train", "tiny_smoke", *settings(*extra), "--out", str(folder / f"r{seed}"), "--no-report"]) == 0
    return folder


@pytest.fixture
def lora(runs, tmp_path, capsys):
    assert main(["export", str(runs / "r0"), "--out", str(tmp_path / "lora")]) == 0
    capsys.readouterr()
    return tmp_path / "lora"


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"{SQUARE}\na photo of two blue circles\n{SQUARE}\n")
    return path


def scores(path):
    return json.loads(path.read_text())


def test_commands_are_there_and_import_nothing_heavy():
    assert len(set(commands.NAMES)) == len(commands.NAMES)
    code = "import sys; from mogb_diffusion.cli import _parser; _parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "numpy", "matplotlib"} & set(loaded)


def test_evaluate_writes_json_csv_and_markdown(runs, prompt_file, capsys):
    run = runs / "r0"
    assert main(["evaluate", str(run), "--prompts", str(prompt_file)]) == 0
    told = capsys.readouterr().out
    assert "red *" in told
    found = scores(run / "evaluation.json")
    assert found["pictures"] == 3  # every line once
    assert found["trained_on"] == ["preference", "aesthetic", "alignment"]
    assert set(found["base"]) == set(found["trained"]) == {"preference", "aesthetic", "alignment", "red"}
    assert found["base"]["red"] != found["trained"]["red"]
    assert "| red | no |" in (run / "evaluation.md").read_text()
    rows = list(csv.DictReader((run / "evaluation.csv").read_text().splitlines()))
    assert [float(row["mean"]) for row in rows if row["reward"] == "red"] == [
        found[which]["red"]["mean"] for which in ("base", "trained")
    ]


def test_evaluate_takes_other_metrics_files_and_no_base(runs, prompt_file, tmp_path, monkeypatch):
    from mogb_diffusion import rewards

    monkeypatch.setitem(rewards.BUILT_IN, "geneval", "test_commands:Red")
    places = [tmp_path / "out" / name for name in ("e.json", "e.csv", "e.md")]
    command = ["evaluate", str(runs / "r0"), "--metrics", "red,geneval", "--images", "2", "--no-base", "--name", "mine",
               "--json", str(places[0]), "--csv", str(places[1]), "--markdown", str(places[2])]  # fmt: skip
    assert main([*command, "--prompts", str(prompt_file)]) == 0
    found = scores(places[0])
    assert found["name"] == "mine"
    assert found["pictures"] == 2
    assert "base" not in found
    red, geneval = (found["trained"][name]["mean"] for name in ("red", "geneval"))
    assert geneval == pytest.approx(red + 10)  # geneval is measured by the benchmark's rule
    assert main([*command, "--prompts", str(prompt_file), "--option", "geneval.metric=score"]) == 0
    assert scores(places[0])["trained"]["geneval"]["mean"] == pytest.approx(red)
    assert all(place.exists() for place in places)


def test_a_run_its_checkpoint_and_its_lora_score_the_same(runs, lora, prompt_file, tmp_path):
    [checkpoint] = (runs / "r0").glob("checkpoint-*")
    found = {}
    for target in (runs / "r0", checkpoint, lora, lora / "pytorch_lora_weights.safetensors"):
        path = tmp_path / "found.json"
        command = ["evaluate", str(target), "--prompts", str(prompt_file), "--metrics", "test_commands:Red"]
        assert main([*command, "--json", str(path)]) == 0
        found[str(target)] = scores(path)
    first, *others = found.values()
    assert first["base"]["Red"]["mean"] != first["trained"]["Red"]["mean"]
    for other in others:
        for which in ("base", "trained"):
            assert other[which]["Red"]["mean"] == pytest.approx(first[which]["Red"]["mean"], abs=1e-6)
        assert (other["epoch"], other["step"]) == (2, 4)
        assert other["trained_on"] == ["preference", "aesthetic", "alignment"]
    for metrics in ("red", "alignment"):  # what its header calls so may be anything
        assert main(["evaluate", str(lora), "--prompts", str(prompt_file), "--metrics", metrics]) == 2


def test_several_at_once_share_their_base_and_have_a_composite(runs, tmp_path, capsys):
    places = [str(tmp_path / name) for name in ("t.json", "t.csv", "t.md")]
    files = ["--json", places[0], "--csv", places[1], "--markdown", places[2]]
    Red.made = 0
    targets = [str(runs / "r0"), str(runs / "r1")]
    assert main(["evaluate", *targets, "--images", "2", "--seed", "0", "--set", "seed=0", *files]) == 0
    both = scores(tmp_path / "t.json")
    first, second = both["runs"]
    assert first["base"] == second["base"]
    assert first["trained"] != second["trained"]
    assert list(both["composite"]) == ["base", "r0", "r1"]
    columns = [[first["base"][name]["mean"], first["trained"][name]["mean"], second["trained"][name]["mean"]]
               for name in ("preference", "aesthetic", "alignment", "red")]  # fmt: skip
    columns = [column for column in map(np.array, columns) if column.std() > 1e-9]
    expected = np.mean([(column - column.mean()) / column.std() for column in columns], axis=0)
    expected *= len(columns) / 4  # a column that does not vary is 0
    assert list(both["composite"].values()) == pytest.approx(list(expected))
    assert "composite: mean of the z-scores of 4 columns over these 3 rows." in capsys.readouterr().out
    assert (tmp_path / "t.md").read_text().count("\n| ") == 4
    assert scores(runs / "r1" / "evaluation.json")["name"] == "r1"


def test_a_recipe_is_its_base_model(prompt_file, tmp_path):
    path = tmp_path / "base.json"
    command = ["evaluate", "tiny_smoke", "--prompts", str(prompt_file), "--metrics", "preference", "--json", str(path)]
    assert main([*command, "--set", "evaluation.guidance=2"]) == 0
    found = scores(path)
    assert found["sampling"]["guidance"] == 2
    assert found["trained_on"] == []
    assert "trained" not in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "r0", "r1", "--name", "x"], "--name is for a single one"),
        (["evaluate", "r0", "r0"], "called 'r0'"),
        (["evaluate", "r0", "--metrics", "beauty"], "There is no reward 'beauty'"),
        (["evaluate", "r0", "--checkpoint", "checkpoint-9"], "has no checkpoint-9. There are: checkpoint-000004"),
        (["evaluate", "peft"], "bring it here first with mogb-diffusion import-peer"),
        (["evaluate", "bare"], "name a configuration with --recipe"),
        (["evaluate", "bare", "--recipe", "tiny_smoke"], "does not fit 'tiny-random'"),
        (["evaluate", "torn"], "cannot be read as safetensors"),
        (["sample", "tiny_smoke", "--prompt", "x", "--before-after"], "nothing before or after"),
        (["sample", "r0", "--prompts", "none.txt"], "cannot be read"),
        (["export", "r0", "--out", "r1"], "is not empty"),
        (["export", "tiny_smoke", "--out", "x"], "is no folder of a run"),
        (["export", "r0", "--out", "x", "--repo", "a/b"], "belong to --to hub"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(runs, arguments, words, capsys, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(runs)
    (runs / "peft" / "lora").mkdir(parents=True, exist_ok=True)
    for name in ("bare", "torn"):
        (runs / name).mkdir(exist_ok=True)
    weights = {f"transformer.nowhere.lora_{which}.weight": torch.ones(1, 1) for which in "AB"}
    save_file(weights, str(runs / "bare" / "pytorch_lora_weights.safetensors"))
    (runs / "torn" / "pytorch_lora_weights.safetensors").write_bytes(b"\x00" * 20)
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert told.err.count("\n") == 1


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_sample_needs_no_reward_and_puts_base_above_trained(runs, tmp_path):
    config = runs / "r1" / "config.yaml"
    kept = config.read_text()
    config.write_text(kept.replace("test_commands:Red", "nowhere:Nothing").replace("world_alignment", "nowhere:Else"))
    try:
        file = tmp_path / "p.txt"
        file.write_text("a photo of two blue circles\n")
        both, each = tmp_path / "out" / "both.png", tmp_path / "each"
        command = ["sample", str(runs / "r1"), "--prompt", SQUARE, "--prompts", str(file), "--count", "3"]
        assert main([*command, "--before-after", "--out", str(both), "--each", str(each)]) == 0
        grids = {}
        for which, flag in (("before", ["--base"]), ("after", [])):
            assert main([*command, *flag, "--out", str(tmp_path / f"{which}.png")]) == 0
            grids[which] = pixels(tmp_path / f"{which}.png")
        assert main(["export", str(runs / "r1"), "--out", str(tmp_path / "lora")]) == 0
    finally:
        config.write_text(kept)
    high = (grids["before"].shape[0] - 6) // 2  # two rows of pictures and gaps of 6
    rows = [pixels(both)[6 + n * high : 6 + (n + 1) * high] for n in range(4)]
    expected = [grids[which][6 + n * high : 6 + (n + 1) * high] for n in (0, 1) for which in ("before", "after")]
    assert [bool((a == b).all()) for a, b in zip(rows, expected, strict=True)] == [True] * 4
    assert int(abs(rows[0] - rows[1]).max()) > 10
    saved = pixels(each / "after" / "00001.png")  # 16 pixels, in the grid enlarged six times, 6 apart
    assert (rows[1][:96:6, 108:204:6] == saved).all()
    assert main(["score", str(each / "before"), "--rewards", "test_commands:Red"]) == 0


def test_rows_of_a_prompt_stay_together():
    from mogb_diffusion.commands.sample import _arranged

    grids = [torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 1, 1) + 10 * n for n in range(2)]
    found = _arranged(grids, count=3, columns=2)[:, 0, 0, 0].tolist()
    assert found == [0, 1, 10, 11, 2, 1, 12, 1, 3, 4, 13, 14, 5, 1, 15, 1]


def test_an_export_says_what_it_is(runs, lora):
    header = read_header(lora / "pytorch_lora_weights.safetensors")
    assert (header["epoch"], header["step"]) == (2, 4)
    source, own = find_source(str(lora)), find_source(str(runs / "r0"))
    for part in ("model", "policy", "sampling", "rewards", "seed"):
        assert getattr(source.run, part) == getattr(own.run, part)
    assert header["config"] == to_plain(own.run)
    assert source.dropped == ("the reward 'test_commands:Red'",)
    [checkpoint] = (runs / "r0").glob("checkpoint-*")
    mine, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (lora, checkpoint))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    with safe_open(str(lora / "pytorch_lora_weights.safetensors"), "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 32
    page = (lora / "README.md").read_text()
    import yaml

    head = yaml.safe_load(page.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert "lora" in head["tags"]
    evaluated = [json.loads(line) for line in (runs / "r0" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in evaluated if row["kind"] == "evaluation"][-1]["scores"]
    final = scores(runs / "r0" / "evaluation.json")["trained"] if (runs / "r0" / "evaluation.json").exists() else last
    for name in ("preference", "aesthetic", "alignment"):
        assert f"| {title(name)} | yes |" in page
        assert f"{final[name]['mean']:.3f}" in page
    assert "![Before](pictures/before.png)" in page
    assert (lora / "pictures" / "after.png").exists()
    code = page.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)  # what the page says works
    assert names["image"].size == (16, 16)


def test_licenses_of_base_models():
    from mogb_diffusion.cards import license_of

    head, text = license_of("stabilityai/stable-diffusion-3.5-medium")
    assert head["license_name"] == "stabilityai-ai-community"
    assert head["license_link"].startswith("https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/")
    assert "stabilityai/stable-diffusion-3.5-medium" in text
    assert license_of("somebody/model")[0] == {"license": "other"}
    assert "`somebody/model`" in license_of("somebody/model")[1]


class Hub:
    """What is asked of the hub's client."""

    calls = []  # noqa: RUF012
    failure = None

    def create_repo(self, repo, **options):
        if self.failure:
            raise self.failure
        self.calls.append(("create_repo", repo, options))
        import huggingface_hub

        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", sorted(os.listdir(options["folder_path"])), options))


def test_a_folder_goes_to_the_hub(runs, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.delattr(huggingface_hub, "utils", raising=False)  # it is there only after somebody imports it
    Hub.calls.clear()
    command = ["export", str(runs / "r0"), "--to", "hub", "--repo", "me/mine", "--private"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/mine"
    (_, repo, made), (_, files, sent) = Hub.calls
    assert (repo, made["private"], sent["repo_id"]) == ("me/mine", True, "me/mine")
    assert files == ["README.md", "pictures", "pytorch_lora_weights.safetensors"]
    assert 'pipe.load_lora_weights("me/mine")' in (tmp_path / "a" / "README.md").read_text()
    monkeypatch.setattr(Hub, "failure", RuntimeError("401: no right to write"))
    assert main([*command, "--out", str(tmp_path / "b")]) == 1
    told = capsys.readouterr().err
    assert "me/mine could not be written: 401: no right to write" in told
    assert told.count("\n") == 1
    assert (tmp_path / "b" / "pytorch_lora_weights.safetensors").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for extra, words in ((["--repo", "me/mine"], "needs a token"), ([], "--repo USER/NAME"), (["--repo", "a/b/c"], "")):
        assert main(["export", str(runs / "r0"), "--to", "hub", "--out", str(tmp_path / "c"), *extra]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_every_weight_can_be_exported_merged_or_not(tmp_path, capsys):
    extra = (*STRONG, "policy.kind=full", "policy.targets=[]", "optimizer.lr=0.001", "evaluation.prompts=[]")
    run = tmp_path / "full"
    assert main(["train", "tiny_smoke", *settings(*extra), "--out", str(run), "--no-report"]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "t")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "p"), "--merge"]) == 0
    assert "StableDiffusion3Pipeline" in capsys.readouterr().out
    alone, merged = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors") for name in ("t", "p")
    )
    base = tiny.build(0).transformer.state_dict()
    assert alone.keys() == merged.keys() == base.keys()
    assert all(torch.equal(alone[key], merged[key]) for key in base)
    assert any(not torch.equal(alone[key], base[key]) for key in base)
    assert 'SD3Transformer2DModel.from_pretrained("' in (tmp_path / "t" / "README.md").read_text()
