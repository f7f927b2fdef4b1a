"""Objects from masks and logits, against plain loops; colours by a known CLIP; a tiny Mask2Former."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import detection, load
from mogb_diffusion.rewards.detection import CLASSES, ColorNamer, GenEval, Instance, find_instances
from mogb_diffusion.rewards.geneval import COLORS

transformers = pytest.importorskip("transformers")


def test_the_classes_are_the_80_of_coco_each_once():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("person", "stop sign", "dog", "orange", "tv", "toothbrush")] == [
        0, 11, 16, 49, 62, 79,
    ]  # fmt: skip


class TestInstances:
    def test_a_square_is_found_where_it_is(self):
        masks = torch.full((2, 8, 8), -5.0)
        masks[0, 2:4, 4:7] = 5.0  # a quarter of the size: rows 8-16, columns 16-28 of 32
        logits = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 6.0]])  # class 1; no object
        found = find_instances(logits, masks, (32, 32), (32, 32), (32, 32))
        assert found[0].label == 1
        assert found[0].box == pytest.approx((16, 8, 28, 16), abs=1)
        assert found[0].mask[9:15, 17:27].all()
        assert not found[0].mask[:7].any()

    def test_scores_boxes_and_order_are_those_of_a_plain_loop(self):
        generator = torch.Generator().manual_seed(0)
        logits, masks = torch.randn(6, 5, generator=generator) * 2, torch.randn(6, 8, 6, generator=generator) * 3
        found = find_instances(logits, masks, (64, 32), (60, 30), (45, 25))
        large = functional.interpolate(masks[None], (64, 32), mode="bilinear")[:, :, :60, :30]
        large = functional.interpolate(large, (45, 25), mode="bilinear")[0].double().numpy()
        expected = []
        for query in range(6):
            chances = np.exp(logits[query].double().numpy())
            chances /= chances.sum()
            rows, columns = np.nonzero(large[query] > 0)
            for label in range(4):
                values = large[query][rows, columns]
                score = chances[label] * (1 / (1 + np.exp(-values))).mean()
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                expected.append((score, label, box))
        expected.sort(key=lambda item: -item[0])
        assert len(found) == len(expected)
        for instance, (score, label, box) in zip(found, expected, strict=True):
            assert instance.score == pytest.approx(score, rel=1e-4)
            assert instance.label == label
            assert instance.box == box

    def test_empty_masks_are_no_objects(self):
        assert find_instances(torch.zeros(3, 4), torch.full((3, 4, 4), -1.0), (32, 32), (32, 32), (9, 9)) == []


RGB = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class KnownClip:
    """Embeds a picture as its mean colour, and a text as the colour that it names."""

    size = 4

    def images(self, pixels):
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
        middle = (pixels * std + mean)[:, :, 1:3, 1:3].mean((2, 3))
        return functional.normalize(middle - 0.2, dim=-1)

    def texts(self, texts):
        told = [next((RGB[color] for color in RGB if f" {color}" in text), (-1.0, -1, -1)) for text in texts]
        return functional.normalize(torch.tensor(told), dim=-1)


def test_a_colour_is_that_of_the_object_and_not_of_what_is_around_it():
    picture = torch.zeros(3, 20, 20, dtype=torch.uint8)
    picture[0] = 255  # all red,
    picture[:, 4:12, 4:12] = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]  # but for a blue square
    mask = np.zeros((20, 20), dtype=bool)
    mask[4:12, 4:12] = True
    blue = Instance(0, 0.9, (4, 4, 12, 12), mask)
    red = Instance(0, 0.9, (0, 12, 20, 20), np.ones((20, 20), dtype=bool))
    assert ColorNamer(KnownClip())(picture, [blue, red], "square") == ["blue", "red"]
    assert ColorNamer(KnownClip())(picture, [], "square") == []
    assert set(RGB) <= set(COLORS)


def save_tiny(path):
    """A Mask2Former with random weights, as the hub holds it."""
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, num_labels=80, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=5,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16,
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mask2former")
    save_tiny(path)
    return str(path)


def test_a_network_in_the_true_format_runs_on_pictures_of_any_shape(folder):
    reward = load("geneval", model=folder, short_side=64, long_side=96)
    prompts = [
        Prompt("a dog", metadata={"tag": "single_object", "include": [{"class": "dog", "count": 1}]}),
        Prompt("a"),
    ]
    for shape in ((48, 48), (30, 70)):
        numbers = reward(torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1)), prompts)
        assert numbers[0].isfinite()
        assert numbers[1].isnan()
    assert [reward.applies(prompt) for prompt in prompts] == [True, False]


def test_what_is_found_is_judged_by_the_rules(folder, monkeypatch):
    reward = load("geneval", model=folder, short_side=64, long_side=96)
    mask = np.ones((20, 20), dtype=bool)
    dog, cat = CLASSES.index("dog"), CLASSES.index("cat")
    seen = [
        Instance(dog, 0.95, (0, 0, 5, 5), mask),
        Instance(cat, 0.8, (14, 0, 19, 5), mask),
        Instance(cat, 0.2, (14, 0, 19, 5), mask),  # below the threshold
    ]
    monkeypatch.setattr(reward, "detector", lambda pictures: [seen] * len(pictures))
    monkeypatch.setattr(
        GenEval, "color_namer", property(lambda self: lambda picture, found, name: ["black"] * len(found))
    )
    picture = torch.rand(1, 3, 20, 20)

    def number(metric, include, tag=""):
        reward.metric = metric
        return reward(picture, [Prompt("", metadata={"tag": tag, "include": include})]).item()

    one_cat = [{"class": "cat", "count": 1}]
    assert number("score", one_cat) == 1
    assert number("score", one_cat, "counting") == 0  # 0.8 does not count there
    assert number("correct", [{"class": "cat", "count": 1, "color": "black"}]) == 1
    assert number("correct", [{"class": "cat", "count": 1, "color": "white"}]) == 0
    left = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}]
    assert number("strict", left) == 1
    assert number("strict", [left[0], {**left[1], "position": ["left of", 0]}]) == 0


def test_another_number_of_classes_is_refused(folder, tmp_path):
    config = transformers.Mask2FormerConfig.from_pretrained(folder)
    config.num_labels = 3
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="knows 3 classes"):
        load("geneval", model=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"metric": "mean"}, "metric must be one of score, strict, correct"), ({"short_side": 0}, "1 <= short <= long")],
)
def test_bad_options_are_named(folder, options, message):
    with pytest.raises(InputError, match=message):
        load("geneval", model=folder, **options)


def test_weights_that_are_not_there_say_how_to_get_them(tmp_path):
    with pytest.raises(InputError, match="hf download"):
        load("geneval", model=str(tmp_path / "nowhere"))
    assert detection.TOP == 100


def test_batches_and_offload_change_no_reward(folder):
    prompt = Prompt("a dog", metadata={"tag": "single_object", "include": [{"class": "dog", "count": 1}]})
    pictures = torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(2))
    sizes = {"model": folder, "short_side": 64, "long_side": 96}
    one = load("geneval", **sizes, batch_size=1)
    together = load("geneval", **sizes, batch_size=3, offload=True)
    assert together.weights.offload
    eight = (pictures * 255).round().byte()
    alone = [one.detector(eight[n : n + 1])[0] for n in range(3)]
    for single, batch in zip(alone, together.detector(eight), strict=True):
        assert len(single) == len(batch)
        scores = [[instance.score for instance in found] for found in (single, batch)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert one(pictures, [prompt] * 3).tolist() == together(pictures, [prompt] * 3).tolist()
