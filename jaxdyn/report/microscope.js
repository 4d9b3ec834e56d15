// The page: completions as text, coloured by what is chosen, and the account of one token.

const TAIL = 280, WITHIN = 0.98, DEEPEST = 85;

const $ = (id) => document.getElementById(id);

function start(ledger) {
  const { names, texts, segments, owner } = ledger;
  const tokens = [], articles = [], sums = [];
  let chosen = 0;

  // -- completions --------------------------------------------------------------------------------

  function prompt(text) {
    const whole = span("prompt"), rest = text.length - TAIL;
    if (rest < 40) return whole.append(safe(text)), whole;
    const more = make("button", { type: "button" }, `… ${rest} characters before`);
    more.onclick = () => whole.replaceChildren(safe(text));
    whole.append(more, " ", safe([...text].slice(-TAIL).join("")));
    return whole;
  }
  function token(i) {
    const shown = safe(ledger.string(ledger.pieces, i)).replaceAll("\n", "⏎\n") || "∅";
    const made = make("span", { className: "token", tabIndex: -1 }, shown);
    made.dataset.site = i;
    made.setAttribute("role", "button");
    return made;
  }
  texts.forEach(({ row, start, end }, t) => {
    for (let i = start; i < end; i++) tokens[i] = token(i);
    sums[t] = span("");
    const asked = prompt(ledger.string(ledger.prompts, t));
    const flow = make("div", { className: "text", dir: "auto" }, asked, tokens.slice(start, end));
    const head = make("header", {}, span("", `Completion ${row + 1}`), sums[t]);
    articles[t] = make("article", {}, head, flow);
  });
  $("texts").append(...articles);

  function paint() {
    const { quantity, part } = ledger, ending = ` ${unit(quantity)}`;
    const amounts = tokens.map((_, i) => ledger.amount(i));
    const scaled = $("fit").checked ? amounts : tokens.map((_, i) => ledger.change(i));
    const sizes = Float64Array.from(scaled, Math.abs).filter(Number.isFinite).sort();
    const largest = sizes[Math.floor(WITHIN * (sizes.length - 1))] || sizes.at(-1) || 1;
    const label = `Δ ${word(quantity)}${part === "total" ? "" : ` (${plain(part)})`}`;
    tokens.forEach((token, i) => {
      const x = amounts[i], level = Number.isFinite(x) ? Math.min(1, Math.abs(x) / largest) : 0;
      token.classList.toggle("up", x > 0);
      token.classList.toggle("down", x < 0);
      token.style.setProperty("--amount", `${(DEEPEST * level).toFixed(1)}%`);
      token.title = `${label}: ${x}${ending}`;
      token.dataset.value = String(x);
    });
    $("low").textContent = digits(-largest, true);
    $("high").textContent = digits(largest, true);
    $("unit").textContent = unit(quantity);
    $("legend").title = `${100 * WITHIN} % of the tokens lie within`;
    const ofTexts = texts.map(({ start, end }) => sum(amounts.slice(start, end)));
    ofTexts.forEach((x, t) => sums[t].replaceChildren(`${label}: `, number(x), ending));
    const sign = { file: 0, fall: -1, rise: 1 }[$("order").value];
    const order = texts.map((_, t) => t);
    order.sort((s, t) => sign * (ofTexts[s] - ofTexts[t]) || s - t);
    if (order.some((t, place) => $("texts").children[place] !== articles[t]))
      $("texts").append(...order.map((t) => articles[t]));
  }
  function totals() {
    const { from, to, components, completions, tokens: count } = ledger;
    const all = ledger.totals[ledger.quantity], changed = ledger.over(all.change, 1, 0);
    const ofParts = components.map((component) => ledger.over(all.parts[component], 1, 0));
    const of = `all ${count} tokens of ${completions} completions`;
    const over = ledger.pages.length > 1 ? "this page" : "all tokens";
    $("totals").replaceChildren(
      ...account(ledger, of, count, changed, ofParts), ". The parts miss a token’s change by ",
      number(ledger.missed(), false), ` of it, root mean square over ${over}.`);
    const counted = segments > 1 ? `, ${to - from} of ${segments} segments` : "";
    $("between").textContent = `From ${safe(names[from])} to ${safe(names[to])}${counted}`;
  }

  // -- the chosen token ---------------------------------------------------------------------------

  function show() {
    const { start, end, row } = texts[owner[chosen]];
    const where = `token ${chosen - start + 1} of ${end - start}, completion ${row + 1}`;
    $("panel").replaceChildren(
      make("button", { type: "button", id: "leave", onclick: leave }, "Close"),
      make("h2", { id: "chosen" }, piece(ledger.string(ledger.pieces, chosen))),
      soft(`${where}, id ${ledger.targets[chosen]}`), ...accountOf(ledger, chosen));
  }
  function choose(i) {
    tokens[chosen].tabIndex = -1;
    tokens[chosen].setAttribute("aria-pressed", "false");
    chosen = i;
    tokens[chosen].tabIndex = 0;
    tokens[chosen].setAttribute("aria-pressed", "true");
    show();
  }
  function go(i) {
    choose(i);
    document.body.classList.add("chosen");
    tokens[i].focus();
  }
  // On a narrow screen the account lies over the text until one leaves it.
  function leave() {
    document.body.classList.remove("chosen");
    tokens[chosen].focus();
  }
  function beside(i, step) {
    const shown = [...$("texts").children];
    const t = articles.indexOf(shown[shown.indexOf(articles[owner[i]]) + step]);
    return t < 0 ? i : Math.min(texts[t].start + i - texts[owner[i]].start, texts[t].end - 1);
  }
  const MOVES = {
    ArrowRight: (i) => Math.min(i + 1, texts[owner[i]].end - 1),
    ArrowLeft: (i) => Math.max(i - 1, texts[owner[i]].start),
    ArrowDown: (i) => beside(i, 1),
    ArrowUp: (i) => beside(i, -1),
    Home: (i) => texts[owner[i]].start,
    End: (i) => texts[owner[i]].end - 1,
    Enter: (i) => i,
    " ": (i) => i,
  };
  $("texts").onclick = (event) => {
    const token = event.target.closest(".token");
    if (token) go(Number(token.dataset.site));
  };
  $("texts").onkeydown = (event) => {
    if (!event.target.matches(".token") || !(event.key in MOVES)) return;
    event.preventDefault();
    go(MOVES[event.key](Number(event.target.dataset.site)));
    if (event.key === "Enter") $("panel").focus();
  };
  $("panel").onkeydown = (event) => event.key === "Escape" && leave();

  // -- controls -----------------------------------------------------------------------------------

  const option = (quantity) => make("option", { value: quantity }, `Δ ${word(quantity)}`);
  $("quantity").append(...ledger.quantities.map(option));
  for (const part of ["total", ...ledger.components, "layers"]) {
    const input = make("input", { type: "radio", name: "part", value: part });
    input.checked = part === "total";
    $("part").append(make("label", {}, input, part === "total" ? " all" : ` ${plain(part)}`));
  }
  const slider = (id, max, value) => Object.assign($(id), { min: 0, max, value });
  slider("from", segments, 0);
  slider("to", segments, segments);
  $("steps").hidden = segments < 2;

  function ofQuantity() {
    ledger.quantity = $("quantity").value;
    const choice = (part) => $("part").querySelector(`[value=${part}]`);
    choice("layers").parentElement.hidden = !ledger.depth;
    if (!ledger.depth && choice("layers").checked) choice("total").checked = true;
    slider("first", ledger.depth - 1, ledger.first);
    slider("last", ledger.depth - 1, Math.min(ledger.last, ledger.depth - 1));
  }
  // A pair of sliders: the one that is not moved makes way.
  function pair(low, high, moved, apart) {
    let [from, to] = [low, high].map((id) => Number($(id).value));
    if (to - from < apart) {
      from = moved === high ? Math.max(to - apart, 0) : Math.min(from, $(low).max - apart);
      to = from + apart;
    }
    [$(low).value, $(high).value] = [from, to];
    return [from, to];
  }
  function read(event) {
    const moved = event?.target.id;
    if (!event || moved === "quantity") ofQuantity();
    ledger.part = document.querySelector("[name=part]:checked").value;
    [ledger.from, ledger.to] = pair("from", "to", moved, 1);
    if (ledger.depth) [ledger.first, ledger.last] = pair("first", "last", moved, 0);
    $("layers").hidden = ledger.part !== "layers";
    $("range").textContent = [ledger.first, ledger.last].map((l) => place(ledger, l)).join(" to ");
    $("segment").textContent = [ledger.from, ledger.to].map((k) => safe(names[k])).join(" → ");
    paint();
    totals();
    show();
  }
  $("controls").oninput = read;
  $("controls").onsubmit = (event) => event.preventDefault();

  const flat = (x, name) => {
    if (x === null || typeof x !== "object") return [[name, String(x)]];
    return Object.entries(x).flatMap(([key, value]) => flat(value, name ? `${name}.${key}` : key));
  };
  const settings = flat(ledger.about, "").map((pair) => pair.map(safe));
  $("about").lastElementChild.append(
    ...settings.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  const link = ({ file, first, last }, p) => {
    const label = `Completions ${first} to ${last}`;
    return p === ledger.page ? make("b", {}, label)
      : make("a", { href: encodeURIComponent(file) }, label);
  };
  if (ledger.pages.length > 1) $("pages").append(...ledger.pages.map(link));
  const top = () => document.body.style.setProperty("--top", `${$("controls").offsetHeight}px`);
  new ResizeObserver(top).observe($("controls"));

  const opening = Array.from({ length: texts[0].end }, (_, i) => Math.abs(ledger.change(i)));
  choose(Math.max(0, opening.indexOf(Math.max(...opening))));
  read();
  document.body.dataset.ready = "yes";
}

const { about, ...packed } = JSON.parse($("data").textContent);
unpack(packed).then((data) => start(new Ledger({ about, ...data }))).catch((error) => {
  const why = `This page could not be read: ${error.message}.`;
  $("totals").textContent = `${why} It needs a browser of 2023 or newer.`;
});
