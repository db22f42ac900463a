"""Find the code blocks and the commands in the READMEs of the repository."""

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
READMES = ("README.md", "CONTRIBUTING.md", "apps/nanogpt-flower/README.md")
READMES += tuple(
    f"packages/{name}/README.md" for name in ("gpt-core", "shakespeare-data", "flower-adapter")
)
PROGRAMS = ("pip", "nox", "nanogpt-flower", "flwr", "flower-superlink", "flower-supernode")
PROGRAMS += ("shakespeare-data", "python", "pytest")
FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a README. The line is that of its first line of code."""

    readme: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands in a block for a shell, without their comments."""
        text = self.text.replace("\\\n", " ")
        lines = [re.sub(r"(^|\s+)#\s.*$", "", line) for line in text.splitlines()]
        if self.language == "console":  # the other lines are output
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if line] if self.language == "sh" else []


def text_of(readme: str) -> str:
    return (REPOSITORY / readme).read_text(encoding="utf-8")


def blocks(readme: str, *languages: str) -> list[Block]:
    """Return the fenced blocks of a README, or only those in some languages."""
    text = text_of(readme)
    found = [
        Block(readme, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])
        for match in FENCED.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def inline_commands(readme: str) -> list[str]:
    """Return the commands in backticks: the names of programs with arguments."""
    codes = re.findall(r"`([^`]+)`", FENCED.sub("", text_of(readme)))
    lines = (" ".join(code.split()) for code in codes)
    return [line for line in lines if " " in line and line.split()[0] in PROGRAMS]


def all_commands() -> dict[str, str]:
    """Return all commands of all READMEs, each with a place where it is.

    A command in backticks that is the beginning of another command is only a mention of it.
    """
    fenced = {
        command: f"{readme}:{block.line}"
        for readme in READMES
        for block in blocks(readme)
        for command in block.commands
    }
    found = {command: readme for readme in READMES for command in inline_commands(readme)} | fenced
    return {
        command: place
        for command, place in found.items()
        if command in fenced or not any(other.startswith(f"{command} ") for other in found)
    }
