import json

import pytest
import torch
from safetensors.torch import load_file
from test_run_config import BAD
from tiny_run import SMALL

from mogb_diffusion.cli import main
from mogb_diffusion.commands import NAMES
from mogb_diffusion.report import write_report

SETS = [word for assignment in SMALL for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "tiny_smoke", *SETS, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("assignment", list(BAD))
def test_bad_configurations_are_one_line_and_status_2(assignment, tmp_path, capsys):
    assert main(["train", "tiny", "--set", assignment, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("mogb-diffusion train: ")
    assert told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "tinny"], "no recipe 'tinny'"),
        (
            ["train", "tiny", "--set", "model.source=/nowhere/at/all"],
            "model.source: '/nowhere/at/all' cannot be loaded",
        ),
        (["train", "tiny_smoke", "--set", "rewards.0.name=beauty"], "There is no reward 'beauty'"),
        (["train", "tiny_smoke", "--set", "model.device=tpu"], "model.device: 'tpu' cannot be used here"),
        (["train", "tiny_smoke", "--set", "balancing.mode=dwa"], "reads only the values of the losses"),
        (["train", "tiny_smoke", "--set", "prompts=[{path: none.txt}]"], "cannot be read"),
        (["evaluate", "/nowhere"], "is no folder of a run"),
        (["sample", "/nowhere", "--prompt", "x"], "is no folder of a run"),
        (["sample", "tiny"], "name a prompt with --prompt TEXT"),
        (["report", "/nowhere"], "is no folder of a run"),
        (["recipes", "nothing"], "There is no recipe"),
        (["prompts", "/nowhere.txt"], "cannot be read"),
        (["prompts"], "name a file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["train", "tiny", "--sets", "x"], ["sample"]])
def test_bad_arguments_are_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", NAMES)
def test_every_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"mogb-diffusion {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_train_evaluate_sample_export_and_report(run_folder, tmp_path, capsys):
    assert {"report.html", "rewards.png", "alpha.png", "cosines.png", "config.yaml"} <= {
        path.name for path in run_folder.iterdir()
    }
    assert main(["evaluate", str(run_folder), "--images", "4"]) == 0
    assert "preference" in capsys.readouterr().out
    found = json.loads((run_folder / "evaluation.json").read_text())
    assert (found["pictures"], found["epoch"], found["step"], found["name"]) == (4, 2, 4, "small")
    assert found["base"]["alignment"]["count"] == 4
    picture = tmp_path / "squares.png"
    assert (
        main(["sample", str(run_folder), "--prompt", "a photo of a red square", "--count", "2", "--out", str(picture)])
        == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["export", str(run_folder), "--out", str(tmp_path / "lora")]) == 0
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert main(["export", str(run_folder), "--out", str(tmp_path / "lora")]) == 2  # not empty
    assert main(["report", str(run_folder)]) == 0


def test_a_merged_pipeline_gives_the_pictures_of_the_adapter(run_folder, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    from mogb_diffusion.models import tiny

    assert main(["export", str(run_folder), "--out", str(tmp_path / "whole"), "--merge"]) == 0
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole", text_encoder_3=None, tokenizer_3=None)
    merged.set_progress_bar_config(disable=True)
    adapted = tiny.build(0)
    adapted.load_lora_weights(run_folder / "checkpoint-000004")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", "max_sequence_length": 1}
    text = ["a photo of a red square"]
    pictures = [pipe(text, latents=noise.clone(), **how).images for pipe in (merged, adapted)]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_written_configuration_can_be_fed_back(run_folder, tmp_path):
    again = tmp_path / "again"
    assert main(["train", str(run_folder / "config.yaml"), "--out", str(again), "--no-report"]) == 0
    assert (again / "config.yaml").read_text() == (run_folder / "config.yaml").read_text()
    name = "checkpoint-000004/pytorch_lora_weights.safetensors"
    found, expected = load_file(again / name), load_file(run_folder / name)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_report_shows_what_went_wrong(tmp_path):
    rows = [
        {"kind": "epoch", "epoch": 1, "step": 1, "rewards": {"a": 0.5, "b": None}, "failures": {"a": {"errors": 2}},
         "skipped": 1, "seconds": {"sampling": 1.0, "scoring": 3.0}},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "st')
    page = write_report(tmp_path).read_text()
    assert "a: 2 errors" in page
    assert "1 optimizer steps were skipped" in page
    assert "data:image/png;base64," in page


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    assert "tiny " in capsys.readouterr().out
    assert main(["recipes", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {"tiny", "sd35_marble"}
    assert main(["recipes", "tiny"]) == 0
    assert "mode: marble_exact" in capsys.readouterr().out


def test_the_doctor_looks_at_packages_and_recipes(capsys):
    assert main(["doctor"]) == 0
    assert "diffusers" in capsys.readouterr().out
    assert main(["doctor", "tiny"]) == 0
    told = capsys.readouterr().out
    assert "8 prompts x 12 pictures = 96 an epoch" in told
    assert "specialists: composition, text" in told


def test_prompts_are_drawn_apart_from_a_test_file(tmp_path, capsys):
    test, train, signs = (str(tmp_path / name) for name in ("test_metadata.jsonl", "train_metadata.jsonl", "train.txt"))
    assert main(["prompts", "geneval", "--n", "60", "--out", test]) == 0
    assert main(["prompts", "geneval", "--n", "90", "--apart-from", test, "--out", train]) == 0
    assert main(["prompts", "ocr", "--n", "30", "--seed", "4", "--out", signs]) == 0
    told = capsys.readouterr().out
    assert "90 prompts, 90 different; 0 with a text to show" in told
    assert "30 prompts, 30 different; 30 with a text to show" in told
    assert "position: 15" in told
    lines = {
        name: set((tmp_path / name).read_text().splitlines())
        for name in ("test_metadata.jsonl", "train_metadata.jsonl")
    }
    assert not lines["test_metadata.jsonl"] & lines["train_metadata.jsonl"]
    assert main(["prompts", "ocr"]) == 2
    assert "--out FILE" in capsys.readouterr().err
    assert main(["prompts", "ocr", "--out", str(tmp_path / "no" / "where.txt")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_prompt_files_are_checked_and_written(tmp_path, capsys):
    path = tmp_path / "world.jsonl"
    assert main(["prompts", "--world", "12", "--out", str(path)]) == 0
    assert main(["prompts", str(path)]) == 0
    told = capsys.readouterr().out
    assert told.count("12 prompts") == 2
    assert "6 with a text to show" in told
    path.write_text('{"prompt": 3}\n')
    assert main(["prompts", str(path)]) == 2
    assert f"{path}:1: prompt must be a text" in capsys.readouterr().err
