"""Advantages against the reference's numbers, NumPy and statistics by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from mogb_diffusion import prompt_advantages
from mogb_diffusion.advantages import RunningAdvantages, clamp_hits, gdpo_advantages, summed_advantages

CASES = json.loads((Path(__file__).parents[1] / "cases" / "diffusion.json").read_text())["per_prompt_stat_tracker"]
NAN = float("nan")


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def by_loop(rewards, ids, std="prompt", eps=1e-4):
    """Reward by reward and prompt by prompt, with NumPy's own statistics."""
    result = np.zeros_like(rewards)
    for k, row in enumerate(rewards):
        for prompt in set(ids):
            members = [i for i, other in enumerate(ids) if other == prompt and not math.isnan(row[i])]
            if members:
                spread = np.std(row[members] if std == "prompt" else row[~np.isnan(row)])
                result[k, members] = (row[members] - np.mean(row[members])) / (spread + eps)
    return torch.from_numpy(result)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_reference_advantages_are_reproduced(case):
    std = "global" if case["global_std"] else "prompt"
    for update, expected in zip(case["updates"], case["advantages"], strict=True):
        rewards, wanted = (
            np.array(values, dtype=np.float64).reshape(len(values), -1).T for values in (update["rewards"], expected)
        )
        for column, answer in zip(rewards, wanted, strict=True):  # the reference repeats rewards over timesteps
            actual = prompt_advantages(column[None], update["prompts"], std=std)
            assert_close(actual[0], torch.from_numpy(answer.copy()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("rewards", "ids", "std", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], "abacba", "prompt", [-1.13549, -0.99993, -0.16221, 0, 0.99993, 1.29771]),
        ([1, 2, 3, 4, 5, 6], "abacba", "global", [-1.36618, -0.87826, -0.19517, 0, 0.87826, 1.56135]),
        ([0.5, 0.5, 0.5], "aaa", "prompt", [0, 0, 0]),
        ([2, 3], "aa", "prompt", [-0.9998, 0.9998]),
        ([0.2801, 0.2802, 0.2803, 0.2804], "aaaa", "prompt", [-0.70820, -0.23607, 0.23607, 0.70820]),
    ],
)
def test_published_examples(rewards, ids, std, expected):
    actual = prompt_advantages(vector(*rewards)[None], list(ids), std=std)
    assert_close(actual[0], vector(*expected), rtol=0, atol=6e-6)


@st.composite
def groups_of_rewards(draw):
    num_rewards, size = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    numbers = st.floats(-10, 10, width=32) | st.just(NAN)
    rewards = draw(hnp.arrays(np.float64, (num_rewards, size), elements=numbers))
    ids = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return rewards, ids


@given(data=groups_of_rewards(), std=st.sampled_from(["prompt", "global"]))
@settings(max_examples=150, deadline=None)
def test_advantages_equal_a_naive_loop_and_have_mean_zero_in_every_group(data, std):
    rewards, ids = data
    actual = prompt_advantages(rewards, ids, std=std)
    assert actual.dtype == torch.float64
    assert_close(actual, by_loop(rewards, ids, std), rtol=1e-7, atol=1e-9)
    for prompt in set(ids):
        members = [i for i, other in enumerate(ids) if other == prompt]
        assert actual[:, members].sum(dim=1).abs().max() < 1e-9
    assert torch.equal(actual[torch.from_numpy(np.isnan(rewards))], torch.zeros(int(np.isnan(rewards).sum())).double())


@given(data=groups_of_rewards(), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_names_and_order_of_prompts_do_not_matter(data, seed):
    rewards, ids = data
    expected = prompt_advantages(rewards, ids)
    assert torch.equal(prompt_advantages(rewards, [f"prompt {prompt}" for prompt in ids]), expected)
    assert torch.equal(prompt_advantages(rewards, torch.tensor(ids) * 7 - 3), expected)
    order = np.random.default_rng(seed).permutation(len(ids))
    shuffled = prompt_advantages(rewards[:, order], np.array(ids)[order])
    assert_close(shuffled, expected[:, order], rtol=1e-9, atol=1e-10)


@given(data=groups_of_rewards(), row=st.integers(0, 3), prompt=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_rewards_that_do_not_apply_leave_every_other_group_as_it_was(data, row, prompt):
    rewards, ids = data
    row %= len(rewards)
    hidden = rewards.copy()
    inside = np.zeros(rewards.shape, dtype=bool)
    inside[row] = np.array(ids) == prompt
    hidden[inside] = NAN
    before, after = prompt_advantages(rewards, ids), prompt_advantages(hidden, ids)
    assert torch.equal(after[~torch.from_numpy(inside)], before[~torch.from_numpy(inside)])
    assert after[torch.from_numpy(inside)].abs().sum() == 0


@pytest.mark.parametrize("value", [0.1, 1e-9, -7.3, 1e12])
def test_a_group_whose_reward_does_not_vary_has_advantage_zero_exactly(value):
    rewards = torch.full((1, 7), value, dtype=torch.float64)
    for eps in (1e-4, 0.0):
        assert torch.equal(prompt_advantages(rewards, [0] * 7, eps=eps), torch.zeros(1, 7, dtype=torch.float64))


def test_an_offset_of_a_billion_costs_only_its_own_digits():
    spread = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    plain, lifted = (prompt_advantages(spread + offset, [0, 0, 0]) for offset in (0, 2.0**30))
    assert_close(lifted, plain, rtol=1e-6, atol=0)  # one pass over the squares would lose all of them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_any_real_dtype_gives_float64_and_inputs_stay_as_they_are(dtype):
    rewards = torch.tensor([[1, 2, 4], [0, 0, 3]]).to(dtype)
    before = rewards.clone()
    actual = prompt_advantages(rewards.T.contiguous().T, (7, 7, 8))
    assert torch.equal(rewards, before)
    assert_close(actual, by_loop(before.double().numpy(), [7, 7, 8]))


def test_lists_keep_their_sixteen_digits():
    rewards = [[0.1, 0.1 + 1e-12, 0.3]]
    assert torch.equal(prompt_advantages(rewards, [0, 0, 1]), prompt_advantages(np.array(rewards), [0, 0, 1]))
    assert prompt_advantages(rewards, [0, 0, 1], eps=0.0)[0].tolist() == pytest.approx([-1, 1, 0])


def test_read_only_arrays_are_welcome():
    frozen = np.broadcast_to(np.array([[1.0], [2.0]]), (2, 3))
    assert torch.equal(prompt_advantages(frozen, [0, 0, 0]), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rewards", "ids", "options", "error", "message"),
    [
        ([1.0, 2.0], [0, 0], {}, ValueError, r"shape \[K, B\].*rewards\[None\]"),
        (torch.zeros(2, 0), [], {}, ValueError, "shape"),
        ([["a"]], [0], {}, TypeError, "rewards must be a tensor, an array or lists"),
        (torch.ones(1, 1, dtype=torch.complex64), [0], {}, TypeError, "rewards must be real"),
        ([[1.0, float("inf")]], [0, 0], {}, ValueError, r"Inf \(reward 0, rollout 1\). Use NaN"),
        ([[1.0, 2.0]], [0], {}, ValueError, "one id per rollout, 2, but got 1"),
        ([[1.0, 2.0]], [0.5, 0.5], {}, TypeError, "integers or strings.*0.5"),
        ([[1.0]], torch.tensor(3), {}, ValueError, "one id per rollout"),
        ([[1.0]], [True], {}, TypeError, "integers or strings"),
        ([[1.0]], [0], {"std": "batch"}, ValueError, "std must be one of prompt, global, but got 'batch'"),
        ([[1.0]], [0], {"eps": -1e-4}, ValueError, "eps must be a finite number >= 0"),
    ],
)
def test_bad_input_is_named(rewards, ids, options, error, message):
    with pytest.raises(error, match=message):
        prompt_advantages(rewards, ids, **options)


@pytest.mark.parametrize("std", ["prompt", "global"])
def test_complete_rewards_are_summed_and_standardized_once(std):
    rewards = np.random.default_rng(0).normal(size=(3, 8)) * [[1.0], [0.1], [5.0]]
    ids = [0, 0, 0, 1, 1, 1, 1, 0]
    weights = [1.0, 0.5, 2.0]
    expected = by_loop((np.array(weights) @ rewards)[None], ids, std)[0]
    assert_close(summed_advantages(rewards, ids, weights=weights, std=std), expected)
    mean = by_loop((np.array(weights) @ rewards / 3.5)[None], ids, std)[0]
    assert_close(summed_advantages(rewards, ids, weights=weights, average=True, std=std), mean)


def test_a_sum_leaves_out_what_does_not_apply_to_the_prompt():
    rewards = vector(1, 2, 5, 8, NAN, NAN, 1, 2).reshape(2, 4)  # the second reward is for the second prompt
    expected = by_loop(np.array([[1.0, 2.0, 6.0, 10.0]]), [0, 0, 1, 1])[0]
    assert_close(summed_advantages(rewards, [0, 0, 1, 1]), expected)
    # averaged: 1, 2 for the first prompt, 3, 5 for the second, which only the spread of the batch can tell
    expected = by_loop(np.array([[1.0, 2.0, 3.0, 5.0]]), [0, 0, 1, 1], "global")[0]
    assert_close(summed_advantages(rewards, [0, 0, 1, 1], average=True, std="global"), expected)


def test_a_failed_reward_counts_as_the_mean_of_its_group():
    rewards = vector(1, 2, 3, 10, NAN, 20).reshape(2, 3)
    assert_close(summed_advantages(rewards, [0, 0, 0]), by_loop(np.array([[11.0, 17.0, 23.0]]), [0, 0, 0])[0])
    nothing = vector(1, 2, NAN, 10, 20, NAN).reshape(2, 3)
    actual = summed_advantages(nothing, [0, 0, 0])
    assert actual[2] == 0
    assert_close(actual[:2], by_loop(np.array([[11.0, 22.0]]), [0, 0])[0])


def test_weights_of_rewards_are_checked():
    for weights in ([1.0], [1.0, NAN]):
        for rule in (summed_advantages, gdpo_advantages):
            with pytest.raises(ValueError, match="weights must be finite numbers, one per reward, 2"):
                rule(torch.zeros(2, 2), [0, 0], weights=weights)
    with pytest.raises(ValueError, match="average=True needs weights whose sum"):
        summed_advantages(torch.zeros(2, 2), [0, 0], weights=[1.0, -1.0], average=True)


def test_gdpo_standardizes_each_reward_then_the_sum():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 12, generator=generator, dtype=torch.float64) * vector(1, 0.01, 30)[:, None]
    weights = vector(1, 2, 0.5)
    grouped = rewards.reshape(3, 4, 3)  # four prompts, three images each
    each = (grouped - grouped.mean(dim=2, keepdim=True)) / (grouped.std(dim=2, keepdim=True) + 1e-4)
    total = (weights[:, None] * each.reshape(3, 12)).sum(dim=0)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    ids = [i // 3 for i in range(12)]
    assert_close(gdpo_advantages(rewards, ids, weights=weights.tolist()), expected)
    order = torch.randperm(12, generator=generator)
    assert_close(
        gdpo_advantages(rewards[:, order], torch.tensor(ids)[order], weights=weights.tolist()), expected[order]
    )


def test_gdpo_without_a_reward_is_zero_and_takes_no_part():
    rewards = vector(1, 3, 2, 4, NAN, 5, 6, 9, 9, NAN).reshape(2, 5)
    actual = gdpo_advantages(rewards, [0, 0, 1, 1, 1])
    assert actual[4] == 0
    assert_close(actual[:4], gdpo_advantages(rewards[:, :4], [0, 0, 1, 1]))
    assert torch.equal(gdpo_advantages([[5.0]], [0]), torch.zeros(1, dtype=torch.float64))


def test_clamp_hits_are_counted_for_every_reward():
    advantages = torch.tensor([[5.0, -5.0, 5.1, -7.0], [0.0, 1.0, 2.0, 3.0]])
    assert clamp_hits(advantages).tolist() == [2, 0]
    assert clamp_hits(advantages, max_advantage=1.5).tolist() == [4, 2]


@pytest.mark.parametrize("size", [12, 24, 26])
def test_no_advantage_of_a_small_group_is_ever_clipped(size):
    # The most extreme group, one rollout against the rest, reaches sqrt(n - 1): 4.8 in the recipe's group of 24.
    rewards = torch.zeros(1, size, dtype=torch.float64)
    rewards[0, 0] = 1.0
    advantages = prompt_advantages(rewards, [0] * size, eps=0.0)
    assert advantages.max().item() == pytest.approx(math.sqrt(size - 1))
    assert clamp_hits(advantages).item() == (size > 26)


@pytest.mark.parametrize("std", ["prompt", "global"])
def test_running_statistics_with_full_memory_are_those_of_all_batches(std):
    generator = np.random.default_rng(1)
    rewards = generator.normal(size=(2, 18)) + np.arange(18)
    rewards[1, [2, 7, 8]] = NAN
    ids = [0, 0, 1, 1, 1, 2, 0, 0, 2, 2, 1, 3, 3, 0, 0, 1, 1, 3]
    running = RunningAdvantages(std=std)
    for start in (0, 6, 12):
        seen = slice(0, start + 6)
        actual = running(rewards[:, start : start + 6], ids[start : start + 6])
        expected = by_loop(rewards[:, seen], ids[seen], std)[:, start:]
        assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("std", ["prompt", "global"])
def test_running_statistics_without_memory_are_those_of_the_batch(std):
    running = RunningAdvantages(std=std, memory=0.0)
    for seed in range(3):
        rewards = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
        rewards[0, 1] = NAN
        ids = [0, 1, 1, 0, seed, seed]
        assert torch.equal(running(rewards, ids), prompt_advantages(rewards, ids, std=std))


def test_memory_weighs_the_past_by_hand():
    running = RunningAdvantages(memory=0.5, eps=0.0)
    running([[0.0, 4.0]], ["a", "a"])
    # The past counts half: weights .5, .5, 1, 1 on 0, 4, 6, 8: mean 16/3, variance (.5*(256+16)+4+64)/9/3 = 204/27.
    expected = (vector(6, 8) - 16 / 3) / math.sqrt(204 / 27)
    assert_close(running([[6.0, 8.0]], ["a", "a"])[0], expected)


def test_a_saved_state_continues_to_the_bit():
    first = RunningAdvantages(memory=0.9)
    batches = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    names = [["a", "a", "b", 3], [3, 3, "b", "c"], ["a", "c", "c", "d"]]
    first(batches[0], names[0])
    state = first.state_dict()
    saved = json.loads(json.dumps(state["prompt_ids"]))
    second = RunningAdvantages(memory=0.9)
    second.load_state_dict(state | {"prompt_ids": saved})
    for rewards, ids in zip(batches[1:], names[1:], strict=True):
        assert torch.equal(first(rewards, ids), second(rewards, ids))
    third = RunningAdvantages(memory=0.9)
    third.load_state_dict(state)  # taken before the others went on
    kept = state["prompts"].clone()
    assert torch.equal(third.state_dict()["prompts"], kept)
    third(batches[0], names[0])
    assert torch.equal(state["prompts"], kept)  # no memory is shared
    first.reset()
    assert torch.equal(first(batches[0], names[0]), prompt_advantages(batches[0], names[0]))


def test_bad_states_and_batches_are_named():
    running = RunningAdvantages()
    running([[1.0, 2.0]], [0, 0])
    with pytest.raises(ValueError, match="as many rows as before, 1, but have 2"):
        running(torch.zeros(2, 2), [0, 0])
    state = running.state_dict()
    with pytest.raises(ValueError, match="keys prompt_ids, prompts and all"):
        running.load_state_dict({"prompts": state["prompts"]})
    with pytest.raises(ValueError, match=r"shape \[3, K, P\]"):
        running.load_state_dict(state | {"all": torch.zeros(3, 2, 1)})
    with pytest.raises(ValueError, match="different prompt_ids"):
        running.load_state_dict(state | {"prompt_ids": [0, 1]})
    with pytest.raises(ValueError, match="memory must be a finite number >= 0 and <= 1"):
        RunningAdvantages(memory=1.5)
