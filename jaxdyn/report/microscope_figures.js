// How names, numbers and texts read, and the figures made of them. All text is text, never markup.

const WORDS = {
  log_prob: ["log π", "nats"],
  entropy: ["entropy", "nats"],
  confidence: ["confidence", "probability"],
  margin: ["margin", "probability"],
  kl: ["KL to the first", "nats"],
};
const DIGITS = 4;

const word = (quantity) => WORDS[quantity]?.[0] ?? plain(quantity);
const unit = (quantity) => WORDS[quantity]?.[1] ?? "";

function make(tag, fields = {}, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children.flat());
  return element;
}
const title = (text) => make("h3", {}, text);
const span = (className, ...children) => make("span", { className }, ...children);
const soft = (...children) => make("p", { className: "soft" }, ...children);

// -- how numbers and texts read -------------------------------------------------------------------

function digits(x, signed) {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x), small = size > 0 && size < 1e-3;
  const text = size === 0 ? "0" : small ? size.toExponential(DIGITS - 1) : size.toPrecision(DIGITS);
  return (x < 0 ? "−" : signed && x > 0 ? "+" : "") + text;
}
function number(x, signed = true) {
  const element = make("span", { className: "number", title: String(x) }, digits(x, signed));
  element.dataset.value = String(x);
  return element;
}

const code = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
// Control characters, and those that would break a line or turn its direction, are named.
const NAMED =
  /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const safe = (text) => text.replace(NAMED, code);
const MARKS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\xa0": "⍽" };
const visible = (text) => (text ? safe(text).replace(/[ \n\t\xa0]/g, (c) => MARKS[c]) : "∅");
const piece = (text) => make("bdi", { className: "piece", title: visible(text) }, visible(text));
const plain = (name) => safe(name).replaceAll("_", " ");

// -- figures --------------------------------------------------------------------------------------

// A table; its groups have rows, each [whether it is marked, its cells].
function table(id, heads, groups) {
  const row = ([marked, row]) =>
    make("tr", { className: marked ? "chosen" : "" }, row.map((cell) => make("td", {}, cell)));
  const head = make("thead", {}, make("tr", {}, heads.map((name) => make("th", {}, name))));
  const bodies = groups.filter((group) => group.length);
  return make("table", { id }, head, bodies.map((group) => make("tbody", {}, group.map(row))));
}

function mark(x, largest) {
  const bar = make("i", { className: x > 0 ? "up" : "down" });
  bar.style.setProperty("--size", `${largest ? (50 * Math.abs(x)) / largest : 0}%`);
  return bar;
}

function bars(id, rows) {
  const largest = Math.max(...rows.map(([, x]) => Math.abs(x)));
  const row = ([name, x]) => [span("", plain(name)), span("bar", mark(x, largest)), number(x)];
  return make("div", { className: "bars", id }, rows.map(row).flat());
}

// A figure's cell: a number, where it is, and its unit.
function cell(place, x, unit, className, ...children) {
  const made = span(`cell ${className}`, ...children);
  Object.assign(made.dataset, { value: String(x), place, unit });
  made.title = `${place}: ${x} ${unit}`;
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", made.title);
  return made;
}

// A figure with cells that arrows move between, and the number of the one that is pointed at.
function figure(all, columns, ...children) {
  const words = make("figcaption", {}, "The pointer or the arrow keys read a cell.");
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  all.forEach((cell, i) => {
    const { place, value, unit } = cell.dataset;
    cell.tabIndex = i ? -1 : 0;
    cell.onfocus = cell.onmouseenter = () =>
      words.replaceChildren(`${place}: `, number(Number(value)), ` ${unit}`);
    cell.onkeydown = (event) => {
      if (!(event.key in moves)) return;
      event.preventDefault();
      all[i + moves[event.key]]?.focus();
    };
  });
  return make("figure", {}, ...children, words);
}
