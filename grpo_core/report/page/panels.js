// A panel: title, note, chart, and a legend that also shows the values at the crosshair.

// `state` is shared by all panels: {runs: [{on}], smoothing, log, xDomain, hover(step)}. `only` is the index of the one run
// to draw, for stacked areas, which cannot share axes with those of another run. Returns {element, draw, move}.
function createPanel(panel, data, state, only = null) {
  const isShare = panel.unit.startsWith("share"), hidden = new Set();
  const format = isShare ? (value, digits = 3) => inShort(100 * value, digits) + " %" : (value, digits = 3) => inShort(value, digits);
  const title = only !== null && data.runs.length > 1 ? `${panel.title}, ${visible(data.runs[only].name)}` : panel.title;
  const root = svg("svg", { role: "img", tabindex: "0", class: "chart" });
  const legend = el("ul", { class: "legend" });
  const where = el("span", { class: "where", "aria-live": "off" });
  const logButton = el("button", { type: "button", class: "small", "aria-pressed": "false", title: "Logarithmic axis" }, "log");
  const heading = el("h3", {}, visible(title), panel.unit ? el("span", { class: "unit" }, " " + panel.unit) : null);
  const element = el(
    "article", { class: "panel", id: `panel-${panel.id}${only === null ? "" : "-" + only}` },
    el("header", {}, heading, logButton),
    el("p", { class: "what" }, panel.what),
    root, el("div", { class: "readout" }, where, legend),
    el("p", { class: "healthy" }, el("b", {}, "Healthy: "), panel.healthy)
  );
  let log = panel.log, series = [], chart = null, step = null, entries = [];

  function draw() {
    const width = Math.max(260, Math.round(element.clientWidth || 420)), height = width < 360 ? 170 : 190;
    const all = seriesOf(panel, data, state, only).filter((one) => one.x.length);
    element.hidden = only !== null && !state.runs[only].on;
    series = all.filter((one) => !hidden.has(one.key));
    const canLog = panel.kind !== "stack" && series.some((one) => one.y.some((value) => value > 0));
    const isLog = canLog && log !== state.log;
    logButton.disabled = !canLog;
    logButton.setAttribute("aria-pressed", String(isLog));
    root.setAttribute("aria-label", describe(title, series, format));
    root.setAttribute("height", height);
    chart = drawChart(root, {
      width, height, kind: panel.kind, series, xDomain: state.xDomain, log: isLog, isShare, format,
      smoothed: state.smoothing > 0 && panel.kind === "line",
    });
    if (!series.length) root.append(svg("text", { class: "nothing", x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to draw"));
    entries = legendOf(all);
    legend.replaceChildren(...entries.map((entry) => entry.item));
    move(step);
  }

  function legendOf(all) {
    return all.map((one) => {
      const value = el("span", { class: "value" });
      const off = hidden.has(one.key);
      const toggle = () => {
        off ? hidden.delete(one.key) : hidden.add(one.key);
        draw();
        legend.querySelectorAll("button")[all.indexOf(one)].focus();
      };
      const name = one.label ? visible(one.label) : "";
      const swatch = el("span", { class: `swatch c${one.colour} d${one.dash} ${panel.kind}` });
      const button = el("button", { type: "button", "aria-pressed": String(!off), click: toggle, title: "Show or hide" }, swatch, name);
      return { one, value, item: el("li", {}, all.length > 1 || one.label ? button : null, value) };
    });
  }

  function move(to) {
    step = to;
    if (chart) chart.move(step);
    where.textContent = step === null ? "last" : `step ${count(step)}`;
    for (const { one, value } of entries) value.textContent = hidden.has(one.key) ? "" : reading(one, step, isShare);
  }

  function point(event) {
    const box = root.getBoundingClientRect();
    const steps = series.flatMap((one) => one.x);
    if (!steps.length || !box.width) return;
    const [from, to] = state.xDomain, inner = box.width - MARGIN.left - MARGIN.right;
    const wanted = from + ((event.clientX - box.left - MARGIN.left) / inner) * (to - from);
    state.hover(closest(series, wanted));
  }
  root.addEventListener("pointermove", point);
  root.addEventListener("pointerdown", point);
  root.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && state.hover(null));
  root.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") state.hover(null);
    if (by === undefined || !series.length) return;
    event.preventDefault();
    const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
    const now = step === null ? (by < 0 ? steps.length : -1) : nearest(steps, step);
    state.hover(steps[Math.min(steps.length - 1, Math.max(0, now + by))]);
  });
  logButton.addEventListener("click", () => {
    log = !log;
    draw();
  });
  return { element, draw, move };
}

// The series to draw. With one run each metric has a colour; with several each run has one, and metrics differ by dashes. From the
// ninth run on colours come again, with the next dashes.
function seriesOf(panel, data, state, only) {
  const found = [], several = data.runs.length > 1;
  data.runs.forEach((run, i) => {
    if (!state.runs[i].on || (only !== null && only !== i)) return;
    const runName = several && only === null ? run.name : "";
    if (panel.kind === "accuracy") return found.push(accuracyOf(run, runName, i, panel.metrics[0]));
    panel.metrics.forEach((metric, k) => {
      const curve = run.curves[metric];
      if (!curve) return;
      const ownColour = !several || only !== null;
      const spread = metric === "reward" ? run.curves.reward_std : null;
      const y = panel.kind === "stack" ? curve.y : smooth(curve.x, curve.y, state.smoothing);
      const half = spread ? smooth(curve.x, spread.y, state.smoothing) : null;
      const edge = (sign) => y.map((value, j) => (value === null || half[j] === null ? null : value + sign * half[j]));
      const short = panel.metrics.length > 1 ? metric.replace(/^(rewards|seconds|failed|memory_gb)\//, "") : "";
      found.push({
        key: `${i} ${metric}`, label: [runName, short].filter(Boolean).join(" · "), x: curve.x, y, raw: curve.y,
        band: half ? [edge(-1), edge(1)] : null, colour: (ownColour ? k : i) % 8, dash: (ownColour ? k >> 3 : k + (i >> 3)) % 4,
      });
    });
  });
  return found;
}

// `metric` is "accuracy"; that of a named evaluation set has a prefix, and so have the ends of its interval.
function accuracyOf(run, label, i, metric) {
  const rows = run.evaluation.filter((row) => row[metric] !== null && row[metric] !== undefined);
  const column = (name) => rows.map((row) => row[name] ?? null);
  const y = column(metric), prefix = metric.slice(0, -"accuracy".length);
  const band = [column(`${prefix}ci_low`), column(`${prefix}ci_high`)];
  return { key: label, label, x: column("step"), y, raw: y, band, colour: i % 8, dash: (i >> 3) % 4 };
}

// The value at a step, or the last value if `step` is null, with its interval if it has one.
function reading(one, step, isShare) {
  let i = step === null ? one.y.length - 1 : nearest(one.x, step);
  while (step === null && i > 0 && one.y[i] === null) i--;
  if (i < 0 || (step !== null && one.x[i] !== step)) return NONE;
  const write = isShare ? (value) => percent(value) : inShort;
  if (!one.band || one.band[0][i] === null || one.band[0][i] === undefined) return write(one.y[i]);
  if (!isShare) return `${write(one.y[i])} ± ${write(one.band[1][i] - one.y[i])}`;
  return `${write(one.y[i])} (${(100 * one.band[0][i]).toFixed(1)} to ${(100 * one.band[1][i]).toFixed(1)})`;
}

function closest(series, wanted) {
  let best = null;
  for (const one of series) {
    const i = nearest(one.x, wanted);
    if (i >= 0 && (best === null || Math.abs(one.x[i] - wanted) < Math.abs(best - wanted))) best = one.x[i];
  }
  return best;
}

function describe(title, series, format) {
  const parts = series.map((one) => {
    const known = one.y.filter((value) => value !== null);
    return known.length ? `${visible(one.label)} from ${format(known[0])} to ${format(known[known.length - 1])}` : "";
  });
  return `${visible(title)}: ${parts.filter(Boolean).join("; ") || "nothing to draw"}. Arrow keys move the crosshair.`;
}
