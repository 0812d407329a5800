"""Hostile names of cases, classes, groups and errors in every section of the report, as a real browser shows it."""

from __future__ import annotations

import argparse
import shutil
import threading
from pathlib import Path
from typing import Any

from browser import chromium, console, requests

from campaigns.common import Report, Row, autoseg, make_data, must

WATCH = """
window.attacks = [];
for (const name of ['alert', 'confirm', 'prompt']) window[name] = (text) => window.attacks.push(`${name} ${text}`);
document.addEventListener('securitypolicyviolation',
  e => window.attacks.push(`policy ${e.violatedDirective} ${e.blockedURI}`));
"""
LOOK = """
const evil = [...document.querySelectorAll(
  'xss, [onerror], [onload], [onclick], [onmouseover], iframe, object, embed, base, meta[http-equiv=refresh]')];
return {
  attacks: window.attacks || [],
  elements: evil.map(e => e.outerHTML.slice(0, 200)),
  sections: Object.fromEntries([...document.querySelectorAll('section')].map(
    s => [s.id, s.textContent.includes('<xss onload=alert(1)>')])),
  links: [...document.querySelectorAll('[href], [src], [action]')].map(
    e => e.getAttribute('href') || e.getAttribute('src') || e.getAttribute('action')).filter(
    u => !u.startsWith('#') && !u.startsWith('data:')),
};
"""


def go(report: Report, folder: Path, args: argparse.Namespace) -> None:
    if shutil.which("chromedriver") is None:
        with report.row("browser") as row:
            row.skipped = "skipped: no Chromium with chromedriver: apt-get install chromium chromium-driver"
        return
    from test_report_escapes import make_hostile, make_hostile_audit

    # The section that compares networks needs two of them, that of predicted quality eight cases.
    path = make_data(folder / "run", num_cases=8, algos=["segresnet", "dints"], dints={"channel_mul": 0.125})
    must(autoseg("run", "--input", path, limit_s=600))
    make_hostile(folder / "run" / "work_dir")
    make_hostile_audit(folder / "audit")
    with chromium(folder / "profile") as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        for name, work_dir in (("a run", folder / "run" / "work_dir"), ("pseudo-labels", folder / "audit")):
            for how, look in (("from the file", look_at_file), ("by --serve", look_at_server)):
                with report.row(f"{name}, {how}") as row:
                    look(row, driver, work_dir, name == "a run")


def look_at_file(row: Row, driver: Any, work_dir: Path, every: bool) -> None:
    from autoseg.pipeline.stages import STAGES
    from autoseg.report.page import make_report

    check(row, driver, make_report(work_dir, STAGES).as_uri(), every)


def look_at_server(row: Row, driver: Any, work_dir: Path, every: bool) -> None:
    from autoseg.pipeline.stages import STAGES
    from autoseg.report.serve import make_server

    server = make_server(work_dir, STAGES, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        check(row, driver, f"http://127.0.0.1:{server.server_address[1]}/", every)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def check(row: Row, driver: Any, address: str, every: bool) -> None:
    """Open a page, click all that can be clicked, and look at what came of it."""
    requests(driver)  # of the pages before
    driver.get(address)
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true);")
    driver.execute_script(
        "document.querySelectorAll('button, summary, th').forEach(e => { try { e.click(); } catch (error) {} });"
        "document.querySelectorAll('*').forEach(e => e.dispatchEvent(new MouseEvent('mouseover', {bubbles: false})));"
    )
    seen = driver.execute_script(LOOK)
    for section, is_hostile in seen["sections"].items():
        row.tried += 1
        row.count("hostile text shown as text" if is_hostile else "without hostile text")
        if every and not is_hostile:
            row.fault("no hostile text came to this section: the campaign does not test it", section=section)
    for kind in ("attacks", "elements", "links"):
        if seen[kind]:
            row.fault(f"{kind} on the page", what=seen[kind][:10])
    if said := [line for line in console(driver) if "favicon" not in line]:
        row.fault("the console is not empty", said=said[:10])
    if asked := [url for url in requests(driver) if not url.startswith(address.partition("?")[0])]:
        row.fault("asks for other addresses", addresses=asked[:10])
