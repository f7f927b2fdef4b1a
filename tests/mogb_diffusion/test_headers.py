import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import small_run

from mogb_diffusion.cards import card, final_scores
from mogb_diffusion.commands.evaluate import _joined, _known, _stem
from mogb_diffusion.commands.export import _command, _without_paths
from mogb_diffusion.config import override, to_plain
from mogb_diffusion.errors import InputError
from mogb_diffusion.evaluation import definitions
from mogb_diffusion.headers import NO_REWARD, shareable
from mogb_diffusion.results import as_markdown, merged
from mogb_diffusion.trained import Source, Trained, find_source, header_of

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


def lora(folder, config, **more):
    """A file with this header."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pytorch_lora_weights.safetensors"
    header = {"config": config, "epoch": 1, "step": 2} | more
    save_file({"w": torch.ones(1)}, str(file), metadata={"mogb_diffusion": json.dumps(header)})
    return file


def hostile():
    plain = to_plain(small_run())
    plain["rewards"] = [
        {"name": "subprocess:Popen", "label": "alignment", "options": {"args": "touch /tmp/x", "shell": True}},
        {"name": "remote", "options": {"url": "https://example.org", "token_file": "/home/me/.token"}},
        {"name": "aesthetic", "label": "pickscore", "options": {"weights": "/etc/passwd", "dtype": "float32"}},
        {"name": "world_text", "label": "text", "options": {"scale": "as_is"}},
    ]
    plain["prompts"] = [{"path": "/etc/passwd"}]
    plain["evaluation"]["prompts"] = [{"path": "../x.txt"}, {"format": "world"}]
    plain["evaluation"]["rewards"] = [{"name": "os:system", "label": "ocr"}]
    plain["tracking"]["wandb"] = "foreign"
    return plain


def options(**given):
    return SimpleNamespace(**({"metrics": None} | given))


def test_a_header_brings_neither_code_nor_paths_nor_addresses(tmp_path):
    source = find_source(str(lora(tmp_path, hostile())))
    assert [(spec.name, spec.label, spec.options) for spec in source.run.rewards] == [
        ("aesthetic", None, {"dtype": "float32"}), ("world_text", "text", {"scale": "as_is"}),
    ]  # fmt: skip
    assert source.run.evaluation.rewards == ()
    assert [prompts.path for prompts in (*source.run.prompts, *source.run.evaluation.prompts)] == [None, None]
    assert source.run.tracking.wandb is None
    assert source.run.sampling == small_run().sampling
    assert source.run.policy == small_run().policy
    assert source.trained_on == ["alignment", "remote", "pickscore", "text"]
    told = []
    with pytest.raises(InputError):
        source.load(tell=told.append)  # its weights are of nothing
    [line] = told
    for word in ("subprocess:Popen", "'remote'", "'weights' of the reward 'aesthetic'", "--recipe", "--metrics"):
        assert word in line


def test_metrics_are_never_a_label_of_a_header(tmp_path):
    source = find_source(str(lora(tmp_path, hostile())))
    assert _known(source, options(metrics="alignment")) == ()
    assert [spec.key for spec in _known(source, options())] == ["aesthetic", "text"]
    nothing = to_plain(small_run()) | {"rewards": [{"name": "os:system"}], "balancing": {"mode": "no such"}}
    source = find_source(str(lora(tmp_path, nothing)))
    assert source.run.rewards == (NO_REWARD,)
    assert _known(source, options()) == ()
    trusted = Source("run", tmp_path, small_run(), "x")
    assert [spec.key for spec in _known(trusted, options(metrics="alignment"))][-1] == "alignment"


@pytest.mark.parametrize("path", ["/srv/model", "../model", "~/model", "weights.safetensors", "model", "here/model"])
def test_a_model_of_a_header_is_on_the_hub_or_tiny(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    plain = to_plain(small_run())
    plain["model"]["source"] = path
    file = str(lora(tmp_path / "lora", plain))
    with pytest.raises(InputError, match=r"--set model\.source=PATH.*--recipe"):
        find_source(file)
    assert find_source(file, assignments=["model.source=mine"]).run.model.source == "mine"
    assert find_source(file, recipe="tiny_smoke").run.model.source == "tiny-random"
    plain["model"]["source"] = "stabilityai/stable-diffusion-3.5-medium"
    assert find_source(str(lora(tmp_path / "lora", plain))).run.model.source == plain["model"]["source"]


@pytest.mark.parametrize("config", [[], "x", {"model": 3}, {"model": {"dtype": "int3"}}, {"policy": {"rank": "a"}}])
def test_a_header_that_is_none_is_one_line(config, tmp_path):
    with pytest.raises(InputError, match="the configuration in its header"):
        find_source(str(lora(tmp_path, config)))


def secretive(**model):
    rewards = (
        "rewards=[{name: remote, options: {url: 'https://me:pw@inner.example/score', token: SECRET1, "
        "token_file: /home/me/.token}}, {name: aesthetic, options: {weights: /home/me/private/head.pth, "
        f"apiKey: SECRET2, nested: {{password: SECRET3}}, list: ['{TOKEN}'], model: openai/clip-vit-large-patch14}}}}]"
    )
    run = override(small_run(), [rewards, "evaluation.prompts=[{path: /home/me/private/test.txt}]"])
    return override(run, ["prompts=[{path: private/train.jsonl}]", *(f"model.{k}={v}" for k, v in model.items())])


def made(run, *, header=None, policy=None, folder=None, step=2):
    return Trained("mine", folder, run, SimpleNamespace(max_sequence_length=128), policy, None, None, 1, step,
                   header=header)  # fmt: skip


LEAKS = ("SECRET", "/home", "me:pw", "inner.example", TOKEN, "private")


def test_nothing_secret_is_in_a_header_or_on_a_page():
    trained = made(secretive(source="/home/me/private/sd35"))
    command = _command(SimpleNamespace(
        target="/home/me/runs/a", checkpoint=None, recipe="/home/me/r.yaml", device=None, out="/home/me/out",
        set=["rewards.0.options.token=SECRET1", "model.source=/home/me/private/sd35", "evaluation.guidance=4.5",
             "rewards=[{name: remote, options: {token: SECRET2}}]"], repo="me/x", merge=False, to="hub", private=False,
    ))  # fmt: skip
    record = {"name": "x", "prompts": "/home/me/private/a.txt, b.txt", "trained_on": [],
              "trained": {"aesthetic": {"mean": 1.0, "error": 0.1, "count": 3}},
              "metrics": definitions(trained.run.rewards, {})}  # fmt: skip
    page = card(trained, "lora", "me/x", command, record, [])
    for text in (page, json.dumps(header_of(trained))):
        assert [leak for leak in LEAKS if leak in text.replace("--private", "")] == []
        for kept in ("train.jsonl", "test.txt", "head.pth", "openai/clip-vit-large-patch14", "sd35"):
            assert kept in text
    assert "--set evaluation.guidance=4.5" in page
    assert "a.txt, b.txt" in page


def test_folders_of_diffusers_do_not_say_where_their_model_was(tmp_path):
    (tmp_path / "vae").mkdir()
    for name, place in (("model_index.json", "/home/me/private/sd35"), ("vae/config.json", "owner/model")):
        (tmp_path / name).write_text(json.dumps({"_name_or_path": place, "x": 1}))
    _without_paths(tmp_path)
    found = [json.loads((tmp_path / name).read_text()) for name in ("model_index.json", "vae/config.json")]
    assert found == [{"_name_or_path": "sd35", "x": 1}, {"_name_or_path": "owner/model", "x": 1}]


def test_what_is_not_secret_stays():
    plain = to_plain(small_run("model.source=stabilityai/stable-diffusion-3.5-medium"))
    assert shareable(plain) == plain
    kept = {"options": {"tokenizer": "laion/CLIP-ViT", "metric": "correct", "offload": True, "template": "a / b\n c"}}
    assert shareable(kept) == kept


def test_an_import_stays_one_when_it_is_exported_again():
    header = {"config": to_plain(small_run()), "epoch": None, "step": 2, "imported": "/home/me/checkpoint-2/nft.bin"}
    trained = made(small_run(), header=header)
    page = card(trained, "lora", "x", "command", None, [])
    assert header_of(trained)["imported"] == "nft.bin"
    assert "imported from `nft.bin`, step 2; what it was trained on is unknown" in page
    for false in ("trained on 3 rewards", "DiffusionNFT", "rank 2", "/home"):
        assert false not in page
    own = made(small_run(), header={"config": to_plain(small_run("balancing.mode=fixed")), "epoch": 1, "step": 2})
    assert "imported" not in header_of(own)
    assert header_of(own)["config"]["balancing"]["mode"] == "fixed"
    assert "(rank 2, alpha 32), trained on 3 rewards (preference, aesthetic, alignment)" in card(
        own, "lora", "x", "command", None, []
    )
    assert "imported from `elsewhere`" in card(made(small_run(), header={}), "lora", "x", "command", None, [])


def test_a_page_says_what_was_merged_and_how_long_prompts_are():
    run = small_run("model.source=stabilityai/stable-diffusion-3.5-medium")
    full = override(run, ["policy.kind=full"])
    assert "a LoRA merged into" not in card(made(full, policy=object()), "pipeline", "x", "c", None, [])
    assert "a LoRA merged into" in card(made(run, policy=object()), "pipeline", "x", "c", None, [])
    for kind in ("lora", "pipeline", "transformer"):
        assert "max_sequence_length=128)" in card(made(run), kind, "x", "c", None, [])


def record(step=2, mean=1.0, **more):
    score = {"mean": mean, "error": 0.1, "count": 4}
    return {"name": "r", "model": "tiny", "epoch": 1, "step": step, "prompts": "p.txt", "pictures": 4, "seed": 0,
            "sampling": {"steps": 2}, "trained_on": [], "metrics": {"text": "world_text"}, "failures": {},
            "versions": {}, "base": {"text": score}, "trained": {"text": score}} | more  # fmt: skip


def test_other_states_have_their_own_file_and_other_metrics_join(tmp_path, capsys):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    names = [_stem(Source("run", tmp_path, small_run(), "x", name))
             for name in (None, "checkpoint-000002", "checkpoint-000001")]  # fmt: skip
    assert names == ["evaluation", "evaluation", "evaluation-checkpoint-000001"]
    files = [Source("lora", tmp_path, small_run(), "x", None, tmp_path / name)
             for name in ("pytorch_lora_weights.safetensors", "second.safetensors")]  # fmt: skip
    assert [_stem(source) for source in files] == ["evaluation", "evaluation-second"]

    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(record(failures={"text": {"nan": 1}})))
    (tmp_path / "evaluation.md").write_text("old")
    new = {"mean": 0.5, "error": None, "count": 4, "categories": {"two": {"mean": 0.5, "error": None, "count": 4}}}
    ocr = {key: value for key, value in record(trained={"ocr": new}, metrics={"ocr": "ocr"}).items() if key != "base"}
    both = _joined(ocr, tmp_path, "evaluation")
    assert set(both["trained"]) == {"text", "ocr"}
    assert both["metrics"] == {"text": "world_text", "ocr": "ocr"}
    assert both["failures"] == {"text": {"nan": 1}}
    assert "| two | - | 0.500 | 4 |" in as_markdown(both)  # a reward that the base model has no score of
    assert merged(record(failures={"text": {"nan": 1}}), record(mean=3.0))["failures"] == {}
    assert merged(record(), record(mean=3.0))["trained"]["text"]["mean"] == 3.0

    later = _joined(record(step=4), tmp_path, "evaluation")
    assert later == record(step=4)
    assert "evaluation-step-2.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation-step-2.json").read_text())["step"] == 2
    assert (tmp_path / "evaluation-step-2.md").read_text() == "old"
    for expected in ("evaluation-old.json", "evaluation-old-2.json"):
        path.write_text(json.dumps(record(step=4, seed=7)))
        _joined(record(step=4), tmp_path, "evaluation")
        assert (tmp_path / expected).is_file()


def test_a_page_has_the_scores_of_its_own_step_and_says_what_they_are(tmp_path):
    geneval = "rewards=[{name: geneval, options: {metric: score, device: cuda}}]"
    run = small_run(geneval, "balancing.mode=fixed")
    (tmp_path / "evaluation.json").write_text(json.dumps(record(step=4)))
    (tmp_path / "evaluation-checkpoint-000002.json").write_text(json.dumps(record(step=2, mean=7.0)))
    assert final_scores(made(run, folder=tmp_path))["trained"]["text"]["mean"] == 7.0
    score = {"mean": 0.5, "error": 0.1, "count": 4}
    row = {"kind": "evaluation", "epoch": 3, "step": 6, "name": "after", "scores": {"geneval": score}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    trained = made(run, folder=tmp_path, step=6)
    found = final_scores(trained)
    assert found["metrics"] == {"geneval": "geneval, metric score"}
    assert "Measured with geneval: geneval, metric score." in card(trained, "lora", "x", "c", found, [])
    assert definitions(run.rewards, {"geneval": {"categories": {}}})["geneval"].endswith("mean of categories")
    assert final_scores(made(run, folder=Path(tmp_path), step=8)) is None
