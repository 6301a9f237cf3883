"""To be skipped at a first reading. Where this repository is, for the pages that link to it.

    python support/address.py OWNER/NAME    # says it anew in README.md and notebook.ipynb

ADDRESS is the one place where it is kept: badges, clone line and the notebook's set-up follow.
"""

import re
import sys
from pathlib import Path

ADDRESS = "vlmrm/vlmrm"  # of a repository on GitHub, OWNER/NAME
ROOT = Path(__file__).parent.parent
FOLLOW = "README.md", "notebook.ipynb"


def move(root: Path, old: str, new: str):
    """Puts the new address in place of the old one, in all links of a checkout.

    Raises ValueError unless the new one is OWNER/NAME.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise ValueError(f"the address is {new!r}; it has to be OWNER/NAME")
    links = re.compile(rf"((?:github\.com|com/github)/){re.escape(old)}(?![\w.-])")
    for name in FOLLOW:
        page = (root / name).read_text(encoding="utf8")
        (root / name).write_text(links.sub(rf"\g<1>{new}", page), encoding="utf8")
    here = root / "support/address.py"
    here.write_text(here.read_text().replace(f'ADDRESS = "{old}"', f'ADDRESS = "{new}"', 1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        move(ROOT, ADDRESS, sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
