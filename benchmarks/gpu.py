"""What a GPU makes of it, in one command of at most eight minutes:

    python benchmarks/gpu.py

    frames      drawn per second, by one process and by several, and what OpenGL draws with
    encoders    of four CLIPs in bf16: pictures per second, and how near that is to the chip's peak
    updates     of SAC per second: ours, eager, compiled and as CUDA graphs; those of others
    loop        steps per second of the whole training, with the embedded CLIP and with the largest,
                with this project's settings and with the paper's, with 1 and 8 workers; and from
                that the hours that the paper's 10 million steps would take

CLIPs have random weights, on which speed does not depend, so that it needs no network. Leaves
gpu.json and gpu.md in runs/. With --device cpu and --small it tries itself out. Run nothing beside
it.
"""

import argparse
import functools
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # first: it chooses how to draw
import sac
import gymnasium
import mujoco
import numpy as np
import open_clip
import torch
from support.workers import Workers
from benchmarks.speed import ACT, OBS, PROMPTS, CleanRL, Spaces, operations, poses, random_clip

# Of matrix products in bf16 without sparsity, TFLOP/s, by NVIDIA's data sheets
PEAKS = {"H100": 989, "H200": 989, "A100": 312}
MODELS = "ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"
PAPER = dict(learning_starts=50_000, updates_per_step=1 / 32, batch_size=512)


def rate(function: Callable[[], int], seconds: float, device: str) -> float:
    """Work per second: function does some and returns how much. The first call is not counted."""

    def wait():
        if device != "cpu":
            torch.cuda.synchronize(device)

    function()
    wait()
    work, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or not work:
        work += function()
        wait()
    return work / passed


# --------------------------------------------------------------------------------------------------
# Frames


def drawn_by() -> str:
    """The renderer's name by OpenGL. llvmpipe is the CPU: then drawing does not use the GPU."""
    from OpenGL import GL

    scene = vlmrm.Scene(8)
    vlmrm.render_states(scene, poses(1))
    with vlmrm.opengl():
        scene.renderer._gl_context.make_current()
        return GL.glGetString(GL.GL_RENDERER).decode()


def draw_for(size: int, seconds: float, barrier) -> float:
    """Frames per second of one process among several that begin together."""
    torch.set_num_threads(1)
    scene, states = vlmrm.Scene((size, size)), poses(100)
    vlmrm.render_states(scene, states)
    if barrier:
        barrier.wait()
    return rate(lambda: len(vlmrm.render_states(scene, states)), seconds, "cpu")


def measure_frames(args) -> list[dict]:
    rows, context = [], multiprocessing.get_context("spawn")
    for size in args.pixels:
        for count in sorted({1, args.processes}):
            with context.Manager() as manager, context.Pool(count) as pool:
                barrier = manager.Barrier(count)
                jobs = [(size, args.seconds, barrier)] * count
                total = sum(pool.starmap(draw_for, jobs, chunksize=1))
            rows.append(dict(pixels=size, processes=count, frames_per_s=total))
            print(rows[-1], flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# Encoders


@torch.inference_mode()
def measure_encoders(args) -> list[dict]:
    rows = []
    for name in args.models:
        clip, best = random_clip(name, args.device, "bf16"), {}
        x = torch.randn(1, 3, *clip.size, device=args.device, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        work = operations(clip.model, x)
        for batch in args.batches:
            pictures = x.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)

            def encode(model=clip.model, pictures=pictures, batch=batch):
                model.encode_image(pictures)
                return batch

            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats(args.device)
            try:
                speed = rate(encode, args.seconds / 2, args.device)
            except torch.OutOfMemoryError:
                break
            if speed > best.get("images_per_s", 0):
                best = dict(batch=batch, images_per_s=speed)
                if args.device != "cpu":
                    best["memory_GiB"] = torch.cuda.max_memory_allocated(args.device) / 2**30
        tflops = work * best["images_per_s"] / 1e12
        row = dict(model=name, GFLOP_per_image=work / 1e9) | best | dict(TFLOP_per_s=tflops)
        rows.append(row | dict(share_of_peak=tflops / args.peak if args.peak else None))
        print(rows[-1], flush=True)
        del clip, encode  # or the next model would have to fit in beside it
    return rows


# --------------------------------------------------------------------------------------------------
# SAC


def measure_updates(args) -> list[dict]:
    import stable_baselines3

    rows, spaces = [], (Spaces.observation_space, Spaces.action_space)
    for batch in (256, 512):
        buffer, width = sac.ReplayBuffer(20_000, OBS, ACT), 2 * OBS + ACT + 2
        data = torch.randn(20_000, width)
        buffer.add(data * (torch.arange(width) < width - 1))  # the last column: none terminated

        def agent(mode=None):
            made = sac.SAC(*spaces, sac.Config(batch_size=batch), args.device)
            made.norm.update(data[:, :OBS].to(args.device))
            for loss in ("critic_loss", "actor_loss") if mode else ():
                setattr(made, loss, torch.compile(getattr(made, loss), mode=mode))
            return made

        sb3 = stable_baselines3.SAC(
            "MlpPolicy", Spaces(), batch_size=batch, buffer_size=20_000, device=args.device
        )
        sb3.set_logger(stable_baselines3.common.logger.Logger(None, []))
        for _ in range(2000):
            obs = np.random.randn(2, 1, OBS).astype(np.float32)
            sb3.replay_buffer.add(*obs, np.random.rand(1, ACT), np.zeros(1), np.zeros(1), [{}])
        cleanrl = CleanRL(args.device)

        def updates(learner):
            for _ in range(args.updates):
                learner.update(*buffer.sample(batch, args.device))
            return args.updates

        def of_cleanrl():
            for _ in range(args.updates):
                obs, action, reward, next_obs, terminated = buffer.sample(batch, args.device)
                cleanrl.update(obs, action, reward[:, None], next_obs, terminated[:, None])
            return args.updates

        def of_sb3():
            sb3.train(args.updates, batch)
            return args.updates

        ours = agent()
        learners = dict(ours=lambda: updates(ours))
        if args.device != "cpu":
            compiled, graphs = agent("default"), agent("reduce-overhead")
            learners["ours, torch.compile"] = lambda: updates(compiled)
            learners["ours, CUDA graphs by torch.compile"] = lambda: updates(graphs)
        learners |= {"stable-baselines3": of_sb3, "CleanRL's update": of_cleanrl}
        for name, learner in learners.items():
            try:
                speed = rate(learner, args.seconds, args.device)
            except Exception as error:  # one way that fails says so, and costs no other row
                speed = None
                print(f"{name}: {' '.join(str(error).split())[:200]}", flush=True)
            rows.append(dict(learner=name, batch=batch, updates_per_s=speed))
            print(rows[-1], flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# The whole loop


def measure_loop(args) -> list[dict]:
    rows = []
    # a large CLIP is slow: rounds of a quarter of the steps give about the same rate
    lengths = {"tinyclip": args.round_steps, args.models[-1]: max(1, args.round_steps // 4)}
    for name, length in lengths.items():
        clip = vlmrm.CLIP(name, args.device) if name == "tinyclip" else None
        clip = clip or random_clip(name, args.device, "bf16")
        reward_fn = vlmrm.VLMReward(clip, *PROMPTS)
        for settings, count in ({}, args.envs[0]), (PAPER, args.envs[1]):
            # learning from the first round, as later; evaluations are as rare as in a long run
            settings = settings | dict(learning_starts=1, eval_every=10**7, steps=10**7)
            settings |= dict(eval_episodes=count, round_steps=length)
            config = sac.Config(**settings, buffer_size=100_000)
            agent, player = vlmrm.prepare(reward_fn, config, count=1)
            scene = player.envs.envs[0].unwrapped.scene
            make = functools.partial(vlmrm.make_envs, scene, episode_steps=length)
            for workers in args.workers:
                player = Workers(make, count, reward_fn, config, workers, label_here=True)
                rounds = sac.train(agent, player)
                next(rounds), next(rounds)  # the first one waits until the workers are there

                def play():
                    next(rounds)
                    return count * length

                speed = rate(play, 3 * args.seconds, args.device)
                player.close()
                whose = "the paper's" if "batch_size" in settings else "ours"
                row = dict(clip=name, settings=whose, environments=count, workers=workers)
                row["round_steps"] = length
                row |= {"steps_per_s": speed, "hours for 10 million steps": 1e7 / speed / 3600}
                rows.append(row)
                print(rows[-1], flush=True)
        del clip, reward_fn
    return rows


def table(rows: list[dict]) -> str:
    """Rows in Markdown."""

    def cell(value):
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(key)) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description="Times this project on a GPU.")
    add = parser.add_argument
    add("--device", default="cuda")
    add("--models", nargs="+", default=MODELS, help="open_clip architectures; the last: the loop's")
    add("--processes", type=int, default=8, help="that draw together")
    add("--seconds", type=float, default=4, help="for most measurements")
    add("--small", action="store_true", help="all as short as can be, to try it out")
    add("--out", type=Path, default=Path("runs"), help="folder of gpu.json and gpu.md")
    args = parser.parse_args()
    args.batches, args.updates = (64, 128, 256, 512, 1024), 100
    args.envs, args.round_steps, args.pixels, args.workers = (16, 32), 100, (96, 224), (1, 8)
    if args.small:
        args.batches, args.updates, args.seconds = (1, 2), 1, 0.01
        args.envs, args.round_steps, args.pixels, args.workers = (1, 2), 2, (96,), (1,)
    gpu = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "none"
    args.peak = next((peak for name, peak in PEAKS.items() if name in gpu), None)
    modules = torch, open_clip, gymnasium, mujoco
    result = dict(gpu=gpu, peak_TFLOP_per_s=args.peak, drawn_by=drawn_by())
    result["cpus"] = multiprocessing.cpu_count()
    result["versions"] = dict(python=platform.python_version())
    result["versions"] |= {module.__name__: module.__version__ for module in modules}
    args.out.mkdir(parents=True, exist_ok=True)
    print(result, flush=True)
    text = f"# On {gpu}\n\nDrawn by {result['drawn_by']}.\n"
    for measure in measure_frames, measure_encoders, measure_updates, measure_loop:
        name, start = measure.__name__.removeprefix("measure_"), time.perf_counter()
        result[name] = measure(args)
        took = time.perf_counter() - start
        print(f"{name}: {took:.0f} seconds", flush=True)
        text += f"\n## {name}\n\n{table(result[name])}\n"
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "gpu.md").write_text(text)  # what is done is kept
    print(f"\n{text}\nSee {args.out}/gpu.json and gpu.md")


if __name__ == "__main__":
    main()
