"""To be skipped at a first reading. What the embedded CLIP can read: the command `phrases`."""

import argparse
import re
import textwrap

import torch
from tinyclip.captions import ARM_PHRASES, LEG_PHRASES, SUBJECTS, TRUNK_PHRASES
from vlmrm import CLIP


def phrases(args: argparse.Namespace):
    """Lists what tinyclip, the embedded CLIP, was taught to read. A sentence begins with a subject
    and says at most one thing of each kind; those of one line mean the same. Words that are not
    here mean nothing to it. Another CLIP (--model) reads whatever it was trained on.
    """
    print("Subjects:", ", ".join(sorted({*SUBJECTS})))
    kinds = {"legs": LEG_PHRASES, "arms": ARM_PHRASES, "torso": TRUNK_PHRASES}
    for kind, table in kinds.items():
        print(f"\nOf the {kind}:")
        for variants, _ in table:
            text = " | ".join(variants.split("|"))
            print(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="      "))


@torch.no_grad()
def unread_words(clip: CLIP, sentences: list[str]) -> list[str]:
    """Words that a CLIP of tinyclip/make.py never read: such tokens embed as zeros.

    Of any other CLIP, none.
    """
    words = dict.fromkeys(re.findall(r"[^\s,.;:!?]+", " ".join(sentences).lower()))
    table = getattr(clip.model, "token_embedding", None)
    if table is None or not words:
        return []
    silent = ~table.weight.any(1).cpu()
    return [word for word in words if silent[clip.tokenizer([word])].any()]
