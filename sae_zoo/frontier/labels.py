"""How a run's label is shown, wherever it is: ``display`` of the config in conf/sae that has it as its name."""

from __future__ import annotations

import yaml

from sae_zoo.paths import CONFIG_DIR


def _displays() -> dict[str, dict[str, str]]:
    configs = (yaml.safe_load(file.read_text()) for file in sorted((CONFIG_DIR / "sae").glob("*.yaml")))
    return {config["name"]: config["display"] for config in configs if "display" in config}


# label -> name, color and marker (matplotlib's).
DISPLAYS = _displays()
NAMES = {label: display["name"] for label, display in DISPLAYS.items()}
