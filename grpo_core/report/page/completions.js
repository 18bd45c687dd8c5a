// The list of completions: filters, sorting, pages, and the full view of one completion.

const PAGE_SIZE = 25;
const ORDER = ["step", "task", "reward", "advantage", "length"];

// The rows of one run as objects. `found` is {columns, rows, names, prompts, tokens, correct_by, ...}, `run` its index.
function recordsOf(found, run) {
  const place = Object.fromEntries(found.columns.map((name, i) => [name, i]));
  const judge = found.names.indexOf(found.correct_by);
  return found.rows.map((row) => ({
    run, found, step: row[place.step], task: row[place.task], sample: row[place.sample],
    prompt: row[place.prompt] === null ? "" : found.prompts[row[place.prompt]], text: row[place.text],
    rewards: row[place.rewards], reward: row[place.reward], shaped: row[place.shaped_reward],
    advantage: row[place.advantage], length: row[place.length], truncated: row[place.truncated],
    turns: row[place.turns], given: row[place.given_tokens], failure: row[place.failure],
    tokens: row[place.tokens] === null ? null : found.tokens[row[place.tokens]],
    correct: judge < 0 || row[place.rewards][judge] === null ? null : row[place.rewards][judge] === 1,
  }));
}

function createBrowser(root, runs, completions) {
  const records = completions.flatMap((found, run) => recordsOf(found, run));
  byId("completions-lead").textContent = howMany(completions, records);
  if (!records.length) return;
  const list = el("div", { class: "list" }), said = el("p", { class: "found", role: "status" });
  const pager = el("nav", { class: "pager", "aria-label": "Pages" });
  const form = filters(runs, records);
  const head = el("div", { class: "row head", role: "group", "aria-label": "Order" });
  let order = "step", down = false, page = 0, shown = records;

  function refresh() {
    const wanted = form.read();
    const worth = (record) => (order === "task" ? [record.task, record.step, record.sample] : [record[order]]);
    shown = records.filter(wanted.accepts);
    if (order !== "step" || down) {
      const places = new Map(shown.map((record, i) => [record, i]));
      shown.sort((a, b) => compare(worth(a), worth(b), down) || places.get(a) - places.get(b));
    }
    const pages = Math.max(1, Math.ceil(shown.length / PAGE_SIZE));
    page = Math.min(page, pages - 1);
    const part = shown.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
    said.textContent = shown.length === records.length ? counted(shown.length, "completion") : `${count(shown.length)} of ${counted(records.length, "completion")} match`;
    list.replaceChildren(...part.map((record) => item(record, runs, wanted.query, only)));
    if (!part.length) list.append(el("p", { class: "nothing" }, "No completion matches. Clear a filter."));
    turnPages(pager, page, pages, (to) => {
      page = to;
      refresh();
      root.scrollIntoView();
    });
    head.replaceChildren(...ORDER.map(orderButton), el("span", {}, "completion"));
  }

  function orderButton(name) {
    const state = name === order ? (down ? " \u2193" : " \u2191") : "";
    const sort = () => {
      down = name === order ? !down : name !== "step" && name !== "task";
      order = name;
      page = 0;
      refresh();
      head.children[ORDER.indexOf(name)].focus();
    };
    const label = `Sort by ${name}${state ? (down ? ", now descending" : ", now ascending") : ""}`;
    return el("button", { type: "button", class: "quiet", click: sort, "aria-label": label, "aria-pressed": String(name === order) }, name + state);
  }

  function only(record) {
    form.choose({ run: String(record.run), from: record.step, to: record.step, task: record.task });
    restart();
    root.scrollIntoView();
  }
  const restart = () => {
    page = 0;
    refresh();
  };
  form.element.addEventListener("input", later(restart, 150));
  form.element.addEventListener("reset", () => setTimeout(restart));
  form.element.addEventListener("submit", (event) => event.preventDefault());
  root.append(form.element, said, head, list, pager);
  refresh();
}

function howMany(completions, records) {
  const total = completions.reduce((sum, found) => sum + found.total, 0);
  if (!total) return "There are no completions: no step has been logged, log.completions is false, or the run is supervised.";
  const steps = completions.reduce((sum, found) => sum + found.total_steps, 0);
  const here = new Set(records.map((record) => `${record.run} ${record.step}`)).size;
  const dumped = records.filter((record) => record.tokens).length;
  const share = records.length === total
    ? `All ${counted(total, "completion")} of ${counted(steps, "step")} are in this page.`
    : `${count(records.length)} of ${counted(total, "completion")} are in this page, those of ${count(here)} of ${counted(steps, "step")}: ` +
      "the first, the last, evenly spaced ones and those with dumped tokens. All are in completions.jsonl.";
  return share + (dumped ? ` ${count(dumped)} have their tokens.` : "") + " They are the unchecked output of a model.";
}

function filters(runs, records) {
  const input = (name, type, label, attributes = {}) =>
    el("label", {}, el("span", {}, label), el("input", { name, type, autocomplete: "off", ...attributes }));
  const choice = (name, label, options) =>
    el("label", {}, el("span", {}, label), el("select", { name }, ...options.map(([value, text]) => el("option", { value }, text))));
  const parts = [
    input("query", "search", "Search prompt and text", { class: "search" }),
    runs.length > 1 ? choice("run", "Run", [["", "all"], ...runs.map((run, i) => [String(i), visible(run.name)])]) : null,
    pair("Step", input("from", "number", "Step from", { placeholder: "from" }), input("to", "number", "Step to", { placeholder: "to" })),
    pair("Reward", input("low", "number", "Reward from", { placeholder: "from", step: "any" }), input("high", "number", "Reward to", { placeholder: "to", step: "any" })),
    input("task", "text", "Task", { inputmode: "numeric" }),
    records.some((record) => record.correct !== null) ? choice("correct", "Answer", [["", "any"], ["true", "correct"], ["false", "wrong"]]) : null,
    choice("truncated", "End", [["", "any"], ["true", "truncated"], ["false", "ended"]]),
    records.some((record) => record.failure !== null) ? choice("failed", "Environment", [["", "any"], ["true", "failed"], ["false", "did not fail"]]) : null,
    records.some((record) => record.tokens) ? choice("tokens", "Tokens", [["", "any"], ["true", "dumped"]]) : null,
    el("button", { type: "reset" }, "Clear"),
  ];
  const element = el("form", { class: "filters", "aria-label": "Filter completions" }, ...parts);
  const value = (name) => (element.elements[name] ? element.elements[name].value.trim() : "");
  const within = (given, low, high) =>
    (low === "" || (given !== null && given >= Number(low))) && (high === "" || (given !== null && given <= Number(high)));
  const same = (given, wanted) => wanted === "" || String(given) === wanted;
  function read() {
    const wanted = Object.fromEntries(
      ["query", "run", "from", "to", "low", "high", "task", "correct", "truncated", "failed", "tokens"].map((name) => [name, value(name)])
    );
    const needle = wanted.query.toLowerCase();
    const accepts = (record) =>
      same(record.run, wanted.run) && within(record.step, wanted.from, wanted.to) && same(record.task, wanted.task) &&
      within(record.reward, wanted.low, wanted.high) && same(record.correct, wanted.correct) &&
      same(record.truncated, wanted.truncated) && same(record.failure !== null, wanted.failed) && (wanted.tokens === "" || record.tokens !== null) &&
      (!needle || record.text.toLowerCase().includes(needle) || record.prompt.toLowerCase().includes(needle));
    return { query: wanted.query, accepts };
  }
  function choose(values) {
    element.reset();
    for (const [name, text] of Object.entries(values)) if (element.elements[name]) element.elements[name].value = text;
  }
  return { element, read, choose };
}

function pair(label, from, to) {
  return el("div", { class: "pair", role: "group", "aria-label": label }, from, to);
}

function compare(a, b, down) {
  for (let i = 0; i < a.length; i++) {
    if (a[i] === b[i]) continue;
    if (a[i] === null || b[i] === null) return a[i] === null ? 1 : -1; // missing values come last in either order
    return (a[i] < b[i] ? -1 : 1) * (down ? -1 : 1);
  }
  return 0;
}

function item(record, runs, query, only) {
  const badges = [
    runs.length > 1 ? el("span", { class: `badge run c${record.run % 8}` }, visible(runs[record.run].name)) : null,
    record.correct === null ? null : el("span", { class: record.correct ? "badge right" : "badge" }, record.correct ? "correct" : "wrong"),
    record.truncated ? el("span", { class: "badge cut" }, "truncated") : null,
    record.turns ? el("span", { class: "badge" }, counted(record.turns.length, "turn")) : null,
    record.failure !== null ? el("span", { class: "badge cut" }, "environment failed") : null,
    record.tokens ? el("span", { class: "badge" }, "tokens") : null,
  ];
  const start = record.text.slice(0, 300).replace(/\s+/g, " ");
  const cell = (name, text) => el("span", { class: "cell", "data-name": name }, text);
  const summary = el(
    "summary", { class: "row" },
    cell("step", count(record.step)), cell("task", `${record.task ?? NONE}\u200a/\u200a${record.sample ?? NONE}`),
    cell("reward", inShort(record.reward, 3)), cell("advantage", signed(record.advantage)), cell("length", inShort(record.length)),
    el("span", { class: "start" }, ...badges, ...marked(start, query))
  );
  const details = el("details", { class: "completion" }, summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(inFull(record, query, only));
  });
  return details;
}

function inFull(record, query, only) {
  const facts = record.found.names.map((name, i) => [visible(name), inShort(record.rewards[i])]);
  facts.push(["reward", inShort(record.reward)]);
  if (record.shaped !== null) facts.push(["reward after shaping", inShort(record.shaped)]);
  facts.push(["advantage", signed(record.advantage)], ["tokens", inShort(record.length)]);
  if (record.turns) facts.push(...factsOfTurns(record));
  const group = el("button", { type: "button", click: () => only(record) }, "All completions of this prompt in this step");
  return el(
    "div", { class: "full" },
    record.prompt ? el("h4", {}, "Prompt") : null,
    record.prompt ? el("pre", { class: "text prompt" }, ...marked(record.prompt, query)) : null,
    el("h4", {}, "Completion"),
    record.turns ? turnView(record.text, record.turns, query) : null,
    record.turns && record.tokens ? el("h4", {}, "Tokens") : null,
    record.tokens ? tokenView(record.tokens, record.advantage ?? 0) : record.turns ? null : el("pre", { class: "text" }, ...marked(record.text, query)),
    record.found.tokens.length ? null : el("p", { class: "what" }, "A run with debug.dump_batches=N keeps the tokens of every N-th step; they are then coloured here."),
    el("dl", { class: "facts" }, ...facts.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)))),
    group
  );
}

// `tokens` are those that the policy drew; the environment gave others.
function factsOfTurns(record) {
  const sum = (place) => record.turns.reduce((total, turn) => total + (turn[place] ?? 0), 0);
  const facts = [["turns", inShort(record.turns.length)], ["given tokens", inShort(record.given)]];
  if (sum(4)) facts.push(["tool calls", inShort(sum(4))], ["errors of tools", inShort(sum(5))]);
  if (record.failure !== null) facts.push(["the environment", visible(record.failure)]);
  return facts;
}

function turnPages(pager, page, pages, go) {
  const button = (label, to, enabled) => el("button", { type: "button", disabled: !enabled, click: () => go(to) }, label);
  pager.hidden = pages < 2;
  pager.replaceChildren(
    button("First", 0, page > 0), button("Previous", page - 1, page > 0),
    el("span", {}, `page ${count(page + 1)} of ${count(pages)}`),
    button("Next", page + 1, page + 1 < pages), button("Last", pages - 1, page + 1 < pages)
  );
}
