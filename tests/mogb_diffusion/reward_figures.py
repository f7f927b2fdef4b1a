"""How well the rewards agree with what is known about them: ``python -m tests.mogb_diffusion.reward_figures``.

The cases and the independent computations are those of the tests in ``rewards/``; here they are counted and measured.
"""

import pathlib
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
for folder in (HERE, HERE / "rewards", HERE.parent / "mogb"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import test_clip_family as clip_family  # noqa: E402
import test_detection as detection  # noqa: E402
import test_geneval as geneval_cases  # noqa: E402
import test_imagereward as image_reward  # noqa: E402
import test_ocr as ocr_cases  # noqa: E402
import test_ocr_reader as rendered  # noqa: E402

from mogb_diffusion.prompts import Prompt  # noqa: E402
from mogb_diffusion.rewards import load  # noqa: E402
from mogb_diffusion.rewards.geneval import iou, judge, relative_position  # noqa: E402
from mogb_diffusion.rewards.ocr import text_reward  # noqa: E402


class Count(NamedTuple):
    """Cases with known answers."""

    what: str
    cases: int
    mismatches: int


class Deviation(NamedTuple):
    """Scores beside those of a computation that shares no code with them."""

    reward: str
    file: str
    truth: str
    scores: int
    largest: float  # absolute
    spread: float  # of the scores, to compare it with


def table_of(test):
    """The cases of a parametrized test."""
    return next(mark for mark in test.pytestmark if mark.name == "parametrize").args[1]


def counted(what, cases, right):
    cases = list(cases)
    return Count(what, len(cases), sum(not right(*case) for case in cases))


def rule_counts():
    """GenEval's rules and OCR's string metric, which need no network."""

    def verdict_matches(case):
        found = judge(case["detections"], case["metadata"])
        same = (found.correct, found.strict_correct) == (case["correct"], case["strict_correct"])
        return same and abs(found.score - case["score"]) <= 1e-12

    def row_matches(metadata, detections, correct, strict, score):
        found = judge(detections, metadata)
        return (found.correct, found.strict_correct) == (correct, strict) and abs(found.score - score) <= 1e-12

    def text_matches(case):
        recognized = [(text, confidence) for text, confidence in case["recognized"]]
        return abs(text_reward(recognized, case["prompt"].split('"')[1]) - case["expected"]) <= 1e-12

    positions = [(case["a"], case["b"], set(case["expected"])) for case in geneval_cases.POSITIONS]
    return [
        counted("GenEval: rules, run by the reference", ((case,) for case in geneval_cases.RULES), verdict_matches),
        counted("GenEval: rules, from the published table",
                table_of(geneval_cases.test_the_table_measured_on_the_reference), row_matches),
        counted("GenEval: positions, run by the reference", positions,
                lambda a, b, expected: relative_position(a, b) == expected),
        counted("GenEval: positions, from the published table",
                table_of(geneval_cases.test_positions_by_the_published_table),
                lambda a, b, expected: relative_position(a, b) == expected),
        counted("GenEval: overlap of boxes (IoU), by hand", table_of(geneval_cases.test_the_overlap_counts_pixels),
                lambda a, b, expected: abs(iou(a, b) - expected) <= 1e-12),
        counted("OCR: texts, run by the reference", ((case,) for case in ocr_cases.CASES), text_matches),
        counted("OCR: texts, by hand", table_of(ocr_cases.test_rewards_by_hand),
                lambda lines, target, expected: abs(text_reward(lines, target) - expected) <= 1e-12),
    ]  # fmt: skip


def reader_count():
    """Rendered text, read by the real reader."""
    reward = load("ocr")

    def matches(picture, text, expected):
        picture = dict(picture)
        found = reward(rendered.rendered(*picture.pop("lines"), **picture), rendered.wanted(text))
        return abs(float(found) - expected) <= 1e-6

    return counted("OCR: rendered pictures, read by rapidocr", table_of(rendered.test_rendered_text_is_read), matches)


def deviations(folder, count=8):
    """CLIP rewards and ImageReward, on tiny random weights saved in the true file formats and loaded from there."""
    clip, hps, blip = (folder / name for name in ("clip", "hps", "blip"))
    for path in (clip, hps, blip):
        path.mkdir()
    clip_family.random_clip().save_pretrained(clip)
    clip_family.tokenizer().save_pretrained(clip)
    clip_family.config("gelu").save_pretrained(hps)
    clip_family.tokenizer().save_pretrained(hps)
    state = clip_family.open_clip_state(clip_family.random_clip(5, "gelu"))
    torch.save({"state_dict": state}, hps / "HPS.pt")
    head = clip_family.TestAesthetic().head()
    torch.save(head, folder / "head.pth")
    torch.save(image_reward.random_state(), blip / "ImageReward.pt")
    (blip / "vocab.txt").write_text("\n".join(image_reward.WORDS) + "\n")
    image_reward.transformers.BertTokenizerFast(str(blip / "vocab.txt")).save_pretrained(blip)

    def pictures(shape, seed):
        return torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(seed))

    made = {
        "pickscore": load("pickscore", model=str(clip), tokenizer=str(clip)),
        "clipscore": load("clipscore", model=str(clip)),
        "hpsv2": load("hpsv2", weights=str(hps / "HPS.pt"), config=str(hps)),
        "aesthetic": load("aesthetic", weights=str(folder / "head.pth"), model=str(clip)),
        "imagereward": image_reward.made(blip),
    }
    files = {
        "pickscore": ("model.safetensors, a folder of the hub", "transformers' own model and processor"),
        "clipscore": ("model.safetensors, a folder of the hub", "transformers' own model, resized by torch"),
        "hpsv2": ("HPS_v2.1_compressed.pt, OpenCLIP's names", "OpenCLIP's towers, from torch's functions"),
        "aesthetic": ("sac+logos+ava1-l14-linearMSE.pth", "transformers' own model, the head in float64"),
        "imagereward": ("ImageReward.pt, BLIP's names", "BLIP's formulas in float64"),
    }
    found = {name: ([], []) for name in made}
    for seed in range(count):
        given = pictures((40, 28) if seed % 2 else (33, 33), seed)
        for name, truth in clip_truths(clip, state, head, given).items():
            found[name][0].append(made[name](given, clip_family.PROMPTS))
            found[name][1].append(truth)
        given = pictures((22, 17), seed)
        found["imagereward"][0].append(made["imagereward"](given, image_reward.PROMPTS))
        found["imagereward"][1].append(
            image_reward.forward(
                image_reward.random_state(), image_reward.prepared(given), *image_reward.tokens_by_hand()
            )
        )
    rows = []
    for name, (ours, truth) in found.items():
        ours, truth = torch.cat(ours).double(), torch.cat(truth).double()
        rows.append(Deviation(name, *files[name], len(ours), float((ours - truth).abs().max()), float(truth.std())))
    return rows


def clip_truths(folder, open_clip, head, given):
    """What the four rewards must be, by other code."""
    pixels = clip_family.processor()(clip_family.as_pil(given), return_tensors="pt")["pixel_values"]
    height, width = given.shape[2] * 16 // given.shape[3], 16
    short = torch.nn.functional.interpolate(given, (height, width), mode="bilinear", antialias=True)
    top = round((height - 16) / 2)
    resized = (short[:, :, top : top + 16] - clip_family.MEAN.view(3, 1, 1)) / clip_family.STD.view(3, 1, 1)
    inner = (16, round(16 * given.shape[3] / given.shape[2]))
    padded, left = torch.zeros(len(given), 3, 16, 16), (16 - inner[1]) // 2
    padded[:, :, :, left : left + inner[1]] = torch.nn.functional.interpolate(
        given, inner, mode="bicubic", antialias=True
    )
    padded = (padded - clip_family.MEAN.view(3, 1, 1)) / clip_family.STD.view(3, 1, 1)
    tokens = clip_family.tokenizer()(
        [prompt.text for prompt in clip_family.PROMPTS], padding="max_length", max_length=9, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        picture, words = clip_family.run_open_clip(open_clip, padded, tokens)
        model = clip_family.transformers.CLIPModel.from_pretrained(folder).eval()
        seen = model(input_ids=tokens[:1], pixel_values=pixels).image_embeds.double().numpy()
    for index in (0, 2, 4, 6, 7):
        seen = seen @ head[f"layers.{index}.weight"].double().numpy().T + head[f"layers.{index}.bias"].double().numpy()
    return {
        "pickscore": clip_family.reference(str(folder), pixels) / 26,
        "clipscore": clip_family.reference(str(folder), resized) / 100,
        "hpsv2": (picture * words).sum(-1),
        "aesthetic": torch.from_numpy(np.ascontiguousarray(seen[:, 0])),
    }


def detector_count(folder):
    """A Mask2Former and a CLIP in the hub's format, loaded and run to the end."""
    path = folder / "mask2former"
    detection.save_tiny(path)
    reward = load("geneval", model=str(path), clip=str(folder / "clip"), short_side=64, long_side=96)
    include = [{"class": "dog", "count": 1, "color": "red"}]
    numbers = reward(torch.rand(2, 3, 48, 48), [Prompt("a", metadata={"tag": "colors", "include": include})] * 2)
    return Count("GenEval: pictures through a Mask2Former in the hub's format", 2, int((~numbers.isfinite()).sum()))


def main():
    """Prints everything; the exit status is 1 if anything deviates."""
    clip_family.transformers.utils.logging.set_verbosity_error()
    clip_family.transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rows = deviations(folder)
        counts = [*rule_counts(), reader_count(), detector_count(folder)]
    print("| cases with known answers | cases | mismatches |\n|---|---|---|")
    for count in counts:
        print(f"| {count.what} | {count.cases} | {count.mismatches} |")
    print("\n| reward | file that was loaded | compared with | scores | largest deviation | spread |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.reward} | {row.file} | {row.truth} | {row.scores} | {row.largest:.1e} | {row.spread:.2g} |")
    bad = sum(count.mismatches for count in counts) + sum(row.largest > 1e-4 * max(1, row.spread) for row in rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
