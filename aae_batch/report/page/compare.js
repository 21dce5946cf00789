// --- win and loss --------------------------------------------------------------------------------

/** Cells of the table: whether an image of the method `a` wins, and one of `b`. */
const CELLS = { both: "both", a: "only the first", b: "only the second", none: "neither" };
const duel = byId("duel");

/** Return the value from which a number wins: the one given, or else the median. */
function least() {
  const [, values] = CRITERIA.get(state.by);
  if (state.least !== "" && Number.isFinite(Number(state.least))) return Number(state.least);
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  return known[Math.floor(known.length / 2)];
}

/** Return a function card -> its cell, or "" if it lacks an image or a value of either method. */
function judge() {
  const [, values] = CRITERIA.get(state.by);
  const bar = isTruth(values) ? true : least();
  return (card) => {
    const [one, other] = [state.a, state.b].map((method) => {
      const value = values[card.find((row) => rows.method[row] === method)] ?? null;
      return value === null ? null : value >= bar;
    });
    if (one === null || other === null) return "";
    return one ? (other ? "both" : "a") : other ? "b" : "none";
  };
}

let cellOf = () => "";

function offerDuel() {
  const { a, b, by, least } = form.elements;
  byId("duel").hidden = methods.length < 2 || !CRITERIA.size;
  if (duel.hidden) return;
  const named = methods.map((name) => [name, name]);
  offer(a, named, DEFAULTS.a);
  offer(b, named, DEFAULTS.b);
  offer(by, [...CRITERIA].map(([name, [label]]) => [name, label]), DEFAULTS.by);
  for (const button of duel.querySelectorAll("[data-cell]")) {
    const { cell } = button.dataset;
    button.addEventListener("click", () => change({ cell: state.cell === cell ? "" : cell, page: "1" }));
  }
  by.addEventListener("input", () => (state.least = least.value = ""));
}

function showDuel() {
  if (duel.hidden) return;
  const [, values] = CRITERIA.get(state.by);
  byId("least").hidden = isTruth(values);
  form.elements.least.placeholder = told(least());
  const counts = { both: 0, a: 0, b: 0, none: 0, "": 0 };
  for (const card of state.cell ? matches("cell") : shown) counts[cellOf(card)] += 1;
  const all = counts.both + counts.a + counts.b + counts.none;
  for (const button of duel.querySelectorAll("[data-cell]")) {
    const count = counts[button.dataset.cell];
    const share = all ? ` ${Math.round((100 * count) / all)} %` : "";
    const text = el("span", {}, CELLS[button.dataset.cell]);
    button.replaceChildren(el("b", {}, count.toLocaleString("en")), el("small", {}, share), text);
    button.setAttribute("aria-pressed", state.cell === button.dataset.cell);
    button.disabled = !count && state.cell !== button.dataset.cell;
  }
  for (const head of duel.querySelectorAll("[data-method]")) {
    head.textContent = state[head.dataset.method];
  }
}

// --- histograms ----------------------------------------------------------------------------------

const BARS = 24;
const histograms = new Map(); // name in NUMBERS -> its parts

/** Return the edges of a number's bars, and what each bar is called. Few whole numbers have one each. */
function barsOf(values) {
  const known = values.filter((value) => value !== null).map(Number);
  const [low, high] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  if (high - low < BARS / 2 && known.every(Number.isInteger)) {
    const starts = Array.from({ length: high - low + 1 }, (_, i) => low + i);
    return { bars: starts.map((start) => [start, start]), at: (value) => value - low };
  }
  const edge = (i) => (i === BARS ? high : low + ((high - low) * i) / BARS);
  const bars = Array.from({ length: BARS }, (_, i) => [edge(i), edge(i + 1)]);
  const at = (value) => Math.min(BARS - 1, Math.floor((BARS * (value - low)) / (high - low)));
  return { bars, at };
}

function offerHistograms() {
  for (const [name, [label, values]] of NUMBERS) {
    if (name !== "loss" || data.lossesCompare) histograms.set(name, histogram(name, label, values));
  }
  byId("histograms").append(...[...histograms.values()].map((one) => one.node));
}

function histogram(name, label, values) {
  const { bars, at } = barsOf(values);
  const rects = bars.map(() => svg("rect", { y: 0, width: 0.86, height: 0 }));
  rects.forEach((rect, i) => rect.setAttribute("x", i + 0.07));
  const band = svg("rect", { class: "band", y: 0, height: 40, width: 0 });
  const box = { viewBox: `0 0 ${bars.length} 40`, preserveAspectRatio: "none", "aria-hidden": "true" };
  const plot = svg("svg", box, band, ...rects);
  const field = { type: "number", step: "any" };
  const ends = [["at least", "≥"], ["at most", "≤"]].map(([end, placeholder]) =>
    el("input", { ...field, "aria-label": `${label}, ${end}`, placeholder }),
  );
  const [low, high] = [bars[0][0], bars.at(-1)[1]];
  const typed = (input, otherwise) => (input.value === "" ? otherwise : Number(input.value));
  for (const input of ends) {
    input.addEventListener("change", () => {
      const empty = ends.every(({ value }) => value === "");
      narrow(name, empty ? null : [typed(ends[0], low), typed(ends[1], high)]);
    });
  }
  let from = null;
  const barAt = ({ clientX }) => {
    const { left, width } = plot.getBoundingClientRect();
    const bar = Math.floor(((clientX - left) / width) * bars.length);
    return Math.min(bars.length - 1, Math.max(0, bar));
  };
  const span = (event) => [from, barAt(event)].sort((a, b) => a - b);
  const paint = (first, last) => {
    band.setAttribute("x", first);
    band.setAttribute("width", Math.max(0, last + 1 - first));
  };
  plot.addEventListener("pointerdown", (event) => {
    from = barAt(event);
    plot.setPointerCapture(event.pointerId);
    paint(from, from);
  });
  plot.addEventListener("pointermove", (event) => from !== null && paint(...span(event)));
  plot.addEventListener("pointercancel", () => ((from = null), showHistograms()));
  plot.addEventListener("pointerup", (event) => {
    const [first, last] = span(event);
    from = null;
    toggle([bars[first][0], bars[last][1]]);
  });
  const toggle = (range) => {
    const same = rangesOf().some(([one, ...own]) => one === name && String(own) === String(range));
    narrow(name, same ? null : range);
  };
  const answers = ["no", "yes"].map((word) => el("button", { type: "button" }, word));
  answers.forEach((button, i) => button.addEventListener("click", () => toggle([i, i])));
  const marks = [low, high].map((value) => el("span", {}, told(value, 2)));
  const under = isTruth(values)
    ? [el("p", { class: "axis" }, ...answers)]
    : [el("p", { class: "axis", "aria-hidden": "true" }, ...marks), el("div", { class: "ends" }, ...ends)];
  const group = { class: "histogram", role: "group", "aria-label": label };
  const node = el("div", group, el("p", { class: "name", title: label }, label), plot, ...under);
  const update = (shown, range) => {
    const counts = bars.map(() => 0);
    for (const row of shown.flatMap(visible)) {
      if (values[row] !== null) counts[at(Number(values[row]))] += 1;
    }
    const most = Math.max(1, ...counts);
    rects.forEach((rect, i) => {
      const height = counts[i] && Math.max(1, (40 * counts[i]) / most);
      rect.setAttribute("height", height);
      rect.setAttribute("y", 40 - height);
      rect.classList.toggle("out", Boolean(range) && (bars[i][1] < range[0] || bars[i][0] > range[1]));
    });
    if (range) paint(at(Math.max(low, range[0])), at(Math.min(high, range[1] - (bars.length === BARS ? 1e-9 : 0))));
    else paint(0, -1);
    answers.forEach((button, i) => button.setAttribute("aria-pressed", range?.[0] <= i && i <= range?.[1]));
    ends.forEach((end, i) => {
      const isOpen = !range || range[i] === [low, high][i]; // so that a rounded end excludes no extreme
      end.value = isOpen ? "" : String(Number(range[i].toPrecision(6)));
    });
    node.classList.toggle("active", Boolean(range));
  };
  return { node, update };
}

/** Set or remove the range of a number. */
function narrow(name, range) {
  const others = rangesOf().filter(([one]) => one !== name);
  const ranges = range ? [...others, [name, ...range]] : others;
  change({ ranges: ranges.length ? JSON.stringify(ranges) : "", page: "1" });
}

function showHistograms() {
  const ranges = new Map(rangesOf().map(([name, ...range]) => [name, range]));
  for (const [name, one] of histograms) {
    const range = ranges.get(name);
    one.update(range ? matches(name) : shown, range);
  }
}

/** Show the filters of both, with a button that removes each. */
function showPills() {
  const pill = (text, remove) => {
    const button = el("button", { type: "button", class: "pill", "aria-label": `Remove the filter ${text}` }, text, " ✕");
    button.addEventListener("click", remove);
    return button;
  };
  const pills = rangesOf().map(([name, low, high]) => {
    const range = low === high ? told(low) : `${told(low)} to ${told(high)}`;
    return pill(`${NUMBERS.get(name)[0]}: ${range}`, () => narrow(name, null));
  });
  if (state.cell) {
    const who = { a: `only ${state.a}`, b: `only ${state.b}` }[state.cell] ?? CELLS[state.cell];
    const remove = () => change({ cell: "", page: "1" });
    pills.unshift(pill(`${CRITERIA.get(state.by)[0]}: ${who}`, remove));
  }
  byId("pills").replaceChildren(...pills);
}
