// The images of a dataset as cards: filters, sorting, attention maps and curves.
//
// `data` contains the rows as columns, and `data.attention` columns with one value per row and subject.
// `curves` contains the curves of all subjects as uint16, and `maps` their maps at the last step as uint8, in
// the order of `data.attention`, of which `times` says where maps of other steps are: [number of the block in
// `data-times`, start in it, steps, the attention at 255 of each]. `ramp` contains the 256 colours of an attention map, sRGB bytes. `data.tries` has
// one value per row and try, in a run with several tries a row, which finds the best of them `by`.
// Attention of the methods `data.apart` does not compare with that of the others, and final losses only if
// `data.lossesCompare`. `data.dataset` names the run.

const CARDS_A_PAGE = 48;
const UNIT = 65535; // the value of an attention of 1 in a curve
const LINES = 6; // .line-0 ... in page.css

const data = JSON.parse(new TextDecoder().decode(await unpacked(byId("data"))));
const { rows, attention, tries, by, scores, methods, thresholds, picturesABlock, ramp } = data;
const curveData = new DataView(await unpacked(byId("curves")));
const curveStarts = startsOf(attention.steps.map((steps) => 2 * steps));
const mapStarts = startsOf(attention.height.map((height, i) => height * attention.width[i]));
const attended = rows.first.map((first, row) => Array.from({ length: rows.attended[row] }, (_, i) => first + i));
const cards = gathered();
const labels = rows.id.flatMap((_, row) =>
  numbered(attendedOf(row).map((i) => attention.subject[i])),
);
const names = numbered(cards.map(([first]) => rows.id[first]));
const found = rows.id.map((_, row) => searchable(row));
const known = new Set(found.flatMap((row) => row.subjects));

// --- data ----------------------------------------------------------------------------------------

/** Decode a script element: gzip in base64. */
async function unpacked(script) {
  const text = script.textContent.trim();
  const packed =
    Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** Return where parts of these sizes start that follow each other. */
function startsOf(sizes) {
  let end = 0;
  return sizes.map((size) => (end += size) - size);
}

/** Return the curve of a row of `attention`, in [0, 1]. */
function curveOf(i) {
  const value = (_, step) => curveData.getUint16(curveStarts[i] + 2 * step, true) / UNIT;
  return Float32Array.from({ length: attention.steps[i] }, value);
}

/** Return the rows of each card, in the order of `methods`. */
function gathered() {
  const cards = [];
  rows.card.forEach((card, row) => (cards[card] ??= []).push(row));
  const rank = (row) => methods.indexOf(rows.method[row]);
  return cards.map((card) => card.sort((a, b) => rank(a) - rank(b)));
}

/** Return the indices in `attention` of a dataset row. */
function attendedOf(row) {
  return attended[row];
}

/** Return the indices in `tries` of a dataset row. */
function triesOf(row) {
  return Array.from({ length: rows.tried[row] }, (_, i) => rows.first_try[row] + i);
}

/** Make names unique: cat, cat (2). */
function numbered(names) {
  const seen = new Map();
  return names.map((name) => {
    seen.set(name, (seen.get(name) ?? 0) + 1);
    return seen.get(name) === 1 ? name : `${name} (${seen.get(name)})`;
  });
}

/** Return the labels of the subjects with attention in a card, each once. */
function labelsOf(card) {
  return [...new Set(card.flatMap((row) => attendedOf(row).map((i) => labels[i])))];
}

/** Return the subjects of a card, each once: those with attention, or else those requested. */
function subjectsOf(card) {
  const seen = card.flatMap((row) => attendedOf(row).map((i) => attention.subject[i]));
  return [...new Set(seen.length ? seen : card.flatMap((row) => rows.subjects[row] ?? []))];
}

function searchable(row) {
  return {
    text: `${rows.prompt[row] ?? ""} ${rows.id[row]}`.toLowerCase(),
    subjects: subjectsOf([row]).map((subject) => subject.toLowerCase()),
  };
}

const blocks = document.querySelectorAll("script[data-pictures]");
const opened = new Map();

/** Return the URL of an image, relative to the page or a data URL; null without one. */
function urlOf(picture) {
  if (typeof picture !== "number") return picture;
  const block = Math.floor(picture / picturesABlock);
  if (!opened.has(block)) opened.set(block, JSON.parse(blocks[block].textContent));
  return `data:image/webp;base64,${opened.get(block)[picture % picturesABlock]}`;
}

// --- elements ------------------------------------------------------------------------------------

function byId(id) {
  return document.getElementById(id);
}

/** Create an element. Children that are strings become text: nothing is parsed as HTML. */
function el(tag, attributes = {}, ...children) {
  return dressed(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return dressed(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function dressed(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function told(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return value.toFixed(digits);
}

/** Return what the browser remembers under a key; null without storage, as a page from a file may be. */
function remembered(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function remember(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // without storage it lasts only as long as the page
  }
}

function counted(count, one, many) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}
