"""Which bundle is used where none is named: the environment's, the user's, or the one that is installed with rsedge."""

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
SETTINGS = {"model": "Bundle of commands that are given no -m."}
"""What ``rsedge config`` knows: setting → what it is for."""


def default_model() -> tuple[Path, str]:
    """The bundle to use where none is named, and why this one.

    Returns:
        Its path, and the reason: ``RSEDGE_MODEL``, the user's settings, or that it is the built-in one.

    Raises:
        BundleError: The chosen path is no bundle; says who chose it and how to choose another.
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
    """The bundle that is installed with rsedge."""
    from importlib.resources import files

    return Path(str(files("rsedge").joinpath("builtin", "sentinel2-rgb.rsedge")))


def settings_path() -> Path:
    """The user's settings file, whether it is there or not."""
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming"
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "rsedge" / "config.toml"


def read_settings() -> dict[str, str]:
    """The user's settings; none if there is no file.

    Raises:
        OptionError: The file is not TOML, or has keys or values that are not accepted; all are named.
    """
    path = settings_path()
    if not path.exists():
        return {}
    values = read_toml(path)
    problems = [f"unknown setting {name}" for name in sorted(set(values) - set(SETTINGS))]
    problems += [f"{name} is {values[name]!r}, expected text" for name in SETTINGS if not _is_text(values.get(name))]
    if problems:
        raise OptionError(f"{path}: {'; '.join(problems)}; there is: {', '.join(SETTINGS)}")
    return values


def change_setting(name: str, value: str | None) -> None:
    """Set a setting, or remove it if ``value`` is None. A path is checked and stored absolute.

    Raises:
        OptionError: There is no such setting, or the settings cannot be read.
        BundleError: ``value`` is no bundle.
        OutputError: The file cannot be written.
    """
    if name not in SETTINGS:
        raise OptionError(f"there is no setting {name!r}: there is {', '.join(SETTINGS)}")
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
