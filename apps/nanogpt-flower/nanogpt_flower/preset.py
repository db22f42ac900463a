"""The presets: named settings, with the loss and the time that were measured with them.

Each preset is a file in `presets/`. `presets/measured.toml` has the measured figures.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_flower.settings import Settings, SettingsError

DIRECTORY = Path(__file__).parent / "presets"
DEFAULT = "quick"
_MEASURED = "measured"


@dataclass(frozen=True)
class Preset:
    """A preset and what was measured with it on Tiny Shakespeare."""

    name: str
    run_config: dict[str, Any]
    summary: str
    val_loss: float
    minutes: dict[str, float]  # by machine and precision

    @property
    def settings(self) -> Settings:
        """The settings of the preset. All others have their defaults."""
        return Settings.from_run_config(self.run_config)

    @property
    def clients(self) -> int:
        """The number of clients for which the preset was made."""
        return self.settings.min_clients

    @property
    def tokens(self) -> int:
        """The number of tokens on which all clients together train in the whole run."""
        settings = self.settings
        steps = self.clients * settings.num_server_rounds * settings.max_steps
        return steps * settings.batch_size * settings.block_size


def all_presets() -> dict[str, Preset]:
    """Return all presets by name."""
    measured = _read(DIRECTORY / f"{_MEASURED}.toml")
    return {
        name: Preset(
            name,
            _read(DIRECTORY / f"{name}.toml"),
            found["summary"],
            found["val-loss"],
            found["minutes"],
        )
        for name, found in measured.items()
    }


def preset_named(name: str) -> Preset:
    """Return the preset with this name.

    Raises:
        SettingsError: there is no such preset. The message names all presets.
    """
    presets = all_presets()
    if name not in presets:
        raise SettingsError(f"the preset is {name!r}; it must be one of {', '.join(presets)}")
    return presets[name]


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
