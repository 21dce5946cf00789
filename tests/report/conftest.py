from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.report.page_data import ROWS, drawn, many_rows, write_dataset

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str | None:
    given = os.environ.get("AAE_BATCH_CHROMIUM")
    return given or next(filter(None, map(shutil.which, CHROMIUM)), None)


@pytest.fixture(scope="module")  # Playwright's event loop runs in this thread until it is closed
def browser() -> Iterator:
    """Chromium, as this machine has it."""
    path = chromium()
    if path is None:
        pytest.skip(
            "there is no Chromium: apt-get install chromium, or give the path of one in "
            "AAE_BATCH_CHROMIUM"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def look(browser) -> Iterator[Callable]:
    """Open a page of a file, with what a browser's context takes. At the end: it has asked the
    network for nothing, and there is no error on the console."""
    asked: list[str] = []
    complaints: list[str] = []
    contexts = []

    def watch(route) -> None:
        if route.request.url.startswith(("file://", "data:")):
            route.continue_()
        else:
            asked.append(route.request.url)
            route.abort()

    def look(page_file: Path, hash: str = "", until: str = "maps", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        context.route("**/*", watch)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(page_file.as_uri() + hash)
        page.wait_for_selector(f"html[data-{until}]", state="attached")
        return page

    yield look
    for context in contexts:
        context.close()
    assert asked == []
    assert complaints == []


@pytest.fixture(scope="session")
def small_page(tmp_path_factory) -> Path:
    """The page of four pairs and a failed row, beside their pictures; with a detector's scores."""
    return small_page_of(tmp_path_factory.mktemp("small") / "out", "files")


@pytest.fixture(scope="session", params=["webdataset", "parquet"])
def embedded_page(request, tmp_path_factory) -> Path:
    """The same of the layouts whose pictures are part of the page."""
    return small_page_of(tmp_path_factory.mktemp("embedded") / "out", request.param)


def small_page_of(root: Path, form: str) -> Path:
    from aae_batch.dataset.reader import Dataset
    from aae_batch.report.write import write_report
    from tests.report.page_data import write_scores

    storage = write_dataset(root, ROWS, drawn, form)
    pictures = Dataset(storage).table(0).to_pydict()
    write_scores(
        storage,
        "detector",
        0,
        {
            "id": pictures["id"],
            "sha256": pictures["sha256"],
            "subjects_found": [2, 1, 0, 2],
            "found": [[True, True], [True, False], [False, False], [True, True]],
            "bound": [[None, None], [None, None], [None, False], [None, False]],
            "all_bound": [None, None, False, False],
        },
    )
    write_report(storage)
    return root / "report.html"


@pytest.fixture(scope="session")
def large_page(tmp_path_factory) -> Path:
    """The page of 10,000 rows, 5,000 pairs."""
    from aae_batch.report.write import write_report

    words = ("cat", "dog", "frog", "bear", "lion", "crown", "bow", "apple", "clock", "suitcase")
    rows = []
    for pair in range(5000):
        one, two = words[pair % 10], words[pair // 10 % 9 + (pair // 10 % 9 >= pair % 10)]
        same = {"prompt": f"a {one} and a {two}, {pair}", "subjects": [one, two], "seed": pair}
        rows += [
            {"id": f"{pair}-{method}", **same, "method": method}
            for method in ("attend-and-excite", "stable-diffusion")
        ]
    root = tmp_path_factory.mktemp("large") / "out"
    write_report(write_dataset(root, rows, many_rows, shard_size=2500))
    return root / "report.html"
