// --- the state, which the URL's hash holds -------------------------------------------------------

const DEFAULTS = {
  q: "",
  subject: "",
  method: "",
  show: "",
  set: "",
  sort: "",
  order: "",
  page: "1",
  card: "", // the name of the open card
};
const form = byId("filters");
let state = { ...DEFAULTS };
let shown = [];

/** Read the state from the URL. Values that no select offers are ignored. */
function fromHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const offered = (name, value) => {
    const options = form.elements[name]?.options;
    return !options || [...options].some((option) => option.value === value);
  };
  const entries = Object.entries(DEFAULTS).map(([name, value]) => {
    const wanted = given.get(name) ?? value;
    return [name, offered(name, wanted) ? wanted : value];
  });
  return Object.fromEntries(entries);
}

/** Update the state and the page. The history keeps one entry for the page. */
function change(values) {
  state = { ...state, ...values };
  show();
  const kept = Object.entries(state).filter(([k, value]) => value !== DEFAULTS[k]);
  const hash = new URLSearchParams(kept).toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

// --- filters and sorting -------------------------------------------------------------------------

const SORTS = {
  loss: ["final loss", rows.final_loss],
  refinements: ["refinements", rows.num_refinements],
  forwards: ["forwards", rows.forwards],
  seconds: ["latency, s", rows.seconds],
  ...Object.fromEntries(
    scores
      .filter((score) => !score.text)
      .map((score) => [score.name, [score.label, score.values]]),
  ),
};
const SHOWS = {
  ok: (row) => rows.error_type[row] === null,
  failed: (row) => rows.error_type[row] !== null,
  neglected: (row) => rows.neglected[row] === true,
  attended: (row) => rows.neglected[row] === false,
  accepted: (row) => rows.accepted[row] === true,
  unaccepted: (row) => rows.accepted[row] === false,
};

/** Return the rows of a card that the method filter admits. */
function visible(card) {
  return state.method ? card.filter((row) => rows.method[row] === state.method) : card;
}

function matches() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const subject = state.subject.trim().toLowerCase();
  const isIt = known.has(subject) ? (one) => one === subject : (one) => one.includes(subject);
  const reason = state.show.startsWith("failed:") ? state.show.slice(7) : null;
  const test = reason === null ? SHOWS[state.show] : (row) => rows.error_type[row] === reason;
  const fits = (row) =>
    (!test || test(row)) &&
    (!state.set || rows.set[row] === state.set) &&
    (!subject || found[row].subjects.some(isIt)) &&
    words.every((word) => found[row].text.includes(word));
  return cards.filter((card) => visible(card).some(fits));
}

/** Sort by the highest or lowest figure of a card's rows; cards without figures come last. */
function sorted(cards) {
  const up = state.order === "up";
  const values = SORTS[state.sort]?.[1];
  if (!values) return cards;
  const best = (card) => {
    const numbers = visible(card).map((row) => values[row]).filter((value) => value !== null);
    return numbers.length ? (up ? Math.min(...numbers) : -Math.max(...numbers)) : Infinity;
  };
  const keyed = cards.map((card, i) => [best(card), i, card]);
  keyed.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] - b[0]));
  return keyed.map(([, , card]) => card);
}
