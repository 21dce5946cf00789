// --- the page ------------------------------------------------------------------------------------

const grid = byId("grid");
let drawn = "";

function show() {
  const view = () => JSON.stringify({ ...state, card: "" });
  if (view() !== drawn) {
    showCards();
    drawn = view();
  }
  const open = cards[names.indexOf(state.card)];
  if (open) {
    details(open);
    const at = shown.indexOf(open);
    byId("before").disabled = at < 1;
    byId("after").disabled = at < 0 || at === shown.length - 1;
    if (!dialog.open) dialog.showModal();
  } else if (dialog.open) {
    dialog.close();
  }
}

function showCards() {
  for (const input of form.elements) {
    if (input.name && input.value !== state[input.name]) input.value = state[input.name];
  }
  form.elements.order.disabled = !state.sort;
  shown = sorted(matches());
  const pages = Math.max(1, Math.ceil(shown.length / CARDS_A_PAGE));
  const page = Math.min(pages, Math.max(1, Number.parseInt(state.page, 10) || 1));
  state.page = String(page);
  const nodes = shown.slice((page - 1) * CARDS_A_PAGE, page * CARDS_A_PAGE).map(cardOf);
  const none = cards.length ? "Nothing fits these filters." : "There are no rows yet.";
  grid.replaceChildren(...(nodes.length ? nodes : [el("p", { class: "empty" }, none)]));
  const across = Math.max(1, ...shown.slice(0, 500).map((card) => visible(card).length));
  grid.style.setProperty("--card-width", `${Math.min(4, across) * 9.5 + 3.5}rem`);
  const total = shown.reduce((sum, card) => sum + visible(card).length, 0);
  const all = shown.length === cards.length ? "" : ` of ${cards.length.toLocaleString("en")}`;
  byId("count").textContent = `${shown.length.toLocaleString("en")}${all} ${
    cards.length === 1 ? "card" : "cards"
  }, ${counted(total, "row", "rows")}`;
  byId("pager").hidden = pages === 1;
  byId("page").textContent = `${page} of ${pages}`;
  byId("previous").disabled = page === 1;
  byId("next").disabled = page === pages;
}

function turn(by) {
  change({ page: String(Number(state.page) + by) });
  byId("cards").scrollIntoView();
  grid.querySelector("h2 button")?.focus({ preventScroll: true });
}

/** Add options, pairs of value and text, to a select. */
function offer(select, options) {
  select.append(...options.map(([value, text]) => el("option", { value }, text)));
}

function offerAll() {
  const { method, show, set, sort } = form.elements;
  offer(method, methods.map((name) => [name, name]));
  const reasons = [...new Set(rows.error_type)].filter((reason) => reason !== null);
  offer(show, reasons.map((reason) => [`failed:${reason}`, `failed: ${reason}`]));
  if (rows.accepted.includes(false)) {
    offer(show, [["accepted", "accepted"], ["unaccepted", "not accepted"]]);
  }
  const sets = [...new Set(rows.set)].filter((name) => name !== null);
  offer(set, sets.map((name) => [name, name]));
  byId("sets").hidden = !sets.length;
  const sorts = Object.entries(SORTS).filter(([, [, values]]) => values.some((v) => v !== null));
  offer(sort, sorts.map(([value, [text]]) => [value, text]));
  const often = new Map();
  cards.flatMap(subjectsOf).forEach((subject) => often.set(subject, (often.get(subject) ?? 0) + 1));
  const most = [...often].sort((a, b) => b[1] - a[1]).slice(0, 300);
  offer(byId("subjects"), most.map(([subject]) => [subject, ""]));
}

form.addEventListener("input", ({ target }) => change({ [target.name]: target.value, page: "1" }));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => change({ ...DEFAULTS }));
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("before").addEventListener("click", () => step(-1));
byId("after").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => change({ card: "" }));
dialog.addEventListener("close", () => state.card && change({ card: "" }));
dialog.addEventListener("click", (event) => event.target === dialog && change({ card: "" }));
window.addEventListener("hashchange", () => {
  state = fromHash();
  show();
});

// --- keys ----------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select");
  if (dialog.open) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !event.target.closest(".scroll")) step(by);
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    form.elements.q.focus();
  } else if (event.key === "Escape") {
    for (const card of grid.children) card.clear?.();
  } else if (!typing && grid.contains(event.target)) {
    move(event);
  }
});

/** Move the focus by arrow keys to the card beside, above or below. */
function move(event) {
  const all = [...grid.children];
  const columns = all.filter((card) => card.offsetTop === all[0].offsetTop).length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const next = by && all[all.indexOf(event.target.closest(".card")) + by];
  if (!next) return;
  event.preventDefault();
  next.querySelector("h2 button").focus();
  next.scrollIntoView({ block: "nearest" });
}

// --- light and dark ------------------------------------------------------------------------------

const THEME = "aae-batch-theme";

function remembered() {
  try {
    return localStorage.getItem(THEME);
  } catch {
    return null; // a page from a file may have no storage
  }
}

function light(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(THEME, theme);
  } catch {
    // without storage the theme lasts only as long as the page
  }
}

if (remembered()) light(remembered());
byId("theme").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  light((document.documentElement.dataset.theme ?? system) === "dark" ? "light" : "dark");
});

/** Keep a focused card clear of the filter bar, however many lines the bar has. */
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--bar", `${form.offsetHeight}px`);
}).observe(form);

offerAll();
state = fromHash();
show();
document.documentElement.dataset.ready = "true";
