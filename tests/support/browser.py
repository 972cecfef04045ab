"""A headless Chromium, the real Mermaid, axe-core and a font for tests of the report; a test is skipped, with the reason, where one is missing.

Chromium is the system's (BITATLAS_CHROMIUM names another). The others come from npm in the versions that package.json pins, once, into
BITATLAS_TEST_CACHE (else a folder under the system's temporary one), never into the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PINNED = Path(__file__).with_name("package.json")


def chromium_path() -> str:
    """The browser's path; skips the test where there is none."""
    path = os.environ.get("BITATLAS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium found (install chromium, or set BITATLAS_CHROMIUM)")
    return path


@contextmanager
def launched() -> Iterator[Any]:
    """A running browser (playwright's Browser)."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium_path()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, with what it said on the console, what it asked the network for, and the dialogs it opened."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@contextmanager
def opened(
    browser: Any, url: str = "about:blank", width: int = 1280, dark: bool = False, bypass_csp: bool = False
) -> Iterator[Opened]:
    """Open `url` with everything recorded and every request but file: and data: refused. `bypass_csp`: the test may bring a font."""
    theme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, bypass_csp=bypass_csp)
    page = context.new_page()
    seen = Opened(page)
    page.on("console", lambda message: seen.messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.messages.append(f"error: {error}"))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(("file:", "data:")) else route.abort())
    page.goto(url)
    yield seen
    context.close()


def mermaid_script() -> Path:
    """`mermaid.min.js` of the pinned version."""
    return _installed() / "mermaid" / "dist" / "mermaid.min.js"


def axe_script() -> Path:
    """`axe.min.js` of the pinned version."""
    return _installed() / "axe-core" / "axe.min.js"


def font_folder() -> Path:
    """The files of Noto Sans in the pinned version."""
    return _installed() / "@fontsource" / "noto-sans" / "files"


def _installed() -> Path:
    """The folder of the packages that package.json pins, installed on first use; skips the test where there is no npm."""
    versions = json.loads(PINNED.read_text())["dependencies"]
    cache = Path(os.environ.get("BITATLAS_TEST_CACHE") or Path(tempfile.gettempdir()) / "bitatlas-test-cache")
    home = cache / "-".join(f"{name.replace('/', '-')}-{version}" for name, version in sorted(versions.items()))
    if (home / "node_modules").is_dir():
        return home / "node_modules"
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm found (install npm for Mermaid, axe-core and the font)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as beside:
        shutil.copy(PINNED, beside)
        command = [npm, "install", "--prefix", beside, "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(command, cwd=beside, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"npm install failed:\n{done.stderr}"
        part = home.with_name(f"{home.name}.{os.getpid()}.part")
        shutil.copytree(beside, part, dirs_exist_ok=True)
        with suppress(OSError):  # another process was first
            part.rename(home)
        shutil.rmtree(part, ignore_errors=True)
    return home / "node_modules"
