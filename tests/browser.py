"""A real browser for the pages of ``dpok label``: a Chromium, and the server that it visits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import ending

#: Chromiums of the system, which are tried if Playwright has none of its own.
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
#: What Chromium says of a request that met no server.
LOST = "net::ERR_"


@contextmanager
def browsing() -> Iterator[Any]:
    """Starts a Chromium: Playwright's own, or else the system's; skips the test if there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra test, is not installed")
    with playwright.sync_playwright() as started:
        launched = _launch(started.chromium, playwright.Error)
        yield launched
        launched.close()


def _launch(chromium: Any, error: type[Exception]) -> Any:
    # No sandbox, which containers forbid; and no /dev/shm, which is small there.
    args = ["--no-sandbox", "--disable-dev-shm-usage"]
    try:
        return chromium.launch(args=args)
    except error as missing:
        if "Executable doesn't exist" not in str(missing):
            raise
    path = next((path for path in map(shutil.which, _NAMES) if path), None)
    if path is None:
        pytest.skip(f"no browser: playwright has none, and none of {', '.join(_NAMES)} is installed")
    return chromium.launch(executable_path=path, args=args)


@contextmanager
def serving(words: Sequence[str], port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs ``dpok label`` with some options until the block ends; yields the process and the address of the page."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "agents", "label", *words, "--no-open", "--port", str(port)]
    env = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process, ending(process):
        assert process.stdout is not None
        # The line that says where the page is comes after the images are drawn.
        found = re.search(r"http://\S+", next((line for line in process.stdout if "http://" in line), ""))
        assert found is not None, "dpok label ended before it served the page"
        yield process, found.group()


@contextmanager
def visiting(browser: Any, address: str, *, may_lose: bool = False, **settings: Any) -> Iterator[Any]:
    """Opens the page as a person named Ada, and yields it at the first pair.

    A request to another host, an error of the script, or one that the browser reports fails the test.

    Args:
        browser: of :func:`browsing`.
        address: of the server.
        may_lose: whether the server is ended while the page is open, so that images of the next pair may be lost.
        **settings: of the browser's context, such as its viewport.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | settings)
    page, problems = context.new_page(), []
    page.on("request", lambda request: request.url.startswith(address) or problems.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto(address)
    page.get_by_label("Your name").fill("Ada")
    page.get_by_role("button", name="Start").click()
    wait_for(page, 0)
    yield page
    assert not [problem for problem in problems if not (may_lose and LOST in problem)]
    context.close()


def wait_for(page: Any, done: int) -> None:
    """Waits until the page says that so many choices are done, and style and script are at work."""
    page.get_by_text(f"{done} done, ").wait_for()
    page.wait_for_load_state()


def finish(page: Any) -> None:
    """Waits until the page says that all is done."""
    page.get_by_role("heading", name="All done. Thank you, Ada!").wait_for()
