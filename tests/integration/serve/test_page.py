"""The page in a real browser: two widths, light and dark, by the keyboard alone."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from aligner_middleware import Aligner
from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.settings import PolicySettings, ServeSettings
from tests.fakes import instructed_aligner, judging_aligner

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def served(folder: Path, policy: PolicySettings, own: Aligner | None = None) -> Iterator[str]:
    aligner = judging_aligner(lambda q, a: a.replace("silly ", ""), lambda q, a: 0.5 if "silly" in a else -3.0)
    app = create_app(ServeSettings(policy=policy, audit=folder / "audit.sqlite"), own or aligner)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("audit"), PolicySettings(keep_texts=True)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(headless=True, executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_an_answer_is_corrected_by_the_keyboard_alone(
    browser: Any, address: str, width: int, scheme: str, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#question:visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("<img src=x onerror=alert(1)>")
    page.keyboard.press("Tab")
    page.keyboard.type("That is a silly question.")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#parts del")
    assert page.inner_text("#parts del").strip() == "silly"
    page.wait_for_selector("#live summary")
    assert page.inner_text("#live summary >> nth=0") == "<img src=x onerror=alert(1)>"
    assert page.locator("img").count() == 0
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "threshold":
            break
    page.keyboard.press("End")
    assert "kept" in page.inner_text("#would")
    page.wait_for_selector("#parts del", state="detached")  # asked again, with this strength
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert errors == []
    page.close()


def test_a_policy_without_overrides_locks_the_slider(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path, PolicySettings(overrides=False)) as address:
        page = browser.new_page()
        page.goto(address)
        page.fill("#question", "Who?")
        page.fill("#answer", "That is a silly question.")
        page.click("#submit")
        page.wait_for_selector("#scale:visible")
        assert page.is_disabled("#threshold")
        assert page.is_disabled("#levels button >> nth=0")
        assert "policy" in page.inner_text("#locked:visible")
        page.close()


def test_an_instruction_is_shown_as_text(browser: Any, tmp_path: Path) -> None:
    policy = PolicySettings(instruction="<img src=x>kind", keep_texts=True)
    aligner = instructed_aligner(lambda instruction, question, answer: answer)
    with aligner, served(tmp_path, policy, aligner) as address:
        page = browser.new_page()
        page.goto(address)
        page.fill("#question", "Who?")
        page.fill("#answer", "You.")
        page.click("#submit")
        page.click("#live summary")
        assert "instruction: <img src=x>kind" in page.inner_text("#live details")
        assert page.locator("img").count() == 0
        page.close()
