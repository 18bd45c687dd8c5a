// Elements, text and numbers. Text from a run is inserted only here, as text and never as markup.

// An element with attributes (functions become event listeners) and children (nodes or text).
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes = {}, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

const byId = (id) => document.getElementById(id);

// Control characters, other invisible characters, and those that change the direction of text.
const UNSEEN = /[^\P{C}\n\t]|[\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;

// The text with such characters as escapes.
function visible(text) {
  return text.replace(UNSEEN, (found) => {
    const code = found.codePointAt(0);
    if (code < 256) return "\\x" + code.toString(16).padStart(2, "0");
    return code < 65536 ? "\\u" + code.toString(16).padStart(4, "0") : "\\u{" + code.toString(16) + "}";
  });
}

// A key that may be broken across lines after a dot or an underscore.
function breakable(key) {
  return el("span", {}, ...visible(key).split(/(?<=[._])/).flatMap((part) => [part, el("wbr")]));
}

// The text with every occurrence of `query` marked.
function marked(text, query) {
  if (!query) return [visible(text)];
  const pattern = new RegExp("(" + query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&") + ")", "giu");
  return text.split(pattern).map((part, i) => (i % 2 ? el("mark", {}, visible(part)) : visible(part)));
}

const MINUS = "\u2212";
const NONE = "\u2013";

// A number with about `digits` significant digits: 1,234, 0.1235, 3.1e−7. Above 4 digits no form has fewer.
function inShort(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  const size = Math.abs(value);
  let text;
  if (value === 0) text = "0";
  else if (size >= 1e7 || size < 1e-4) text = String(Number(value.toPrecision(digits > 4 ? digits : 3)).toExponential()).replace("e+", "e");
  else if (size >= 1000) text = digits > 4 ? value.toLocaleString("en", { maximumSignificantDigits: digits }) : Math.round(value).toLocaleString("en");
  else text = String(Number(value.toPrecision(digits)));
  return text.replace(/-/g, MINUS);
}

function signed(value) {
  return (value > 0 ? "+" : "") + inShort(value, 3);
}

function percent(value, digits = 1) {
  return value === null || value === undefined ? NONE : (100 * value).toFixed(digits).replace("-", MINUS) + " %";
}

function count(value) {
  return value.toLocaleString("en");
}

// A number with its noun, which is plural unless the number is 1.
function counted(value, noun) {
  return count(value) + " " + noun + (value === 1 ? "" : "s");
}

// A table of text; the first column and the first row are headings.
function table(head, rows, className = "") {
  const heading = el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...rest]) =>
    el("tr", {}, el("th", { scope: "row" }, first), ...rest.map((cell) => el("td", {}, cell)))
  );
  return el("table", { class: className }, el("thead", {}, heading), el("tbody", {}, ...body));
}

// Runs `action` once, after no call has come for so many milliseconds.
function later(action, milliseconds) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}

// Runs `action` once per animation frame, however often it is called.
function onceAFrame(action) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      action();
    });
  };
}
