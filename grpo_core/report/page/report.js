// Fills the sections of the page from its data. The root element gets data-report="ready", or data-error with a message.

window.addEventListener("error", (event) => failed(event.message));
window.addEventListener("securitypolicyviolation", (event) => failed(`blocked by the Content-Security-Policy (${event.violatedDirective})`));

function failed(message) {
  document.documentElement.dataset.error = message;
  byId("problem").textContent = `An error occurred in the script of this page: ${message}`;
  byId("problem").hidden = false;
}

function fillSummary(data) {
  const names = data.runs.map((run) => visible(run.name));
  document.title = `${names.join(", ")} \u2013 report`;
  byId("title").textContent = names.join(", ");
  byId("made").textContent = `Made ${data.made}`;
  if (data.runs.length === 1) byId("headline").append(...headline(data.runs[0]));
  const omitted = data.runs.length === 1 ? accuracies(data.runs[0]) : [];
  byId("summary-table").append(rowsOf(data.runs.map((run) => run.summary), names, omitted));
  if (data.runs.some((run) => Object.keys(run.final).length)) {
    byId("final-title").textContent = visible(data.final);
    byId("final-table").append(rowsOf(data.runs.map((run) => run.final), names));
  } else {
    byId("final-title").hidden = byId("final-table").hidden = true;
  }
}

// The titles of a run's accuracies: before and after training, on each evaluation set.
function accuracies(run) {
  return Object.keys(run.summary).filter((name) => /^Accuracy (before|after)/.test(name));
}

// The accuracies of a single run, in large letters.
function headline(run) {
  return accuracies(run).flatMap((name) => {
    const [value, rest] = run.summary[name].split(/ (?=\()| (?=after)/, 2);
    if (!value) return [];
    const more = run.summary[name].slice(value.length).trim();
    return [el("div", {}, el("p", { class: "name" }, name), el("p", { class: "large" }, value), el("p", { class: "more" }, rest ? more : ""))];
  });
}

// A table with one column per run. Keys in `omitted`, and rows that are empty for every run, are left out.
function rowsOf(columns, names, omitted = []) {
  const keys = [...new Set(columns.flatMap(Object.keys))].filter((key) => !omitted.includes(key) && columns.some((column) => column[key]));
  const rows = keys.map((key) => [key, ...columns.map((column) => visible(column[key] || NONE))]);
  return table(names.length > 1 ? ["Run", ...names] : ["", ""], rows, names.length > 1 ? "many" : "one");
}

function fillConfigurations(data) {
  const objectives = new Map(); // a formula shared by several runs appears once
  for (const run of data.runs) objectives.set(run.objective, [...(objectives.get(run.objective) || []), visible(run.name)]);
  for (const [text, names] of objectives) {
    if (data.runs.length > 1) byId("objectives").append(el("h3", {}, names.join(", ")));
    byId("objectives").append(text ? el("pre", { class: "formula", tabindex: "0" }, visible(text)) : el("p", { class: "lead" }, "Not in the run folder."));
  }
  if (data.runs.length > 1) {
    const rows = data.difference.map(([key, values]) => [breakable(key), ...values.map((value) => (value === null ? NONE : visible(value)))]);
    const shown = rows.length ? table(["Key", ...data.runs.map((run) => visible(run.name))], rows, "many code") : el("p", { class: "lead" }, "The configurations are the same.");
    byId("difference").append(el("h3", {}, "Keys that differ"), el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Keys that differ" }, shown));
  }
  for (const run of data.runs) {
    if (!run.config) continue;
    const title = data.runs.length > 1 ? `config.yaml of ${visible(run.name)}` : "config.yaml";
    byId("configs").append(el("details", { class: "config" }, el("summary", {}, title), el("pre", { class: "text", tabindex: "0" }, visible(run.config))));
  }
  if (!data.runs.some((run) => run.config)) byId("configs").append(el("p", { class: "lead" }, "Not in the run folder."));
}

function fillAnswers(data) {
  for (const run of data.runs.filter((one) => one.answers.length)) {
    byId("held-out").hidden = false;
    if (data.runs.length > 1) byId("answers").append(el("h3", {}, visible(run.name)));
    for (const answer of run.answers) {
      const both = answer.texts.flatMap((text, i) => [
        el("p", { class: "lead" }, `After ${counted(answer.steps[i], "step")}, ${answer.correct[i] ? "correct" : "wrong"}`),
        answer.turns[i] ? turnView(text, answer.turns[i], "") : el("pre", { class: "text", tabindex: "0" }, visible(text)),
      ]);
      const title = `Problem ${answer.task}: ${answer.correct.map((right) => (right ? "correct" : "wrong")).join(", then ")}`;
      byId("answers").append(el("details", { class: "config" }, el("summary", {}, title), el("pre", { class: "text", tabindex: "0" }, visible(answer.prompt)), ...both));
    }
  }
}

function fillCurves(data) {
  const state = { runs: data.runs.map(() => ({ on: true })), smoothing: 0, log: false, xDomain: [0, 1], hover: null };
  const panels = data.panels.flatMap((panel) =>
    panel.kind === "stack" ? data.runs.map((_, i) => createPanel(panel, data, state, i)) : [createPanel(panel, data, state)]
  );
  const thinned = data.runs.filter((run) => run.steps > data.points).map((run) => visible(run.name));
  byId("curves-lead").textContent = !panels.length
    ? "There are no curves, because no step has been logged."
    : "The horizontal axis is the step. Point at a chart, tap it, or focus it and use the arrow keys to read the values of all charts at one step." +
      (thinned.length ? ` Runs of more than ${count(data.points)} steps show only the lowest and highest value of each interval (${thinned.join(", ")}).` : "");
  byId("bar").hidden = !panels.length;
  byId("panels").append(...panels.map((panel) => panel.element));
  const draw = () => {
    state.xDomain = stepsOf(data, state);
    panels.forEach((panel) => panel.draw());
  };
  let step = null;
  const showStep = onceAFrame(() => panels.forEach((panel) => panel.move(step)));
  state.hover = (to) => {
    if (to === step) return;
    step = to;
    showStep();
  };
  controls(data, state, onceAFrame(draw));
  draw();
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.round(entry.contentRect.width) !== width) onceAFrame(draw)();
    width = Math.round(entry.contentRect.width);
  }).observe(byId("panels"));
}

// The first and the last step of the visible runs.
function stepsOf(data, state) {
  let low = Infinity, high = -Infinity;
  data.runs.forEach((run, i) => {
    if (!state.runs[i].on) return;
    const curves = [...Object.values(run.curves).map((curve) => curve.x), run.evaluation.map((row) => row.step)];
    for (const x of curves.filter((steps) => steps.length)) {
      low = Math.min(low, x[0]);
      high = Math.max(high, x[x.length - 1]);
    }
  });
  return low <= high ? [low, high > low ? high : low + 1] : [0, 1];
}

function controls(data, state, draw) {
  if (data.runs.length > 1) {
    byId("runs").append(...data.runs.map((run, i) => {
      const toggle = () => {
        state.runs[i].on = !state.runs[i].on;
        button.setAttribute("aria-pressed", String(state.runs[i].on));
        draw();
      };
      const button = el("button", { type: "button", "aria-pressed": "true", click: toggle }, el("span", { class: `swatch c${i % 8} d${(i >> 3) % 4}` }), visible(run.name));
      return button;
    }));
  }
  byId("smoothing").addEventListener("input", (event) => {
    state.smoothing = Number(event.target.value);
    byId("smoothing-value").textContent = state.smoothing ? state.smoothing.toFixed(2) : "none";
    draw();
  });
  byId("all-log").addEventListener("click", (event) => {
    state.log = !state.log;
    event.currentTarget.setAttribute("aria-pressed", String(state.log));
    draw();
  });
}

// The theme of the system, until the reader chooses one. The choice is stored if the browser lets a local file store data.
function chooseTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => (byId("theme").textContent = isDark() ? "Light" : "Dark");
  try {
    const kept = localStorage.getItem("report-theme");
    if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  } catch { /* no storage */ }
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    label();
    try {
      localStorage.setItem("report-theme", document.documentElement.dataset.theme);
    } catch { /* no storage */ }
  });
  dark.addEventListener("change", label);
  label();
}

chooseTheme();
const data = JSON.parse(byId("report-data").textContent);
fillSummary(data);
fillConfigurations(data);
fillCurves(data);
fillAnswers(data);
createBrowser(byId("browser"), data.runs, JSON.parse(byId("completion-data").textContent));
document.documentElement.dataset.report = "ready";
