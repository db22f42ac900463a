"""Names of the app's policy and state that the faults rely on.

If the app changes one of them, only this file has to follow.
"""

import re
from pathlib import Path
from typing import Any

from nanogpt_flower.client_node import default_policy_text

# The runs of the faults are small: fewer windows and steps than the default policy allows.
SMALL_RUNS = """\
queries = ["label", "vocabulary", "end_of_run"]
max-rounds = 1_000
max-rounds-per-day = 10_000

[run-config]
batch-size = { min = 1, max = 256 }
block-size = { min = 1, max = 256 }
max-steps = { min = 1, max = 1000 }

[limits]
characters = { min = 0 }
steps = { min = 0 }
windows = { min = 0 }
tokens = { min = 0 }
learning-rate-sum = { min = 0 }
"""

# A refusal begins with a code, then comes a sentence.
REFUSAL = re.compile(r"[a-z][a-z-]*: \S.*")
LONGEST_REASON = 600  # characters: 500 of the client's, and the server's own words
MOST_RUNS = 20  # runs of which one client keeps a state
SECRET_MODES = {"directory": 0o700, "file": 0o600}
STATE_FILES = "*.safetensors"  # the files of a client's state


def deployed(part: Path, state: Path, policy: Path | None = None) -> dict[str, Any]:
    """Return the node config of a SuperNode with its own text.

    Without a policy file it has the default policy, but for shorter texts.
    """
    if policy is None:
        policy = part / "policy.toml"
        rules = re.sub(r"(?m)^characters = .*", "characters = { min = 0 }", default_policy_text())
        policy.write_text(rules, encoding="utf-8")
    return {"data-path": str(part), "state-path": str(state), "policy": str(policy)}


def audit_lines(state: Path) -> list[str]:
    """Return the lines of a client's audit log."""
    return [
        line
        for path in sorted(state.rglob("audit*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
