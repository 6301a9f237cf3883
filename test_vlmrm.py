"""What this repository promises, one promise a test. What is expected is computed in other ways."""

import argparse
import copy
import csv
import functools
import gc
import hashlib
import http.server
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected is computed on the CPU, to its digits
import vlmrm  # first: it chooses MuJoCo's renderer, after torch and open_clip
import sac
import evaluation.climb
import evaluation.states
import support.runs
import gymnasium
import hypothesis
import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import matplotlib
import mujoco
import nbclient
import nbformat
import numpy as np
import open_clip
import pytest
import safetensors.torch
import stable_baselines3
import support.address
import support.command_line
import support.training
import torch
import torch.nn as nn
from evaluation.evaluate import remove_evaluation
from evaluation.states import goal_states, pose_path
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from PIL import Image
from matplotlib.font_manager import fontManager
from support.address import ADDRESS
from support.command_line import interrupted, main
from support.pictures import fonts_for
from support.processes import check_same_start, share, shared_update
from support.runs import Checkpoint, atomic_open, load_policy, read_metrics, save_policy
from support.runs import save_small_policy, write_csv
from support.vocabulary import unread_words
from support.workers import Workers
from tinyclip import bodies, captions, grading, make, poses
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(vlmrm.__file__).parent
KNEELING, BASELINE = "a humanoid robot kneeling", "a humanoid robot"
RULER = "# " + "-" * 98 + "\n"


def close(actual, expected, atol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def run_alone(folder, code, *words, **settings):
    """A new Python, in a folder; what it printed is its stdout."""
    command = [sys.executable, "-c", code, *words]
    settings = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH="") | settings
    process = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    return process


# Hypothesis looks for inputs that break the pure functions. Whatever they are given, they return
# what they promise or raise ValueError.
anything = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)

# --------------------------------------------------------------------------------------------------
# Equations: the reward


def reference_reward(states, goal, baseline, alpha):
    """Equation (3), one state at a time, in float64."""
    vectors = (np.asarray(x, float) for x in (states, goal, baseline))
    states, g, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in vectors)
    line, rewards = g - b, []
    for s in states:
        projection = b + np.dot(s - b, line) / np.linalg.norm(line) ** 2 * line
        rewards.append(1 - 0.5 * np.linalg.norm(alpha * projection + (1 - alpha) * s - g) ** 2)
    return np.array(rewards)


def embeddings():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((64, 512), (512,), (512,))]


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.75, 1])
def test_reward_is_equation_3_for_embeddings_of_any_length(alpha):
    state, goal, baseline = embeddings()
    expected = reference_reward(state, goal, baseline, alpha)
    close(vlmrm.goal_baseline_reward(state, goal, baseline, alpha), expected, 1e-6)
    close(vlmrm.goal_baseline_reward(7 * state, 0.1 * goal, 30 * baseline, alpha), expected, 1e-6)


def test_clip_reward_is_the_cosine_and_equation_3_at_alpha_0():
    state, goal, baseline = embeddings()
    s, g = state.double().numpy(), goal.double().numpy()
    cosine = s @ g / np.linalg.norm(s, axis=1) / np.linalg.norm(g)
    close(vlmrm.clip_reward(state, goal), cosine, 1e-6)
    close(vlmrm.goal_baseline_reward(state, goal, baseline, 0), cosine, 1e-6)
    close(vlmrm.goal_baseline_reward(state, goal, goal, 0), cosine, 1e-6)  # it needs no line


def test_alpha_1_reads_nothing_but_the_place_along_the_line():
    """L runs through (1, 0, 0), the goal, and (0, 1, 0). Unit vectors with x - y = .4 all project
    on (.7, .3, 0), whose squared distance to the goal is .18."""
    state = torch.tensor([[0.4, 0, 0.84**0.5], [0.2, -0.2, 0.92**0.5], [0.7, 0.3, -(0.42**0.5)]])
    close(vlmrm.goal_baseline_reward(state, *torch.eye(3)[:2], 1), [0.91] * 3, 1e-6)


def test_reward_refuses_alpha_outside_0_to_1_and_a_line_through_one_point():
    state, goal, baseline = embeddings()
    for alpha in -0.01, 1.01, float("nan"):
        with pytest.raises(ValueError, match="alpha"):
            vlmrm.goal_baseline_reward(state, goal, baseline, alpha)
    with pytest.raises(ValueError, match="alpha 0"):
        vlmrm.goal_baseline_reward(state, goal, 2 * goal, 0.5)


@anything
@hypothesis.given(st.data(), st.floats(-0.5, 1.5) | st.sampled_from([0, 1, np.nan]))
def test_rewards_are_at_most_1_whatever_the_embeddings(data, alpha):
    """Of fitting shapes or not, with numbers of any size or none."""
    number = st.floats(width=32) | st.floats(-10, 10, width=32)
    count, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    odd = npst.array_shapes(min_dims=1, max_dims=3, max_side=4)
    shapes = [data.draw(st.just(x) | odd) for x in ((count, width), (width,), (width,))]
    fits = len(shapes[0]) == 2 and shapes[1] == shapes[2] == shapes[0][1:]
    state, goal, baseline = (
        torch.tensor(data.draw(npst.arrays(np.float32, shape, elements=number))) for shape in shapes
    )
    try:
        reward = vlmrm.goal_baseline_reward(state, goal, baseline, alpha)
    except ValueError as error:
        assert not fits or any(word in str(error) for word in ("alpha", "NaN", "same"))
    else:
        assert fits and 0 <= alpha <= 1
        assert reward.shape == state.shape[:1] and (reward <= 1 + 1e-5).all()
        plain = vlmrm.goal_baseline_reward(state, goal, baseline, 0)
        close(vlmrm.clip_reward(state, goal), plain, 1e-5)


# --------------------------------------------------------------------------------------------------
# Equations: SAC's update


def policy(actor, obs, noise=None):
    """What an Actor does, written out: a squashed Gaussian's action and log-probability."""
    mean, log_std = actor.head(actor.body(obs)).chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.exp())
    u = mean + normal.stddev * (torch.randn_like(mean) if noise is None else noise)
    return u.tanh(), (normal.log_prob(u) - (1 - u.tanh() ** 2).log()).sum(-1)


def q(critic, obs, action):
    """Both values of a TwinCritic, layer by layer."""
    values = []
    for network in (critic.q1, critic.q2):
        x = torch.cat([obs, action], -1)
        for i in (0, 3):
            x = x @ network[i].weight.T + network[i].bias
            variance = x.var(-1, keepdim=True, correction=0)
            x = ((x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()).clamp(min=0)
        values.append((x @ network[6].weight.T + network[6].bias).squeeze(-1))
    return values


def test_actors_log_probability_is_finite_where_the_tanh_is_saturated():
    actor, obs = sac.Actor(6, 4, 32).double(), torch.randn(50, 6).double()
    torch.testing.assert_close(
        actor(obs, noise := torch.ones(50, 4).double()), policy(actor, obs, noise)
    )
    torch.testing.assert_close(actor(obs, 0)[0], policy(actor, obs, 0)[0])
    action, log_prob = actor(obs, 50 * noise)
    assert (action == 1).any() and log_prob.isfinite().all()


def box(size, low=-1, high=1):
    return Box(low, high, (size,), np.float32)


def agent_and_batch(**settings):
    """In float64, where no wrong term hides in rounding. The target is not the critic."""
    agent = sac.SAC(box(5), box(3), sac.Config(hidden=32, **settings)).double()
    agent.target.load_state_dict(sac.TwinCritic(5, 3, 32).state_dict())
    obs, action, next_obs = (torch.randn(64, n).double() for n in (5, 3, 5))
    agent.norm.update(3 * obs + 1)
    reward, terminated = torch.randn(64).double(), (torch.rand(64) < 0.3).double()
    return agent, (obs, action.tanh(), reward, next_obs, terminated)


def test_one_update_is_the_equations_of_sac_written_out():
    gamma, tau, actor_tau, rate = 0.9, 0.1, 0.3, 1e-3
    settings = dict(gamma=gamma, tau=tau, actor_tau=actor_tau, learning_rate=rate)
    agent, batch = agent_and_batch(**settings)
    networks = agent.actor, agent.critic, agent.target
    actor, critics, target = (copy.deepcopy(network) for network in networks)
    before = [parameter.detach().clone() for parameter in agent.mean_actor.parameters()]
    log_temperature = agent.log_temperature.detach().clone().requires_grad_()
    torch.manual_seed(1)
    losses = agent.update(*batch)

    def descend(loss, parameters):
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        torch.optim.Adam(parameters, rate).step()

    torch.manual_seed(1)
    obs, action, reward, next_obs, terminated = batch
    obs, next_obs = ((x - agent.norm.mean) / agent.norm.var.sqrt() for x in (obs, next_obs))
    with torch.no_grad():
        next_action, next_log_prob = policy(actor, next_obs)
        value = torch.min(*q(target, next_obs, next_action))
        value = value - log_temperature.exp() * next_log_prob
        y = torch.where(terminated == 1, reward, reward + gamma * value)
    critic_loss = sum(((value - y) ** 2).mean() for value in q(critics, obs, action))
    descend(critic_loss, list(critics.parameters()))
    new_action, log_prob = policy(actor, obs)
    lower = torch.min(*q(critics, obs, new_action))
    actor_loss = (log_temperature.exp().detach() * log_prob - lower).mean()
    descend(actor_loss, list(actor.parameters()))
    # the entropy that is wanted is -dim(A), here -3
    descend(-(log_temperature.exp() * (log_prob.detach() - 3)).mean(), [log_temperature])
    for old, new in zip(target.parameters(), critics.parameters()):
        old.data = (1 - tau) * old.data + tau * new.data
    mean = [(1 - actor_tau) * old + actor_tau * new for old, new in zip(before, actor.parameters())]

    assert all(parameter.grad_fn is None for parameter in agent.target.parameters())
    exactly = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    exactly([losses["critic_loss"], losses["actor_loss"]], [critic_loss, actor_loss])
    exactly(agent.log_temperature, log_temperature)
    for ours, expected in (agent.actor, actor), (agent.critic, critics), (agent.target, target):
        exactly(list(ours.parameters()), list(expected.parameters()))
    exactly(list(agent.mean_actor.parameters()), mean)


def test_updates_are_the_same_to_the_last_bit_on_one_thread_and_on_two():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # as in training
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            agent, noise = sac.SAC(box(348), box(17), sac.Config()), torch.Generator()
            noise.manual_seed(0)
            for _ in range(4):
                columns = [torch.randn(256, n, generator=noise) for n in (348, 17, 1, 348, 1)]
                agent.update(*(column.squeeze(1) for column in columns))
            results.append(agent.state_dict())
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    same(*results)


def test_running_norm_has_the_mean_and_variance_of_all_batches():
    rng, norm = np.random.default_rng(0), sac.RunningNorm(3).double()
    batches = [rng.normal([5, -1, 0], [0.1, 3, 50], (n, 3)) for n in (1, 40, 7, 300)]
    for batch in batches:
        norm.update(torch.from_numpy(batch))
    seen = np.concatenate(batches)
    close(norm.mean, seen.mean(0), 1e-9)
    close(norm.var, seen.var(0), 1e-9)
    close(norm(torch.from_numpy(seen)), (seen - seen.mean(0)) / seen.std(0), 1e-5)
    assert norm(torch.full((1, 3), 1e6)).tolist() == [[10, 10, 10]]


def test_replay_buffer_overwrites_the_oldest_and_keeps_rows_together():
    buffer = sac.ReplayBuffer(5, 1, 1)
    for numbers, kept in ([0, 1, 2], {0, 1, 2}), ([3, 4, 5, 6], {2, 3, 4, 5, 6}):
        buffer.add(torch.tensor(numbers).float()[:, None] + 10 * torch.arange(5))
        sample = [column.flatten() for column in buffer.sample(500)]
        assert len(buffer) == len(kept) and set(sample[0].tolist()) == kept
        assert all(torch.equal(sample[column], sample[0] + 10 * column) for column in range(5))
    with pytest.raises(ValueError, match="buffer_size"):
        buffer.add(torch.zeros(6, 5))


def test_pink_noise_is_gaussian_of_variance_1_and_its_power_falls_as_one_over_frequency():
    noise = sac.pink_noise(np.random.default_rng(0), (100, 400, 17))
    assert np.allclose((noise**2).mean((1, 2)), 1, atol=0.05)  # at every step
    assert abs((noise**4).mean() - 3) < 0.05  # a Gaussian's fourth moment
    power = (np.abs(np.fft.rfft(noise, axis=0)) ** 2).mean((1, 2))[1:-1]  # at 1, 2, ... periods
    assert np.allclose(power * np.arange(1, 50) / power[0], 1, atol=0.1)
    for steps in 1, 2, 3, 7:
        noise = sac.pink_noise(np.random.default_rng(1), (steps, 4000, 2))
        assert abs((noise**2).mean() - 1) < 0.05


# --------------------------------------------------------------------------------------------------
# Equations: EPIC, and AUC


def reference_epic(one, other, gamma):
    """Definition 2 by enumeration: an expectation is an average over all triples (S, A, S')."""
    n, m, _ = one.shape
    triples = list(itertools.product(range(n), range(m), range(n)))

    def shaped(r):
        values = []
        for s, a, s2 in triples:
            inner = [
                gamma * r[s2, A, S2] - r[s, A, S2] - gamma * r[S, A, S2] for S, A, S2 in triples
            ]
            values.append(r[s, a, s2] + sum(inner) / len(inner))
        return values

    rho = np.corrcoef(shaped(one), shaped(other))[0, 1]
    return np.sqrt(1 - rho) / np.sqrt(2)


@pytest.mark.parametrize("gamma", [0.5, 0.95, 1])
def test_epic_distance_is_definition_2_and_ignores_scale_shift_and_shaping(gamma):
    rng = np.random.default_rng(0)
    reward, other = rng.standard_normal((2, 5, 3, 5))
    distance = reference_epic(reward, other, gamma)
    close(vlmrm.epic_distance(reward, other, gamma), distance, 1e-9)
    potential = 3 * rng.standard_normal(5)
    shaping = gamma * potential - potential[:, None, None]  # gamma phi(s') - phi(s)
    close(vlmrm.epic_distance(4 * reward + 7 + shaping, other, gamma), distance, 1e-9)
    close(vlmrm.epic_distance(reward, reward + shaping, gamma), 0, 1e-9)
    close(vlmrm.epic_distance(reward, -0.5 * reward + shaping, gamma), 1, 1e-9)


def test_lemma_1_rewards_of_the_next_state_alone_need_no_shaping():
    rng = np.random.default_rng(3)
    clip, goal = rng.standard_normal(8), np.arange(8) < 3
    as_tables = (np.broadcast_to(reward, (8, 4, 8)).astype(float) for reward in (clip, goal))
    expected = np.sqrt(1 - np.corrcoef(clip, goal)[0, 1]) / np.sqrt(2)
    close([vlmrm.epic_distance(*as_tables), vlmrm.epic_distance(clip, goal)], [expected] * 2, 1e-9)


SHAPES = st.sampled_from([(1,), (7,), (7,), (3, 2, 3), (3, 2, 3), (2, 1, 2), (0,), (2, 3)])
NUMBERS = st.floats(-1e6, 1e6) | st.floats()


@anything
@hypothesis.given(*[npst.arrays(np.float64, SHAPES, elements=NUMBERS) for _ in range(2)])
@hypothesis.example(np.arange(5.0), np.arange(6.0))
@hypothesis.example(np.ones(5), np.arange(5.0))
def test_epic_distance_lies_between_0_and_1_or_is_refused(a, b):
    try:
        distance = vlmrm.epic_distance(a, b)
    except ValueError as error:
        assert any(reason in str(error) for reason in ("shapes", "constant", "empty"))
    else:
        assert a.shape == b.shape and np.isfinite([a, b]).all() and np.ptp(a) > 0 < np.ptp(b)
        assert 0 <= distance <= 1 + 1e-9
        close(distance, vlmrm.epic_distance(b, a), 1e-9)


@anything
@hypothesis.given(
    npst.arrays(float, st.integers(0, 9), elements=st.floats() | st.sampled_from([0.0, 1.0])),
    npst.arrays(bool, st.integers(0, 9)),
)
def test_auc_is_the_chance_that_a_goal_state_scores_higher(reward, goal):
    try:
        chance = vlmrm.auc(reward, goal)
    except ValueError:
        assert reward.shape != goal.shape or np.isnan(reward).any()
    else:
        pairs = [(a > b) + (a == b) / 2 for a in reward[goal] for b in reward[~goal]]
        close(chance, np.mean(pairs) if pairs else np.nan, 1e-12)


# --------------------------------------------------------------------------------------------------
# CLIP: models of four kinds with random weights, saved as folders: all of a downloaded model but
# its knowledge


def architecture(kind):
    shortest = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    shortest["resize_mode"] = "shortest"
    if kind == "ViT-B-32":
        return open_clip.get_model_config(kind), shortest
    if kind == "CoCa":  # made small
        config = open_clip.get_model_config("coca_ViT-B-32") | dict(embed_dim=64)
        for part in "vision_cfg", "text_cfg", "multimodal_cfg":
            config[part].update(width=64, layers=2)
        config["text_cfg"]["heads"] = config["multimodal_cfg"]["heads"] = 2
        return config, shortest
    mode = "squash" if kind == "SigLIP" else "longest"
    preprocess = dict(mean=[0.5] * 3, std=[0.5] * 3, resize_mode=mode)
    if kind == "padding":
        settings = json.loads((ROOT / "tinyclip/open_clip_config.json").read_text())
        return settings["model_cfg"], preprocess
    config = open_clip.get_model_config("ViT-B-16-SigLIP") | dict(embed_dim=192)  # made small
    config["vision_cfg"]["timm_model_name"] = "vit_tiny_patch16_224"
    config["text_cfg"].update(width=192, heads=3, layers=2)
    config["text_cfg"].pop("hf_tokenizer_name")  # a download; open_clip's own has
    config["text_cfg"]["vocab_size"] = 49408
    return config, preprocess


def save_random(kind, folder):
    config, preprocess = architecture(kind)
    settings = dict(model_cfg=config, preprocess_cfg=preprocess | dict(interpolation="bicubic"))
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config.pop("custom_text", None)
    kinds = dict(CoCa=open_clip.CoCa, SigLIP=open_clip.CustomTextCLIP)
    model = kinds.get(kind, open_clip.CLIP)(**config)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module", params=["ViT-B-32", "SigLIP", "CoCa", "padding"])
def saved(request, tmp_path_factory):
    """A model's name, and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    name = save_random(request.param, folder)
    yield name, vlmrm.CLIP(name)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def clip():
    return vlmrm.CLIP()


@functools.cache
def frames(height, width, count=3):
    env, result = vlmrm.Humanoid(vlmrm.Scene((height, width))), []
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(count):
        for _ in range(20):
            env.step(env.action_space.sample())
        result.append(env.render())
    return np.stack(result)


def test_preprocessing_agrees_with_open_clips_own_for_frames_of_any_size(saved):
    """The largest differences measured, in normalised units and fp32: 0 for frames of the model's
    own size; for others 0.015 with "shortest" (std 0.26), 0.008 with "squash" and "longest"
    (std 0.5): one grey level, Pillow's rounding."""
    (_, clip), theirs = saved, open_clip.create_model_and_transforms(saved[0])[2]
    for size in (224, 224), (96, 96), (480, 480), (320, 480), (240, 427), (97, 131):
        expected = torch.stack([theirs(Image.fromarray(frame)) for frame in frames(*size)])
        worst = ((clip.preprocess(frames(*size)) - expected).abs() * clip.std).max() * 255
        assert worst <= (1e-4 if size == clip.size else 1.01), f"{size}: {worst:.1f} grey levels"


def test_image_embeddings_are_unit_vectors_whatever_the_batch(saved):
    clip, images = saved[1], frames(224, 224, 5)
    together = clip.embed_images(images)
    close(together.norm(dim=1), np.ones(5), 1e-5)
    close(clip.embed_images(images, batch_size=2), together, 1e-5)
    close(clip.embed_images(torch.from_numpy(images[3:4])), together[3:4], 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rewards_in_half_precision_are_close_to_those_in_fp32(saved, precision):
    name, full = saved
    half = vlmrm.CLIP(name, precision=precision)
    for alpha in 0, 0.5:
        ours, expected = (
            vlmrm.VLMReward(model, KNEELING, BASELINE, alpha)(frames(224, 224))
            for model in (half, full)
        )
        assert ours.dtype == np.float32
        close(ours, expected, 2e-2)


def test_embedded_model_is_an_ordinary_local_dir_of_at_most_6_million_bytes(clip):
    folder = ROOT / "tinyclip"
    settings = json.loads((folder / "open_clip_config.json").read_text())
    assert set(settings) == {"model_cfg", "preprocess_cfg"}
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = torch.stack([preprocess(Image.fromarray(frame)) for frame in frames(*clip.size)])
    with torch.inference_mode():
        expected = model.eval().encode_image(images, normalize=True)
    close(clip.embed_images(frames(*clip.size)), expected, 1e-5)
    names = "open_clip_config.json", "open_clip_model.safetensors"
    assert sum((folder / name).stat().st_size for name in names) <= 6_000_000


def test_several_prompts_are_averaged_and_any_script_is_read(clip):
    pair = [KNEELING, "a robot on its knees"]
    one, two = (clip.embed_text(prompt) for prompt in pair)
    both = clip.embed_text(pair)
    close(both, (one + two) / (one + two).norm(), 1e-6)
    reward = vlmrm.VLMReward(clip, pair, "a robot", alpha=0.3)
    state = clip.embed_images(frames(96, 96))
    expected = reference_reward(state, both, clip.embed_text("a robot"), 0.3)
    close(reward(frames(96, 96)), expected, 1e-6)
    for prompt in (
        "ein kniender Roboter",
        "跪着的人形机器人",
        "إنسان آلي راكع",
        "🤖🧎",
        "now!\nNow\t.",
    ):
        close(clip.embed_text(prompt).norm(), 1, 1e-5)


def test_a_prompt_that_just_fits_is_read_and_others_are_refused(clip):
    words = clip.tokenizer(["robot"]).shape[1] - 2  # besides the start and the end
    clip.embed_text(" ".join(["robot"] * words))
    for count in words + 1, 10 * words:
        with pytest.raises(ValueError, match="tokens"):
            clip.embed_text(" ".join(["robot"] * count))
    for prompts in "", "  ", [], [None], [KNEELING, 3], [b"kneeling"], [""]:
        with pytest.raises(ValueError, match="write a sentence"):
            clip.embed_text(prompts)


def test_frames_of_another_kind_are_refused(clip):
    floats = np.zeros((2, 8, 8, 3)), np.full((2, 8, 8, 3), np.nan), torch.zeros(2, 8, 8, 3)
    shapes = (8, 8, 3), (2, 8, 8, 1), (2, 8, 8, 4), (0, 8, 8, 3), (2, 0, 8, 3)
    for images in *floats, [[0, 1], [2, 3]], None, *(np.zeros(shape, np.uint8) for shape in shapes):
        with pytest.raises(ValueError, match="uint8"):
            clip.embed_images(images)


def test_towers_of_different_width_and_a_model_of_nans_are_refused_at_once(clip, monkeypatch):
    wide = clip.embed_images
    monkeypatch.setattr(clip, "embed_images", lambda frames: wide(frames)[:, :32])
    with pytest.raises(ValueError, match=r"\(1, 32\), \(64,\)"):
        vlmrm.VLMReward(clip, KNEELING, BASELINE)
    monkeypatch.setattr(clip, "embed_images", lambda frames: wide(frames) * np.nan)
    with pytest.raises(ValueError, match="NaN"):
        vlmrm.VLMReward(clip, KNEELING, BASELINE)


@pytest.mark.parametrize(
    "tag, activation", [("laion2b_s34b_b79k", nn.GELU), ("openai", open_clip.model.QuickGELU)]
)
def test_a_model_gets_the_activation_function_of_its_weights(tag, activation, monkeypatch):
    build = open_clip.create_model

    def without_weights(name, tag, require_pretrained, **settings):
        return build(name, **settings)

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    modules = vlmrm.CLIP(f"ViT-B-32/{tag}").model.modules()
    assert {type(m) for m in modules if "GELU" in type(m).__name__} == {activation}


# --------------------------------------------------------------------------------------------------
# CLIP: the way from the hub, with a server here in its place


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as open_clip's client asks for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        asked = re.fullmatch("/[^/]+/[^/]+/resolve/[^/]+/(.+)", self.path)
        data = self.server.files.get(asked and asked[1])
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "GET" and self.server.cut:
            self.wfile.write(data[first : (first + len(data)) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data[first:])

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.cut = {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(name, server, home):
    """A model's embedding of a text, fetched by a new process, or an error; and the progress."""
    code = (
        "import sys, vlmrm\ntry: print(vlmrm.CLIP(sys.argv[1]).embed_text('a dog').tolist())\n"
        "except ValueError as error: print(f'error: {error}')"
    )
    address = f"http://127.0.0.1:{server.server_address[1]}"
    settings = dict(HF_ENDPOINT=address, HF_HOME=str(home), TQDM_POSITION="-1")  # draws its bar
    process = run_alone(ROOT, code, name, **settings)
    return process.stdout.strip(), process.stderr


def test_weights_come_from_the_hub_once_and_a_cut_download_goes_on(hub, tmp_path):
    torch.manual_seed(0)
    model, name = open_clip.create_model("ViT-B-32"), "ViT-B-32/laion2b_s34b_b79k"
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    hub.files["open_clip_model.safetensors"] = safetensors.torch.save(weights)
    hub.cut = True
    said, _ = load(name, hub, tmp_path)
    assert said.startswith(f"error: cannot load {name}") and "if you try again" in said
    hub.cut = False
    embedding, progress = load(name, hub, tmp_path)
    assert "open_clip_model.safetensors: " in progress and "100%" in progress
    model.load_state_dict(weights)
    with torch.no_grad():
        expected = model.eval().encode_text(open_clip.get_tokenizer("ViT-B-32")(["a dog"]))
    close(json.loads(embedding), nn.functional.normalize(expected)[0], 1e-5)
    hub.server_close()  # without a network, from the cache
    hub.shutdown()
    assert load(name, hub, tmp_path)[0] == embedding


def test_any_repository_of_the_hub_that_holds_an_open_clip_model_loads(hub, tmp_path, clip):
    for file in (ROOT / "tinyclip").glob("open_clip_*"):
        hub.files[file.name] = file.read_bytes()
    embedding, _ = load("hf-hub:someone/tinyclip", hub, tmp_path)
    close(json.loads(embedding), clip.embed_text("a dog"), 1e-6)


# --------------------------------------------------------------------------------------------------
# The scene


def test_physics_is_gymnasiums_to_the_last_bit_and_drawing_and_judging_do_not_change_it():
    theirs = gymnasium.make("Humanoid-v5", terminate_when_unhealthy=False)
    plain, ours = (
        vlmrm.make_envs(vlmrm.Scene(), condition, count=1) for condition in (None, vlmrm.kneeling)
    )
    np.testing.assert_array_equal(ours.reset(seed=7)[0][0], theirs.reset(seed=7)[0])
    plain.reset(seed=7)
    theirs.action_space.seed(0)
    for _ in range(50):
        action = theirs.action_space.sample()
        ours.render()
        obs, reward, *_ = ours.step(action[None])
        np.testing.assert_array_equal(obs[0], theirs.step(action)[0])
        assert plain.step(action[None])[1] == reward


def test_episodes_never_terminate_and_truncate_at_step_100():
    envs = vlmrm.make_envs(vlmrm.Scene(), vlmrm.kneeling, count=2)
    envs.reset(seed=0)
    for step in range(1, 101):
        _, _, terminated, truncated, info = envs.step(np.full((2, 17), -0.4))
        assert not terminated.any() and truncated.tolist() == [step == 100] * 2
        assert info["success"].dtype == bool
    assert envs.envs[0].unwrapped.data.qpos[2] < 0.7  # although it has long fallen


def picture(scene, x=0.0, y=0.0, z=1.4):
    data = mujoco.MjData(scene.model)
    data.qpos[:3] = x, y, z
    return scene.render(data).astype(int)


def centre(scene, x=0.0, y=0.0, z=1.4):
    """(row, column) of the robot: the mean of the pixels that change when it is out of sight."""
    return np.argwhere((picture(scene, x, y, z) != picture(scene, x, y, 100)).any(-1)).mean(0)


@pytest.mark.parametrize("size", [(96, 96), (224, 224), (64, 120)])
def test_frames_are_uint8_of_the_size_asked_for_and_repeat_exactly(size):
    scene, data = vlmrm.Scene(size), mujoco.MjData(vlmrm.Scene(size).model)
    first = scene.render(data).copy()
    assert first.dtype == np.uint8 and first.shape == (*size, 3) and first.std() > 10
    for another in scene, vlmrm.Scene(size):
        np.testing.assert_array_equal(another.render(data), first)


def test_camera_shows_height_and_follows_the_robot_over_the_floor_in_both_looks():
    ours, original = (vlmrm.Scene((96, 96), look) for look in ("realistic", "original"))
    for scene in ours, original:
        assert centre(scene, z=1.0)[0] > centre(scene)[0] + 5  # 0.4 m lower is lower
        close(centre(scene, x=1.5, y=-0.7), centre(scene), 1)
    assert np.abs(picture(ours) - picture(original)).mean() > 10


# --------------------------------------------------------------------------------------------------
# The tasks: poses placed by hand. In degrees; a joint named without a side is both sides'.

POSES = """
stand = knee -2, on_heels = hip_y -60 knee -150, kneel = knee -90, kneel_low = hip_y -15 knee -110,
one_knee = left_knee -90 right_hip_y -90 right_knee -90,
one_leg = knee -2 right_hip_y -60 right_knee -80, leg_back = knee -2 right_hip_y 5 right_knee -110,
crouch = hip_y -40 knee -80, squat = hip_y -95 knee -125 abdomen_y -30 pitch 15,
all_fours = hip_y -90 knee -90 abdomen_y 10 pitch 85, lying = knee -2 pitch 88,
lotus = hip_x -5 hip_z -55 hip_y -60 knee -155, sit = hip_y -85 knee -5,
lotus_too = hip_x -15 hip_z -55 hip_y -85 knee -155 pitch 15 abdomen_y 20,
splits = hip_x -25 hip_z -60 hip_y -80 knee -2, straddle = hip_x -15 hip_z -35 hip_y -85 knee -5,
front_splits = pitch 5 abdomen_y 30 abdomen_x 20 left_hip_x -25 left_hip_z 30 left_hip_y 20
    left_knee -10 right_hip_x -25 right_hip_z -30 right_hip_y -110,
in_air = lift 0.3, tipped = pitch 60, leaning = pitch 10, twisted = abdomen_z 30,
twisted_more = abdomen_z 40, bent = right_knee -20, bent_more = right_knee -60,
unfolded = right_hip_z 0
"""
POSES = dict(line.split(" = ") for line in " ".join(POSES.split()).split(", "))
ARMS = dict(raised=(-75, -5, -30), on_hips=(45, -55, -30), crossed=(55, 35, -80))
ARMS |= dict(hanging=(45, -35, -80), aside=(-55, -55, -50), forward=(5, -5, 0), down=(25, -45, -85))
ARMS |= dict(on_chest=(55, -65, 40), at_head=(-40, 10, 40), behind=(60, -85, -60))
for arms, (one, two, elbow) in ARMS.items():  # shoulder1, shoulder2, elbow of the right arm
    right = f"right_shoulder1 {one} right_shoulder2 {two} right_elbow {elbow}"
    left = f"left_shoulder1 {-one} left_shoulder2 {-two} left_elbow {elbow}"
    POSES |= {arms: f"{right} {left}", f"left_{arms}": left}
SCENE = vlmrm.Scene()


def place(pose):
    """The simulator's state with the robot in a pose, such as "kneel+raised", on the floor."""
    model, data = SCENE.model, mujoco.MjData(SCENE.model)
    words = " ".join(POSES[part] for part in pose.split("+")).split()
    angles = dict(pitch=0, lift=0) | dict(zip(words[::2], map(float, words[1::2])))
    pitch, lift = np.deg2rad(angles.pop("pitch")), angles.pop("lift")
    for name, angle in angles.items():
        sides = [f"left_{name}", f"right_{name}"]
        for joint in [name] if name.startswith(("left", "right", "abdomen")) else sides:
            low, high = model.joint(joint).range
            assert low - 1e-6 <= np.deg2rad(angle) <= high + 1e-6, joint
            data.joint(joint).qpos[0] = np.deg2rad(angle)
    data.qpos[3:7] = np.cos(pitch / 2), 0, np.sin(pitch / 2), 0
    mujoco.mj_kinematics(model, data)
    capsule = model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
    half_length = np.where(capsule, model.geom_size[:, 1], 0) * np.abs(data.geom_xmat[:, 8])
    lowest = data.geom_xpos[:, 2] - model.geom_size[:, 0] - half_length
    data.qpos[2] += lift - lowest[1:].min()  # geom 0 is the floor
    return data


GOALS_AND_NEAR_MISSES = """
kneeling: kneel on_heels kneel_low kneel+raised
    | one_knee squat kneel+in_air kneel+tipped all_fours lotus stand sit lying
lotus: lotus lotus_too lotus+raised
    | lotus+unfolded lotus+in_air lotus+tipped kneel on_heels sit splits
standing: stand stand+raised stand+hanging stand+leaning
    | stand+in_air stand+tipped one_leg leg_back crouch squat kneel lying
arms-raised: stand+raised
    | stand+hanging+left_raised stand+aside stand+forward stand+hanging kneel+raised one_leg+raised
splits: splits splits+raised
    | splits+bent_more splits+in_air splits+tipped straddle sit lotus kneel
hands-on-hips: stand+on_hips
    | stand+on_chest stand+hanging stand+down stand+crossed stand+aside kneel+on_hips
one-leg: one_leg leg_back one_leg+raised
    | stand stand+bent one_leg+in_air one_leg+tipped one_knee kneel squat
arms-crossed: stand+crossed stand+crossed+twisted_more
    | stand+forward stand+on_chest stand+hanging stand+on_hips stand+raised kneel+crossed
kneeling-arms-raised: kneel+raised | kneel+hanging+left_raised kneel stand+raised lotus+raised
kneeling-hands-on-hips: kneel+on_hips | kneel+hanging kneel stand+on_hips lotus+on_hips
splits-arms-raised: splits+raised | splits+hanging+left_raised splits straddle+raised
splits-arms-crossed: splits+crossed | splits+on_chest splits+forward straddle+crossed
lotus-arms-raised: lotus+raised | lotus+aside lotus sit+raised
squatting-arms-crossed: squat+crossed
    | squat+on_chest squat+forward squat crouch+crossed stand+crossed kneel+crossed
kneeling-one-arm-raised: kneel+hanging+left_raised kneel+down+left_raised
    | kneel+raised kneel+hanging kneel stand+hanging+left_raised
arms-out: stand+aside
    | stand+raised stand+forward stand+down stand+left_aside stand+on_hips squat+aside
sitting: sit sit+raised
    | straddle splits lotus on_heels sit+bent_more sit+tipped sit+in_air squat
squatting: squat squat+raised squat+crossed
    | crouch kneel one_knee sit all_fours squat+tipped squat+in_air
"""
CASES = dict(case.split(":") for case in re.split(r"\n(?=\w)", GOALS_AND_NEAR_MISSES.strip()))


@pytest.mark.parametrize("task", vlmrm.JUDGED)
def test_success_condition_accepts_the_goal_and_refuses_near_misses(task):
    goals, near_misses = (poses.split() for poses in CASES[task].split("|"))
    condition, accepted = vlmrm.JUDGED[task][1], []
    for pose in goals + near_misses:
        if vlmrm.holds(condition, vlmrm.measure(SCENE.model, place(pose))):
            accepted.append(pose)
    assert accepted == goals


def test_a_pose_is_the_same_wherever_the_robot_stands_and_faces():
    data = place("one_leg+crossed+leaning")
    here, before = vlmrm.measure(SCENE.model, data), data.qpos[3:7].copy()
    data.qpos[:2] += 3, -2
    turn = np.array([np.cos(1), 0, 0, np.sin(1)])  # by 2 radians
    mujoco.mju_mulQuat(data.qpos[3:7], turn, before)
    for one, other in zip(here, vlmrm.measure(SCENE.model, data)):
        close(one, other, 1e-9)


def test_a_near_miss_meets_all_parts_of_a_condition_but_one():
    states = [place(pose).qpos.copy() for pose in ("stand+raised", "stand+down", "kneel")]
    pose = vlmrm.measure_states(SCENE.model, states)
    _, arms_raised = vlmrm.TASKS["arms-raised"]
    parts = [[True, True, False], [True, False, False]]
    np.testing.assert_array_equal(list(arms_raised(pose).values()), parts)
    np.testing.assert_array_equal(vlmrm.holds(arms_raised, pose), [True, False, False])


def test_success_rates_by_both_rules():
    half, held, neither, almost_held = np.zeros((4, 100))
    half[:50], held[80:], neither[51:99], almost_held[81:] = 1, 1, 1, 1
    episodes = np.stack([half, held, neither, almost_held])
    assert vlmrm.success_rates(episodes) == (0.25, 0.25)
    assert vlmrm.success_rates(np.ones((3, 100))) == (1, 1)
    assert vlmrm.success_rates([[1] * 20]) == (1, 1)  # a list will do
    assert np.isnan(vlmrm.success_rates(np.full((3, 100), np.nan))).all()


# --------------------------------------------------------------------------------------------------
# Training, on a small task that is seen only through frames


class Point(gymnasium.Env):
    """A point in a square. Only its picture is rewarded: the nearer to the middle, the better."""

    metadata, render_mode = dict(render_modes=["rgb_array"]), "rgb_array"
    observation_space, action_space, ends = box(2), box(2, -0.3, 0.1), False
    reward = -1.0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.place, {}

    def step(self, action):
        self.place = np.clip(self.place + action, -1, 1).astype(np.float32)
        return self.place, self.reward, self.ends, False, {}

    def render(self):
        frame = np.zeros((41, 41, 3), np.uint8)
        frame[tuple(np.rint(20 * (self.place + 1)).astype(int))] = 255
        return frame


def nearness(images):
    row, column = np.divmod(images[..., 0].reshape(len(images), -1).argmax(1), 41)
    return 1 - np.hypot(row - 20, column - 20) / 20


def points(steps=20, env=Point, count=8):
    def make_one():
        return gymnasium.wrappers.TimeLimit(env(), steps)

    return SyncVectorEnv([make_one] * count, autoreset_mode=AutoresetMode.DISABLED)


def point_agent(**settings):
    envs = points()
    return sac.SAC(envs.single_observation_space, envs.single_action_space, sac.Config(**settings))


def test_rollout_labels_the_frame_after_the_action_and_does_not_call_truncation_an_end():
    envs, rng = points(steps=3), np.random.default_rng(0)
    played = sac.rollout(envs, lambda obs: rng.uniform(-1, 1, obs.shape), 8, nearness, seed=0)
    obs, action, reward, next_obs, terminated, success = played
    close(next_obs, np.clip(obs - 0.1 + 0.2 * action, -1, 1), 1e-6)  # also at an episode's end
    close(reward, 1 - np.linalg.norm(next_obs, axis=-1), 0.036)  # to half of a pixel's diagonal
    assert np.abs(reward - (1 - np.linalg.norm(obs, axis=-1))).max() > 0.1
    assert not terminated.any() and np.isnan(success).all()
    goes_on = (obs[1:] == next_obs[:-1]).all(-1)  # a new episode each 3 steps
    assert goes_on.all(1).tolist() == goes_on.any(1).tolist() == [1, 1, 0, 1, 1, 0, 1]
    np.testing.assert_array_equal(obs[0], envs.reset(seed=0)[0])
    envs = points(env=type("Ending", (Point,), dict(ends=True)))  # a real end is reported
    ended = sac.rollout(envs, np.zeros_like, 2, None, seed=0)
    assert ended.terminated.all() and (ended.obs[1] != ended.next_obs[0]).any(-1).all()


USUAL = dict(learning_starts=800, round_steps=20, batch_size=128, gamma=0.9, hidden=64, seed=3)
USUAL |= dict(learning_rate=1e-3, actor_tau=0.01, eval_every=800)


def learn(steps, reward_fn=nearness, count=8, player=None, **settings):
    """With fewer updates than usual. Several processes share it."""
    agent = point_agent(steps=steps, **USUAL | settings)
    player = player or sac.Player(*share(agent, points(count=count), reward_fn), agent.config)
    return agent, list(sac.train(agent, player))


def test_sac_solves_a_task_that_it_sees_only_through_frames():
    agent, rows = learn(12_000)

    def straight_to_the_middle(obs):
        return (np.clip(-obs, -0.3, 0.1) + 0.1) / 0.2  # -0.3..0.1 to -1..1

    best, learned = (
        sac.evaluate(points(), act, nearness, 64, 50_000, 20).reward.mean()
        for act in (straight_to_the_middle, agent.deterministic_action)
    )
    assert learned > best - 0.02 and rows[0]["reward"] < best - 0.3


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_exploration_noise_is_pink_for_a_share_of_the_run_and_then_white(share, monkeypatch):
    def act(agent, obs, noise):
        seen.append(noise.numpy())
        return np.zeros(noise.shape)

    seen = []
    monkeypatch.setattr(sac.SAC, "act", act)
    rows = learn(1280, pink=share)[1]
    assert not np.array_equal(seen[0], seen[20])
    noise = np.stack(seen).reshape(len(rows), 20, 8, 2)  # rounds, steps, environments, actions
    correlation = (noise[:, 1:] * noise[:, :-1]).mean((1, 2, 3))
    pink = round(len(rows) * share)
    assert (correlation[:pink] > 0.3).all() and (abs(correlation[pink:]) < 0.3).all()


def test_one_seed_gives_one_run():
    (one, rows), (two, same_rows) = learn(1_600), learn(1_600)
    np.testing.assert_equal(rows, same_rows)
    same(one.state_dict(), two.state_dict())
    assert rows[-1]["critic_loss"] != learn(1_600, seed=4)[1][-1]["critic_loss"]


@pytest.mark.parametrize("trend", [1, -1])
def test_checkpoint_that_is_kept_is_the_one_with_the_best_eval_reward(trend):
    class Remembering(sac.Player):
        def play(self, policy, *rest):
            results = super().play(policy, *rest)
            if results[1]:
                evaluated.append((results[1].reward.mean(), copy.deepcopy(policy)))
            return results

    clock, evaluated = itertools.count(), []
    config = sac.Config(steps=2_400, **USUAL)
    reward_fn = lambda images: np.full(len(images), trend * next(clock))  # noqa: E731
    agent, rows = learn(2_400, player=Remembering(points(), reward_fn, config))
    best = [bool(row.get("best")) for row in rows if "eval_reward" in row]
    assert best == [True, trend == 1, trend == 1] and len(evaluated) == 3
    same(agent.state_dict(), max(evaluated, key=lambda pair: pair[0])[1])


@pytest.mark.parametrize(("workers", "label_here"), [(1, False), (2, False), (2, True)])
def test_workers_play_what_this_process_would(workers, label_here):
    config = sac.Config(steps=1_600, **USUAL)
    player = Workers(functools.partial(points, 20), 8, nearness, config, workers, label_here)
    processes = [process for _, _, process in player.workers]
    try:
        next(sac.train(point_agent(steps=1_600, **USUAL), player))  # and is broken off
        agent, rows = learn(1_600, player=player)
    finally:
        player.close()
    assert len(processes) == workers and not any(process.is_alive() for process in processes)
    alone, same_rows = learn(1_600)
    np.testing.assert_equal(rows, same_rows)
    same(agent.state_dict(), alone.state_dict())


def test_a_player_forgets_a_training_that_was_broken_off():
    player = sac.Player(points(), nearness, sac.Config(steps=1_600, **USUAL))
    next(sac.train(point_agent(steps=1_600, **USUAL), player))
    (agent, rows), (alone, same_rows) = learn(1_600, player=player), learn(1_600)
    np.testing.assert_equal(rows, same_rows)
    same(agent.state_dict(), alone.state_dict())


def test_a_worker_that_ends_is_reported_and_what_cannot_be_sent_refused():
    config = sac.Config(steps=1_600, **USUAL)
    with pytest.raises(ValueError, match="cannot be sent"):
        Workers(lambda count: points(), 8, nearness, config, 1, False)
    for workers in 3, 16:
        with pytest.raises(ValueError, match="equal shares"):
            Workers(functools.partial(points, 20), 8, nearness, config, workers, False)
    player = Workers(functools.partial(points, 20), 8, nearness, config, 1, False)
    player.workers[0][2].kill()
    with pytest.raises(ValueError, match="--workers 0"):
        learn(1_600, player=player)
    player.close()


def test_the_pendulum_of_sac_py_runs(monkeypatch, capsys):
    whole = sac.Config
    monkeypatch.setattr(sac, "Config", lambda **rest: whole(**rest | dict(steps=6_400)))
    sac.main()
    first, last, judged = capsys.readouterr().out.splitlines()
    assert first.startswith("  4800 steps") and last.startswith("  6400 steps")
    assert all(-2000 < float(line.split()[-1]) < 0 for line in (first, last, judged))


# --------------------------------------------------------------------------------------------------
# Elsewhere: wrappers for other people's environments and algorithms


def pendulum():
    settings = dict(render_mode="rgb_array", width=64, height=64)
    return gymnasium.make("InvertedPendulum-v5", **settings)


def brightness(images):
    assert images.dtype == np.uint8 and images.ndim == 4
    return images.mean((1, 2, 3)) / 255


def test_wrapper_passes_gymnasiums_checker_and_rewards_the_frame_after_the_step():
    check_env(vlmrm.VLMRewardWrapper(pendulum(), brightness), skip_render_check=True)
    env, plain = vlmrm.VLMRewardWrapper(pendulum(), brightness), pendulum()
    env.reset(seed=0), plain.reset(seed=0)
    for action in np.full((5, 1), 0.5, np.float32):
        obs, reward, *ends, info = env.step(action)
        same_obs, own, *same_ends, _ = plain.step(action)
        np.testing.assert_array_equal(obs, same_obs)
        assert ends == same_ends and info["env_reward"] == own
        assert reward == brightness(plain.render()[None])[0]


@pytest.mark.parametrize("mode", ["NEXT_STEP", "DISABLED"])
def test_vector_wrapper_rewards_as_the_single_one_does_and_a_mere_reset_by_nothing(mode):
    vector = SyncVectorEnv([pendulum] * 3, autoreset_mode=AutoresetMode[mode])
    envs = vlmrm.VLMRewardVectorWrapper(vector, brightness)
    single, ended = vlmrm.VLMRewardWrapper(pendulum(), brightness), False
    envs.reset(seed=0), single.reset(seed=0)
    for _ in range(40):
        obs, reward, terminated, _, info = envs.step(np.full((3, 1), 0.5, np.float32))
        if ended:
            assert mode == "NEXT_STEP" and reward[0] == 0
            break
        same_obs, same_reward, ended, *_ = single.step(np.full(1, 0.5, np.float32))
        np.testing.assert_array_equal(obs[0], same_obs)
        assert reward.shape == info["env_reward"].shape == (3,) and reward[0] == same_reward
        assert terminated[0] == ended
        if ended and mode == "DISABLED":
            break
    assert ended


@pytest.mark.parametrize("reward", [np.nan, np.inf, [0.5], [[1, 2]]])
def test_rewards_that_are_not_one_number_a_frame_are_refused(reward):
    def reward_fn(images):
        return np.array([reward] * len(images), dtype=float)

    with pytest.raises(ValueError, match="number each"):
        learn(160, reward_fn, learning_starts=160)
    vector = vlmrm.VLMRewardVectorWrapper(SyncVectorEnv([pendulum]), reward_fn)
    for env in vlmrm.VLMRewardWrapper(pendulum(), reward_fn), vector:
        env.reset(seed=0)
        with pytest.raises(ValueError, match="number each"):
            env.step(env.action_space.sample())


def test_rewards_of_an_environment_that_are_nan_are_refused_in_training_and_evaluation():
    envs = points(env=type("Broken", (Point,), dict(reward=np.nan)))
    act = lambda obs: np.zeros((len(obs), 2), np.float32)  # noqa: E731
    with pytest.raises(ValueError, match="NaN"):
        sac.rollout(envs, act, 5, None, 0)
    with pytest.raises(ValueError, match="NaN"):
        sac.evaluate(envs, act, None, 8, 0, 5)
    assert sac.rollout(envs, act, 5, nearness, 0).reward.max() <= 1  # there they do not count


def test_stable_baselines3_learns_from_a_clip_reward(clip):
    reward_fn = vlmrm.VLMReward(clip, "a pole standing upright", "a pole")
    env = vlmrm.VLMRewardWrapper(pendulum(), reward_fn)
    env.reset(seed=0)
    _, reward, *_ = env.step(np.zeros(1, np.float32))
    close(reward, env.reward_fn(env.render()[None].copy())[0], 1e-6)
    model = stable_baselines3.SAC("MlpPolicy", env).learn(200)
    rewards = model.replay_buffer.rewards[:200]
    assert model.num_timesteps == 200 and np.abs(rewards).max() < 1.0001
    assert len(np.unique(rewards)) > 50


def test_mistakes_in_a_call_are_named():
    same_step = SyncVectorEnv([Point], autoreset_mode=AutoresetMode.SAME_STEP)
    tables = np.arange(8.0).reshape(2, 2, 2), np.ones((2, 2, 2))
    for mistake, word in (
        (lambda: sac.SAC(Discrete(3), box(2), sac.Config()), "Discrete"),
        (lambda: sac.SAC(Box(-1, 1, (2, 2)), box(2), sac.Config()), "one dimension"),
        (lambda: sac.Config(seed=10**20), "seed"),
        (lambda: sac.Config(seed=float("nan")), "seed"),
        (lambda: sac.Config(hidden=2.5), "whole number"),
        (lambda: sac.Player(same_step, None, sac.Config()), "DISABLED"),
        (lambda: vlmrm.CLIP(Path("tinyclip")), "name"),
        (lambda: vlmrm.CLIP(precision="fp64"), "fp64"),
        (lambda: vlmrm.Scene(look="Realistic"), "look"),
        (lambda: vlmrm.auc([0.5, "a"], [True, False]), "<U"),
        (lambda: vlmrm.success_rates([1, 0]), "episodes, steps"),
        (lambda: vlmrm.epic_distance(*tables, gamma=float("nan")), "gamma is nan"),
        (lambda: goal_states("Kneeling"), "kneeling, lotus"),
        (lambda: vlmrm.VLMRewardWrapper(gymnasium.make("CartPole-v1"), brightness), "rgb_array"),
        (lambda: vlmrm.VLMRewardVectorWrapper(same_step, brightness), "NEXT_STEP or DISABLED"),
        (lambda: learn(160, learning_starts=1, learning_rate=1e30), "learning_rate"),
        (lambda: learn(160, learning_starts=160, buffer_size=100), "buffer_size"),
    ):
        with pytest.raises(ValueError, match=word):
            mistake()
    shaped = (np.zeros(shape) for shape in [(0, 24), (24,), (3, 23), (2, 3, 24)])
    for states in *shaped, np.full((2, 24), np.nan):
        for function, first in (vlmrm.measure_states, SCENE.model), (vlmrm.render_states, SCENE):
            with pytest.raises(ValueError, match="states are"):
                function(first, states)
    assert sac.Config(steps=1e6, learning_rate=1).steps == 1_000_000  # a whole number too
    assert vlmrm.auc([0.2, 0.7], [False, True]) == 1  # lists will do


# --------------------------------------------------------------------------------------------------
# Copying: parts of the code in other places, where the rest is missing


def copy_sections(folder, *numbers):
    """Sections of vlmrm.py, as a module `copied` of their own."""
    sections = (ROOT / "vlmrm.py").read_text().split(RULER)
    heads = tuple(f"# {number}. " for number in numbers)
    text = "".join(RULER + section for section in sections if section.startswith(heads))
    (folder / "copied.py").write_text(text)


WITHOUT = """
import json, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if {missing}:
            raise ImportError(f"{{name}} is not there")
sys.meta_path.insert(0, Without())
from copied import *
"""


def test_section_1_needs_torch_alone(tmp_path):
    copy_sections(tmp_path, 1)
    missing = WITHOUT.format(missing="name.partition('.')[0] not in ('torch', 'copied')")
    code = (
        f"import torch\n{missing}torch.manual_seed(0)\nstate, goal, baseline = torch.randn(3, 4, 8)"
    )
    code += "\nprint(clip_reward(state, goal[0]).tolist())"
    code += "\nprint(goal_baseline_reward(state, goal[0], baseline[0], 0.5).tolist())"
    cosine, regularized = map(json.loads, run_alone(tmp_path, code).stdout.splitlines())
    torch.manual_seed(0)
    state, goal, baseline = torch.randn(3, 4, 8)
    close(cosine, vlmrm.clip_reward(state, goal[0]), 1e-6)
    close(regularized, reference_reward(state, goal[0], baseline[0], 0.5), 1e-6)


def test_sections_1_and_2_need_torch_open_clip_and_numpy(tmp_path, clip):
    copy_sections(tmp_path, 1, 2)
    np.save(tmp_path / "frames.npy", frames(96, 96))
    names = "vlmrm sac support evaluation tinyclip mujoco gymnasium matplotlib".split()
    code = WITHOUT.format(missing=f"name.partition('.')[0] in {names}")
    code += f"reward_fn = VLMReward(CLIP(sys.argv[1]), {KNEELING!r}, {BASELINE!r})\n"
    code += "print(json.dumps(reward_fn(np.load('frames.npy')).tolist()))"
    rewards = json.loads(run_alone(tmp_path, code, f"local-dir:{ROOT / 'tinyclip'}").stdout)
    close(rewards, vlmrm.VLMReward(clip, KNEELING, BASELINE)(frames(96, 96)), 1e-5)


def test_two_files_and_the_weights_are_enough_to_train(tmp_path):
    (tmp_path / "tinyclip").mkdir()
    weights = (ROOT / "tinyclip").glob("open_clip_*")
    for file in ROOT / "vlmrm.py", ROOT / "sac.py", *weights:
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    settings = "steps=640, learning_starts=320, updates_per_step=0.02, round_steps=20"
    code = f"import vlmrm\nfor row in vlmrm.train({KNEELING!r}, {settings}):\n    print(row)"
    first, last = run_alone(tmp_path, code).stdout.splitlines()
    assert "'steps': 320" in first and "'steps': 640" in last
    for key in "reward", "success", "eval_reward", "eval_success", "critic_loss":
        assert re.search(rf"'{key}': -?\d", last), last


# --------------------------------------------------------------------------------------------------
# The command line: two short trainings, and what they leave

SMALL = "--envs 4 --round-steps 20 --learning-starts 80 --updates-per-step 0.1 --hidden 64"
SMALL = f"{SMALL} --eval-episodes 4 --episodes 4 --device cpu --workers 0".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "kneeling-seed0"
    quick = "--learning-starts 1600 --updates-per-step 0.4 --batch-size 64 --learning-rate 1e-3"
    quick = f"{quick} --episodes 16 --seed 0 --device cpu --workers 1"
    main(f"train --steps 6400 {quick} --out {out}".split())
    return out


def read_json(path):
    return json.loads(path.read_text())


def test_a_run_raises_the_clip_reward_and_leaves_its_settings_metrics_and_result(run):
    names = "config.json metrics.csv policy.pt result.json curve.png video.gif"
    assert {file.name for file in run.iterdir()} == set(names.split())
    expected = dict(prompt=[KNEELING], task="kneeling", alpha=0.5, steps=6400, seed=0)
    config, rows = read_json(run / "config.json"), read_metrics(run / "metrics.csv")
    settings = dict(baseline=["a humanoid robot"], look="realistic", model="tinyclip", device="cpu")
    settings |= {key: vlmrm.CAMERA[key] for key in ("distance", "elevation", "azimuth")}
    settings |= dict(height=1.0)
    assert config == config | expected | settings | dict(precision="fp32", hidden=256)
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.02
    assert [row["steps"] for row in rows] == list(range(1600, 6401, 1600))
    assert all({"steps", "reward", "success", "success_held"} <= set(row) for row in rows)
    assert {"eval_reward", "eval_success", "eval_success_held"} <= set(rows[-1])
    assert {"critic_loss", "actor_loss", "temperature", "entropy"} <= set(rows[-1])
    assert np.isfinite([value for row in rows for value in row.values()]).all()
    result = read_json(run / "result.json")
    assert result == result | expected | dict(episodes=16)
    for key in "reward", "reward_at_the_end":
        assert -1 <= result[key] < result["reward_of_goal_poses"] <= 1  # after so short a training
    assert set(result["references"]) == {"zero action", "untrained network", "random policy"}
    for scores in result, *result["references"].values():
        assert 0 <= scores["success"] <= 1 and 0 <= scores["success_held"] <= 1


def test_train_from_python_gives_the_same_rows(run):
    row, rows = next(vlmrm.train(KNEELING, steps=6400)), read_metrics(run / "metrics.csv")
    close(row["reward"], rows[0]["reward"], 1e-6)
    assert row["success"] == rows[0]["success"] and row["steps"] == rows[0]["steps"]


def test_saved_policy_is_the_one_that_was_judged(run, clip):
    config, result = read_json(run / "config.json"), read_json(run / "result.json")
    envs = vlmrm.make_envs(vlmrm.Scene(clip.size), vlmrm.kneeling, config["envs"])
    settings = sac.Config(hidden=config["hidden"], seed=99)
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, settings)
    agent.load_state_dict(torch.load(run / "policy.pt", weights_only=True))
    reward_fn = vlmrm.VLMReward(clip, config["prompt"], config["baseline"], config["alpha"])
    played = sac.evaluate(envs, agent.deterministic_action, reward_fn, 16, 2 * 10**9, 100)
    close(played.reward.mean(), result["reward"], 1e-6)
    success = result["success"], result["success_held"]
    assert vlmrm.success_rates(played.success.T) == success


def test_curve_and_video_can_be_seen(run):
    with Image.open(run / "curve.png") as curve, Image.open(run / "video.gif") as video:
        assert np.asarray(curve.convert("L")).std() > 10
        assert video.n_frames > 50 and video.size == (480, 240)
        first = np.asarray(video.convert("RGB"), float)
        video.seek(30)
        assert np.abs(np.asarray(video.convert("RGB"), float) - first).mean() > 1


BOWING = "a humanoid robot bowing"


@pytest.fixture(scope="module")
def free_run(tmp_path_factory):
    """Of a sentence that is no task's, without the word train, in a scene that is not the usual."""
    out = tmp_path_factory.mktemp("runs") / "bowing"
    baselines = ["--baseline", "a robot", "--baseline", "the robot"]
    look = ["--look", "original", "--azimuth", "90"]
    main([BOWING, *baselines, *look, *SMALL, "--steps", "160", "--out", str(out)])
    return out


def test_a_sentence_on_the_command_line_is_trained_on_and_not_judged(free_run):
    config, result = read_json(free_run / "config.json"), read_json(free_run / "result.json")
    assert config["prompt"] == [BOWING] and config["task"] is None
    assert config["baseline"] == ["a robot", "the robot"] and config["look"] == "original"
    assert result["success"] is None and not result["references"]
    rows = read_metrics(free_run / "metrics.csv")
    assert [row["steps"] for row in rows] == [80, 160]
    assert np.isnan([row["success"] for row in rows]).all() and np.isfinite(result["reward"])
    settings = dict(steps=160, round_steps=20, learning_starts=80, updates_per_step=0.1, hidden=64)
    reward_fn = vlmrm.VLMReward(vlmrm.CLIP(), BOWING, ["a robot", "the robot"])
    scene = vlmrm.Scene(look="original", camera=vlmrm.CAMERA | dict(azimuth=90))
    config = sac.Config(**settings, eval_episodes=4)
    trained = sac.train(*vlmrm.prepare(reward_fn, config, None, scene, 4))
    close([row["reward"] for row in trained], [row["reward"] for row in rows], 1e-6)


def test_play_writes_a_gif_of_new_episodes(free_run, run, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    gifs = []
    for seed in 0, 0, 1:
        out = tmp_path / f"{len(gifs)}.gif"
        main(["play", str(free_run), "--episodes", "2", "--seed", str(seed), "--out", str(out)])
        gifs.append(out.read_bytes())
    assert gifs[0] == gifs[1] != gifs[2]
    with Image.open(tmp_path / "0.gif") as gif:
        assert gif.size == (480, 240) and gif.n_frames == 2 * 7  # every third of 20 steps
    with Image.open(tmp_path / "0.gif") as original, Image.open(run / "video.gif") as usual:
        looks = (np.asarray(x.convert("RGB"), float).mean((0, 1)) for x in (original, usual))
        assert np.abs(np.subtract(*looks)).max() > 5  # it is drawn as the run saw it
    copied = shutil.copytree(free_run, tmp_path / "copied")
    main(["play", str(copied), "--episodes", "1"])  # where there is no screen
    assert (copied / "play.gif").stat().st_size > 1000
    (copied / "policy.pt").unlink()
    with pytest.raises(SystemExit, match="policy.pt"):
        main(["play", str(copied)])


def test_a_policy_that_is_kept_here_kneels_and_can_be_played_by_its_name(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    main(["play", "kneeling", "--episodes", "1"])
    assert Image.open("runs/kneeling/play.gif").n_frames > 20
    agent, settings = load_policy(Path("kneeling"))
    assert settings["prompt"] == [KNEELING]
    envs = vlmrm.make_envs(vlmrm.Scene(), vlmrm.kneeling)
    played = sac.evaluate(envs, agent.deterministic_action, None, 16, 5, 100)
    assert vlmrm.success_rates(played.success.T)[0] >= 0.9
    with pytest.raises(SystemExit, match="of finished runs, and of kneeling"):
        main(["play", "sneezing"])


def test_a_small_policy_acts_like_the_whole_one(tmp_path, monkeypatch):
    agent = sac.SAC(box(12), box(3), sac.Config(hidden=32))
    obs = 1e4 * np.random.default_rng(0).standard_normal((64, 12))
    agent.norm.update(torch.from_numpy(obs).float())
    monkeypatch.setattr(support.runs, "POLICIES", tmp_path)
    save_small_policy(tmp_path / "small.safetensors", agent.state_dict(), dict(hidden=32))
    small, _ = load_policy(Path("small"))
    close(small.deterministic_action(obs), agent.deterministic_action(obs), 5e-3)


def test_commands_are_not_taken_for_prompts_nor_flags_for_commands(capsys):
    for arguments in ["--overwrite", "evaluate"], ["--alpha", "strong"], ["bowing"], ["play"]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2 and "usage" in capsys.readouterr().err
    for arguments in ["--help"], ["train", "--help"], ["evaluate", "--help"], ["play", "--help"]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0 and "usage: vlmrm.py" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Mistakes on the command line end in one line that says what to do


@pytest.fixture
def error(tmp_path):
    def message_of(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["train", "--out", str(tmp_path / "run"), *map(str, arguments)])
        message = str(caught.value)
        assert message.startswith("error: ") and "\n" not in message
        assert not (tmp_path / "run").exists()
        return message

    return message_of


@pytest.mark.parametrize("model", ["ViT-B-32/laion2b_s34b_b79k", "hf-hub:someone/some-clip"])
def test_error_when_weights_cannot_be_downloaded(model, error, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("cannot reach the hub\n(a second line)")

    for name in "download_pretrained", "download_pretrained_from_hf":
        monkeypatch.setattr(open_clip.factory, name, unreachable)
    message = error("--model", model)
    assert model in message and "embedded" in message and "local-dir" in message


def test_error_for_a_model_that_does_not_exist(error, tmp_path):
    name = "ViT-B-32/laion2b_s34b_b79k"
    assert name in error("--model", "ViT-B-32/laion2b_s34b_b97k")  # the nearest
    assert "ViT-bigG-14/" in error("--model", "ViT-bigG-14")
    assert "open_clip_config.json" in error("--model", f"local-dir:{tmp_path / 'missing'}")
    shutil.copy(ROOT / "tinyclip/open_clip_config.json", tmp_path)
    assert "weights" in error("--model", f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"something else")
    assert str(tmp_path) in error("--model", f"local-dir:{tmp_path}")


def test_error_for_settings_that_make_no_sense(error):
    for arguments, word in (
        ("--alpha -0.1", "[0, 1]"),
        ("--alpha 1.5", "[0, 1]"),
        ("--device nowhere", "nowhere"),
        ("--distance nan", "camera"),
        ("--height inf", "camera"),
        ("--workers 3", "equal shares"),
        ("--workers -1", "equal shares"),
        ("--workers 4 --eval-episodes 3", "equal shares"),
        ("--gamma 2", "gamma"),
        ("--seed -1", "seed"),
        ("--seed 99999999999", "seed"),
        ("--hidden 0", "hidden"),
        ("--learning-rate inf", "learning_rate"),
        ("--pink 1.1", "pink"),
        ("--envs 0", "--envs"),
        ("--episodes 0", "--episodes"),
        ("--resume absent", "absent"),
        ("--out /proc/run --episodes 1", "/proc/run"),
    ):
        assert word in error(*arguments.split())
    assert "alpha 0" in error("a humanoid robot")  # the goal is the baseline
    for prompts in ["  "], [KNEELING, "--baseline", ""]:
        assert "write a sentence" in error(*prompts)
    assert "tokens" in error("a humanoid robot " + "kneeling down very slowly " * 50)


def test_error_without_opengl(error, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no display\n(a second line)")

    monkeypatch.setattr(mujoco, "Renderer", refuse)
    message = error()
    assert "libegl1" in message and "MUJOCO_GL" in message


def test_a_run_is_not_replaced_unasked_nor_by_a_command_that_is_wrong(error, tmp_path):
    (tmp_path / "policy.pt").write_text("hours of work")
    for overwrite in [], ["--overwrite"]:  # no run of ours: not even then
        assert "other files" in error("--out", tmp_path, *overwrite)
    for name in "config.json", "metrics.csv":
        (tmp_path / name).write_text("")
    assert "by --overwrite" in error("--out", tmp_path)
    wrong = "--alpha 2", "--gamma 2", "--buffer-size 100", "--batch-size 0", "--device nowhere"
    for words in wrong:
        error("--out", tmp_path, "--overwrite", *words.split())
        assert (tmp_path / "policy.pt").read_text() == "hours of work"


def test_the_folder_of_a_run_tells_what_is_unusual_about_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lotus = "--task lotus --alpha 0.3 --pink 0.75 --azimuth 210"
    for options, name in (
        (["--seed", "3"], "kneeling-seed3"),
        (lotus.split(), "lotus-alpha0.3-pink0.75-azimuth210-seed0"),
        (["--gamma", "0.98"], "kneeling-gamma0.98-seed0"),
        (["--look", "original"], "kneeling-original-seed0"),
        (["--model", "local-dir:a/b", "--alpha", "0"], "kneeling-b-alpha0-seed0"),
        (["A robot: bowing!"], "a-robot-bowing-seed0"),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "a file").write_text("")
        with pytest.raises(SystemExit, match=f"runs/{name} already holds"):
            main(["train", *options])


@pytest.mark.parametrize("settings", [{}, dict(MUJOCO_GL="absent")])  # importing MuJoCo fails
def test_user_sees_one_line_and_no_traceback(settings, tmp_path):
    command = [sys.executable, ROOT / "vlmrm.py", "--alpha", "2", "--out", tmp_path / "run"]
    process = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.strip().splitlines()[-1].startswith("error: ")


# --------------------------------------------------------------------------------------------------
# Runs that are interrupted


def start(*words, cwd=ROOT, before="", launcher=()):
    """python vlmrm.py train ..., begun; its two outputs are one."""
    program = launcher or [ROOT / "vlmrm.py"]
    command = shlex.join(map(str, [sys.executable, *program, "train", *words]))
    return subprocess.Popen(
        ["bash", "-c", f"{before} exec {command}"],
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also behind nohup
    )


def finish(job):
    output, _ = job.communicate()
    assert job.returncode == 0, output
    return output


def wait_for(path, job):
    while not path.exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)


def contents(folder, *names):
    return [(folder / name).read_bytes() for name in names]


LEFT = "metrics.csv", "policy.pt"


def train_in(folder, rank=0, processes=1, stop=None, steps=1_600, **settings):
    """A training that leaves its metrics and, when it is done, its weights.

    It may stop after so many rounds.
    """
    columns, metrics = ("steps", "reward", "critic_loss", "eval_reward"), folder / "metrics.csv"
    usual = dict(learning_starts=480, round_steps=20, batch_size=32, hidden=16, seed=5)
    usual |= dict(updates_per_step=0.05, eval_every=480, eval_episodes=8)
    usual |= dict(buffer_size=900)  # it wraps around
    agent = point_agent(steps=steps, **usual | settings)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(folder / "checkpoint", agent, 160 * processes, processes)
    progress = checkpoint.restore()
    check_same_start(progress.steps, folder)
    rows = read_metrics(metrics) if metrics.exists() else []
    player = sac.Player(*share(agent, points(), nearness), agent.config)
    for count, row in enumerate(sac.train(agent, player, progress), 1):
        row = {key: row[key] for key in columns if key in row}
        rows = [*(old for old in rows if old["steps"] < row["steps"]), row]
        if rank == 0:
            write_csv(metrics, columns, rows)
            checkpoint.save()
        if count == stop:
            return
    save_policy(folder / "policy.pt", agent.state_dict())


def train_alone(folder):
    torch.set_num_threads(1)
    train_in(folder)


def test_a_training_killed_at_any_moment_is_resumed_to_the_last_byte(tmp_path):
    context = multiprocessing.get_context("forkserver")  # its children have everything imported
    context.set_forkserver_preload(["test_vlmrm"])
    whole, killed, kills = tmp_path / "whole", tmp_path / "killed", 0
    # the first process only waits for the imports
    for target, arguments in (contents, (whole,)), (train_alone, (whole,)):
        process, began = context.Process(target=target, args=arguments), time.monotonic()
        process.start()
        process.join()
    length, rng = time.monotonic() - began, np.random.default_rng(0)
    while kills < 12:
        shutil.rmtree(killed, ignore_errors=True)
        while not (killed / "policy.pt").exists():  # the last run of each ends by itself
            process = context.Process(target=train_alone, args=(killed,))
            process.start()
            process.join(rng.uniform(0.2, 0.9) * length)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                for file in killed.rglob("*"):  # whatever has its name is whole
                    if file.suffix == ".pt":
                        torch.load(file, weights_only=True)
                    elif file.suffix == ".npy":
                        assert np.load(file).shape == (160, 8)
        assert contents(killed, *LEFT) == contents(whole, *LEFT)
        left = len(list((killed / "checkpoint").glob("*.npy")))
        # of 10: what the buffer remembers, one more, and some if killed while tidying
        assert 7 <= left < 10


def test_a_checkpoint_that_is_damaged_or_of_other_settings_is_refused(tmp_path):
    train_in(tmp_path, stop=2)
    with pytest.raises(ValueError, match="gamma 0.95 there, 0.5 here; seed 5 there, 6 here"):
        train_in(tmp_path, gamma=0.5, seed=6)
    for name in "round0.npy", "state.pt":
        for content in b"", b"no such format":
            (tmp_path / "checkpoint" / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                train_in(tmp_path)


def test_a_full_disk_leaves_what_was_there_before(tmp_path):
    with atomic_open(tmp_path / "file", "w") as file:
        file.write("before")
    with pytest.raises(OSError), atomic_open(tmp_path / "file") as file:
        file.write(b"half")
        raise OSError("No space left on device")
    assert (tmp_path / "file").read_text() == "before"


def test_a_killed_command_is_resumed_to_the_last_byte(tmp_path):
    settings = [*SMALL, *"--steps 1200 --elevation -15 --pink 0.5 --workers 2 --out".split()]
    finish(start(*settings, tmp_path / "whole"))
    job = start(*settings, run := tmp_path / "run")
    wait_for(run / "checkpoint/round160.npy", job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    job.kill()
    job.communicate()
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):  # its workers, too
        time.sleep(0.1)
    with pytest.raises(SystemExit, match="leave out --alpha"):
        main(["train", "--resume", str(run), "--alpha", "0.25"])
    for name, change, complaint in (
        ("config.json", lambda text: text[:-9], "is damaged"),
        ("config.json", lambda text: text.replace('"envs"', '"robots"'), "another version"),
        ("metrics.csv", lambda text: text.splitlines()[0] + "\n", "lacks rounds"),
    ):
        shutil.rmtree(damaged := tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(run, damaged)
        (damaged / name).write_text(change((damaged / name).read_text()))
        with pytest.raises(SystemExit, match=complaint):
            main(["train", "--resume", str(damaged)])
    finish(start("--resume", run))
    assert contents(run, *LEFT) == contents(tmp_path / "whole", *LEFT)
    assert not (run / "checkpoint").exists() and not list(run.glob("*.part"))
    with pytest.raises(SystemExit, match="complete"):
        main(["train", "--resume", str(run)])


def test_of_two_identical_commands_at_once_one_trains_and_the_other_says_why_not(tmp_path):
    jobs = [start("--steps", 160, *SMALL, cwd=tmp_path) for _ in range(2)]
    (first, _), (second, message) = sorted((job.wait(), job.stdout.read()) for job in jobs)
    assert (first, second) == (0, 1), message
    assert "error:" in message and "runs/kneeling-seed0" in message and "Traceback" not in message
    assert (tmp_path / "runs/kneeling-seed0/result.json").exists()


def test_a_disk_that_is_full_and_ctrl_c_end_in_one_line_and_lose_nothing(tmp_path):
    settings = [*SMALL, *"--steps 1000000 --hidden 512 --out".split()]
    # KiB in one file: the round fits, the weights do not
    full = start(*settings, tmp_path / "full", before="ulimit -f 6000;")
    stopped = start(*settings, tmp_path / "stopped")
    wait_for(tmp_path / "stopped/checkpoint/state.pt", stopped)
    stopped.send_signal(signal.SIGINT)
    resume = f"--resume {tmp_path / 'stopped'}"
    for job, words, name in (full, "File too large", "full"), (stopped, resume, "stopped"):
        *_, line = job.communicate()[0].strip().splitlines()
        assert job.returncode == 1 and words in line
        assert len(read_metrics(tmp_path / name / "metrics.csv")) >= 1
    assert not (tmp_path / "full/policy.pt").exists()


# --------------------------------------------------------------------------------------------------
# Several processes that share a training


def five_updates(rank=0, processes=1):
    """On five batches, of which several processes take their shares, and of the same noise."""
    agent, batch = agent_and_batch(learning_rate=1e-3)
    update = agent.update if processes == 1 else shared_update(agent)
    noise = torch.Generator().manual_seed(2)

    def share_of_noise(x):
        whole = torch.randn(64, x.shape[1], generator=noise, dtype=x.dtype)
        return whole.tensor_split(processes)[rank]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", share_of_noise)
        for _ in range(5):
            losses = update(*batch)
    return agent.state_dict(), losses["critic_loss"]


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    updated = five_updates(rank, 2)
    agent, rows = learn(8_000)
    torch.save((updated, agent.state_dict(), rows), folder / f"{rank}.pt")
    apart = folder / f"apart{rank}"  # as on two machines that share no folder
    train_in(apart, rank, 2, stop=2)
    with pytest.raises(ValueError, match="have to share it"):
        train_in(apart, rank, 2)
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_would_and_stay_the_same(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    (updated, learned, rows), other = saved
    same([*updated], [*other[0]])
    same(learned, other[1])
    np.testing.assert_equal(rows, other[2])
    torch.testing.assert_close([*updated], [*five_updates()], rtol=0, atol=1e-6)
    assert (
        len(rows) == 25 and max(row.get("eval_reward", 0) for row in rows) > 0.3 + rows[0]["reward"]
    )
    alone = learn(640, count=16, learning_starts=640)[1]  # all 16 environments in one process
    for row, same_row in zip(rows, alone):
        assert row["steps"] == same_row["steps"] and row["success"].shape == (16, 20)
    close(rows[0]["reward"], alone[0]["reward"], 1e-6)


def test_torchrun_trains_one_policy_and_goes_on_after_a_kill_to_the_last_byte(tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    torchrun = functools.partial(start, launcher=[*launcher, ROOT / "vlmrm.py"])
    settings = [*SMALL, "--steps", "1200", "--out"]
    output = finish(torchrun(*settings, whole := tmp_path / "whole"))
    assert output.count("Training") == output.count("Success") == 1
    assert read_json(whole / "result.json")["steps"] == 1200
    assert [row["steps"] for row in read_metrics(whole / "metrics.csv")] == [*range(80, 1201, 80)]
    job = torchrun(*settings, killed := tmp_path / "killed")
    wait_for(killed / "checkpoint/state.pt", job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = job.communicate()
    assert job.returncode != 0 and "Signal 9" in output  # it waits for nobody
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    finish(torchrun("--resume", killed))
    assert contents(killed, *LEFT) == contents(whole, *LEFT)


# --------------------------------------------------------------------------------------------------
# How the embedded CLIP is made


def test_captions_are_true_of_their_own_frame_and_the_bare_baseline_of_all():
    rng, kinds = np.random.default_rng(0), (captions.LEGS, captions.ARMS, captions.TRUNK)
    labels = rng.integers([len(names) for names in kinds], size=(400, 3))
    sentences, says = captions.write_captions(labels, rng)
    true, bare = captions.truth(labels, says), (says == 0).all(1)
    assert true.shape == (400, 400) and true.diagonal().all() and true.mean() < 0.5
    assert bare.any() and true[:, bare].all()
    assert {sentences[i] for i in np.flatnonzero(bare)} <= set(captions.SUBJECTS)


LABELS = """
stand+raised: stand raised upright, stand+crossed: stand crossed upright,
splits: splits any upright, front_splits: front_splits any any,
stand+crossed+twisted: stand crossed any,
one_leg+on_hips: one_leg hips upright, kneel+down: kneel down upright, squat: squat any any,
on_heels+hanging+left_raised: heels one_raised upright, one_knee+aside: one_knee sides upright,
lotus+forward: lotus forward upright, all_fours: fours any lying, straddle: straddle any upright,
stand+in_air: air any upright, stand+at_head: stand head upright, stand+behind: stand back upright,
stand+on_chest: stand chest upright, stand+hanging+left_crossed: stand one_across any,
stand+on_hips+twisted_more: stand down upright
"""  # crossed arms are judged from the torso, hands on the hips from the pelvis


def test_captioner_names_poses_placed_by_hand():
    kinds = captions.LEGS, captions.ARMS, captions.TRUNK
    for line in " ".join(LABELS.split()).split(", "):
        pose, names = line.split(": ")
        state = place(pose).qpos[None].copy()
        labels = captions.label(vlmrm.measure_states(SCENE.model, state))[0]
        found = [kind[label] for kind, label in zip(kinds, labels)]
        assert all(a in ("any", b) for a, b in zip(names.split(), found)), (line, found)


def test_no_body_is_nearly_this_robot_in_its_proportions_or_its_colours():
    for lesson in dict(seed=0, near=False), dict(seed=1, near=True):
        proportion, colour = bodies.margins(count=500, **lesson)
        assert proportion > bodies.PROPORTION_MARGIN and colour > bodies.COLOUR_MARGIN
    robot = dict.fromkeys(bodies.RANGES, 1.0)
    assert bodies.proportion_margin(robot) == 0
    assert bodies.colour_margin(np.array(vlmrm.PAINT["head"][:3])) == 0


def test_the_robots_own_body_would_come_out_of_the_same_recipe():
    shapes = {part: "sphere" if part in bodies.ROUND else "capsule" for part in bodies.THICKNESS}
    body = bodies.Body(dict.fromkeys(bodies.RANGES, 1.0), shapes, None)
    model = bodies.build(body, np.random.default_rng(0), 32)
    close(model.body_pos, SCENE.model.body_pos, 1e-9)
    close(model.geom_pos[1:], SCENE.model.geom_pos[1:], 1e-9)
    close(model.geom_rbound[1:], SCENE.model.geom_rbound[1:], 1e-9)  # the sphere around each part
    close(model.body_mass, SCENE.model.body_mass, 1e-9)
    close(bodies.own_metre(model), 1, 1e-4)


def test_the_lowest_point_of_each_shape_lies_on_the_floor_that_it_touches():
    for number in range(4):
        rng = bodies.body_rng(1, number)
        model = bodies.build(bodies.random_body(rng), rng, 32)
        sim, data = poses.Simulator(model), mujoco.MjData(model)
        arms = poses.random_arms(sim, rng, 20)
        for _ in range(5):
            data.qpos[:] = sim.ground(poses.random_pose(sim, arms, rng), 0)
            mujoco.mj_forward(model, data)
            # MuJoCo's own distance from geom 0, the floor
            distances = [
                mujoco.mj_geomDistance(model, data, 0, geom, 2, None)
                for geom in range(1, model.ngeom)
            ]
            close(min(distances), 0, 1e-4)


def test_a_sentence_is_graded_by_its_parts(monkeypatch):
    pose = drawn(0)[1]
    labels = captions.label(pose)
    grades = grading.grade_phrases(pose, labels)
    rows, rng = np.arange(len(labels)), np.random.default_rng(0)
    _, says = captions.write_captions(labels, rng)
    graded = grading.graded_truth(grades, rows, says)
    true = captions.truth(labels, says)
    assert graded.shape == true.shape and (graded >= 0).all() and (graded <= 1).all()
    assert graded[true].min() > 0.6  # an upright pose leans by at most 45 degrees
    assert graded[~true].max() < 0.7  # of one part at least, half is missing
    monkeypatch.setattr(grading, "LEAN", 0)
    upright = grading.graded_truth(grading.grade_phrases(pose, labels), rows, says)
    close(upright[true], 1, 1e-6)
    assert (graded <= upright).all() and (graded < upright).mean() > 0.2
    vectors, images = grading.arm_vectors(pose), grading.arm_vectors(grading.mirrored(pose))
    close(grading.arm_vectors(grading.mirrored(grading.mirrored(pose))), vectors, 1e-6)
    lengths = np.linalg.norm(vectors.reshape(-1, 2, 2, 3), axis=-1)
    close(np.linalg.norm(images.reshape(-1, 2, 2, 3), axis=-1), lengths[..., ::-1], 1e-5)


@functools.cache
def drawn(number):
    """Frames of a body, and their poses."""
    return make.frames_of_body(number, library(), 100, 32, 0)


@functools.cache
def library():
    return make.arm_library(0, count=3, tries=2000)


@functools.cache
def first_states():
    """Such states as CLIP is trained on, but of this robot."""
    rng = np.random.default_rng(5)
    arms = make.choose_arms(SCENE.model, library(), 40, rng)
    return poses.random_states(poses.Simulator(SCENE.model), arms, rng, 3000)


def test_held_out_combinations_are_in_no_training_frame_and_in_no_caption():
    for number in range(3):
        images, own = drawn(number)
        assert len(images) == len(own.up) > 80 and not captions.held_out(own).any()
    states = first_states()
    pose = vlmrm.measure_states(SCENE.model, states)
    kept = ~captions.held_out(pose)
    for task, (_, condition) in vlmrm.COMPOSITIONS.items():  # by the simulator, not the captioner
        assert not (vlmrm.holds(condition, pose) & kept).any(), task
        goals = vlmrm.measure_states(SCENE.model, goal_states(task))
        assert captions.held_out(goals).all()
    for task, (_, condition) in vlmrm.TASKS.items():
        assert (vlmrm.holds(condition, pose) & kept).any(), task
    labels, rng = captions.label(pose)[kept], np.random.default_rng(0)
    said = set()  # pairs of a legs and an arms phrase
    for _ in range(60):
        _, says = captions.write_captions(labels, rng)
        said |= {(legs, arms) for legs, arms, _ in says if legs and arms}
    legs_phrases, arms_phrases = captions.TABLES[0][0], captions.TABLES[1][0]
    said = {(legs_phrases[legs], arms_phrases[arms]) for legs, arms in said}
    for legs, arms in (
        ("kneeling", "with both arms raised"),
        ("meditating", "arms up"),
        ("kneeling", "with hands on hips"),
        ("doing the side splits", "with both arms raised"),
        ("doing the side splits", "with its arms crossed"),
        ("in the lotus position", "with both arms raised"),
        ("squatting", "with its arms crossed"),
        ("sitting on the floor", "with its arms crossed"),
    ):
        assert legs in legs_phrases and arms in arms_phrases and (legs, arms) not in said
    assert ("standing", "with both arms raised") in said
    assert ("kneeling", "with its arms down") in said


def test_climbers_on_training_bodies_earn_more_and_stay_out_of_what_is_held_out():
    frames, pose = make.climbs_of_body(1, library(), 60, 96, 0, ROOT / "tinyclip", 2, 12)
    assert frames.shape == (60, 96, 96, 3) and not captions.held_out(pose).any()
    start = make.frames_of_body(1, library(), 60, 96, 0)[0]
    clip = vlmrm.CLIP("tinyclip")
    rewards = [vlmrm.VLMReward(clip, prompt, BASELINE) for prompt, _ in vlmrm.TASKS.values()]
    # each climber likes one of twelve sentences, eight of which are these
    climbed, before = (np.median(np.max([fn(x) for fn in rewards], 0)) for x in (frames, start))
    assert climbed > before + 0.05


def test_contrastive_loss_is_clips_where_each_frame_has_one_sentence():
    logits, numbers = torch.randn(6, 6, dtype=torch.double), torch.arange(6)
    both = nn.functional.cross_entropy(logits, numbers) + nn.functional.cross_entropy(
        logits.T, numbers
    )
    torch.testing.assert_close(make.contrastive_loss(logits, torch.eye(6).double()), both / 2)


def test_a_small_clip_learns_and_is_loaded_by_its_folder(tmp_path, monkeypatch):
    def recorded(logits, true):
        losses.append(whole(logits, true))
        return losses[-1]

    losses, whole = [], make.contrastive_loss
    monkeypatch.setattr(make, "contrastive_loss", recorded)
    (images, pose), config = drawn(0), make.architecture(width=4, size=32)
    model = make.train(images, pose, config, steps=40, batch_size=32)
    losses = torch.stack(losses)
    assert losses.isfinite().all() and losses[-10:].mean() < losses[:10].mean()
    make.save(model, config, tmp_path)
    clip = vlmrm.CLIP(f"local-dir:{tmp_path}")
    x = clip.preprocess(images)
    with torch.no_grad():
        expected = nn.functional.normalize(model.encode_image(x), dim=-1)
    close(clip.embed_images(images), expected, 2e-2)  # the weights are saved in fp16
    assert np.isfinite(vlmrm.VLMReward(clip, KNEELING, BASELINE)(images)).all()


def test_climbing_poses_earn_more_and_stay_out_of_what_is_held_out():
    rng = np.random.default_rng(0)
    states = evaluation.climb.climb(KNEELING, rng, "tinyclip", climbers=6, tries=12).astype(float)
    reward_fn = vlmrm.VLMReward(vlmrm.CLIP(), KNEELING, BASELINE)
    # the same six climbers
    early, middle, late = (reward_fn(vlmrm.render_states(SCENE, part)) for part in states)
    assert states.shape == (3, 6, 24) and late.mean() > early.mean() + 0.01
    assert (middle > early - 1e-4).all() and (late > middle - 1e-4).all()
    assert not captions.held_out(vlmrm.measure_states(SCENE.model, states[2])).any()


# --------------------------------------------------------------------------------------------------
# Judging rewards


def test_a_path_of_poses_begins_and_ends_as_asked_and_never_leaves_the_floor():
    begin, goal = (place(pose).qpos.copy() for pose in ("stand", "lying"))
    path, data = pose_path(SCENE.model, begin, goal, 9), mujoco.MjData(SCENE.model)
    assert path.shape == (9, 24)
    close(path[[0, -1], 3:], [begin[3:], goal[3:]], 1e-9)
    for data.qpos[:] in path:
        close(poses.lowest_point(SCENE.model, data), 0, 1e-9)
    negated = np.concatenate([begin[:3], -begin[3:7], begin[7:]])  # the same orientation
    half_way = pose_path(SCENE.model, negated, begin, 3)[1]
    close(np.abs(half_way[3:7]), np.abs(begin[3:7]), 1e-9)


def test_evaluation_set_has_goal_states_of_every_task_from_scripts_and_from_policies():
    states, origin = evaluation.states.load_states()
    assert len(states) >= 2000 and len(np.unique(states, axis=0)) == len(states)
    pose = vlmrm.measure_states(SCENE.model, states)
    for task, (_, condition) in vlmrm.TASKS.items():
        goal = vlmrm.holds(condition, pose)
        assert goal.sum() >= 100
        # the states are older than the rule that crossed arms are judged from the chest
        scripted = goal[origin == f"scripted {task}"]
        assert scripted.mean() > 0.8 if task == "arms-crossed" else scripted.all()
        assert {f"half-trained {task}", f"trained {task}"} <= set(origin)
    for task, (_, condition) in vlmrm.JUDGED.items():
        goals = goal_states(task)
        assert len(goals) >= 50
        assert vlmrm.holds(condition, vlmrm.measure_states(SCENE.model, goals)).all()


@pytest.fixture(scope="module")
def few_states(tmp_path_factory):
    """A part of the evaluation states."""
    states, origin = evaluation.states.load_states()
    some = [np.flatnonzero(origin == f"scripted {task}")[:10] for task in vlmrm.TASKS]
    some = np.unique(np.concatenate([np.arange(0, len(states), 12), *some]))
    path = tmp_path_factory.mktemp("states") / "states.npz"
    np.savez(path, states=states[some], origin=origin[some])
    return path


def test_evaluate_tells_the_embedded_model_from_a_random_one(few_states, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.states, "EVALUATION_STATES", few_states)
    (tmp_path / "random").mkdir()
    models = ["tinyclip", save_random("padding", tmp_path / "random")]
    words = "--task splits kneeling --alpha 0 1 --out".split()
    main(["evaluate", *words, str(out := tmp_path / "out"), "--model", *models])
    with open(out / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * 3 * 2 * 2  # models, scenes, tasks, alphas
    ours = {
        (row["model"], row["task"]): {key: float(row[key]) for key in ("epic", "auc", "pearson")}
        for row in table
        if row["scene"] == "textures and camera" and row["alpha"] == "0"
    }
    for task in ("splits", "kneeling"):
        tiny, random = ours["tinyclip", task], ours["random", task]
        assert tiny["epic"] < 0.5 < random["epic"] and tiny["auc"] > 0.95
        close(tiny["pearson"], 1 - 2 * tiny["epic"] ** 2, 1e-4)
    figures = itertools.product(("tinyclip", "random"), ("paths", "histograms", "frames"))
    names = ["epic_alpha", "epic_size", "epic_scene", *map("/".join, figures)]
    for name in names:
        assert np.asarray(Image.open(out / f"{name}.png").convert("L")).std() > 10, name
    with pytest.raises(SystemExit, match="already holds table.csv"):
        main(["evaluate", *words, str(out)])


# --------------------------------------------------------------------------------------------------
# The scripts, with small numbers in place of large ones


def test_climb_script_prints_where_climbers_arrive_and_draws_the_misled(tmp_path):
    words = "--task standing arms-crossed --climbers 4 --tries 6 --out".split()
    command = [sys.executable, ROOT / "evaluation/climb.py", *words, tmp_path / "climb.png"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    printed = process.stdout.splitlines()
    assert [line.split()[0] for line in printed] == ["task", "standing", "arms-crossed", "See"]
    assert Image.open(tmp_path / "climb.png").size == (8 * 118, 2 * 118)
    with open(tmp_path / "climb.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["standing", "arms-crossed"]
    shares = [f"{float(row['goal']):.0%}" for row in rows]
    assert shares == [line.split()[1] for line in printed[1:3]]


class Scripts:
    """Runs scripts in this process, on less of everything."""

    def __init__(self, patch, folder, few_states):
        self.patch, self.folder, self.few_states = patch, folder, few_states

    def __call__(self, path, *words):
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        less = getattr(self, path.split("/")[1].removesuffix(".py"))(module, words)
        if hasattr(module, "in_parallel"):
            self.patch.setattr(module, "in_parallel", self.one_by_one)
        self.patch.setattr(sys, "argv", [path, *words, *less.split()])
        threads = torch.get_num_threads()
        module.main()
        torch.set_num_threads(threads)
        return module

    def one_by_one(self, function, jobs, *_):
        return [function(*job) for job in jobs]

    def learn_at_the_end(self):
        few = functools.partial(sac.Config, learning_starts=1600, updates_per_step=0.01)
        self.patch.setattr(sac, "Config", few)

    def climb(self, module, words):
        return f"--task standing --climbers 2 --tries 3 --out {self.folder / 'climb.png'}"

    def landscape(self, module, words):
        return f"--points 3 --alpha 0 1 --out {self.folder}"

    def scaling(self, module, words):
        self.patch.setattr(evaluation.states, "EVALUATION_STATES", self.few_states)
        self.patch.setattr(module, "BODIES", (1, 2))
        self.patch.setattr(module, "WIDTHS", (2, 4))
        self.patch.setattr(module, "USUAL", 4)
        arms = library()
        self.patch.setattr(make, "arm_library", lambda *_, **__: arms)
        self.patch.setattr(make, "in_parallel", self.one_by_one)
        return f"--frames 40 --steps 2 --seeds 1 --out {self.folder}"

    def make_states(self, module, words):
        self.patch.setattr(module, "EVALUATION_STATES", self.folder / "made.npz")
        self.patch.setattr(module, "SCRIPTS", {"kneeling": module.SCRIPTS["kneeling"]})
        for name, count in dict(scripted=3, between=4, settled=2, random_policy=2).items():
            self.patch.setattr(getattr(module, name), "__defaults__", (count,))
        self.patch.setattr(module.policy, "__defaults__", (1600,))
        self.learn_at_the_end()
        return ""

    def make(self, module, words):
        arms = library()
        self.patch.setattr(module, "arm_library", lambda *_, **__: arms)
        self.patch.setattr(module, "CLIMBED", 10)
        self.patch.setattr(module.climbs_of_body, "__defaults__", (1, 4))
        small = "--bodies 2 --frames 20 --steps 4 --climbs 2 --more-steps 3 --width 4 --size 32"
        return f"{small} --out {self.folder / 'clip'}"

    def ceiling(self, module, words):
        self.patch.setattr(module, "goal_states", functools.cache(goal_states))
        evaluate = sac.evaluate
        few = lambda envs, act, reward_fn, *_: evaluate(envs, act, reward_fn, 4, 0, 100)  # noqa: E731
        self.patch.setattr(sac, "evaluate", few)
        self.learn_at_the_end()
        return f"--steps 1600 --out {self.folder / 'ceiling.csv'}"

    def results(self, module, words):
        runs = self.folder / "assets/runs"
        shutil.copytree(ROOT / "assets/runs", runs, ignore=shutil.ignore_patterns("before"))
        self.patch.setattr(module, "ASSETS", self.folder / "assets")
        self.patch.setattr(module, "RUNS", runs)
        return ""

    def speed(self, module, words):
        def once_in_a_hundred(function):
            count = itertools.count()
            return lambda *args: None if next(count) % 100 else function(*args)

        for learner in sac.SAC, module.CleanRL:
            self.patch.setattr(learner, "update", once_in_a_hundred(learner.update))
        theirs, some, made = stable_baselines3.SAC.train, module.poses, gymnasium.make

        def train_once(learner, gradient_steps, batch_size):
            theirs(learner, 1, batch_size)

        self.patch.setattr(stable_baselines3.SAC, "train", train_once)
        self.patch.setattr(module, "poses", lambda count: some(min(count, 32)))
        self.patch.setattr(module, "matmul_shapes", lambda batch: [(2, 3, 4)])
        self.patch.setattr(torch, "compile", lambda function, **_: function)
        self.patch.setattr(module, "ENVS", 1)
        self.patch.setattr(module, "TURN", 200)
        self.patch.setitem(sys.modules, "sbx", None)  # as if it were not installed
        small = dict(width=64, height=64)
        self.patch.setattr(gymnasium, "make", lambda name, **rest: made(name, **rest | small))
        return "--pairs 1 --frames 2 --device cpu"

    def gpu(self, module, words):
        random_clip = lambda name, device, precision: vlmrm.CLIP("tinyclip", device, precision)  # noqa: E731
        self.patch.setattr(module, "random_clip", random_clip)
        return f"--device cpu --small --processes 1 --models any --out {self.folder}"


@pytest.fixture
def scripts(monkeypatch, tmp_path, few_states):
    return Scripts(monkeypatch, tmp_path, few_states)


def test_make_states_makes_states_of_all_kinds_and_the_same_scripted_ones(scripts, tmp_path):
    scripts("evaluation/make_states.py")
    committed, its_origin = evaluation.states.load_states()
    with np.load(tmp_path / "made.npz") as made:
        states, origin = made["states"], made["origin"]
    kinds = "between", "settled", "random policy", "scripted kneeling"
    assert {*kinds, "half-trained kneeling", "trained kneeling"} == set(origin)
    assert states.shape == (4 + 2 + 2 + 3 + 60 + 120, 24) and np.isfinite(states).all()
    scripted = committed[its_origin == "scripted kneeling"][:3]
    close(states[origin == "scripted kneeling"], scripted, 1e-5)


def test_make_makes_the_same_clip_twice(scripts, tmp_path, capsys):
    weights = tmp_path / "clip/open_clip_model.safetensors"
    scripts("tinyclip/make.py")
    once = weights.read_bytes()
    assert np.isfinite(vlmrm.CLIP(f"local-dir:{tmp_path / 'clip'}").embed_text(KNEELING)).all()
    scripts("tinyclip/make.py")
    output = capsys.readouterr().out
    assert weights.read_bytes() == once and "40 frames" in output and "20 frames found" in output
    assert (tmp_path / "clip/first/open_clip_model.safetensors").read_bytes() != once


def test_scaling_goes_on_where_it_was_and_draws_both_curves(scripts, tmp_path, capsys):
    scripts("evaluation/scaling.py")
    with open(tmp_path / "scaling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [(row["bodies"], row["width"], row["grading"]) for row in rows]
    usual = "as it is"
    assert kinds[:3] == [("1", "4", usual), ("2", "4", usual), ("2", "2", usual)]
    others = ["yes or no", "mean alone", "product alone"]
    assert kinds[3:] == [("2", "4", name) for name in others]
    assert {row["frames"] for row in rows} == {"40"}
    assert all(0 <= float(row["auc_near"]) <= 1 and 0 <= float(row["epic"]) <= 1 for row in rows)
    (tmp_path / "scaling.png").unlink()
    capsys.readouterr()
    scripts("evaluation/scaling.py")
    assert not capsys.readouterr().out and (tmp_path / "scaling.png").exists()
    assert not (tmp_path / "model").exists()


def test_phrases_are_listed_and_a_training_warns_of_words_that_were_never_read(capsys):
    main(["phrases"])
    listed = " ".join(capsys.readouterr().out.split())
    for prompt, _ in vlmrm.JUDGED.values():
        assert not unread_words(vlmrm.CLIP(), [prompt])
    for phrase in ("kneeling | on its knees", "with both arms raised", "leaning forward"):
        assert phrase in listed
    sentences = ["a humanoid robot Juggling, with its arms raised", "a kitchen"]
    assert unread_words(vlmrm.CLIP(), sentences) == ["juggling", "kitchen"]
    vision, text = (
        dict(layers=1, width=64, patch_size=8, image_size=16),
        dict(width=8, heads=1, layers=1),
    )
    real = argparse.Namespace(tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    real.model = open_clip.CLIP(8, vision, text)
    assert not unread_words(real, sentences)


def test_what_is_timed_on_a_gpu_leaves_a_table_and_all_numbers(scripts, tmp_path):
    scripts("benchmarks/gpu.py")
    result, text = read_json(tmp_path / "gpu.json"), (tmp_path / "gpu.md").read_text()
    assert result["gpu"] == "none" and result["encoders"][0]["share_of_peak"] is None
    for name in "frames", "encoders", "updates", "loop":
        assert f"## {name}" in text and text.count("\n|") > len(result[name])
        speeds = [value for row in result[name] for key, value in row.items() if "per_s" in key]
        assert speeds and min(speeds) > 0
    assert {row["settings"] for row in result["loop"]} == {"ours", "the paper's"}


def test_landscapes_of_classic_control_are_drawn_for_any_clip(scripts, saved, tmp_path):
    name, clip = saved
    module = scripts("evaluation/landscape.py", "--model", name, "tinyclip")
    with open(tmp_path / "landscape.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 * 3  # models, panels, alphas, points
    plain, coloured = (module.car_frames(np.array([-0.5, 0.5]), x) for x in (False, True))
    assert plain.shape == coloured.shape == (2, 600, 600, 3)
    moved = (plain[0] != plain[1]).any(-1)  # the car, wherever the mountain is coloured
    np.testing.assert_array_equal((coloured[0] != coloured[1]).any(-1), moved)
    reward = vlmrm.VLMReward(clip, *module.CAR, alpha=1)(coloured[1:])
    assert -1 <= reward[0] <= 1 and Image.open(tmp_path / "landscape.png").size[1] > 800


def test_ceiling_trains_on_a_reward_that_knows_the_pose(scripts, tmp_path):
    module = scripts("benchmarks/ceiling.py", "one-leg", "--hands", "2")
    (row,) = csv.DictReader(open(tmp_path / "ceiling.csv"))
    assert row["task"] == "one-leg" and float(row["steps"]) == 1600 and 0 < float(row["reward"]) < 1
    env = module.Tracking("one-leg")
    env.reset(seed=0)
    env.set_state(goal_states("one-leg")[0], np.zeros(23))
    points = env.points(vlmrm.measure(env.model, env.data))
    close(points, env.goal, 1e-9)


def test_results_of_a_run_enter_the_table_and_the_pictures(scripts, run, tmp_path, capsys):
    scripts("benchmarks/results.py", str(run), "--gallery", "--alphas", "--parts")
    printed = capsys.readouterr().out
    assert "| 6,400 |" in printed and f"{run.name}" in printed
    (metrics,) = (tmp_path / "assets/runs").glob("kneeling-*-steps6400-seed0.csv")
    assert metrics.read_bytes() == (run / "metrics.csv").read_bytes()
    with open(tmp_path / "assets/runs/results.csv") as file:
        rows = [row for row in csv.DictReader(file) if float(row["steps"]) == 6400]
    (row,) = rows
    config = read_json(run / "config.json")  # its settings are what train takes
    args = support.command_line.parser().parse_args(["train", *shlex.split(row["settings"])])
    assert all(str(config[key]) == str(getattr(args, key)) for key in ("envs", "batch_size"))
    close(float(row["reward"]), read_json(run / "result.json")["reward"], 1e-6)
    for picture in "gallery.gif", "alpha.png":
        assert np.asarray(Image.open(tmp_path / "assets" / picture).convert("L")).std() > 10


def test_speed_times_everything(scripts, capsys):
    scripts("benchmarks/speed.py")
    lines = capsys.readouterr().out.splitlines()
    timed = [line for line in lines if re.search(r"[\d.]x  \([\d.]+ to [\d.]+\)$", line)]
    assert len(timed) == 2 * (2 * 3 + 1) + 3 + 2 + 4 + 1
    assert sum("rank correlation" in line for line in lines) == 2
    assert "nan" not in "".join(lines)


# --------------------------------------------------------------------------------------------------
# The notebook


def code_cells(notebook=None):
    cells = (notebook or nbformat.read(ROOT / "notebook.ipynb", 4)).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_notebook_is_committed_with_its_outputs_and_short_cells():
    cells = code_cells()
    assert (ROOT / "notebook.ipynb").stat().st_size < 3_000_000
    assert max(len(cell.source.splitlines()) for cell in cells) <= 22
    assert max(len(line) for cell in cells for line in cell.source.splitlines()) <= 88
    assert all(re.match(r"# .*(\d s|minutes)\b", cell.source) for cell in cells)  # its time
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def executed(notebook, folder):
    resources = dict(metadata=dict(path=str(folder)))
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_notebook_runs_from_top_to_bottom_without_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("VLMRM_QUICK", "1")
    for name in ("vlmrm.py", "sac.py", "requirements.txt"):  # its run stays out of ours
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("support", "evaluation", "tinyclip", "assets"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    outputs = executed(nbformat.read(ROOT / "notebook.ipynb", 4), tmp_path)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    assert sum("data:image/webp" in page for page in pages) == 2
    assert "not written yet" in str(outputs) and (tmp_path / "runs/quick/result.json").exists()


def test_notebooks_answers_pass_its_own_checks(tmp_path, monkeypatch):
    """The stubs are filled in with the folded answers; what is slow and not needed is left out."""
    notebook, kept = nbformat.read(ROOT / "notebook.ipynb", 4), []
    slow = ("record_video(", "Popen(", "alive()", "SCENES", "open_clip", "darkness(", "favourites(")
    for cell in notebook.cells:
        if cell.cell_type == "code" and not any(word in cell.source for word in slow):
            kept.append(cell)
        answers = re.findall(r"<details>.*?```python\n(.*?)```", cell.source, re.S)
        for answer in answers if cell.cell_type == "markdown" else []:
            name = re.match(r"def (\w+)", answer)[1]
            stub = [c for c in kept if f"def {name}(" in c.source][0]
            given = re.search(rf"def {name}\(.*?return \.\.\.", stub.source, re.S)[0]
            stub.source = stub.source.replace(given, answer.strip())
    notebook.cells = kept
    lines = "".join(o.get("text", "") for o in executed(notebook, ROOT)).splitlines()
    checked = [line for line in lines if "off by at most" in line]
    assert len(checked) == 6 and all(": correct" in line for line in checked)


def repository(folder):
    """A repository of little, and what makes git find it at this repository's address."""
    folder.mkdir()
    for name in ("vlmrm.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run(git + command, check=True)
    instead = dict(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0=f"url.file://{folder}.insteadOf")
    return instead | dict(GIT_CONFIG_VALUE_0=f"https://github.com/{ADDRESS}", PIP_NO_INDEX="1")


@pytest.mark.parametrize("place", ["nowhere", "beside", "unzipped"])
def test_notebooks_setup_cell_finds_or_fetches_the_repository(tmp_path, place):
    bare, instead = tmp_path / "bare", repository(tmp_path / "origin")
    bare.mkdir()
    if place != "nowhere":
        files = bare if place == "beside" else bare / "vlmrm-main"
        shutil.copytree(tmp_path / "origin", files, dirs_exist_ok=True)
    setup = code_cells()[0].source + "\nassert os.path.exists('vlmrm.py')"
    command = [sys.executable, "-c", setup]
    subprocess.run(command, cwd=bare, check=True, env=os.environ | instead)
    assert (bare / "vlmrm").exists() == (place == "nowhere")


def test_notebooks_setup_cell_makes_colab_draw(tmp_path):
    """With a GPU, EGL is told of NVIDIA's library; without one, Mesa's is installed."""
    setup = code_cells()[1].source
    for old, new in (
        ("/usr/share/glvnd/egl_vendor.d/10_nvidia.json", f"{tmp_path}/nvidia.json"),
        ("apt-get ", "echo "),
        ("/dev/nvidia0", f"{tmp_path}/gpu"),
    ):
        assert old in setup
        setup = setup.replace(old, new)
    begin = "import os, subprocess, sys\nfrom pathlib import Path\n"
    run = dict(check=True, capture_output=True, text=True)
    colab = os.environ | dict(COLAB_RELEASE_TAG="any")
    command = [sys.executable, "-c", begin + setup + "\nprint(os.environ['MUJOCO_GL'])"]
    out = subprocess.run(command, env=colab, **run).stdout
    assert "libegl1" in out and out.endswith("egl\n") and not (tmp_path / "nvidia.json").exists()
    (tmp_path / "gpu").touch()
    assert "libegl1" not in subprocess.run(command, env=colab, **run).stdout
    assert "libEGL_nvidia.so.0" in str(json.loads((tmp_path / "nvidia.json").read_text()))
    early = [sys.executable, "-c", begin + "sys.modules['mujoco'] = 1\n" + setup]
    assert "restart the kernel" in subprocess.run(early, capture_output=True, text=True).stderr


def test_this_repositorys_address_is_kept_in_one_place(tmp_path):
    (tmp_path / "support").mkdir()
    for name in (*support.address.FOLLOW, "support/address.py"):
        shutil.copy(ROOT / name, tmp_path / name)
        assert ADDRESS in (ROOT / name).read_text()
    support.address.move(tmp_path, ADDRESS, "some-one/vlm.rm")
    for name in support.address.FOLLOW:
        page = (tmp_path / name).read_text()
        assert "com/some-one/vlm.rm" in page and f"com/{ADDRESS}" not in page
        assert (
            f"com/github/{ADDRESS}" not in page
            and "AlignmentResearch/vlmrm" in page
            or name[0] == "n"
        )
    assert 'ADDRESS = "some-one/vlm.rm"' in (tmp_path / "support/address.py").read_text()
    nbformat.read(tmp_path / "notebook.ipynb", 4)
    with pytest.raises(ValueError, match="OWNER/NAME"):
        support.address.move(tmp_path, "some-one/vlm.rm", "https://github.com/a/b")


# --------------------------------------------------------------------------------------------------
# The README


README = (ROOT / "README.md").read_text()
FENCED = r"^```(\w*)\n(.*?)^```"


def readme_commands():
    """Each command of the page's blocks that runs something here, as its words."""
    blocks = [text for kind, text in re.findall(FENCED, README, re.M | re.S) if kind != "python"]
    page = re.sub(FENCED, "", README, flags=re.M | re.S)
    blocks += [line[4:] for line in page.splitlines() if line.startswith("    ")]
    commands = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if not re.match(r"[$ ]*(python|torchrun|git|pip)", line):
            continue
        lexer = shlex.shlex(line.lstrip("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        parts = "\0".join(lexer).split("\0&&\0")
        commands += [tuple(part.split("\0")) for part in parts]
    ours = re.compile(r"(python3?|torchrun) .*\b(vlmrm|sac|\w+/\w+)\.py\b")
    return [command for command in dict.fromkeys(commands) if ours.match(" ".join(command))]


def parse(words):
    """What the command line understands, without doing it."""
    with pytest.MonkeyPatch.context() as patch:
        understood = []
        for name in support.command_line.COMMANDS:
            patch.setitem(support.command_line.COMMANDS, name, understood.append)
        main(words)
    return understood[0]


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readmes_command_works(command, scripts, run, few_states, tmp_path, monkeypatch):
    """With few steps; only parsed, if it needs a network, a GPU or an interrupted run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    program, *words = command
    if program == "torchrun":
        args = torchrun_parser().parse_args(words)
        words = [args.training_script, *args.training_script_args]
    instead = {"RUN": str(run), "...": ""}
    instead["local-dir:PATH"] = f"local-dir:{ROOT / 'tinyclip'}"
    script, *words = filter(None, (instead.get(word, word) for word in words))
    if script == "sac.py":
        return  # has its own test
    if script != "vlmrm.py":
        return scripts(script, *words)
    args = parse(words)
    models = np.atleast_1d(getattr(args, "model", "tinyclip"))
    elsewhere = any(not model.startswith(("tinyclip", "local-dir:")) for model in models)
    if elsewhere or program == "torchrun" or getattr(args, "resume", None):
        return
    if args.command == "train":
        words += [*SMALL, "--steps", "160"]
    elif args.command == "evaluate":
        monkeypatch.setattr(evaluation.states, "EVALUATION_STATES", few_states)
        words += ["--task", "standing", "--alpha", "0.5"]
    elif args.command == "play":
        if not args.run.exists():
            shutil.copytree(run, args.run)
        words += ["--episodes", "1"]
    main(words)


def test_readmes_lines_of_python_run(run, tmp_path, monkeypatch):
    """With the embedded CLIP, which needs no network, and with few steps."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs/kneeling-seed0")
    few = dict(steps=1600, learning_starts=1600, updates_per_step=0.01)
    whole = sac.Config
    monkeypatch.setattr(sac, "Config", lambda **rest: whole(**rest | few))
    names = dict(frames=np.random.default_rng(0).integers(256, size=(3, 50, 60, 3), dtype=np.uint8))
    blocks = [text for kind, text in re.findall(FENCED, README, re.M | re.S) if kind == "python"]
    assert blocks
    for block in blocks:
        block = re.sub(r'\bCLIP\("[^"]*"', 'CLIP("tinyclip"', block)
        exec(re.sub(r"learn\([\d_]+", "learn(150", block), names)
    assert names["rewards"].shape == (3,) and np.isfinite(names["rewards"]).all()


# --------------------------------------------------------------------------------------------------
# What people trip over


def small(name="Hopper-v5", **settings):
    settings = dict(render_mode="rgb_array", width=48, height=48) | settings
    env = gymnasium.make(name, **settings)
    env.reset(seed=0)
    return env


def test_whatever_draws_beside_it_each_gets_the_pictures_that_it_would_get_alone():
    single = vlmrm.VLMRewardWrapper(small(), brightness)
    several = vlmrm.VLMRewardVectorWrapper(SyncVectorEnv([small] * 2), brightness)
    several.reset(seed=0)
    scene = vlmrm.Scene(48)
    drawers = [single.render, *[lambda i=i: several.render()[i] for i in (0, 1)]]
    drawers.append(lambda: picture(scene))
    alone = [draw().copy() for draw in drawers]

    def check():
        for draw, expected in zip(drawers * 2, alone * 2):
            np.testing.assert_array_equal(draw(), expected)

    for last in reversed(drawers):
        other, another = small("HalfCheetah-v5"), vlmrm.Scene((30, 40), "original")
        frame = other.render().copy()
        picture(another)
        check()
        np.testing.assert_array_equal(other.render(), frame)  # nor does it lose its own
        last()
        other.close()  # deletes its textures where it drew last
        del other, another
        gc.collect()
        check()
    _, reward, *_ = single.step(np.zeros(3, np.float32))
    assert reward == brightness(single.render()[None])[0] > 0.05
    several.close()
    np.testing.assert_array_equal(picture(scene), alone[-1])


FORKED = """
import gymnasium, mujoco, vlmrm, test_vlmrm
scene = vlmrm.Scene(48)
scene.render(mujoco.MjData(scene.model))
wrapped = lambda: vlmrm.VLMRewardWrapper(test_vlmrm.small(), test_vlmrm.brightness)
for make in wrapped, lambda: vlmrm.Humanoid(scene), lambda: vlmrm.Humanoid(vlmrm.Scene(48)):
    envs = gymnasium.vector.AsyncVectorEnv([make], context="fork")
    envs.reset(seed=0)
    try:
        envs.step(envs.action_space.sample())
        envs.render()
    except ValueError as error:
        print(error)
    envs.close(terminate=True)
"""


def test_drawing_in_a_fork_of_a_process_that_drew_is_refused_before_it_hangs():
    assert run_alone(ROOT, FORKED).stdout.count('context="spawn"') == 3


def test_a_scene_draws_in_another_thread_too():
    frames, scene = [], vlmrm.Scene(48)
    for drawn in scene, scene, vlmrm.Scene(48):
        frames.append(picture(drawn))
        thread = threading.Thread(target=lambda: frames.append(picture(drawn)))  # noqa: B023
        thread.start()
        thread.join()
    assert len(frames) == 6 and all((frame == frames[0]).all() for frame in frames)


def test_vlmrm_may_be_imported_after_something_was_drawn():
    code = "import os\nos.environ.setdefault('MUJOCO_GL', 'egl')\nimport mujoco, sys\n"
    code += "model = mujoco.MjModel.from_xml_string('<mujoco/>')\n"
    code += "mujoco.Renderer(model, 8, 8).render()\nflags = sys.getdlopenflags()\n"
    code += "import vlmrm\nassert sys.getdlopenflags() == flags\n"
    run_alone(ROOT, code + "vlmrm.Scene(8).render(mujoco.MjData(vlmrm.Scene(8).model))")


def test_somebody_elses_sac_py_is_named(tmp_path):
    (tmp_path / "sac.py").write_text("class SAC: pass")
    code = f"import sys\nsys.path.append({str(ROOT)!r})\n"
    code += "try: import vlmrm\nexcept ImportError as error: print(error)"
    said = run_alone(tmp_path, code).stdout
    assert str(ROOT / "vlmrm.py") in said and str(tmp_path / "sac.py") in said


class Undrawn(Point):
    def render(self):
        return None


class Unseen(Point):
    def step(self, action):
        return np.full(2, np.nan, np.float32), *super().step(action)[1:]


def see_nothing():
    agent = point_agent(steps=160, learning_starts=160, round_steps=20)
    next(sac.train(agent, sac.Player(points(env=Unseen), None, agent.config)))


def step_wrapped(env, wrapper=vlmrm.VLMRewardWrapper):
    env = wrapper(env, brightness)
    env.reset(seed=0)
    env.step(env.action_space.sample())


class Reusing(Point):
    frame = np.zeros((41, 41, 3), np.uint8)

    def render(self):
        self.frame[:] = super().render()
        return self.frame


def test_environments_that_reuse_their_arrays_give_the_same_rewards_and_observations(clip):
    modes = dict(autoreset_mode=AutoresetMode.DISABLED)
    make = lambda: gymnasium.wrappers.TimeLimit(Reusing(), 3)  # noqa: E731
    reusing, plain = SyncVectorEnv([make] * 2, copy=False, **modes), points(3, count=2)
    act = lambda obs: np.clip(obs, -0.5, 1)  # noqa: E731
    alone = sac.rollout(SyncVectorEnv([make], copy=False, **modes), act, 8, nearness, 0)
    usual = sac.rollout(plain, act, 8, nearness, 0)
    np.testing.assert_equal(sac.rollout(reusing, act, 8, None, 0)[0], usual.obs)
    for ours, expected in zip(alone, usual):
        np.testing.assert_array_equal(ours, expected[:, :1])


class Untold(SyncVectorEnv):
    metadata = property(lambda _: {}, lambda *_: None)


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda: sac.SAC(box(3), box(2, -np.inf, np.inf), sac.Config()), "finite bounds"),
        (lambda: vlmrm.Scene(0), "size is .0, 0"),
        (lambda: vlmrm.Scene((96, 20_000)), "20000.* 16384 pixels"),
        (lambda: step_wrapped(Untold([Point]), vlmrm.VLMRewardVectorWrapper), "mode None"),
        (lambda: sac.Config(steps=1600), "nothing would be learned"),
        (see_nothing, "observations .* NaN"),
        (lambda: vlmrm.VLMReward(vlmrm.CLIP(), "a red cube"), "baseline_prompt"),
        (lambda: step_wrapped(Undrawn()), "NoneType; wanted is a frame"),
        (lambda: step_wrapped(SyncVectorEnv([Undrawn]), vlmrm.VLMRewardVectorWrapper), "NoneType"),
        (lambda: step_wrapped(type("Listing", (Point,), dict(render=lambda _: [1]))()), "list"),
    ],
)
def test_what_was_silently_wrong_is_refused(mistake, words):
    with pytest.raises(ValueError, match=words):
        mistake()


def test_alpha_0_needs_no_baseline_and_a_wrapper_passes_gymnasiums_whole_checker(clip):
    images, zero = frames(96, 96), vlmrm.VLMReward(clip, KNEELING, alpha=0)
    close(zero(images), vlmrm.VLMReward(clip, KNEELING, BASELINE, 0)(images), 1e-6)
    check_env(vlmrm.VLMRewardWrapper(pendulum(), brightness))


@pytest.mark.parametrize(
    "words, said",
    [
        ("a humanoid robot kneeling", '"a humanoid robot kneeling"'),
        ("--steps 1600", "learning_starts"),
        ("--model ./tinyclip", "local-dir:./tinyclip"),
        ("--model ViT-B-16-SigLIP/webli", "pip install transformers"),
        ("--model ViT-H-14-worldwide/metaclip2_worldwide", "pip install transformers"),
        ("--model xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k", "pip install transformers"),
        ("--model nllb-clip-base/v1", "pip install transformers"),
        ("--model ViT-B-32/laion2b_s34b_b79k", "from: no such host"),
    ],
)
def test_a_line_says_what_to_do_before_a_download(words, said, error, monkeypatch):
    def unreachable(*args, **kwargs):
        try:
            raise OSError("no such host")
        except OSError as cause:
            raise FileNotFoundError("words " * 99) from cause

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said in error(*words.split())


@pytest.mark.parametrize("settings", [dict(MUJOCO_GL=""), dict(DISPLAY=":987", MUJOCO_GL="glfw")])
def test_drawing_works_or_egl_is_named(settings):
    code = "import vlmrm, mujoco\nscene = vlmrm.Scene(8)\n"
    code += "try: scene.render(mujoco.MjData(scene.model)), print('MUJOCO_GL=egl')\n"
    code += "except ValueError as error: print(error)"
    assert "MUJOCO_GL=egl" in run_alone(ROOT, code, **settings).stdout


def test_several_prompts_of_a_word_are_meant_where_words_have_no_spaces():
    for prompts in ["跪着的人形机器人", "下跪的机器人"], ["bowing"], ["a robot", "bowing"], []:
        support.training.check_quotes(prompts)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, clip):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").symlink_to(ROOT / "tinyclip")
    close(vlmrm.CLIP("local-dir:~/x").embed_text(KNEELING), clip.embed_text(KNEELING), 1e-6)
    for words in ["train", "--out=~/a", "--resume=~/a"], ["play", "~/a"], ["evaluate", "--out=~/a"]:
        args = vars(parse(words))
        folders = [args[key] for key in ("out", "resume", "run") if args.get(key)]
        assert folders and set(folders) == {tmp_path / "a"}


def test_overwriting_removes_what_a_run_left_through_links_and_nothing_else(tmp_path):
    real, out, disk = tmp_path / "real", tmp_path / "link", tmp_path / "disk"
    real.mkdir(), disk.mkdir()
    out.symlink_to(real)
    (real / "checkpoint").symlink_to(disk)
    ours = "policy.pt", "result.json", "play.gif", "curve.png.part", "checkpoint/round0.npy"
    for name in ("config.json", "metrics.csv", *ours, "thesis.tex", "policy.pt.old"):
        (real / name).write_text("")
    support.training.begin_folder(out, True, {})
    kept = {"config.json", "metrics.csv", "checkpoint", "thesis.tex", "policy.pt.old"}
    assert {file.name for file in real.iterdir()} == kept and not list(disk.iterdir())
    assert (real / "metrics.csv").read_text().startswith("steps,")
    (real / "checkpoint/notes").write_text("")
    with pytest.raises(OSError, match="checkpoint"):
        support.training.begin_folder(out, True, {})
    assert (real / "checkpoint/notes").exists() and (real / "config.json").exists()


def test_overwriting_an_evaluation_removes_only_its_files(tmp_path):
    names = "table.csv epic_size.png tinyclip/paths.png tinyclip/mine.png b/frames.png c/paths.png"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("model\ntinyclip\nb\n../c\n" if name == "table.csv" else "")
    remove_evaluation(tmp_path / "absent")
    remove_evaluation(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"tinyclip", "tinyclip/mine.png", "c", "c/paths.png"}


def test_an_evaluation_that_fails_leaves_no_folder(tmp_path, few_states, monkeypatch):
    monkeypatch.setattr(evaluation.states, "EVALUATION_STATES", few_states)
    for out in tmp_path / "new/er", tmp_path:
        with pytest.raises(SystemExit, match="alpha is 2"):
            main(["evaluate", "--alpha", "2", "--task", "splits", "--out", str(out)])
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_any_letters_are_drawn_or_said_to_be_missing_and_no_picture_costs_the_result(
    tmp_path, monkeypatch, capsys
):
    usual, every = matplotlib.rcParams["font.family"], fontManager.ttflist
    known = [font for font in every if font.name.startswith(("DejaVu", "STIX", "Last Resort"))]
    monkeypatch.setattr(fontManager, "ttflist", known)
    assert fonts_for("50% of $x_$ é") == (usual, "")
    assert fonts_for("a 跪 of 𝔄") == ([*usual, "STIXGeneral"], "跪")

    def fail(*args):
        raise RuntimeError("the screen\nis upside down")

    monkeypatch.setattr(support.training, "record_video", fail)
    words = [*SMALL, "--steps", "160", "--task", "splits", "--out", str(tmp_path / "run")]
    main(["train", "50% of $x_$, 跪", *words])
    printed, names = capsys.readouterr().out, {file.name for file in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.csv", "policy.pt", "result.json", "curve.png"}
    assert "no video.gif: the screen is upside down" in printed and "Success" in printed
    assert re.findall("^(Judging what|Training|Judging the best|Drawing)", printed, re.M)[3]


def test_an_interrupted_training_says_how_it_goes_on(tmp_path):
    args = parse(["train", "--out", str(tmp_path / "a run")])
    assert interrupted(args) == "interrupted"  # nothing was begun
    (tmp_path / "a run/checkpoint").mkdir(parents=True)
    assert f"train --resume '{tmp_path / 'a run'}'" in interrupted(args)
    assert interrupted(parse(["play", str(tmp_path)])) == "interrupted"


def test_make_states_has_a_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_states.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("evaluation.make_states").main()
    assert "states.npz" in capsys.readouterr().out
