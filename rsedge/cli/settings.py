"""The default bundle: from the environment, from the user's settings, or the built-in one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsedge.bundle import read_bundle
from rsedge.errors import BundleError, OptionError, OutputError
from rsedge.tomlfile import read_toml, write_toml

ENVIRONMENT = "RSEDGE_MODEL"
SETTINGS = {"model": "Bundle of commands without -m."}
"""Setting of ``rsedge config`` → its meaning."""


def default_model() -> tuple[Path, str]:
    """Return the default bundle and the reason for it.

    Returns:
        Its path, and the reason: ``RSEDGE_MODEL``, the user's settings, or the built-in model.

    Raises:
        BundleError: The chosen path is no bundle; the message names the setting and the next step.
        OptionError: The settings cannot be read.
    """
    if given := os.environ.get(ENVIRONMENT):
        return _bundle(given, f"{ENVIRONMENT} in the environment", f"set {ENVIRONMENT} to a bundle, or unset it")
    if chosen := read_settings().get("model"):
        remedy = "rsedge config set model BUNDLE chooses another, rsedge config unset model the built-in one"
        return _bundle(chosen, f"model in {settings_path()}", remedy)
    return (
        built_in_model(),
        "built in, for land cover in Sentinel-2 true colour at 10 m; choose your own with -m, or rsedge config set "
        "model BUNDLE",
    )


def built_in_model() -> Path:
    """Return the bundle that is installed with rsedge."""
    from importlib.resources import files

    return Path(str(files("rsedge").joinpath("builtin", "sentinel2-rgb.rsedge")))


def settings_path() -> Path:
    """Return the path of the user's settings file, which may not exist."""
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming"
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "rsedge" / "config.toml"


def read_settings() -> dict[str, str]:
    """Return the user's settings; empty without a file.

    Raises:
        OptionError: The file is not TOML, or has unknown keys or wrong values; the message names all of them.
    """
    path = settings_path()
    if not path.exists():
        return {}
    values = read_toml(path)
    problems = [f"unknown setting {name}" for name in sorted(set(values) - set(SETTINGS))]
    problems += [f"{name} is {values[name]!r}, expected text" for name in SETTINGS if not _is_text(values.get(name))]
    if problems:
        raise OptionError(f"{path}: {'; '.join(problems)}; known settings: {', '.join(SETTINGS)}")
    return values


def change_setting(name: str, value: str | None) -> None:
    """Set a setting, or remove it if ``value`` is None. A path is checked and stored as an absolute path.

    Raises:
        OptionError: The setting is unknown, or the settings cannot be read.
        BundleError: ``value`` is not a bundle.
        OutputError: The file cannot be written.
    """
    if name not in SETTINGS:
        raise OptionError(f"unknown setting {name!r}: expected {', '.join(SETTINGS)}")
    settings: Mapping[str, Any] = read_settings()
    if value is not None:
        value = str(read_bundle(Path(value).expanduser()).path.resolve())
    path = settings_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        write_toml(draft, {**settings, name: value})
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _bundle(value: str, source: str, remedy: str) -> tuple[Path, str]:
    path = Path(value).expanduser()
    try:
        read_bundle(path)
    except BundleError as error:
        raise BundleError(f"the default model, from {source}, cannot be used: {error}\n{remedy}") from error
    return path, source
