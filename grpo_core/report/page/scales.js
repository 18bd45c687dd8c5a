// Maps values to pixels: axes and their ticks; also smoothing and the search for the nearest point.

// About `wanted` round numbers between low and high.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Powers of ten between low and high, thinned to about `wanted`. If there are fewer than two, multiples of 2 and 5 too.
function logTicks(low, high, wanted) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const every = Math.max(1, Math.ceil((last - first + 1) / wanted));
  const found = [];
  for (let power = first; power <= last; power += every) found.push(10 ** power);
  if (found.length >= 2) return found;
  const finer = [];
  for (let power = first - 1; power <= last + 1; power++) finer.push(10 ** power, 2 * 10 ** power, 5 * 10 ** power);
  const inside = finer.filter((value) => value >= low && value <= high);
  return inside.length >= 2 ? inside : ticks(low, high, wanted).filter((value) => value > 0);
}

// The labels of an axis, with as many digits as make them differ.
function tickLabels(values, format) {
  for (let digits = 3; digits < 16; digits++) {
    const labels = values.map((value) => format(value, digits));
    if (new Set(labels).size === labels.length) return labels;
  }
  return values.map(String);
}

// Maps `domain` in values onto `range` in pixels. Returns {at(value) -> pixels, ticks, ...}.
function scale(domain, range, log, wanted) {
  const put = log ? Math.log10 : (value) => value;
  const [low, high] = domain.map(put);
  const at = (value) => range[0] + ((put(value) - low) / (high - low)) * (range[1] - range[0]);
  return { at, domain, log, ticks: (log ? logTicks : ticks)(domain[0], domain[1], wanted) };
}

// The ends of an axis: those of the values with a margin, and from 0 if the values are near it.
function domainOf(values, log, isShare) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return high / low < 1.2 ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
  if (high - low <= 1e-4 * Math.abs(high)) { // a constant, up to rounding
    const air = Math.abs(high) * 0.1 || 1;
    return low >= 0 && isShare ? [0, high ? Math.min(1, high * 1.5) : 1] : [high === 0 ? 0 : low - air, high + air];
  }
  const air = (high - low) * 0.06;
  const bottom = low >= 0 && (isShare || low < 0.5 * high) ? 0 : low - air;
  return [bottom, isShare && high <= 1 ? Math.min(1.02, high + air) : high + air];
}

// Exponential moving average without bias towards 0 at the start. The past decays by `weight` over one average gap in x.
function smooth(x, y, weight) {
  if (!weight) return y;
  const gap = x.length > 1 ? (x[x.length - 1] - x[0]) / (x.length - 1) || 1 : 1;
  let sum = 0, total = 0, before = null;
  return y.map((value, i) => {
    if (value === null) return null;
    const keep = before === null ? 0 : weight ** ((x[i] - before) / gap);
    sum = sum * keep + value * (1 - weight);
    total = total * keep + (1 - weight);
    before = x[i];
    return sum / total;
  });
}

// The index of the entry of the ascending `x` that is nearest to `value`; -1 if x is empty.
function nearest(x, value) {
  let low = 0, high = x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - x[low - 1] <= x[low] - value ? low - 1 : x.length ? low : -1;
}
