"""A browser draws the report and uses it. Skipped where there is no Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_report import EVIL, Page, made_run

from grpo_core.report import report
from grpo_core.report.report import write_report

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
        assert "no step has been logged" in dom and "There are no completions" in dom

    def driven(self, tmp_path, monkeypatch, script, *runs, width=None):
        """What a script at the end of the page's own has seen there; in a frame of `width` pixels."""
        shutil.copytree(report.PAGE, tmp_path / "page", dirs_exist_ok=True)
        with open(tmp_path / "page" / "report.js", "a") as file:
            file.write(script)
        with monkeypatch.context() as patch:
            patch.setattr(report, "PAGE", tmp_path / "page")
            dom = self.opened(tmp_path, *runs)
        if width is not None:  # a window is never narrower than 500
            (tmp_path / "frame.html").write_text(FRAME.format(width))
            dom = drawn(tmp_path / "frame.html", tmp_path)
        return json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))

    def test_a_run_of_one_step_is_seen(self, tmp_path):
        page = Page(self.opened(tmp_path, made_run(tmp_path / "a", steps=1)))
        places = {
            look: [
                [float(x) for x in re.findall(r"[ML]([\d.]+) ", a["d"])]
                for tag, a in page.tags
                if tag == "path" and a.get("class", "").startswith(look)
            ]
            for look in ("fill", "band")
        }
        assert len(places["fill"]) == 3 and len(places["band"]) == 1
        assert all(max(xs) - min(xs) == 8 for found in places.values() for xs in found)
        assert sum(tag == "circle" and a.get("class", "").startswith("point") for tag, a in page.tags) >= 15

    def test_two_runs_stand_beside_each_other_on_a_phone_and_more_scroll(self, tmp_path, monkeypatch):
        name = "lr-5e-4-seed-{}-and-whatever-else-was-changed-by-it"
        runs = [made_run(tmp_path / name.format(i), **{"loss.name": loss}) for i, loss in enumerate(("grpo", "gspo"))]
        seen = self.driven(tmp_path, monkeypatch, MEASURE, *runs, width=390)
        assert seen["width"] == 390 and seen["page"] == 0 and seen["beyond"] == [0, 0, 0], seen
        more = [made_run(tmp_path / f"more-{i}") for i in range(3)]
        seen = self.driven(tmp_path, monkeypatch, MEASURE, *runs, *more, width=390)
        assert seen["page"] == 0 and all(beyond > 0 for beyond in seen["beyond"]) and seen["shadows"] == 3, seen

    def test_attack_3_a_long_name_leaves_the_other_columns_legible(self, tmp_path, monkeypatch):
        runs = [made_run(tmp_path / "a"), made_run(tmp_path / ("very_long_name_" * 14))]
        seen = self.driven(tmp_path, monkeypatch, MEASURE, *runs, width=1200)
        assert seen["page"] == 0 and seen["narrowest"] >= 60, seen

    def test_attack_3_no_two_runs_look_the_same(self, tmp_path):
        dom = self.opened(tmp_path, *(made_run(tmp_path / f"r{i}", steps=2) for i in range(12)))
        looks = re.findall(r'class="swatch (c\d d\d)"></span>r\d+</button>', dom)
        assert len(looks) == len(set(looks)) == 12, looks
        panel = dom[dom.index('id="panel-entropy"') : dom.index('id="panel-length"')]
        lines = re.findall(r'class="line (c\d d\d)', panel)
        assert sorted(lines) == sorted(looks), lines

    def test_without_a_dump_it_is_said_what_gives_tokens(self, tmp_path, monkeypatch):
        first, second = made_run(tmp_path / "a"), made_run(tmp_path / "b")
        shutil.rmtree(second / "batches")
        assert "debug.dump_batches" not in self.driven(tmp_path, monkeypatch, OPEN, first)
        assert "debug.dump_batches=N keeps the tokens" in self.driven(tmp_path, monkeypatch, OPEN, second)

    def test_filters_order_pages_runs_and_tokens(self, tmp_path, monkeypatch):
        """A script uses the page as a reader would, and writes down what is shown."""
        seen = self.driven(tmp_path, monkeypatch, DRIVER, made_run(tmp_path / "a"), made_run(tmp_path / "b"))
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


FRAME = """<!doctype html><iframe src="r.html" width="{}" height="900"></iframe>
<script>addEventListener("message", (event) => (document.documentElement.dataset.seen = event.data));</script>"""
MEASURE = """
const boxes = [...document.querySelectorAll(".wide")], root = document.documentElement;
parent.postMessage(root.dataset.seen = JSON.stringify({
  width: innerWidth,
  page: root.scrollWidth - root.clientWidth,
  beyond: boxes.map((box) => box.scrollWidth - box.clientWidth),
  narrowest: Math.min(...[...document.querySelectorAll(".many td")].map((cell) => cell.clientWidth)),
  shadows: boxes.filter((box) => getComputedStyle(box).backgroundImage.includes("gradient")).length,
}), "*");
"""
OPEN = """
const completion = document.querySelector(".completion");
completion.addEventListener("toggle", () => setTimeout(() => {
  document.documentElement.dataset.seen = JSON.stringify(completion.textContent);
}));
completion.open = true;
"""
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
