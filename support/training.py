"""To be skipped at a first reading. The commands `train` and `play`: a training and its folder."""

import argparse
import json
import os
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import mujoco
import numpy as np
import sac
import torch
import vlmrm
from evaluation.states import goal_states
from tqdm import tqdm
from vlmrm import BASELINE_PROMPT, CAMERA, EMBEDDED_CLIP, JUDGED

from support.pictures import plot_curve, record_video, show_window
from support.processes import check_same_start, join, share
from support.vocabulary import unread_words
from support.workers import Workers, default_workers
from support.runs import (
    Checkpoint,
    check_free,
    load_policy,
    read_metrics,
    remove_checkpoint,
    remove_run,
    save_policy,
    short,
    write_csv,
    write_json,
)

JUDGEMENT_SEED = 2 * 10**9  # and up: for neither training nor its evaluations
COLUMNS = "steps reward success success_held eval_reward eval_success eval_success_held".split()
COLUMNS += "critic_loss actor_loss temperature entropy".split()
NOT_SETTINGS = "command", "overwrite", "resume", "typed"


def train(args: argparse.Namespace):
    """Trains SAC on the humanoid, rewarded by CLIP for looking like a sentence, and leaves in
    runs/NAME/:

    video.gif    the best policy, in three new episodes
    curve.png    CLIP reward beside success, over training
    result.json  success by two rules over 100 new episodes, and what zero, random and untrained
                 actions reach
    policy.pt    the best policy's weights; also metrics.csv and config.json
    """
    start, args = time.time(), resumed(args) if args.resume else args
    device, rank, processes = join(args.device or vlmrm.default_device())
    task, prompt, condition = find_task(args)
    baseline = args.baseline or [BASELINE_PROMPT]
    out = args.out = args.out or Path("runs") / run_name(task, prompt, args)
    new = rank == 0 and not args.resume  # this process begins the folder
    if new:
        check_free(out, args.overwrite, "config.json", "metrics.csv")
    config = checked_config(args, processes)
    camera = camera_of(vars(args))

    clip = vlmrm.CLIP(args.model, device, args.precision)
    reward_fn = vlmrm.VLMReward(clip, prompt, baseline, args.alpha)
    scene = vlmrm.Scene(clip.size, args.look, camera)
    scene.render(mujoco.MjData(scene.model))  # without OpenGL, fail now, not after the first round
    count = args.envs // processes
    make_envs = partial(vlmrm.make_envs, scene, condition, episode_steps=config.round_steps)
    envs = make_envs(count=count)
    spaces = envs.single_observation_space, envs.single_action_space
    agent = sac.SAC(*spaces, config, device)
    envs, label = share(agent, envs, reward_fn)  # among the processes
    player = sac.Player(envs, label, config)
    if new:
        settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
        settings |= dict(prompt=prompt, baseline=baseline, task=task, out=str(out))
        begin_folder(out, args.overwrite, settings)
    if processes > 1:
        torch.distributed.barrier()  # an older run is gone before any looks for a checkpoint

    def judge(act, label_with=None):  # (rewards, success), each (episodes, steps)
        episodes, length = args.episodes, config.round_steps
        played = sac.evaluate(envs, act, label_with, episodes, JUDGEMENT_SEED, length)
        return played.reward.T, played.success.T

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    references = {}
    if condition:
        shape = envs.action_space.shape
        say("Judging what has learned nothing: three times", args.episodes, "episodes")
        references = judge_references(judge, agent, shape, args.seed)
    if unread := unread_words(clip, [*prompt, *baseline]):
        say(f"warning: this CLIP never read {', '.join(unread)}. See: python vlmrm.py phrases")
    against = f"{prompt} against {baseline}, alpha {args.alpha:g}"
    say(f"Training {against}, on {device}, into {out}/")
    round_size = config.round_steps * args.envs
    checkpoint = Checkpoint(out / "checkpoint", agent, round_size, processes)
    threads = torch.get_num_threads()
    if args.workers:
        label_here = device != "cpu" or args.model != EMBEDDED_CLIP  # another may be large
        player = Workers(make_envs, args.envs, reward_fn, config, args.workers, label_here)
        torch.set_num_threads(threads if label_here else max(1, threads - args.workers))
    try:
        rows = learn(agent, player, checkpoint, out, rank)
    finally:
        if args.workers:
            player.close()
    torch.set_num_threads(threads)

    say("Judging the best policy in", args.episodes, "new episodes")
    rewards, success = judge(agent.deterministic_action, label)
    half, held = vlmrm.success_rates(success) if condition else (None, None)
    if processes > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    # again: a GPU may resume a round to other last bits
    save_policy(out / "policy.pt", agent.state_dict())
    goal_reward = None
    if condition:
        frames = vlmrm.render_states(scene, goal_states(task))
        goal_reward = float(reward_fn(frames).mean())
    steps = int(rows[-1]["steps"])
    result = dict(prompt=prompt, task=task, model=args.model, alpha=args.alpha, seed=args.seed)
    result |= dict(steps=steps, episodes=args.episodes, success=half, success_held=held)
    result |= dict(reward=float(rewards.mean()), reward_at_the_end=float(rewards[:, -20:].mean()))
    result |= dict(reward_of_goal_poses=goal_reward, references=references)
    result["seconds"] = None if args.resume else round(time.time() - start, 1)
    write_json(out / "result.json", result)
    remove_checkpoint(checkpoint.folder)
    say("Drawing the curve and the video")
    act, length = agent.deterministic_action, config.round_steps
    for name, decorate in {
        "curve.png": lambda path: plot_curve(rows, prompt[0], goal_reward, path),
        "video.gif": lambda path: record_video(act, camera, args.look, path, length),
    }.items():
        try:
            decorate(out / name)
        except Exception as error:  # the result is there already
            print(f"no {name}: {' '.join(str(error).split())[:200]}")

    found = "No success condition for this prompt"
    if condition:
        found = f"Success {half:.0%}, held to the end {held:.0%}"
    found += f"; CLIP reward {rewards.mean():.3f}; {args.episodes} episodes after {steps:,} steps"
    took = f"{(time.time() - start) / 60:.1f} minutes" + " since it was resumed" * bool(args.resume)
    print(f"{found} and {took}. Watch {out}/video.gif and see {out}/curve.png")


def find_task(args: argparse.Namespace) -> tuple:
    """(task, prompts, condition). Without a prompt: kneeling. Without a task, no condition."""
    known = {prompt: task for task, (prompt, _) in JUDGED.items()}
    if args.task:
        task = args.task
    elif args.prompt:
        task = known.get(args.prompt[0]) if len(args.prompt) == 1 else None
    else:
        task = "kneeling"
    check_quotes(args.prompt)
    prompt = args.prompt or [JUDGED[task][0]]
    return task, prompt, JUDGED[task][1] if task else None


def camera_of(settings: dict) -> dict:
    """For a Scene: the camera of these flags."""
    camera = {key: settings[key] for key in ("distance", "elevation", "azimuth")}
    return camera | dict(lookat=(0, 0, settings.get("height", 1)))  # older runs had no other


def check_quotes(prompts: list[str]):
    """Raises ValueError for words that were meant as a sentence; some scripts have no spaces."""
    words = all(len(prompt.split()) == 1 and max(prompt) < "\u0e00" for prompt in prompts)
    if len(prompts) > 1 and words:
        given = f"{len(prompts)} prompts of a word each"
        raise ValueError(f'{given}; put the sentence in quotes: train "{" ".join(prompts)}"')


def checked_config(args: argparse.Namespace, processes: int) -> sac.Config:
    """SAC's settings. Raises ValueError if they, the camera or the numbers of things cannot be."""
    camera = args.distance, args.elevation, args.azimuth, args.height
    if not np.isfinite(camera).all() or args.distance <= 0:
        given = f"--distance {args.distance}, --elevation {args.elevation}"
        given += f", --azimuth {args.azimuth}, --height {args.height}"
        raise ValueError(f"{given}: a camera needs finite numbers, and some distance")
    if args.workers is None:
        alone = processes == 1
        args.workers = default_workers(args.envs, args.eval_episodes) if alone else 0
    several = args.workers and (args.envs % args.workers or args.eval_episodes < args.workers)
    if args.workers < 0 or several or args.workers and processes > 1:
        given = f"--workers {args.workers}, --envs {args.envs}, --eval-episodes"
        need = "workers need equal shares of the environments, and an episode each"
        raise ValueError(f"{given} {args.eval_episodes}: {need}; under torchrun there are none")
    uneven = args.envs % processes or args.batch_size % processes
    if args.envs < 1 or args.episodes < 1 or uneven:
        given = f"--envs {args.envs}, --episodes {args.episodes}, --batch-size {args.batch_size}"
        shares = f"at least 1 each, the first and last in equal shares for {processes} processes"
        raise ValueError(f"{given}: {shares}")
    config = sac.Config(**{field.name: getattr(args, field.name) for field in fields(sac.Config)})
    steps = config.round_steps * args.envs
    if config.buffer_size < steps:
        given = f"--buffer-size {config.buffer_size}"
        raise ValueError(f"{given}: it has to hold a round, here of {steps} steps")
    return config


def run_name(task: str | None, prompt: list[str], args: argparse.Namespace) -> str:
    """The task, or the prompt's letters and digits, and what is unusual about the settings."""
    words = "".join(c if c.isalnum() else " " for c in prompt[0].lower()).split()
    name = task or "-".join(words)[:60] or "prompt"
    if args.model != EMBEDDED_CLIP:
        name += f"-{short(args.model)}"
    name += f"-{args.look}" * (args.look != "realistic")
    usual = dict(alpha=0.5, pink=0, gamma=0.95, azimuth=CAMERA["azimuth"])
    for setting, value in usual.items():
        if getattr(args, setting) != value:
            name += f"-{setting}{getattr(args, setting):g}"
    return f"{name}-seed{args.seed}"


def begin_folder(out: Path, overwrite: bool, settings: dict):
    if overwrite:
        remove_run(out)
    (out / "checkpoint").mkdir(parents=True)  # fails if the same command was started twice
    write_json(out / "config.json", settings)
    write_csv(out / "metrics.csv", COLUMNS, [])


def judge_references(judge, agent: sac.SAC, shape: tuple, seed: int) -> dict:
    """Success of what has learned nothing."""
    rng, rates = np.random.default_rng(seed), {}
    for name, act in (
        ("zero action", lambda obs: np.zeros(shape)),
        ("untrained network", agent.deterministic_action),
        ("random policy", lambda obs: rng.uniform(-1, 1, shape)),
    ):
        half, held = vlmrm.success_rates(judge(act)[1])
        rates[name] = dict(success=half, success_held=held)
    return rates


def learn(agent, player, checkpoint: Checkpoint, out: Path, rank: int) -> list:
    """Algorithm 1, with a progress bar. Keeps metrics.csv, policy.pt and a checkpoint up to date.

    Returns the rows of metrics.csv. Of several processes, the first one reads and writes them.
    """
    metrics, progress = out / "metrics.csv", checkpoint.restore()
    check_same_start(progress.steps, checkpoint.folder)
    rows = read_metrics(metrics) if rank == 0 else []
    total, done = agent.config.steps, progress.steps
    with tqdm(total=total, initial=done, unit="step", disable=rank > 0) as bar:
        for row in sac.train(agent, player, progress):
            best = row.pop("best", False)
            for key in {"success", "eval_success"} & row.keys():
                row[key], row[f"{key}_held"] = vlmrm.success_rates(row[key])
            if rank > 0:
                continue
            # metrics.csv may be a round ahead of the checkpoint
            rows = [*(old for old in rows if old["steps"] < row["steps"]), row]
            if len(rows) * checkpoint.round_size != row["steps"]:
                raise ValueError(f"{metrics} is damaged: it lacks rounds of the checkpoint")
            write_csv(metrics, COLUMNS, rows)
            if best:
                save_policy(out / "policy.pt", progress.best)
            checkpoint.save()
            success = "" if np.isnan(row["success"]) else f", success {row['success']:.0%}"
            bar.set_postfix_str(f"CLIP reward {row['reward']:.3f}{success}")
            bar.update(row["steps"] - bar.n)
    return rows


def resumed(args: argparse.Namespace) -> argparse.Namespace:
    """The settings of the interrupted run args.resume. Raises ValueError if it is none."""
    run = args.resume
    if (run / "result.json").exists():
        raise ValueError(f"{run} is complete: there is nothing to resume")
    if not (run / "checkpoint").is_dir() or not (run / "config.json").exists():
        raise ValueError(f"{run} holds no interrupted run: config.json and checkpoint/ are missing")
    flags = [word for word in args.typed if word.startswith("--")]
    others = [flag for flag in flags if flag.split("=")[0] not in ("--resume", "--workers")]
    others += args.prompt
    if others:
        raise ValueError(f"{run} goes on with its own settings: leave out {' '.join(others)}")
    try:
        settings = dict(json.loads((run / "config.json").read_text()))
        read_metrics(run / "metrics.csv")
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.json or metrics.csv in {run} is damaged ({error})") from error
    if settings.keys() != vars(args).keys() - set(NOT_SETTINGS):
        raise ValueError(f"{run} was begun by another version: it cannot be resumed by this one")
    if args.workers is not None:
        settings["workers"] = args.workers
    return argparse.Namespace(**settings | dict(out=run, resume=run))


def play(args: argparse.Namespace):
    """Shows the policy of a finished training, or one that is kept in assets/policies, in new
    episodes: in a window where there is a screen, else as a GIF in the run's folder.
    """
    agent, settings = load_policy(args.run)
    seed = 4 * 10**9 + args.seed  # other episodes than any of training, judgement or its video
    camera = camera_of(settings)
    act, length = agent.deterministic_action, settings["round_steps"]
    screen = sys.platform != "linux" or os.environ.get("DISPLAY")
    if screen and not args.out:
        return show_window(act, camera, args.episodes, seed, length)
    path = args.out or (args.run if args.run.exists() else Path("runs") / args.run) / "play.gif"
    path.parent.mkdir(parents=True, exist_ok=True)
    record_video(act, camera, settings["look"], path, length, args.episodes, seed)
    print(f"Watch {path}")
