"""Pictures for the README, from a finished demo: a predicted image, and parts of its report in a headless browser.

autoseg demo && python benchmarks/pictures.py autoseg_demo

Needs Chromium with chromedriver (apt-get install chromium chromium-driver) and the extra `test`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from autoseg.cli.main import run_command

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import chromium, screenshot  # noqa: E402 - the tests' browser

HIDE = """
const hide = (query) => document.querySelectorAll(query).forEach((e) => e.style.display = "none");
hide("nav, .made, .shown, main > section:not(#scores):not(#cases)");
hide("#scores > :nth-child(n + 4), #cases > article ~ *");  // the first table, the first picture
"""
WIDTH, HEIGHT = 1100, 900
"""Pixels of the window."""
MOST_BYTES = 300_000
"""Of all pictures together."""


def predict(demo: Path, work: Path) -> Path:
    """The picture of the first testing case, as `autoseg predict --preview` draws it."""
    case = json.loads((demo / "datalist.json").read_text())["testing"][0]["image"]
    words = ["--image", str(demo / case), "--work_dir", str(demo / "work_dir"), "--output", str(work), "--preview"]
    if code := run_command(["predict", *words]):
        raise SystemExit(code)
    (picture,) = work.glob("*.preview.png")
    return picture


def photograph(report: Path, work: Path) -> Path:
    """The head of the report, its first table of scores and its first case."""
    with chromium(work / "profile", width=WIDTH, height=HEIGHT) as driver:
        driver.get(report.resolve().as_uri())
        driver.execute_script(HIDE)
        screenshot(driver, work / "report.png")
    return work / "report.png"


def save(source: Path, target: Path, *, colours: int) -> int:
    """Write a picture with few colours; return its bytes."""
    with Image.open(source) as image:
        image.convert("RGB").quantize(colours).save(target, optimize=True)
    return target.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    given = parser.parse_args()
    if not shutil.which("chromedriver"):
        sys.exit("no Chromium with chromedriver: apt-get install chromium chromium-driver")
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        sources = {
            "prediction.png": (predict(given.demo, Path(name) / "predicted"), 64),
            "report.png": (photograph(given.demo / "work_dir" / "report.html", Path(name)), 255),
        }
        sizes = {target: save(path, given.output / target, colours=n) for target, (path, n) in sources.items()}
    print(sizes)
    if sum(sizes.values()) > MOST_BYTES:
        sys.exit(f"over {MOST_BYTES} bytes: take fewer colours or a smaller part")


if __name__ == "__main__":
    main()
