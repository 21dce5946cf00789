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
    const title = byId("details-title");
    if (title.scrollHeight > title.clientHeight) title.tabIndex = 0; // a long prompt scrolls
  } else if (dialog.open) {
    dialog.close();
  }
}

function showCards() {
  for (const input of form.elements) {
    if (input.name && input.value !== state[input.name]) input.value = state[input.name];
  }
  form.elements.order.disabled = !state.sort;
  if (!duel.hidden) cellOf = judge();
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
  showDuel();
  showHistograms();
  showPills();
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

/** Add options, pairs of value and text, to a select. `first` is the one that it has at first. */
function offer(select, options, first = "") {
  const option = ([value, text]) => el("option", { value, selected: value === first }, text);
  select.append(...options.map(option));
}

/** Offer what can match something, and hide the fields that are left with nothing to choose. */
function offerAll() {
  const { method, show, set, sort, order, subject } = form.elements;
  if (methods.length > 1) offer(method, methods.map((name) => [name, name]));
  offer(show, [...SHOWS, ...CHOSEN].map(([value, [text]]) => [value, text]));
  const sets = [...new Set(rows.set)].filter((name) => name !== null);
  if (sets.length > 1) offer(set, sets.map((name) => [name, name]));
  offer(sort, [...NUMBERS].map(([value, [text]]) => [value, text]));
  for (const select of [method, set, sort]) select.closest("label").hidden = select.length === 1;
  order.closest("label").hidden = sort.length === 1;
  subject.closest("label").hidden = !known.size;
  const often = new Map();
  cards.flatMap(subjectsOf).forEach((subject) => often.set(subject, (often.get(subject) ?? 0) + 1));
  const most = [...often].sort((a, b) => b[1] - a[1]).slice(0, 300);
  offer(byId("subjects"), most.map(([subject]) => [subject, ""]));
  offerDuel();
  offerHistograms();
  byId("histograms").hidden = !histograms.size;
  byId("explore").hidden = duel.hidden && !histograms.size;
  byId("explore").open = innerWidth > 1024;
}

document.addEventListener("input", ({ target }) => {
  if (target.form === form) change({ [target.name]: target.value, page: "1" });
});
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
    if (by && !event.target.closest(".scroll, input")) step(by);
    else if (event.key in KEYS) chooseBy(event);
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    form.elements.q.focus();
  } else if (event.key === "Escape") {
    for (const card of grid.children) card.clear?.();
  } else if (!typing && event.key in KEYS) {
    chooseBy(event);
  } else if (!typing && (grid.contains(event.target) || event.target === document.body)) {
    move(event);
  }
});

/** Keep, drop or undecide the focused image, or all of the focused or open card. */
function chooseBy(event) {
  const around = event.target.closest("figure") ?? event.target.closest(".card, dialog");
  if (!around) return;
  const figures = around.matches("figure") ? [around] : [...around.querySelectorAll("figure")];
  choose(figures.map((figure) => figure.row), KEYS[event.key]);
}

/** Move the focus by arrow keys to the card beside, above or below, or to the first in sight. */
function move(event) {
  const all = [...grid.querySelectorAll(".card")];
  const columns = all.filter((card) => card.offsetTop === all[0].offsetTop).length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const from = all.indexOf(event.target.closest(".card"));
  const inSight = () => all.find((card) => card.getBoundingClientRect().bottom > form.offsetHeight);
  const next = by && (from < 0 ? inSight() : all[from + by]);
  if (!next) return;
  event.preventDefault();
  next.querySelector("h2 button").focus({ preventScroll: true });
  const isTall = next.offsetHeight > innerHeight - form.offsetHeight;
  next.scrollIntoView({ block: isTall ? "start" : "nearest" });
}

// --- light and dark ------------------------------------------------------------------------------

const THEME = "aae-batch-theme";

function light(theme) {
  document.documentElement.dataset.theme = theme;
  remember(THEME, theme);
}

if (remembered(THEME)) light(remembered(THEME));
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
showChoices();
document.documentElement.dataset.ready = "true";
mapsRead.then(() => (document.documentElement.dataset.maps = "true"));
