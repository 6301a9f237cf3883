"""Makes a CLIP like the embedded one, into runs/clip, in about an hour on 2 cores:

    python tinyclip/make.py

What it is, plainly: a stand-in, trained on captioned pictures of this very robot, including
rollouts of policies that were trained on its own rewards, so that everything here runs on any
machine. It is not zero-shot, and its scores say nothing about the paper's models, which never saw
this robot.

    1. states     scripted, blended, mixed and random poses, settled under gravity by weak motors;
                  random policies (poses.py)
    2. captions   computed from each state by geometry, so that any frame, however odd, has a true
                  sentence (captions.py)
    3. training   contrastive, like CLIP's; but in a batch, every sentence that is true of a frame
                  is a positive. And the cosine of a frame and a sentence is pulled towards one
                  value if it is true, another if not
    4. found      if found.npy is there: states of policies of long trainings on earlier models,
                  some of them misled
    5. climbs     three times meanwhile, for each of the eight prompts: random poses are changed at
                  random, and each change is kept that the unfinished model rewards. What it likes,
                  right or wrong, is found in minutes, and joins the data with true captions
    6. policies   so do, once, the states of policies that SAC trains on the unfinished model's
                  rewards

Six combinations, such as kneeling with raised arms, are kept from all of it (HELD_OUT): sentences
to try it on. No success condition and no hand-written reward is used here.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # before mujoco: it chooses how to draw
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import numpy as np
from safetensors.torch import save_file
from tinyclip import poses
from tinyclip.captions import ARMS, LEGS, SUBJECTS, TABLES, TRUNK
from tinyclip.captions import held_out, label, truth, write_captions
from tinyclip.poses import in_parallel
from torch import Tensor

FOUND = Path(__file__).parent / "found.npy"

# --------------------------------------------------------------------------------------------------
# The model and its training

VOCABULARY = 49408  # of CLIP's tokenizer
PREPROCESS = dict(mean=[0.5] * 3, std=[0.25] * 3, interpolation="bicubic", resize_mode="shortest")


def architecture(width: int = 16, size: int = 96) -> dict:
    """A miniature of CLIP's own RN50, for frames of size x size pixels, as open_clip has it.

    One block a stage instead of 3, 4, 6, 3, and a quarter of the width.
    """
    layers = [1, 1, 1, 1]
    return dict(
        embed_dim=64,
        vision_cfg=dict(layers=layers, width=width, head_width=width * 4, image_size=size),
        text_cfg=dict(context_length=32, vocab_size=VOCABULARY, width=32, heads=2, layers=2),
    )


def train(
    frames: np.ndarray,
    labels: np.ndarray,
    config: dict,
    steps: int,
    seed: int = 0,
    batch_size: int = 256,
    grow: Callable | None = None,
    trained: open_clip.CLIP | None = None,
) -> open_clip.CLIP:
    """A new model of frames, uint8 (N, H, W, 3), and their labels (N, 3); or `trained`, further.

    grow(model, i) -> more of both, which is asked for after quarter i = 1, 2, 3 of the steps; for
    a trained model once, with i = 1, after half of them.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = (trained or open_clip.CLIP(**config)).requires_grad_()
    model.to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    mask = used_tokens(tokenizer)
    silence(model, mask)
    # two aids that only training has: classifiers of the labels, and a line from a cosine to 0 or 1
    heads = nn.ModuleList(nn.Linear(64, len(names)) for names in (LEGS, ARMS, TRUNK))
    line = nn.Parameter(
        torch.tensor([1.2, 0.28] if trained else [1.6, 0.0])
    )  # once fitted; a start
    parameters = [*model.parameters(), *heads.parameters(), line]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02, fused=True)
    rate = 1e-3 if trained else 2e-3
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    model.train()
    # bf16 is 1.5 times as fast where a CPU has it; elsewhere a tenth as fast
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    start, report = time.time(), np.zeros(5)
    turns = [0, steps // 2] if trained else [0, steps // 4, steps // 2, 3 * steps // 4]
    for i in range(steps):
        if i in turns:
            if i and grow:
                more_frames, more_labels = grow(model, turns.index(i))
                frames = np.concatenate([frames, more_frames])
                labels = np.concatenate([labels, more_labels])
            order = iter(rng.choice(len(frames), (steps - i, batch_size), p=chances(labels)))
        rows = next(order)
        x = torch.from_numpy(frames[rows]).permute(0, 3, 1, 2).float() / 255
        x = (x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1)) - mean) / std  # darker or brighter
        sentences, says = write_captions(np.tile(labels[rows], (2, 1)), rng)  # two of each frame
        true = torch.from_numpy(truth(labels[rows], says)).float()  # (B frames, 2B sentences)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image = model.encode_image(x.contiguous(memory_format=torch.channels_last))
        image = F.normalize(image.float(), dim=-1)
        text = F.normalize(model.encode_text(tokenizer(sentences)), dim=-1)
        cosine = image @ text.T  # (B, 2B)
        contrastive = contrastive_loss(model.logit_scale.exp().clamp(max=30) * cosine, true)
        y = torch.from_numpy(labels[rows])
        auxiliary = [F.cross_entropy(head(image) * 10, y[:, k]) for k, head in enumerate(heads)]
        # a cosine has to say true or not, and no more. A new model learns less if this has its
        # full weight from the start
        squared = (line[0] * cosine + line[1] - true).square().mean()
        weight = 20 if trained else 20 * i / steps
        loss = contrastive + weight * squared + 0.5 * sum(auxiliary)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        silence(model, mask)
        report += [contrastive.item(), squared.item(), *(a.item() for a in auxiliary)]
        if (i + 1) % 100 == 0:
            names = "contrastive", "squared", "legs", "arms", "trunk"
            losses = " ".join(f"{name} {value / 100:.3f}" for name, value in zip(names, report))
            print(f"  step {i + 1}/{steps} {losses} {time.time() - start:.0f} s", flush=True)
            report[:] = 0
    return model.eval()


def used_tokens(tokenizer: open_clip.SimpleTokenizer) -> Tensor:
    """1 for each token that a caption may use, 0 for the others: (VOCABULARY, 1)."""
    phrases = [phrase for sentences, _ in TABLES for phrase in sentences]
    captions = [f"{subject} {phrase}" for subject in SUBJECTS for phrase in phrases]
    used = tokenizer([*captions, ", "]).unique()
    return torch.zeros(VOCABULARY, 1).index_fill_(0, used, 1)


@torch.no_grad()
def silence(model: open_clip.CLIP, mask: Tensor):
    """Makes the tokens that no caption uses say nothing."""
    model.token_embedding.weight.mul_(mask)


def chances(labels: np.ndarray) -> np.ndarray:
    """How probable each frame of labels (N, 3) is in a batch, (N,): rare legs and arms are more."""
    legs, arms = (np.bincount(labels[:, k])[labels[:, k]] for k in (0, 1))
    chance = 1 / np.sqrt(legs) * (1 / np.sqrt(arms))
    return chance / chance.sum()


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss with several positives: the mean cross-entropy of both directions.

    logits (B frames, C sentences); true: 1 where the sentence is true of the frame, else 0.
    """
    of_frames = (true / true.sum(1, keepdim=True)) * logits.log_softmax(1)
    of_sentences = (true / true.sum(0)) * logits.log_softmax(0)
    return -of_frames.sum(1).mean() / 2 - of_sentences.sum(0).mean() / 2


def save(model: open_clip.CLIP, config: dict, folder: Path):
    """Leaves the model in a folder, as open_clip's local-dir: wants it, with weights in fp16."""
    folder.mkdir(exist_ok=True, parents=True)
    settings = dict(model_cfg=config, preprocess_cfg=PREPROCESS)
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    weights = {}
    for name, value in model.state_dict().items():
        half = value.is_floating_point() and "running" not in name  # statistics stay in fp32
        weights[name] = (value.half() if half else value).contiguous()
    save_file(weights, folder / "open_clip_model.safetensors")


# --------------------------------------------------------------------------------------------------
# The command line


def render(states: np.ndarray, size: int) -> np.ndarray:
    """qpos (N, 24) -> uint8 (N, size, size, 3)."""
    return vlmrm.render_states(vlmrm.Scene((size, size)), states)


def draw(states: np.ndarray, size: int) -> np.ndarray:
    """render, by two processes."""
    return np.concatenate(in_parallel(render, [(half, size) for half in np.array_split(states, 2)]))


def admit(states: np.ndarray) -> np.ndarray:
    """Those of the states (N, 24) that are not held out."""
    return states[~held_out(vlmrm.measure_states(vlmrm.Scene().model, states))]


def make(args: argparse.Namespace):
    """States, training and climbs, as at the top of this file."""
    start, config = time.time(), architecture(args.width, args.size)

    def log(text):
        print(f"[{(time.time() - start) / 60:.1f} min] {text}", flush=True)

    kept = np.load(args.further) if args.further else np.zeros((0, 24), np.float32)
    first_seed = len(kept)  # other seeds for other poses than those that were kept
    jobs = [(first_seed + i, 5500, 1250, 75) for i in range(2 if args.further else 4)]
    states = [kept, *in_parallel(poses.make_states, jobs)]
    if FOUND.exists():
        found = np.load(FOUND).astype(np.float32)
        rng = np.random.default_rng(4)
        states += [found, poses.around(poses.Body(), np.tile(found, (3, 1)), rng)]
    states = [admit(np.concatenate(states))]
    log(f"{len(states[0])} states to begin with")

    def grow(model, turn):
        save(model, config, args.out)
        prompts = [prompt for prompt, _ in vlmrm.TASKS.values()]
        seeds = [first_seed + 100 * turn + i for i in range(len(prompts))]
        jobs = [(prompt, seed, args.out) for prompt, seed in zip(prompts, seeds)]
        found = in_parallel(poses.climbed_states, jobs)
        if turn == 2:
            jobs = [(p, i, args.policy_steps, 2000, args.out) for i, p in enumerate(prompts)]
            found += in_parallel(poses.on_policy_states, jobs)
        states.append(admit(np.concatenate(found)))
        log(f"{len(states[-1])} states more")
        return draw(states[-1], args.size), label(states[-1])

    labels = label(states[0])
    for k, names in enumerate((LEGS, ARMS, TRUNK)):
        counts = np.bincount(labels[:, k], minlength=len(names))
        print("  " + ", ".join(f"{name} {count}" for name, count in zip(names, counts)))
    trained = None
    if args.further:
        trained = vlmrm.CLIP(vlmrm.EMBEDDED_CLIP, device="cpu").model.float()
    frames = draw(states[0], args.size)
    model = train(frames, labels, config, args.steps, grow=grow, trained=trained)
    save(model, config, args.out)
    log(f"a model in {args.out}")
    if args.keep:
        np.save(args.keep, np.concatenate(states))


def make_member(states: Path, width: int, seed: int, args: argparse.Namespace):
    """One model of --family, on the states in a .npy file."""
    torch.set_num_threads(1)
    states, config = np.load(states), architecture(width, args.size)
    model = train(render(states, args.size), label(states), config, args.steps, seed)
    save(model, config, args.out / f"width{width}-seed{seed}")


def find(runs: list[Path]):
    """Adds states of the policies of finished runs to found.npy."""
    found = [np.load(FOUND)] if FOUND.exists() else []
    found += [poses.played_states(run) for run in runs]
    np.save(FOUND, np.concatenate(found).astype(np.float16))


def main():
    parser = argparse.ArgumentParser(
        description="Makes a CLIP like the embedded one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/clip"), help="where the model goes")
    add("--steps", type=int, default=4000, help="training steps")
    meaning = "environment steps of each policy"
    add("--policy-steps", type=int, default=20_000, help=meaning)
    add("--width", type=int, default=16, help="of the image tower")
    add("--size", type=int, default=96, help="of the frames, in pixels")
    add("--keep", type=Path, help="a .npy file for the states that it was trained on")
    meaning = "train the embedded CLIP further for --steps: on the states that --keep kept of its "
    meaning += "training, those of found.npy, half as many new ones as a training begins with, and "
    add("--further", type=Path, metavar="KEPT", help=meaning + "what climbs find once")
    meaning = "train several widths and seeds for --steps on the states that --keep kept, into "
    add("--family", type=Path, metavar="KEPT", help=meaning + "folders under --out")
    meaning = "make nothing: add states of the policies of these finished runs to found.npy"
    add("--find", nargs="+", type=Path, metavar="RUN", help=meaning)
    args = parser.parse_args()
    if args.find:
        find(args.find)
    elif args.family:
        members = [(width, seed) for width in (24, 16, 8, 4, 2) for seed in range(2)]
        in_parallel(make_member, [(args.family, *member, args) for member in members])
    else:
        make(args)


if __name__ == "__main__":
    main()
