"""To be skipped at a first reading. The command line: python vlmrm.py --help."""

import argparse
import inspect
import os
import shlex
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import sac
from evaluation.evaluate import evaluate
from vlmrm import BASELINE_PROMPT, CAMERA, EMBEDDED_CLIP, JUDGED, TASKS

from support.training import play, train
from support.vocabulary import phrases

COMMANDS = dict(train=train, evaluate=evaluate, play=play, phrases=phrases)


def path(text: str) -> Path:
    return Path(text).expanduser()  # the shell leaves the ~ of --out=~/run


def add(group, name: str, meaning: str, **settings):
    if type(settings.get("default")) in (int, float):  # others say in words what happens without
        meaning += " (default: %(default)s)"
    group.add_argument(name, help=meaning, **settings)


def add_clip(group, **several):
    """What both commands ask of a CLIP."""
    meaning = "NAME/TAG from open_clip's list, hf-hub:REPO or local-dir:PATH. Left out: tinyclip, "
    meaning += "embedded here, which reads few phrases and never saw this robot"
    add(group, "--model", meaning, default=[EMBEDDED_CLIP] if several else EMBEDDED_CLIP, **several)
    precisions = dict(choices=("fp32", "fp16", "bf16"), default="fp32")
    add(group, "--precision", "of CLIP's weights. Left out: fp32", **precisions)
    add(group, "--device", "cpu, cuda, cuda:1, ... Left out: cuda where there is one")
    meaning = f"the scene without the goal; several are averaged. Left out: {BASELINE_PROMPT}"
    add(group, "--baseline", meaning, action="append", metavar="PROMPT")


def add_train(command):
    group = command.add_argument_group("the task")
    add(group, "prompt", "the goal in a sentence, or in several to be averaged", nargs="*")
    meaning = "one of the paper's eight, a combination that tinyclip was never shown, or another: "
    meaning += "its prompt, unless one is given, and its success condition. Left out: kneeling; "
    meaning += "with a prompt, the task of that prompt, if there is one"
    add(group, "--task", meaning, choices=JUDGED)
    meaning = "strength of the projection, from 0 (plain CLIP) to 1 [0 in the paper's Table 1]"
    add(group, "--alpha", meaning, type=float, default=0.5)
    add_clip(command.add_argument_group("the CLIP"))
    group = command.add_argument_group("the scene")
    looks = dict(choices=["realistic", "original"], default="realistic")
    add(group, "--look", "the colours; original is Gymnasium's own. Left out: realistic", **looks)
    add(group, "--distance", "of the camera, in m", type=float, default=CAMERA["distance"])
    meaning = "how far up the camera looks, in degrees; below 0, down"
    add(group, "--elevation", meaning, type=float, default=CAMERA["elevation"])
    meaning = "direction of the camera's look, in degrees; 180 sees the robot's front at the start"
    add(group, "--azimuth", meaning, type=float, default=CAMERA["azimuth"])
    meaning = "of the point that the camera looks at, in m"
    add(group, "--height", meaning, type=float, default=float(CAMERA["lookat"][2]))
    group = command.add_argument_group("learning, by SAC. In [brackets]: the paper's, if different")
    add(group, "--envs", "environments that step together [32]", type=int, default=16)
    meaning = "processes that play while this one learns; another number of them may give another "
    meaning += "run of the same seed. Left out: 1 on two cores, at most 8"
    add(group, "--workers", meaning, type=int)
    for field in fields(sac.Config):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        add(group, flag, field.metadata["help"], type=kind, default=field.default)
    group = command.add_argument_group("the output")
    add(group, "--episodes", "episodes of the final judgement", type=int, default=100)
    meaning = "folder; left out: runs/TASK-seedN, and in its name any unusual model, look, alpha, "
    add(group, "--out", meaning + "pink, gamma, azimuth", type=path)
    add(group, "--overwrite", "replace a run that is already there", action="store_true")
    meaning = "go on with the interrupted run in this folder, with the settings it was begun with"
    add(group, "--resume", meaning, type=path, metavar="RUN")


def add_evaluate(command):
    meaning = f"of {', '.join(TASKS)}. Left out: all eight"
    add(command, "--task", meaning, nargs="+", choices=TASKS, metavar="TASK")
    alphas = [0, 0.25, 0.5, 0.75, 1]
    meaning = "the middle one is drawn where a figure needs one. Left out: "
    meaning += " ".join(map(str, alphas))
    add(command, "--alpha", meaning, nargs="+", type=float, default=alphas)
    add_clip(command, nargs="+")
    add(command, "--out", "folder of the figures; left out: runs/evaluate", type=path)
    add(command, "--overwrite", "replace an evaluation already there", action="store_true")


def add_play(command):
    meaning = "folder of a finished training, such as runs/kneeling-seed0, or the name of a policy "
    add(command, "run", meaning + "in assets/policies, such as kneeling", type=path)
    add(command, "--episodes", "how many", type=int, default=3)
    add(command, "--seed", "of the first episode; others have other seeds", type=int, default=0)
    add(command, "--out", "a GIF to write, in place of a window or RUN/play.gif", type=path)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="vlmrm.py",
        description="One sentence in, a trained humanoid out.",
        epilog="Without a command: train, on the sentence that is given, or on kneeling. "
        "Each command has its own --help.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, short_help, add_options in (
        ("train", "train a policy on a sentence", add_train),
        ("evaluate", "judge rewards before training on them", add_evaluate),
        ("play", "show a trained policy in new episodes", add_play),
        ("phrases", "list what the embedded CLIP can read", lambda command: None),
    ):
        command = commands.add_parser(
            name,
            help=short_help,
            description=inspect.getdoc(COMMANDS[name]),
            usage="vlmrm.py train [PROMPT ...] [OPTIONS]" if name == "train" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_options(command)
    return top


def main(argv: list[str] | None = None):
    argv = list(sys.argv[1:] if argv is None else argv)
    words = {*COMMANDS, "-h", "--help"}
    if not argv or " " in argv[0] or argv[0].startswith("-") and not words & set(argv):
        argv.insert(0, "train")
    args = parser().parse_args(argv)
    args.typed = argv
    try:
        COMMANDS[args.command](args)
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        if args.command != "phrases":  # which was read far enough, as by: phrases | head
            sys.exit(f"error: {error}")
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that is not ours
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        why = textwrap.shorten(str(error), 160, placeholder="...")
        advice = "use a smaller model, --precision fp16, or smaller --buffer-size, --envs, --hidden"
        sys.exit(f"error: not enough memory ({why}): {advice}")
    except KeyboardInterrupt:
        sys.exit(interrupted(args))


def interrupted(args: argparse.Namespace) -> str:
    run = getattr(args, "resume", None) or args.out
    if args.command != "train" or not run or not (run / "checkpoint").is_dir():
        return "interrupted"
    resume = shlex.join(["train", "--resume", str(run)])
    return f"interrupted. The training goes on from its last round by {resume}"
