// --- what can be asked of a picture --------------------------------------------------------------

/** Return whether several values occur: otherwise neither sorting nor filtering says anything. */
function isVaried(values) {
  const known = values.filter((value) => value !== null);
  return known.some((value) => value !== known[0]);
}

/** Name -> [label, value of each row], of the figures that vary. */
const NUMBERS = new Map(
  [
    ...scores.filter((score) => !score.text).map(({ name, label, values }) => [name, label, values]),
    ["loss", data.lossesCompare ? "final loss" : "own final loss", rows.final_loss],
    ["refinements", "refinements", rows.num_refinements],
    ["forwards", "forwards", rows.forwards],
    ["seconds", "latency, s", rows.seconds],
  ]
    .filter(([, , values]) => isVaried(values))
    .map(([name, ...rest]) => [name, rest]),
);

/** Value of `show` -> [label, test of a row, given the subjects in question]. */
const SHOWS = new Map([
  ["ok", ["with an image", (row) => rows.error_type[row] === null]],
  ["neglected", ["neglected", (row) => rows.neglected[row] === true]],
  ["attended", ["not neglected", (row) => rows.neglected[row] === false]],
  ["missed", ["missed by the detector", missedIn]],
  ["accepted", ["accepted", (row) => rows.accepted[row] === true]],
  ["unaccepted", ["not accepted", (row) => rows.accepted[row] === false]],
  ["failed", ["failed", (row) => rows.error_type[row] !== null]],
  ...[...new Set(rows.error_type)]
    .filter((reason) => reason !== null)
    .map((reason) => [
      `failed:${reason}`,
      [`failed: ${reason}`, (row) => rows.error_type[row] === reason],
    ]),
]);
for (const [name, [, test]] of SHOWS) {
  if (!rows.id.some((_, row) => test(row, () => true))) SHOWS.delete(name);
}
/** The same of what the reader has chosen. */
const CHOSEN = new Map([
  ["kept", ["kept", (row) => choiceOf(row) === "keep"]],
  ["dropped", ["dropped", (row) => choiceOf(row) === "drop"]],
  ["undecided", ["not decided", (row) => rows.error_type[row] === null && !choiceOf(row)]],
]);

/** Name -> [label, value of each row], by which an image wins: if true, or if large enough. */
const CRITERIA = new Map(
  [
    ...scores.map(({ name, label, values }) => [name, label, values]),
    ["neglected", "not neglected", rows.neglected.map((value, row) => comparable(row, !value, value))],
  ]
    .filter(([, , values]) => isVaried(values) && !values.some((value) => typeof value === "string"))
    .sort(([, , one], [, , other]) => isTruth(other) - isTruth(one))
    .map(([name, ...rest]) => [name, rest]),
);

function isTruth(values) {
  return values.some((value) => typeof value === "boolean");
}

/** Return `result`, or null if the attention of the row's method does not compare or is not known. */
function comparable(row, result, value) {
  return value === null || data.apart.includes(rows.method[row]) ? null : result;
}

/** Return whether a detector missed a subject of a row that `isIt` admits. */
function missedIn(row, isIt) {
  return attendedOf(row).some((i) => isMissed(i) && isIt(attention.subject[i].toLowerCase()));
}

// --- the state, which the URL's hash holds -------------------------------------------------------

const DEFAULTS = {
  q: "",
  subject: "",
  method: "",
  show: "",
  set: "",
  sort: "",
  order: "",
  by: CRITERIA.keys().next().value ?? "", // what wins or loses
  a: methods[0] ?? "", // the two methods compared
  b: methods.includes("attend-and-excite") ? "attend-and-excite" : (methods[1] ?? ""),
  least: "", // the value that wins, of a number
  cell: "", // one of CELLS, to which the cards are narrowed
  ranges: "", // JSON, [name in NUMBERS, lowest, highest] of each histogram with a selection
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

/** Return the rows of a card that the method filter admits. */
function visible(card) {
  return state.method ? card.filter((row) => rows.method[row] === state.method) : card;
}

/** Return the cards that pass the filters, but for one: `cell`, or the range of a number. */
function matches(except = "") {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const subject = state.subject.trim().toLowerCase();
  const isIt = known.has(subject) ? (one) => one === subject : (one) => one.includes(subject);
  const [, test] = SHOWS.get(state.show) ?? CHOSEN.get(state.show) ?? [];
  const ranges = rangesOf().filter(([name]) => name !== except);
  const within = (row) =>
    ranges.every(([name, low, high]) => {
      const value = NUMBERS.get(name)[1][row];
      return value !== null && low <= value && value <= high;
    });
  const fits = (row) =>
    (!test || test(row, isIt)) &&
    (!state.set || rows.set[row] === state.set) &&
    (!subject || found[row].subjects.some(isIt)) &&
    words.every((word) => found[row].text.includes(word)) &&
    within(row);
  const cell = except === "cell" ? "" : state.cell;
  return cards.filter((card) => visible(card).some(fits) && (!cell || cellOf(card) === cell));
}

/** Return the ranges in the state, without any that the page does not know. */
function rangesOf() {
  let given;
  try {
    given = JSON.parse(state.ranges || "[]");
  } catch {
    return [];
  }
  const isRange = (one) => Array.isArray(one) && NUMBERS.has(one[0]) && one.slice(1).every(Number.isFinite);
  return Array.isArray(given) ? given.filter((one) => isRange(one) && one.length === 3) : [];
}

/** Sort by the highest or lowest figure of a card's rows; cards without figures come last. */
function sorted(cards) {
  const up = state.order === "up";
  const values = NUMBERS.get(state.sort)?.[1];
  if (!values) return cards;
  const best = (card) => {
    const numbers = visible(card).map((row) => values[row]).filter((value) => value !== null);
    return numbers.length ? (up ? Math.min(...numbers) : -Math.max(...numbers)) : Infinity;
  };
  const keyed = cards.map((card, i) => [best(card), i, card]);
  keyed.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] - b[0]));
  return keyed.map(([, , card]) => card);
}
