"""A browser draws the report and uses it. Skipped where there is no Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_report import EVIL, Page, made_run

from grpo_core import report
from grpo_core.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def drawn(page, tmp_path, *options):
    """The page's elements after its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}", *options,
               "--virtual-time-budget=15000", "--dump-dom", page.as_uri()]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return out.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
class TestBrowser:
    def opened(self, tmp_path, *runs):
        dom = drawn(write_report(list(runs), tmp_path / "r.html")[0], tmp_path)
        root = re.search(r"<html[^>]*>", dom)[0]
        assert 'data-report="ready"' in root and "data-error" not in root, root
        return dom

    def test_charts_and_rows_are_drawn(self, tmp_path):
        dom = self.opened(tmp_path, made_run(tmp_path / "a"))
        page = Page(dom)
        assert "<title>a – report</title>" in dom
        lines = [a["d"] for tag, a in page.tags if tag == "path" and a.get("class", "").startswith("line ")]
        panels = [a["id"] for tag, a in page.tags if tag == "article"]
        assert {"panel-accuracy", "panel-reward", "panel-kl", "panel-time-0", "panel-other-0"} <= set(panels)
        assert len(lines) >= 15 and all(re.match(r"^M[\d.]+ [\d.]+(L|M)", d) for d in lines)
        assert not [d for d in lines if "NaN" in d]
        assert sum(tag == "path" and a.get("class", "").startswith("whisker") for tag, a in page.tags) == 2
        assert sum(tag == "path" and a.get("class", "").startswith("fill") for tag, a in page.tags) == 3
        assert sum(tag == "details" and a.get("class") == "completion" for tag, a in page.tags) == 25
        assert "page 1 of 2" in dom and "All 48 completions of 6 steps" in dom

    def test_completions_stay_text(self, tmp_path):
        dom = self.opened(tmp_path, made_run(tmp_path / "a", text=EVIL.replace("{", "{{").replace("}", "}}")))
        assert not [tag for tag, _ in Page(dom).tags if tag == "img"]
        shown = dom[dom.index('class="list"') : dom.index('id="report-data"')]
        assert "&lt;/script&gt;&lt;img src=https" in shown
        assert "\\x1b[31m" in shown and "\\u202e" in shown and "\x1b" not in shown and "\u202e" not in shown

    def test_several_runs_and_an_empty_one(self, tmp_path):
        empty = made_run(tmp_path / "c")
        shutil.rmtree(empty / "batches")
        for name in ("metrics", "evaluation", "completions"):
            (empty / f"{name}.jsonl").unlink()
        dom = self.opened(tmp_path, made_run(tmp_path / "a"), made_run(tmp_path / "b", **{"loss.name": "gspo"}), empty)
        page = Page(dom)
        colours = {a["class"] for tag, a in page.tags if tag == "path" and a.get("class", "").startswith("line ")}
        assert {"line c0 d0", "line c1 d0"} <= colours
        assert "All 96 completions of 12 steps" in dom and "panel-time-1" in dom
        dom = self.opened(tmp_path, empty)
        assert "no step has been logged" in dom and "These runs have no completions" in dom

    def test_filters_order_pages_runs_and_tokens(self, tmp_path, monkeypatch):
        """A script at the end of the page's own uses it as a reader would, and writes down what is shown."""
        shutil.copytree(report.PAGE, tmp_path / "page")
        with open(tmp_path / "page" / "report.js", "a") as file:
            file.write(DRIVER)
        monkeypatch.setattr(report, "PAGE", tmp_path / "page")
        dom = self.opened(tmp_path, made_run(tmp_path / "a"), made_run(tmp_path / "b"))
        seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))
        assert seen["all"] == "96 completions"
        assert seen["search"] == "12 of 96 completions match" and seen["marks"] >= 12
        assert seen["steps"] == "32 of 96 completions match"  # two steps of 8 in two runs
        assert seen["rewarded"] == seen["correct"] == seen["truncated"] == "12 of 96 completions match"
        assert seen["task"] == "8 of 96 completions match"
        assert seen["dumped"] == "16 of 96 completions match"
        assert seen["second page"] == "page 2 of 4"
        assert seen["by advantage"] == "+1.5" and seen["by advantage, ascending"] == "\u22120.5"
        assert seen["group"] == "4 of 96 completions match"
        assert (
            seen["advantage look"] == "down1 against"
            and seen["ratio look"] == "up3"
            and seen["said"].startswith("Token 3 of 3")
        )
        assert seen["lines"] - seen["lines of one run"] == seen["lines of one run"] > 10
        assert seen["crosshair"] == "step 3" and seen["value"] == "0.003"


DRIVER = """
window.requestAnimationFrame = (action) => setTimeout(action, 16);  // without a screen there are no frames
const seen = {}, form = document.querySelector(".filters"), pause = () => new Promise((done) => setTimeout(done, 300));
const found = () => document.querySelector(".found").textContent, all = (query) => [...document.querySelectorAll(query)];
async function filter(values) {
  form.reset();
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
  form.dispatchEvent(new Event("input", { bubbles: true }));
  await pause();
  return found();
}
(async () => {
  seen.all = found();
  seen.search = await filter({ query: "#### 3" });
  seen.marks = all(".list mark").length;
  seen.steps = await filter({ from: 2, to: 3 });
  seen.rewarded = await filter({ low: 0.5 });
  seen.correct = await filter({ correct: "true" });
  seen.truncated = await filter({ truncated: "true" });
  seen.task = await filter({ task: "20" });
  seen.dumped = await filter({ tokens: "true" });
  await filter({});
  all(".pager button")[2].click();
  seen["second page"] = document.querySelector(".pager span").textContent;
  const first = () => document.querySelector('.list [data-name="advantage"]').textContent;
  all(".head button")[3].click();
  seen["by advantage"] = first();
  all(".head button")[3].click();
  seen["by advantage, ascending"] = first();
  await filter({ tokens: "true" });
  document.querySelector(".completion").open = true;
  await pause();
  const token = () => all(".tokens span")[2];
  seen["advantage look"] = token().className;
  all(".choice button")[1].click();
  seen["ratio look"] = token().className;
  token().click();
  seen.said = document.querySelector(".token-said").textContent;
  document.querySelector(".full > button").click();
  await pause();
  seen.group = found();
  seen.lines = all("path.line").length;
  document.querySelector("#runs button").click();
  await pause();
  seen["lines of one run"] = all("path.line").length;
  const kl = document.querySelector("#panel-kl");
  for (const key of ["Home", "ArrowRight", "ArrowRight", "ArrowRight"]) {
    kl.querySelector("svg").dispatchEvent(new KeyboardEvent("keydown", { key }));
    await pause();
  }
  seen.crosshair = kl.querySelector(".where").textContent;
  seen.value = kl.querySelector(".value").textContent;
  document.documentElement.dataset.seen = JSON.stringify(seen);
})();
"""
