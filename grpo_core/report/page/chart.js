// One chart as SVG: axes, and lines with bands, points with intervals, or stacked areas.

const MARGIN = { top: 8, right: 10, bottom: 22, left: 50 };

// `series`: [{x, y, raw, band: [low, high] or null, colour: 0-7, dash: 0-3}], aligned with x; null is a gap.
// Fills `root` and returns {x, move}; move(step) moves the crosshair and move(null) hides it.
function drawChart(root, { width, height, kind, series, xDomain, log, isShare, format, smoothed }) {
  const stacked = kind === "stack" ? stackOf(series) : null;
  const values = stacked ? stacked.flatMap((layer) => layer.high) : series.flatMap(spanned);
  const x = scale(xDomain, [MARGIN.left, width - MARGIN.right], false, Math.max(2, Math.round(width / 110)));
  const yDomain = domainOf(stacked ? [0, ...values] : values, log, isShare);
  const y = scale(yDomain, [height - MARGIN.bottom, MARGIN.top], log, 4);
  root.setAttribute("viewBox", `0 0 ${width} ${height}`);
  root.replaceChildren(axes(x, y, width, height, format));
  const drawable = (value) => value !== null && !(log && value <= 0);
  if (stacked) stacked.forEach((layer) => root.append(area(layer.x, layer.low, layer.high, x, y, `fill c${layer.colour}`)));
  else series.forEach((one) => root.append(...curve(one, kind, x, y, drawable, smoothed, yDomain)));
  const line = svg("line", { class: "cross", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
  const dots = svg("g", { class: "dots" });
  root.append(line, dots);
  const move = (step) => {
    const inside = step !== null && step >= xDomain[0] && step <= xDomain[1];
    line.setAttribute("visibility", inside ? "visible" : "hidden");
    dots.replaceChildren();
    if (!inside) return;
    line.setAttribute("x1", x.at(step));
    line.setAttribute("x2", x.at(step));
    if (stacked) return;
    for (const one of series) {
      const i = nearest(one.x, step);
      if (i >= 0 && one.x[i] === step && drawable(one.y[i])) {
        dots.append(svg("circle", { class: `dot c${one.colour}`, cx: x.at(one.x[i]), cy: y.at(one.y[i]), r: 3 }));
      }
    }
  };
  return { x, move };
}

function spanned(one) {
  return one.band ? [...one.y, ...one.band[0], ...one.band[1]] : [...one.y, ...one.raw];
}

function axes(x, y, width, height, format) {
  const group = svg("g", { class: "axes" });
  const labels = tickLabels(y.ticks, format);
  for (const [i, value] of y.ticks.entries()) {
    const place = y.at(value);
    group.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: place, y2: place }));
    group.append(svg("text", { x: MARGIN.left - 6, y: place + 3.5, "text-anchor": "end" }, labels[i]));
  }
  const base = height - MARGIN.bottom;
  group.append(svg("line", { class: "base", x1: MARGIN.left, x2: width - MARGIN.right, y1: base, y2: base }));
  const steps = x.ticks.filter(Number.isInteger), stepLabels = tickLabels(steps, inShort);
  for (const [i, value] of steps.entries()) {
    const place = x.at(value);
    const anchor = place > width - MARGIN.right - 12 ? "end" : "middle";
    group.append(svg("line", { class: "base", x1: place, x2: place, y1: base, y2: base + 4 }));
    group.append(svg("text", { x: place, y: base + 16, "text-anchor": anchor }, stepLabels[i]));
  }
  return group;
}

function curve(one, kind, x, y, drawable, smoothed, yDomain) {
  const parts = [], look = `line c${one.colour} d${one.dash}`;
  const inside = (value) => Math.min(yDomain[1], Math.max(yDomain[0], value));
  if (kind === "accuracy") {
    one.x.forEach((step, i) => {
      if (!drawable(one.y[i])) return;
      const place = x.at(step);
      if (one.band && drawable(one.band[0][i]) && drawable(one.band[1][i])) {
        const [low, high] = [y.at(one.band[0][i]), y.at(one.band[1][i])];
        parts.push(svg("path", { class: `whisker c${one.colour}`, d: `M${place} ${low}V${high}M${place - 3} ${low}h6M${place - 3} ${high}h6` }));
      }
      parts.push(svg("circle", { class: `point c${one.colour}`, cx: place, cy: y.at(one.y[i]), r: 3 }));
    });
  } else if (one.band) {
    const clip = (edge) => edge.map((value) => (value === null ? null : inside(value)));
    parts.push(area(one.x, clip(one.band[0]), clip(one.band[1]), x, y, `band c${one.colour}`));
  }
  if (smoothed) parts.push(svg("path", { class: `raw c${one.colour}`, d: path(one.x, one.raw, x, y, drawable) }));
  parts.push(svg("path", { class: look, d: path(one.x, one.y, x, y, drawable) }));
  if (kind !== "accuracy") parts.push(...alone(one, x, y, drawable));
  return parts;
}

function path(xs, ys, x, y, drawable) {
  let text = "", pen = false;
  for (let i = 0; i < xs.length; i++) {
    if (drawable(ys[i])) text += `${pen ? "L" : "M"}${x.at(xs[i]).toFixed(1)} ${y.at(ys[i]).toFixed(1)}`;
    pen = drawable(ys[i]);
  }
  return text;
}

// Points between two gaps, which a line would not show.
function alone(one, x, y, drawable) {
  const there = (i) => i >= 0 && i < one.x.length && drawable(one.y[i]);
  return one.x.flatMap((step, i) =>
    there(i) && !there(i - 1) && !there(i + 1)
      ? [svg("circle", { class: `point c${one.colour}`, cx: x.at(step), cy: y.at(one.y[i]), r: 2.5 })]
      : []
  );
}

// The area between two edges, split at gaps. A point between two gaps is drawn as a bar.
function area(xs, low, high, x, y, look) {
  let text = "", start = 0;
  for (let i = 0; i <= xs.length; i++) {
    if (i < xs.length && low[i] !== null && high[i] !== null) continue;
    if (i > start) {
      const top = [], bottom = [];
      for (let k = start; k < i; k++) {
        for (const aside of i - start > 1 ? [0] : [-4, 4]) {
          top.push(`${(x.at(xs[k]) + aside).toFixed(1)} ${y.at(high[k]).toFixed(1)}`);
          bottom.unshift(`${(x.at(xs[k]) + aside).toFixed(1)} ${y.at(low[k]).toFixed(1)}`);
        }
      }
      text += `M${top.join("L")}L${bottom.join("L")}Z`;
    }
    start = i + 1;
  }
  return svg("path", { class: look, d: text });
}

// The lower and upper edge of each series, stacked on those before it; missing values count as 0.
function stackOf(series) {
  let floor = series.length ? series[0].x.map(() => 0) : [];
  return series.map((one) => {
    const low = floor;
    floor = low.map((value, i) => value + (one.y[i] ?? 0));
    return { x: one.x, low, high: floor, colour: one.colour };
  });
}
