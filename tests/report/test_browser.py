"""Every kind of page in a real browser: it says nothing on the console and asks nobody for anything.

Chromium is not among what the project installs; where there is none, these are skipped and say so.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from analysis_records import maps_of, record_of
from compared_folders import compared_run, pair
from run_folders import fill_run
from test_analysis_page import other_of
from test_compare import compared, hostile_items
from test_data_page import domain, hostile_record, statistics
from test_report import hostile_run

from scionlm.report import html as report_html
from scionlm.report import render_report
from scionlm.report.analysis_page import analysis_page
from scionlm.report.compare_page import compare_page
from scionlm.report.data_page import data_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")]


@dataclass
class Visit:
    """What a browser made of a page."""

    document: str
    console: list[str]
    requests: list[str]


def visit(page: Path, tmp_path: Path) -> Visit:
    """Open a page in Chromium."""
    log = tmp_path / "net.json"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-sync", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom",
        page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    # The browser's own questions, about updates and the time, come from no origin.
    begun = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return Visit(
        document=done.stdout,
        console=[line for line in done.stderr.splitlines() if ":CONSOLE:" in line],
        requests=[params["url"] for params in begun if params["initiator"] != "not an origin"],
    )


def run_page(tmp_path: Path) -> str:
    (tmp_path / "demo").mkdir()
    fill_run(tmp_path / "demo", control=True, state="done")
    return render_report(tmp_path / "demo")


def hostile_run_page(tmp_path: Path) -> str:
    def make(**changes: object) -> Path:
        (tmp_path / "demo").mkdir()
        fill_run(tmp_path / "demo", control=True, state="done", **changes)
        return tmp_path / "demo"

    return render_report(hostile_run(make))


def comparison_page(tmp_path: Path) -> str:
    runs = [compared_run(tmp_path / f"r{k}", pair(3 + k, 3), seed=k, control=pair(6, 5)) for k in range(3)]
    return compare_page(compared(runs), "three")


PAGES: dict[str, Callable[[Path], str]] = {
    "run": run_page,
    "hostile run": hostile_run_page,
    "comparison": comparison_page,
    "hostile comparison": lambda tmp_path: compare_page(compared(hostile_items(tmp_path)), "hostile"),
    "analysis": lambda _: analysis_page(record_of(lazy=(1,), against=other_of((2,))), maps_of(4), "tiny"),
    "data": lambda _: data_page(statistics({"verse": domain(1), "code": domain(2)}), "corpus"),
    "hostile data": lambda _: data_page(hostile_record(), "corpus"),
}


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_is_quiet_and_asks_nobody(kind: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGES[kind](tmp_path), encoding="utf-8")
    seen = visit(page, tmp_path)
    assert "</footer>" in seen.document  # it was read to its end
    assert not seen.console
    assert not seen.requests


def test_hostile_text_that_is_not_escaped_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    with monkeypatch.context() as patch:
        patch.setattr(report_html, "escape", str)
        page.write_text(hostile_run_page(tmp_path), encoding="utf-8")
    assert any("Content Security Policy" in line for line in visit(page, tmp_path).console)


def test_a_request_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><title>x</title><img src="http://127.0.0.1:9/x.png">', encoding="utf-8")
    assert "http://127.0.0.1:9/x.png" in visit(page, tmp_path).requests
