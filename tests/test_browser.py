"""The pages of a run in a real browser, at the width of a phone and of a desktop; and their structure without one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from cammask_fast.cli import main
from cammask_fast.evaluate import Predicted
from cammask_fast.viz.run_report import thumbnail, worst_images, write_run_report
from tests.test_run_report import HOSTILE, make_run

WIDTHS = (390, 1280)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "a_class_whose_folder_has_a_very_long_name_without_any_space_" * 3

LOOK = """
const pages = PAGES, found = {}, frames = [];
for (const [name, page] of Object.entries(pages)) for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.srcdoc = page;
  frames.push(new Promise(done => frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement;
    const right = one => one.getBoundingClientRect().right;
    const within = one => one.getBoundingClientRect().left >= 0 && right(one) <= root.clientWidth + 1;
    found[name + " " + width] = {
      wider: root.scrollWidth > root.clientWidth, width: frame.contentWindow.innerWidth,
      tables: [...inside.querySelectorAll("table")].map(one => within(one.closest(".scroll") || one)),
      pictures: [...inside.images].map(one => one.complete && one.naturalWidth > 0 && within(one)),
      ran: frame.contentWindow.ran === true,
    };
    done();
  }));
  document.body.appendChild(frame);
}
Promise.all(frames).then(() => { document.getElementById("result").textContent = JSON.stringify(found); });
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A report with long and hostile names, and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    names = [f"{HOSTILE}<img src=x onerror='window.ran=true'>", LONG, *(f"class {i}" for i in range(20))]
    runs = [make_run(folder / f"{seed}-{LONG[:60]}", seed=seed, accuracy=80.0 + seed) for seed in range(2)]
    other = make_run(folder / "other", w_distill=5.0, accuracy=60.0)
    record = {**json.loads((runs[0] / "run.json").read_text()), "class_names": names, "command": f"cammask train --data {LONG}"}
    labels = torch.arange(66) % 22
    guesses = (labels + (torch.arange(66) % 3 > 0).long()) % 22
    predicted = Predicted(torch.arange(66), labels, guesses, guesses, torch.rand(66))
    shown = [
        thumbnail(torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8), text) for _, text in worst_images(predicted, names)
    ]
    counts = predicted.confusion(22)[:, :-1]
    page = write_run_report(runs[0], record, counts=counts, wrong=shown, alarms=[f"nothing was learnt {LONG}"])
    assert main(["compare", *map(str, [*runs, other]), "--html", str(folder / "compare.html")]) == 0
    return {"report": page.read_text(), "compare": (folder / "compare.html").read_text()}


@pytest.mark.slow
def test_pages_fit_a_phone_and_a_desktop(pages: dict[str, str], tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    script = LOOK.replace("PAGES", json.dumps(pages).replace("</", "<\\/")).replace("WIDTHS", json.dumps(WIDTHS))
    (tmp_path / "look.html").write_text(f'<!doctype html><body><pre id="result"></pre><script>{script}</script></body>')
    quiet = [
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000", "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "look.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result is not None
    found = json.loads(result.group(1))
    assert set(found) == {f"{name} {width}" for name in pages for width in WIDTHS}
    for name, seen in found.items():
        assert seen["width"] == int(name.split()[1])
        assert not seen["wider"], f"{name} scrolls sideways"
        assert seen["tables"], name
        assert all(seen["tables"]), f"a table of {name} overflows"
        assert seen["pictures"], name
        assert all(seen["pictures"]), f"a picture of {name} is missing or too wide"
        assert not seen["ran"], f"a name ran as a script in {name}"


class Structure(HTMLParser):
    """Tables outside a scrolling box, pictures from elsewhere, and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: list[bool] = []
        self.faults: list[str] = []
        self.tables = self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "div":
            self.boxes.append(given.get("class") == "scroll")
        if tag == "table":
            self.tables += 1
            self.faults += [] if any(self.boxes) else ["a table outside .scroll"]
        if tag == "img":
            self.images += 1
            self.faults += [] if (given.get("src") or "").startswith("data:image/") and given.get("alt") else ["a picture"]
        if tag in ("script", "link", "iframe", "object") or any(name.startswith("on") for name in given):
            self.faults.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.boxes.pop()


def test_pages_are_self_contained(pages: dict[str, str]) -> None:
    for page in pages.values():
        found = structure_of(page)
        assert found.faults == []
        assert found.boxes == []
        assert found.tables >= 3
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
        assert "url(" not in page
        assert "max-width: 100%" in page
    assert structure_of(pages["report"]).images == 6 + 20, (
        "trade-off, curves, matrix, and two wrong images for each of ten classes"
    )
    assert "taken for class 5" in pages["report"]


def structure_of(page: str) -> Structure:
    found = Structure()
    found.feed(page)
    return found
