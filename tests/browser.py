"""A headless Chromium for tests of pages: what a page asks for and complains of is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Opened:
    """A page with what went on in it.

    Attributes:
        page: Playwright's page.
        requests: Every address it asked for, ``data:`` left out.
        complaints: Console warnings and errors, uncaught exceptions, dialogs.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, driven by Playwright; the test is skipped where either is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # No sandbox: as root, in a container, Chromium has none; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Opened]:
    """The file as a page; ``options`` are those of Playwright's ``new_context``, such as ``viewport``."""
    context = browser.new_context(**options)
    try:
        seen = Opened(context.new_page())

        def refuse(dialog: Any) -> None:
            seen.complaints.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        def hear(message: Any) -> None:
            if message.type in ("error", "warning"):
                seen.complaints.append(f"{message.type}: {message.text}")

        seen.page.on("request", lambda request: request.url.startswith("data:") or seen.requests.append(request.url))
        seen.page.on("console", hear)
        seen.page.on("pageerror", lambda error: seen.complaints.append(f"exception: {error}"))
        seen.page.on("dialog", refuse)
        seen.page.goto(path.as_uri())
        yield seen
    finally:
        context.close()
