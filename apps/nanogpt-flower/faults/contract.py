"""Names of the app's policy and state that the faults rely on.

If the app changes one of them, only this file has to follow.
"""

import re
from pathlib import Path
from typing import Any

# The runs of the faults are small: fewer windows and steps than the default policy allows.
SMALL_RUNS = """\
[settings]
batch-size = [1, 256]
block-size = [1, 1024]
max-steps = [1, 1000]

[limits]
least-tokens = 1
"""

# A refusal begins with a code, then comes a sentence.
REFUSAL = re.compile(r"[a-z][a-z-]*: \S.*")
LONGEST_REASON = 600  # characters: 500 of the client's, and the server's own words
MOST_RUNS = 64  # runs of which one client keeps a state
SECRET_MODES = {"directory": 0o700, "file": 0o600}
STATE_FILES = "*.safetensors"  # the files of a client's state


def deployed(part: Path, state: Path, policy: Path | None = None) -> dict[str, Any]:
    """Return the node config of a SuperNode with its own text. None is the default policy."""
    config = {"data-path": str(part), "state-path": str(state)}
    return config | ({"policy": str(policy)} if policy else {})


def audit_lines(state: Path) -> list[str]:
    """Return the lines of a client's audit log."""
    return [
        line
        for path in sorted(state.rglob("audit*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
