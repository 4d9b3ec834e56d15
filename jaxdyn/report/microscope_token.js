// The account of a token, and of the completion it is in: sections, each a list of elements.

const OUTSIDE = ["embedding", "final_norm", "classifier"];
const SHOWN = 5;

const place = (ledger, l) =>
  l === 0 ? "embedding" : l === ledger.depth - 1 ? "final norm" : `layer ${l - 1}`;

// In words: by how much, on average of so many tokens, and through which components.
function account(ledger, of, count, changed, ofParts) {
  const { quantity, components } = ledger;
  const share = (x) =>
    ofParts.every((y) => y * changed > 0) ? ` (${Math.round((100 * x) / changed)}\xa0%)` : "";
  const through = ofParts.flatMap((x, c) =>
    [`${c ? ", " : "; "}${plain(components[c])} `, number(x), share(x)]);
  const mean = number(changed / count);
  return [
    `Δ ${word(quantity)} over ${of}: `, number(changed), ` ${unit(quantity)} (`, mean, " a token)",
    ...through,
  ];
}

function statistics(ledger, i) {
  const row = (quantity, name, read) => {
    const [before, after] = ledger.ends(quantity, i).map(read);
    const cells = [name, number(before, false), number(after, false), number(after - before)];
    return [quantity === ledger.quantity, cells];
  };
  const rows = ledger.quantities.flatMap((quantity) => {
    const itself = row(quantity, word(quantity), (x) => x);
    return quantity === "log_prob" ? [itself, row(quantity, "π", Math.exp)] : [itself];
  });
  return [table("statistics", ["", "before", "after", "change"], [rows])];
}

function byComponent(ledger, i) {
  const ofParts = ledger.components.map((component) => [component, ledger.through(component, i)]);
  const rows = [["change", ledger.change(i)], ...ofParts, ["residual", ledger.residual(i)]];
  return [title(`Δ ${word(ledger.quantity)} by component`), bars("components", rows)];
}

function alternatives(ledger, i) {
  const { alternatives, alternative_parts, alternative_pieces, alternative_values } = ledger;
  const wide = alternatives.shape[1], stride = ledger.size * wide;
  if (!wide) return [];
  const all = Array.from({ length: wide }, (_, a) => {
    const j = i * wide + a;
    const logs = [ledger.from, ledger.to].map((k) => alternative_values[k * stride + j]);
    const ofParts = Object.values(alternative_parts).map((x) => ledger.over(x, stride, j));
    const [before, after] = logs.map(Math.exp);
    const amounts = [logs[1] - logs[0], ...ofParts].map((x) => number(x));
    const name = piece(ledger.string(alternative_pieces, j));
    const cells = [name, number(before, false), number(after, false), ...amounts];
    return { by: after - before, row: [alternatives[j] === ledger.targets[i], cells] };
  });
  all.sort((a, b) => b.by - a.by);
  const raised = all.filter((a) => a.by > 0).slice(0, SHOWN);
  const lowered = all.filter((a) => a.by < 0).reverse().slice(0, SHOWN);
  const heads = ["", "π before", "after", "Δ log π", ...Object.keys(alternative_parts)];
  const rows = [raised, lowered].map((group) => group.map((a) => a.row));
  return [title("Most raised and most lowered tokens here"), table("alternatives", heads, rows)];
}

function byLayer(ledger, i) {
  const { depth, part, first, last } = ledger;
  if (!depth) return [];
  const all = Array.from({ length: depth }, (_, l) => ledger.layer(l, i));
  const largest = Math.max(...all.map(Math.abs));
  const inside = (l) => (part === "layers" && first <= l && l <= last ? "inside" : "");
  const columns = all.map((x, l) =>
    cell(place(ledger, l), x, unit(ledger.quantity), `column ${inside(l)}`, mark(x, largest)));
  const chart = make("div", { className: "columns", id: "by-token" }, columns);
  const ends = make("div", { className: "ends" }, span("", "embedding"), span("", "final norm"));
  return [title(`Its Δ ${word(ledger.quantity)} by layer`), figure(columns, depth, chart, ends)];
}

function influence(ledger, i) {
  const given = ledger.influence, m = given ? given.sites.indexOf(i) : -1;
  const found = given?.quantities[ledger.quantity];
  if (m < 0 || !found) return [];
  const wide = found.who.shape[1], ofPart = Object.entries(found.parts);
  const pushes = Array.from({ length: wide }, (_, p) => {
    const j = m * wide + p, who = found.who[j], text = safe(ledger.string(given.texts, who));
    const line = make("bdi", {}, text.replaceAll("\n", " ") || "∅");
    const asked = span("prompt", safe(ledger.string(given.prompts, who)));
    const amount = number(sum(ofPart.map(([, x]) => x[j])));
    const amounts = ofPart.flatMap(([name, x]) => [`${plain(name)} `, number(x[j]), "  "]);
    return make("details", { className: "push" },
      make("summary", { className: "row" }, amount, number(given.advantages[who]), line),
      make("div", {}, asked, text), soft(...amounts));
  });
  const others = number(sum(Object.values(found.others).map((x) => x[m])));
  const row = (id, ...cells) => make("div", { className: "push row", id }, cells);
  const heads = ["amount", "advantage", "completion"].map((name) => span("soft", name));
  const rest = row("others", others, span(""), "all others together");
  const all = [row("", ...heads), ...pushes, rest];
  return [
    title(`Training completions that moved its ${word(ledger.quantity)}`),
    soft(safe(given.about)), make("div", { id: "influence" }, all),
  ];
}

function completion(ledger, t) {
  const { start, end, row } = ledger.texts[t], { from, to, nodes, texts, quantity } = ledger;
  const inside = Array.from({ length: end - start }, (_, i) => start + i);
  const changed = sum(inside.map((i) => ledger.change(i)));
  const ofParts = ledger.components.map((c) => sum(inside.map((i) => ledger.through(c, i))));
  const taken = Array.from({ length: to - from }, (_, k) => nodes[(from + k) * texts.length + t]);
  const words = account(ledger, `its ${inside.length} tokens`, inside.length, changed, ofParts);
  const missed = number(sum(ofParts) - changed);
  return [
    title(`Completion ${row + 1} as a whole`),
    make("p", { id: "completion" }, words, "; residual ", missed,
      `. Quadrature nodes: ${taken.join(", ")}.`),
    ...(ledger.by_layer[quantity] ? layersByKinds(ledger, t) : []),
  ];
}

function layersByKinds(ledger, t) {
  const ending = unit(ledger.quantity);
  const kinds = Object.keys(ledger.by_layer[ledger.quantity]).map((kind) =>
    [kind, ledger.ofKind(kind, t)]);
  const inLayers = kinds.filter(([kind]) => !OUTSIDE.includes(kind));
  const columns = Math.max(1, ...inLayers.map(([, xs]) => xs.length));
  const spread = inLayers.filter(([, xs]) => xs.length === columns);
  const alone = kinds.filter((kind) => !spread.includes(kind));
  const largest = Math.max(0, ...spread.flatMap(([, xs]) => xs).map(Math.abs));
  const rows = spread.map(([kind, xs]) => xs.map((x, l) => {
    const made = cell(`${plain(kind)}, layer ${l}`, x, ending, x > 0 ? "up" : "down");
    made.style.setProperty("--amount", `${largest ? (100 * Math.abs(x)) / largest : 0}%`);
    return made;
  }));
  const axis = Array.from({ length: columns }, (_, l) =>
    span("axis", l % 5 && columns > 12 ? "" : String(l)));
  const lines = rows.flatMap((row, k) => [span("kind", plain(spread[k][0])), ...row]);
  const map = make("div", { className: "map", id: "by-layer" }, lines, span("kind", "layer"), axis);
  map.style.setProperty("--columns", columns);
  return [
    title(`Its Δ ${word(ledger.quantity)} by layer and kind of parameter`),
    soft("The fullest colour is ± ", number(largest, false), ` ${ending}.`),
    figure(rows.flat(), columns, map),
    bars("outside", alone.flatMap(([kind, xs]) => xs.map((x) => [kind, x]))),
  ];
}

const accountOf = (ledger, i) => [
  ...[statistics, byComponent, alternatives, byLayer, influence].flatMap((part) => part(ledger, i)),
  ...completion(ledger, ledger.owner[i]),
];
