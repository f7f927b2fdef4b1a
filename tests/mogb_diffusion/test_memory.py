"""The estimate of memory against what PyTorch keeps: counted tensor by tensor, and the peak of live tensors."""

import contextlib
import types

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mogb_diffusion import config, memory
from mogb_diffusion.config import load_run, override
from mogb_diffusion.errors import InputError
from mogb_diffusion.models import architectures, tiny
from mogb_diffusion.models.architectures import build_transformer
from mogb_diffusion.policy import LoraPolicy
from mogb_diffusion.recipes import recipe
from mogb_diffusion.recipes.presets import PRESETS, preset
from mogb_diffusion.rollouts import describe_batch

MID = {
    "sample_size": 32, "num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64, "pos_embed_max_size": 16,
    "in_channels": 16, "out_channels": 16, "caption_projection_dim": 384, "joint_attention_dim": 96,
    "pooled_projection_dim": 64, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1),
}  # fmt: skip
TINY = {
    "sample_size": 16, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "pos_embed_max_size": 8,
    "in_channels": 3, "out_channels": 3, "caption_projection_dim": 128, "joint_attention_dim": 64,
    "pooled_projection_dim": 64, "qk_norm": "rms_norm",
}  # fmt: skip
RANK, TEXT = 8, 20


class Live(TorchDispatchMode):
    """The peak of the bytes of live tensors; what is dead is looked for only where the peak would rise."""

    def __init__(self):
        super().__init__()
        self.peak = self.now = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                before = self.alive.get(storage._cdata, (None, 0))[1]
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.now += storage.nbytes() - before
        if self.now > self.peak:
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.now = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.now)
        return result


class Kept:
    """The bytes that autograd keeps, each storage once, parameters apart."""

    def __init__(self, module):
        self.total, self.held = 0, []
        self.seen = {param.untyped_storage()._cdata for param in module.parameters()}

    def pack(self, tensor):
        self.held.append(tensor)  # so that no storage gets the address of another
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.total += storage.nbytes()
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)


def policy_of(transformer, rank=RANK):
    return LoraPolicy(transformer, config.Policy(rank=rank), 0)


def inputs(options, pictures, side=None, tokens=TEXT, dtype=torch.float32, device="cpu"):
    side = side or options["sample_size"]
    made = {
        "hidden_states": (pictures, options["in_channels"], side, side),
        "timestep": (pictures,),
        "encoder_hidden_states": (pictures, tokens, options["joint_attention_dim"]),
        "pooled_projections": (pictures, options["pooled_projection_dim"]),
    }
    return {name: torch.ones(shape, dtype=dtype, device=device) for name, shape in made.items()}


def autocast(half):
    return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()


def run_of(options, pictures, *, half=False, **model):
    base = override(recipe("sd35_marble"), [f"batch.micro_batch={pictures}", f"policy.rank={RANK}"])
    settings = config.to_plain(base)
    settings["model"] |= {"dtype": "bfloat16" if half else "float32", "resolution": 8 * options["sample_size"]} | model
    return config.build(config.Run, settings)


def shape_of(run, options):
    found = memory.shape_of(run, options)
    return memory.Shape(**{**vars(found), "text_tokens": TEXT})


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [TINY, MID], ids=["tiny", "mid"])
@pytest.mark.parametrize("pictures", [2, 3])
def test_kept_activations_are_what_autograd_keeps(options, half, pictures):
    transformer = build_transformer(options, "cpu")
    if half:
        torch.nn.Module.to(transformer, torch.bfloat16)
    policy_of(transformer)
    kept = Kept(transformer)
    with kept.hooks(), autocast(half):
        transformer(**inputs(options, pictures), return_dict=False)
    run = run_of(options, pictures, half=half)
    expected = memory.kept_activations(run, shape_of(run, options), on_gpu=False)
    assert expected == pytest.approx(kept.total, rel=0.03)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [TINY, MID], ids=["tiny", "mid"])
def test_kept_activations_where_every_weight_trains(options, half):
    transformer = build_transformer(options, "cpu").requires_grad_(True)
    kept = Kept(transformer)
    with kept.hooks(), autocast(half):
        transformer(**inputs(options, 2), return_dict=False)
    run = override(run_of(options, 2, half=half), ["policy.kind=full", "balancing={mode: fixed}"])
    shape = shape_of(run, options)
    assert shape.trained == shape.parameters == sum(param.numel() for param in transformer.parameters())
    assert memory.kept_activations(run, shape, on_gpu=False) == pytest.approx(kept.total, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_pass_is_what_is_kept_and_in_hand(checkpointing):
    transformer = build_transformer(MID, "cpu")
    policy = policy_of(transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing(
            gradient_checkpointing_func=lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False
            )
        )
        transformer.train()
    given = inputs(MID, 2)
    still = sum(param.untyped_storage().nbytes() for param in transformer.parameters())
    with Live() as live:
        loss = transformer(**given, return_dict=False)[0].square().mean()
        torch.autograd.grad(loss, policy.parameters)
    with Live() as frozen, torch.no_grad():
        transformer(**given, return_dict=False)
    run = run_of(MID, 2, gradient_checkpointing=checkpointing)
    shape = shape_of(run, MID)
    expected = memory.kept_activations(run, shape) + 2 * memory.working(shape, 4) + 4 * shape.trained
    measured = live.peak - still
    assert measured < expected < 1.2 * measured
    assert 0.8 * (frozen.peak - still) < 2 * memory.working(shape, 4) < 1.5 * (frozen.peak - still)


def test_checkpointing_keeps_the_inputs_of_the_blocks_and_one_block():
    run = run_of(MID, 4, gradient_checkpointing=True)
    shape = shape_of(run, MID)
    blocks = [memory.kept_by_block(shape, number, half=False) for number in range(4)]
    assert memory.kept_activations(run, shape) == 4 * (4 * 4 * (256 + TEXT) * 384 + max(blocks))


@pytest.mark.parametrize("side", [64, 96])
def test_decoding_is_three_maps_of_full_size(side):
    from diffusers import AutoencoderKL

    channels = (8, 16, 32, 32)
    vae = AutoencoderKL(
        **{**architectures.SD35_AUTOENCODER, "block_out_channels": channels, "norm_num_groups": 8}
    ).requires_grad_(False)
    still = sum(param.untyped_storage().nbytes() for param in vae.decoder.parameters())
    with Live() as live, torch.no_grad():
        vae.decode(torch.ones(2, 16, side // 8, side // 8))
    assert 2 * memory.decoding(side, channels[1]) == pytest.approx(live.peak - still, rel=0.1)


def test_parts_add_up_by_phase():
    parts = (memory.Part("a", 3.0), memory.Part("b", 5.0, "training"), memory.Part("c", 7.0, "encoding"))
    estimate = memory.Estimate(parts)
    assert [estimate.phase(name) for name in ("training", "sampling", "encoding")] == [8, 3, 10]
    assert estimate.peak == 10


def sizes(run, **options):
    """The parts of the estimate of a run on a transformer of made-up size."""
    shape = memory.Shape(
        layers=2, width=64, heads=1, image_tokens=16, text_tokens=4, dual=(), rms_norm=True, parameters=1000,
        trained=10, rank=2,
    )  # fmt: skip
    found = memory.estimate(run, shape, **options)
    return {part.name: (part.size, part.when) for part in found.parts}, found


def test_every_part_follows_its_key():
    plain, whole = sizes(recipe("sd35_marble"))
    assert plain["transformer, bfloat16"] == (2000, "always")
    assert plain["AdamW"] == (80, "always")
    assert plain["text encoders"] == (2 * (123_650_304 + 694_659_840 + 4_762_310_656), "always")
    assert plain["gradients of 5 rewards"] == (7 * 40, "training")  # five, the distance, the direction
    assert plain["ViT-L/14, float32"][0] == 4 * 427_616_513  # of CLIPScore and of GenEval's colours: once
    assert sizes(recipe("sd35_marble"), ranks=8)[0]["gradients of 5 rewards"][0] == 2 * 7 * 40
    assert "gradients of 5 rewards" not in sizes(recipe("sd35_weighted_sum"))[0]
    assert "average of the adapters" not in sizes(override(recipe("sd35_marble"), ["policy.ema=0"]))[0]
    away, smaller = sizes(override(recipe("sd35_marble"), ["model.text_encoders=offload"]))
    assert away["text encoders"][1] == "encoding"
    assert smaller.phase("training") == whole.phase("training") - plain["text encoders"][0]
    half = override(recipe("sd35_marble"), ["rewards.0.options.dtype=float16", "rewards.1.options.offload=true"])
    assert sizes(half)[0]["ViT-H/14 of PickScore, float16"] == (2 * 986_109_441, "always")
    assert sizes(half)[0]["ViT-H/14 of HPSv2.1, float32"] == (4 * 986_109_441, "sampling")
    assert not any("ViT" in name for name in sizes(recipe("sd35_marble"), on_gpu=False)[0])
    own = override(recipe("sd35_marble"), ["rewards.0={name: 'mine:Own', label: pickscore}"])
    assert sizes(own)[1].unknown == ("pickscore",)
    assert sizes(recipe("tiny"))[1].unknown == ()


FULL_SHAPE = memory.Shape(
    layers=4, width=64, heads=1, image_tokens=16, text_tokens=205, dual=(), rms_norm=True, parameters=1000,
    trained=1000, rank=0,
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", 4), ("float32", 4), ("float64", 8)])
def test_every_copy_of_full_fine_tuning_counts_in_the_dtype_it_is_kept_in(dtype, wide):
    def parts(*more, ranks=1):
        run = override(
            recipe("sd35_marble"), ["policy.kind=full", "balancing={mode: fixed}", f"model.dtype={dtype}", *more]
        )
        return {part.name: part.size for part in memory.estimate(run, FULL_SHAPE, ranks=ranks).parts}

    name = f"transformer, {'float64' if wide == 8 else 'float32'}: current, old and reference"
    copies = {name: 3, "average of the weights": 1, "AdamW": 2, "gradient": 1}
    plain, shared = parts(), parts("model.shard=true", ranks=4)
    for part, count in copies.items():
        assert plain[part] == count * 1000 * wide
        assert shared[part] == count * 1000 * wide / 4
    assert shared["gathered weights of two blocks"] == 2 * 1000 * wide / 4  # of four blocks
    assert parts(ranks=4)[name] == plain[name]  # every rank has all of them
    assert "average of the weights" not in parts("policy.ema=0")
    steps = parts("balancing={mode: marble_every_step, gradients: full}", "model.shard=true", ranks=4)
    assert steps["gradients of 5 rewards"] == 2 * plain["gradient"] * memory.kept_rows(recipe("sd35_marble")) / 4


def test_full_fine_tuning_of_the_big_model_needs_more_than_a_gpu_has():
    run = override(recipe("sd35_marble"), ["policy.kind=full", "balancing={mode: fixed}", "policy.ema=0"])
    shape = memory.shape_of(run, architectures.SD35_MEDIUM_TRANSFORMER)
    assert memory.estimate(run, shape).peak > 24 * 2_243_171_520  # six copies of four bytes


def test_main_memory_for_prompts_by_hand():
    run = override(recipe("sd35_marble"), ["model.text_encoders=precompute"])
    each = 2 * (205 * 4096 + 2048)  # 77 tokens of CLIP and 128 of T5, in bfloat16
    assert memory.embedding_bytes(run, FULL_SHAPE) == each
    encoders, prompts = memory.main_memory(run, FULL_SHAPE, 25_000, 8)
    assert encoders.size == 8 * 2 * (123_650_304 + 694_659_840 + 4_762_310_656)
    assert prompts.size == 25_000 * each * 8
    assert prompts.name == "25000 prompts of 1.7 MB, 8 times"
    away = override(run, ["model.text_encoders=offload"])
    assert memory.main_memory(away, FULL_SHAPE, 25_000)[1].size == (256 + 128) * each
    assert memory.main_memory(away, FULL_SHAPE, 7)[1].size == 7 * each
    assert memory.main_memory(override(run, ["model.text_encoders=resident"]), FULL_SHAPE, 7) == ()


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_change_the_cut_and_nothing_else(name):
    plain, fitted = recipe("sd35_marble"), load_run("sd35_marble", preset=name)
    found, wanted = config.to_plain(fitted), config.to_plain(plain)
    for key in ("micro_batch", "sampling_batch"):
        found["batch"].pop(key), wanted["batch"].pop(key)
    for key in ("text_encoders", "gradient_checkpointing"):
        found["model"].pop(key), wanted["model"].pop(key)
    found["evaluation"].pop("batch"), wanted["evaluation"].pop("batch")
    for reward in found["rewards"]:
        reward["options"].pop("offload", None)
    assert found == wanted
    assert fitted.batch.images == 1152


ARITHMETIC = {  # pictures of a rank, its micro-batches, and micro-steps with 24 times each
    "1x24gb": (1152, 144, 3456),
    "1x80gb": (1152, 96, 2304),
    "8x80gb": (144, 16, 384),
    "2x8x80gb": (72, 8, 192),
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_batch_arithmetic_of_a_preset(name):
    chosen, run = preset(name), load_run("sd35_marble", preset=name)
    pictures, batches, micro_steps = ARITHMETIC[name]
    assert pictures * chosen.ranks == 1152
    assert batches * run.batch.micro_batch == pictures  # no micro-batch is cut short
    assert pictures % run.batch.sampling_batch == 0
    told = describe_batch(run, chosen.ranks)
    assert f": {pictures} pictures an update, {micro_steps} micro-steps of up to {run.batch.micro_batch}" in told


def test_presets_are_named_and_overrides_come_last(tmp_path):
    run = load_run("sd35_marble", ["batch.micro_batch=3"], preset="1x24gb")
    assert (run.batch.micro_batch, run.model.text_encoders) == (3, "offload")
    assert [reward.options.get("offload") for reward in run.rewards] == [True, True, True, None, True]
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: sd35_marble\nepochs: 3\n")
    run = load_run(str(path), preset="1x24gb")
    assert (run.epochs, run.batch.micro_batch) == (3, 8)
    with pytest.raises(InputError, match=r"no preset '8x80g'. Did you mean '8x80gb'"):
        load_run("sd35_marble", preset="8x80g")


def test_launch_lines():
    assert preset("1x24gb").launch("sd35_marble") == "mogb-diffusion train sd35_marble --preset 1x24gb"
    assert (
        preset("8x80gb").launch("x").startswith("torchrun --standalone --nproc_per_node 8 -m mogb_diffusion train x ")
    )
    assert "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --nproc_per_node 8" in preset("2x8x80gb").launch(
        "x"
    )


def test_an_architecture_is_read_from_a_folder(tmp_path):
    pipeline = tiny.build(0)
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    found = memory.known_architecture(str(tmp_path))
    shape = memory.shape_of(override(recipe("tiny"), ["model.resolution=64"]), found)
    assert (shape.layers, shape.width, shape.heads, shape.image_tokens) == (4, 128, 4, 16)
    assert shape.parameters == sum(param.numel() for param in pipeline.transformer.parameters())
    assert shape.trained == sum(param.numel() for param in policy_of(pipeline.transformer, 16).parameters)
    assert memory.known_architecture("nobody/nothing") is None


def fused(query, key, value, *args, **options):
    """Attention that keeps what fused kernels keep, on any device: ``meta`` has only the one that keeps everything."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            out = torch.empty_like(query)
            ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
            return out

        @staticmethod
        def backward(ctx, grad):
            raise AssertionError("never differentiated")

    return Fused.apply(query, key, value)


@pytest.fixture(scope="module")
def built():
    with torch.device("meta"):
        transformer = build_transformer()
        policy = policy_of(transformer, 32)
    return transformer, policy


@pytest.mark.slow
class TestMedium:
    """The true architecture, without its weights."""

    def test_counts(self, built):
        transformer, policy = built
        adapters = sum(param.numel() for name, param in transformer.named_parameters() if "lora_" in name)
        assert sum(param.numel() for param in transformer.parameters()) - adapters == 2_243_171_520
        assert sum(param.numel() for param in policy.parameters) == 18_776_064
        assert len(policy.parameters) == 382
        shape = memory.shape_of(recipe("sd35_marble"), architectures.SD35_MEDIUM_TRANSFORMER)
        assert (shape.parameters, shape.trained) == (2_243_171_520, 18_776_064)
        assert (shape.layers, shape.width, shape.heads) == (24, 1536, 24)
        assert (shape.image_tokens, shape.text_tokens) == (1024, 205)

    def test_target_modules(self, built):
        transformer, _ = built
        adapted = {name for name, module in transformer.named_modules() if hasattr(module, "lora_A")}
        targets = config.SD3_LORA_TARGETS
        expected = {f"transformer_blocks.{block}.{target}" for block in range(24) for target in targets}
        assert adapted == expected - {"transformer_blocks.23.attn.to_add_out"}  # the last block drops the text
        assert len(adapted) == 191
        assert any(".attn2." in name for name, _ in transformer.named_modules())
        assert not any(".attn2." in name for name in adapted)  # as in DiffusionNFT

    @pytest.mark.parametrize(("resolution", "side"), [(512, 64), (1024, 128), (None, 128)])
    def test_latent_shapes(self, resolution, side):
        from mogb_diffusion.models.sd3 import SD3Model

        pipeline = types.SimpleNamespace(transformer=build_transformer(), vae=torch.nn.Linear(1, 1), vae_scale_factor=8)
        model = SD3Model(pipeline, device="meta", dtype=torch.bfloat16, resolution=resolution)
        assert model.latent_shape == (16, side, side)
        text = types.SimpleNamespace(
            tokens=torch.ones(2, 205, 4096, device="meta", dtype=torch.bfloat16),
            pooled=torch.ones(2, 2048, device="meta", dtype=torch.bfloat16),
        )
        model.dtype = torch.bfloat16  # there is no autocast on meta
        model._autocast = contextlib.nullcontext
        velocity = model.velocity(torch.ones(2, 16, side, side, device="meta"), 0.5, text)
        assert velocity.shape == (2, 16, side, side)
        assert sum(p.numel() for p in pipeline.transformer.parameters()) == 2_243_171_520

    def test_kept_activations_at_full_size(self, built, monkeypatch):
        transformer, _ = built
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
        kept = Kept(transformer)
        with kept.hooks(), torch.device("meta"):
            transformer(
                **inputs(architectures.SD35_MEDIUM_TRANSFORMER, 2, side=64, tokens=205, device="meta"),
                return_dict=False,
            )
        run = override(recipe("sd35_marble"), ["model.dtype=float32", "batch.micro_batch=2"])
        shape = memory.shape_of(run, architectures.SD35_MEDIUM_TRANSFORMER)
        assert memory.kept_activations(run, shape) == pytest.approx(kept.total, rel=0.02)

    def test_counts_of_what_does_not_train(self):
        from diffusers import AutoencoderKL
        from transformers import (
            CLIPConfig,
            CLIPModel,
            CLIPTextConfig,
            CLIPTextModelWithProjection,
            Mask2FormerConfig,
            Mask2FormerForUniversalSegmentation,
            SwinConfig,
            T5Config,
            T5EncoderModel,
        )

        def count(model):
            return sum(param.numel() for param in model.parameters())

        texts = architectures.SD35_TEXT_ENCODERS
        swin = SwinConfig(
            depths=[2, 2, 18, 2], embed_dim=96, num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.3,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        with torch.device("meta"):
            assert {
                "text_encoder": count(CLIPTextModelWithProjection(CLIPTextConfig(**texts["text_encoder"]))),
                "text_encoder_2": count(CLIPTextModelWithProjection(CLIPTextConfig(**texts["text_encoder_2"]))),
                "text_encoder_3": count(T5EncoderModel(T5Config(**texts["text_encoder_3"]))),
            } == memory.TEXT_ENCODERS
            assert count(AutoencoderKL(**architectures.SD35_AUTOENCODER)) == memory.AUTOENCODER
            large = CLIPModel(
                CLIPConfig(**{k: dict(v) for k, v in architectures.CLIP_VIT_L.items()}, projection_dim=768)
            )
            huge = CLIPModel(
                CLIPConfig(**{k: dict(v) for k, v in architectures.CLIP_VIT_H.items()}, projection_dim=1024)
            )
            found = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80))
        assert count(huge) == memory.NETWORKS["ViT-H/14 of PickScore"] == memory.NETWORKS["ViT-H/14 of HPSv2.1"]
        assert count(large) == memory.NETWORKS["ViT-L/14"]
        assert count(found) == memory.NETWORKS["Mask2Former"]

    @pytest.mark.parametrize("name", list(PRESETS))
    @pytest.mark.parametrize("of", ["sd35_marble", "sd35_exact", "sd35_every_step", "sd35_marble_script"])
    def test_a_preset_fits_with_a_tenth_to_spare(self, name, of):
        chosen, run = preset(name), load_run(of, preset=name)
        shape = memory.shape_of(run, architectures.SD35_MEDIUM_TRANSFORMER)
        estimate = memory.estimate(run, shape, ranks=chosen.ranks)
        assert 0.4 * chosen.memory < estimate.peak / memory.GIB < 0.9 * chosen.memory
        assert estimate.unknown == ()

    def test_what_the_small_preset_changes_is_needed(self):
        chosen = preset("1x24gb")
        for key in ("model.text_encoders=resident", "model.gradient_checkpointing=false"):
            run = load_run("sd35_marble", [key], preset="1x24gb")
            shape = memory.shape_of(run, architectures.SD35_MEDIUM_TRANSFORMER)
            assert memory.estimate(run, shape).peak / memory.GIB > 0.9 * chosen.memory
