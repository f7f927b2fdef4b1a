import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mogb_diffusion.cli import main
from mogb_diffusion.errors import InputError
from mogb_diffusion.models import tiny
from mogb_diffusion.peers import read_peer
from mogb_diffusion.trained import find_source

TARGETS = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_k", "attn.to_out.0",
           "attn.to_q", "attn.to_v"]  # fmt: skip
FILE = "pytorch_lora_weights.safetensors"
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"transformer_blocks.1.attn.to_q": 3}, "alpha_pattern": {"attn.to_v": 9}},
    "pattern of names": {"target_modules": r".*\.attn\.to_[qk]"},
}


def pipeline():
    made = tiny.build(0)
    with torch.no_grad():
        for param in made.transformer.parameters():
            if param.ndim >= 2 and float(param.abs().max()) == 0:
                param.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return made


def pictures(made):
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return made(
        ["a photo of a red square", "a photo of two blue circles"], latents=noise, num_inference_steps=3,
        guidance_scale=1.0, output_type="pt", max_sequence_length=1,
    ).images  # fmt: skip


def peer(folder, **options):
    """What DiffusionNFT does: get_peft_model, a second adapter, save_pretrained; the pictures of the first one."""
    made = pipeline()
    config = LoraConfig(**({"r": 4, "lora_alpha": 7, "target_modules": TARGETS} | options))
    wrapped = get_peft_model(made.transformer, config)
    wrapped.add_adapter("old", config)
    with torch.no_grad():
        for number, (name, param) in enumerate(sorted(wrapped.named_parameters())):
            if "lora_" in name:
                param.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    wrapped.set_adapter("default")
    wrapped.save_pretrained(str(folder))
    found = {"default": pictures(made)}
    wrapped.set_adapter("old")
    return made, wrapped, found | {"old": pictures(made)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer") / "checkpoints" / "checkpoint-12" / "lora"
    (folder.parent.parent / "checkpoint-9").mkdir(parents=True)
    return folder, *peer(folder)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_an_import_has_the_same_weights_and_pictures(variant, tmp_path):
    _, wrapped, expected = peer(tmp_path / "lora", **VARIANTS[variant])
    assert main(["import-peer", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / FILE)
    mine = get_peft_model_state_dict(wrapped, adapter_name="default")
    assert {f"transformer.{key.removeprefix('base_model.model.')}" for key in mine} == set(weights)
    for key, tensor in mine.items():
        assert torch.equal(tensor, weights[f"transformer.{key.removeprefix('base_model.model.')}"])
    fresh = pipeline()
    before = pictures(fresh)
    fresh.load_lora_weights(tmp_path / "out")
    assert float((pictures(fresh) - expected["default"]).abs().max()) < 1e-6
    assert float((before - expected["default"]).abs().max()) > 1e-3


def test_a_peers_folder_as_it_is_changes_nothing(saved):
    """Why there is an import at all."""
    fresh = pipeline()
    before = pictures(fresh)
    fresh.load_lora_weights(saved[0], weight_name="adapter_model.safetensors")
    assert torch.equal(pictures(fresh), before)


def test_checkpoints_and_adapters_are_found(saved, tmp_path, capsys):
    folder, _, _, expected = saved
    runs = folder.parent.parent.parent
    for number, (source, adapter) in enumerate(((runs, None), (folder, "default"), (runs, "old"))):
        out = tmp_path / str(number)
        command = ["import-peer", str(source), "--out", str(out)] + (["--adapter", adapter] if adapter else [])
        assert main(command) == 0
        assert "31 layers, rank 4, alpha 7" in capsys.readouterr().out  # 4 blocks of 8; the last adds no to_add_out
        fresh = pipeline()
        fresh.load_lora_weights(out)
        assert float((pictures(fresh) - expected[adapter or "default"]).abs().max()) < 1e-6
    assert read_peer(runs).step == 12


@pytest.mark.parametrize("kind", ["bin", "ddp", "raw", "diffusers"])
def test_other_forms_of_the_same_weights(saved, kind, tmp_path):
    folder, _, wrapped, expected = saved
    weights = {f"{'module.' * (kind == 'ddp')}{name}": param.detach().clone() for name, param in
               wrapped.named_parameters() if "lora_" in name}  # fmt: skip
    plain = load_file(folder / "adapter_model.safetensors")
    command = []
    if kind == "bin":
        torch.save(plain, tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    elif kind == "diffusers":  # without alpha
        save_file({f"transformer.{k.removeprefix('base_model.model.')}": t for k, t in plain.items()}, tmp_path / FILE)
        command = ["--alpha", "7"]
    else:  # both adapters in one file
        save_file(weights, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    assert main(["import-peer", str(tmp_path), "--out", str(tmp_path / "out"), *command]) == 0
    fresh = pipeline()
    fresh.load_lora_weights(tmp_path / "out")
    assert float((pictures(fresh) - expected["default"]).abs().max()) < 1e-6


def test_an_import_can_be_evaluated_and_is_not_said_to_be_trained_on_anything(saved, tmp_path):
    out = tmp_path / "out"
    assert main(["import-peer", str(saved[0]), "--out", str(out), "--recipe", "tiny_smoke"]) == 0
    assert find_source(str(out)).step == 12
    command = ["evaluate", str(out), "--images", "2", "--metrics", "world_alignment"]
    assert main(command) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["trained_on"] is None
    assert found["base"] != found["trained"]
    assert "| world_alignment | ? |" in (out / "evaluation.md").read_text()
    assert "`tiny-random`" in (out / "README.md").read_text()
    with safe_open(str(out / FILE), "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 7


def test_a_lora_of_another_model_is_refused(saved, tmp_path, capsys):
    command = ["import-peer", str(saved[0]), "--out", str(tmp_path / "x"), "--recipe", "sd35_marble"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "is for a layer of [128, 128]" in told
    assert "[1536, 1536]: the LoRA is of another model" in told
    assert not (tmp_path / "x").exists()


def changed(folder, out, weights=lambda found: found, **config):
    out.mkdir()
    found = {key: tensor.clone() for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights(found), out / "adapter_model.safetensors")
    given = json.loads((folder / "adapter_config.json").read_text()) | config
    (out / "adapter_config.json").write_text(json.dumps(given))
    return out


def without(*parts):
    return lambda found: {key: tensor for key, tensor in found.items() if not any(part in key for part in parts)}


def renamed(found):
    return {key.replace("lora_A", "lora_down"): tensor for key, tensor in found.items()}


@pytest.mark.parametrize(
    ("weights", "config", "words"),
    [
        (without("blocks.1.attn.to_q.lora_B"), {}, r"blocks\.1\.attn\.to_q\.lora_B\.weight is missing"),
        (without("attn.to_q"), {}, r"names attn\.to_q, but it has no weights"),
        (without("blocks.2."), {}, "blocks 0 to 3 have weights, but 2 has none"),
        (lambda found: found, {"r": 8}, "ranks 4 .* but its configuration says 8"),
        (lambda found: found, {"rank_pattern": {"attn.to_q": 2}}, "configuration says 2"),
        (renamed, {}, "layout that is not known: .*lora_down"),
        (lambda found: found | {"text_encoder.x": torch.ones(2, 2)}, {}, "layout that is not known: text_encoder"),
        (lambda found: {}, {}, "holds no tensor"),
        (lambda found: found, {"use_dora": True}, "use_dora: True"),
        (lambda found: found, {"bias": "all"}, "bias: 'all'"),
        (lambda found: found, {"modules_to_save": ["proj_out"]}, "modules_to_save"),
        (lambda found: found, {"init_lora_weights": "pissa_niter_4"}, "more than a LoRA"),
        (lambda found: found, {"peft_type": "LOHA"}, "only LORA"),
        (lambda found: found, {"lora_alpha": None}, "does not say lora_alpha"),
    ],
)
def test_what_is_missing_or_unknown_is_named(saved, weights, config, words, tmp_path):
    folder = changed(saved[0], tmp_path / "x", weights, **config)
    with pytest.raises(InputError, match=words):
        read_peer(folder)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_unpickled(tmp_path):
    victim = tmp_path / "made"
    for save in (lambda path: torch.save({"x": Trap(str(victim))}, path),
                 lambda path: path.write_bytes(pickle.dumps({"x": Trap(str(victim))}))):  # fmt: skip
        save(tmp_path / "adapter_model.bin")
        with pytest.raises(InputError, match="pickle that holds more than tensors"):
            read_peer(tmp_path)
    assert not victim.exists()
    torch.save({"x": {"y": torch.ones(1)}}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="no dictionary of tensors"):
        read_peer(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "holds no LoRA"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read as safetensors"),
        (lambda folder: folder.rmdir(), "does not exist"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, make, words):
    folder = tmp_path / "x"
    folder.mkdir()
    make(folder)
    with pytest.raises(InputError, match=words):
        read_peer(folder)


def test_alpha_is_asked_for_where_nobody_says_it_and_only_there(saved, tmp_path):
    with pytest.raises(InputError, match="says its alpha itself, 7"):
        read_peer(saved[0], alpha=8)
    plain = load_file(saved[0] / "adapter_model.safetensors")
    save_file(plain, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="--alpha"):
        read_peer(tmp_path)
    assert read_peer(tmp_path, alpha=3).options["lora_alpha"] == 3
