// The images of a dataset as cards: filters, sorting, attention maps and curves.
//
// `data` contains the rows as columns, and `data.attention` columns with one value per row and subject.
// `maps` contains the curves of all subjects as uint16, then their maps as uint8, in the order of
// `data.attention`. `ramp` contains the 256 colours of an attention map, sRGB bytes. `data.tries` has
// one value per row and try, in a run with several tries a row, which finds the best of them `by`.

const CARDS_A_PAGE = 48;
const UNIT = 65535; // the value of an attention of 1 in a curve
const HUES = 6; // --subject-0 ... in page.css

const { rows, attention, tries, by, scores, methods, thresholds, picturesABlock, ramp } = JSON.parse(
  new TextDecoder().decode(await unpacked("data")),
);
const [curves, maps] = parted(await unpacked("maps"));
const cards = gathered();
const labels = rows.id.flatMap((_, row) =>
  numbered(attendedOf(row).map((i) => attention.subject[i])),
);
const names = numbered(cards.map(([first]) => rows.id[first]));
const found = rows.id.map((_, row) => searchable(row));
const known = new Set(found.flatMap((row) => row.subjects));

// --- data ----------------------------------------------------------------------------------------

/** Decode a script element: gzip in base64. */
async function unpacked(id) {
  const text = byId(id).textContent.trim();
  const packed =
    Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** Split the buffer into the curve in [0, 1] and the uint8 map of each row of `attention`. */
function parted(buffer) {
  const view = new DataView(buffer);
  const curves = [];
  const maps = [];
  let at = 0;
  for (const steps of attention.steps) {
    const value = (_, i) => view.getUint16(at + 2 * i, true) / UNIT;
    curves.push(Float32Array.from({ length: steps }, value));
    at += 2 * steps;
  }
  attention.height.forEach((height, i) => {
    maps.push(new Uint8Array(buffer, at, height * attention.width[i]));
    at += height * attention.width[i];
  });
  return [curves, maps];
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
  return Array.from({ length: rows.attended[row] }, (_, i) => rows.first[row] + i);
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

function counted(count, one, many) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
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

// --- attention maps ------------------------------------------------------------------------------

document.documentElement.style.setProperty(
  "--ramp",
  [0, 51, 102, 153, 204, 255].map((i) => `rgb(${ramp[i].join(" ")})`).join(", "),
);

/** Draw a map over its image: bilinear between cells, more opaque where attention is higher. */
function draw(canvas, i) {
  const [map, height, width] = [maps[i], attention.height[i], attention.width[i]];
  const times = Math.max(1, Math.round(160 / Math.max(height, width)));
  canvas.width = width * times;
  canvas.height = height * times;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let y = 0, at = 0; y < canvas.height; y++) {
    const [top, bottom, down] = between(y, times, height);
    for (let x = 0; x < canvas.width; x++, at += 4) {
      const [left, right, along] = between(x, times, width);
      const upper = map[top * width + left] * (1 - along) + map[top * width + right] * along;
      const lower = map[bottom * width + left] * (1 - along) + map[bottom * width + right] * along;
      const value = upper * (1 - down) + lower * down;
      image.data.set(ramp[Math.round(value)], at);
      image.data[at + 3] = 95 + 0.53 * value;
    }
  }
  context.putImageData(image, 0, 0);
}

/** Return the two cells whose centres enclose a pixel, and its relative position in [0, 1]. */
function between(pixel, times, cells) {
  const at = Math.min(cells - 1, Math.max(0, (pixel + 0.5) / times - 0.5));
  const low = Math.floor(at);
  return [low, Math.min(cells - 1, low + 1), at - low];
}

/** Return the index in `attention` of a dataset row and a label, or undefined. */
function mapOf(row, label) {
  return attendedOf(row).find((i) => labels[i] === label);
}

/** Create buttons that show a subject's map over the images, on hover or focus, or until released. */
function chips(card, subjects, figures) {
  let pressed = null;
  const overlay = (subject) => card.forEach((row, i) => lay(figures[i], mapOf(row, subject)));
  const press = (subject) => {
    pressed = subject;
    for (const one of bar.children) one.setAttribute("aria-pressed", one.subject === pressed);
    overlay(pressed);
  };
  const buttons = subjects.flatMap((subject, i) => {
    if (card.every((row) => mapOf(row, subject) === undefined)) return [];
    const button = el("button", { type: "button", class: "chip", style: `--hue: ${hue(i)}` });
    button.append(el("span", { dir: "auto" }, subject));
    button.setAttribute("aria-pressed", "false");
    button.title = "Show its attention over the images";
    button.subject = subject;
    button.addEventListener("click", () => press(pressed === subject ? null : subject));
    button.addEventListener("pointerenter", ({ pointerType }) => {
      if (pointerType === "mouse") overlay(subject);
    });
    button.addEventListener("pointerleave", () => overlay(pressed));
    button.addEventListener("focus", () => button.matches(":focus-visible") && overlay(subject));
    button.addEventListener("blur", () => overlay(pressed));
    return [button];
  });
  const named = { class: "chips", role: "group", "aria-label": "Attention of" };
  const bar = el("div", named, ...buttons);
  bar.clear = () => press(null);
  return bar;
}

function lay(figure, i) {
  const canvas = figure.querySelector("canvas");
  figure.querySelector(".scale")?.remove();
  canvas?.classList.toggle("on", i !== undefined);
  if (!canvas || i === undefined) return;
  draw(canvas, i);
  const most = attention.scale[i];
  const scale = el("span", { class: "scale" }, "0 ", el("i"), ` ${most.toPrecision(2)}`);
  figure.querySelector(".frame").append(scale);
}

function hue(i) {
  return `var(--subject-${i % HUES})`;
}

// --- curves --------------------------------------------------------------------------------------

/** Return a card's highest value, rounded up: the common scale of its charts. */
function ceiling(card) {
  const most = card.flatMap(attendedOf).reduce((high, i) => Math.max(high, ...curves[i]), 0);
  const top = Math.max(most, ...thresholds.map(([, share]) => share)) * 1.05;
  return [0.05, 0.1, 0.2, 0.4, 0.6, 0.8].find((value) => top <= value) ?? 1;
}

/** Plot the max attention per step of each subject, and the thresholds; null without curves. */
function chart(row, subjects, top, large) {
  const attended = attendedOf(row).filter((i) => curves[i].length);
  if (!attended.length) return null;
  const steps = curves[attended[0]].length;
  const [width, height] = [320, large ? 150 : 42];
  const [left, bottom] = large ? [34, 22] : [0, 0];
  const x = (step) => left + ((width - left) * step) / Math.max(1, steps - 1);
  const y = (value) => 4 + (height - bottom - 5) * (1 - value / top);
  const point = (value, step) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`;
  const parts = [
    svg("title", {}, "Largest attention of each subject, step by step"),
    svg("path", { class: "axis", d: `M${left} ${y(0)}H${width}` }),
  ];
  if (large) {
    for (const value of [0, top / 2, top]) {
      parts.push(svg("path", { class: "axis", d: `M${left} ${y(value)}H${width}` }));
      const place = { x: left - 6, y: y(value) + 4, "text-anchor": "end" };
      parts.push(svg("text", place, told(value, 2)));
    }
    parts.push(svg("text", { x: left, y: height - 5 }, "step 1"));
    parts.push(svg("text", { x: width, y: height - 5, "text-anchor": "end" }, String(steps)));
  }
  thresholds.forEach(([step, share], n) => {
    if (step >= steps) return;
    const end = Math.min(steps - 1, thresholds[n + 1]?.[0] ?? steps - 1);
    parts.push(svg("path", { class: "threshold", d: `M${x(step)} ${y(share)}H${x(end)}` }));
  });
  for (const i of attended) {
    const points = Array.from(curves[i], point).join(" ");
    const style = `--hue: ${hue(subjects.indexOf(labels[i]))}`;
    parts.push(svg("polyline", { class: "curve", style, points }));
  }
  const spoken = attended.map((i) => {
    const [from, to] = [curves[i].at(0), curves[i].at(-1)].map((value) => told(value, 2));
    return `${labels[i]} from ${from} to ${to}`;
  });
  const label = `Largest attention over ${steps} steps: ${spoken.join("; ")}`;
  const fit = large ? "xMidYMid meet" : "none";
  const box = { class: "chart", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: fit };
  return svg("svg", { ...box, role: "img", "aria-label": label }, ...parts);
}

// --- a card --------------------------------------------------------------------------------------

function figureOf(row, subjects, top, large) {
  const picture = urlOf(rows.picture[row]);
  const name = rows.method[row] ?? "no method";
  const [width, height] = [rows.width[row] ?? 1, rows.height[row] ?? 1];
  const frame = el("div", { class: "frame", style: `aspect-ratio: ${width} / ${height}` });
  if (picture !== null) {
    const alt = `${rows.prompt[row]} (${name})`;
    const image = el("img", { alt, width, height, loading: "lazy", decoding: "async" });
    image.addEventListener("error", () => {
      frame.classList.add("lost");
      frame.append(el("span", { class: "none" }, "Not found next to this page: --embed includes it."));
    });
    image.src = picture;
    frame.append(image, el("canvas", { "aria-hidden": "true" }));
  } else if (rows.error_type[row] !== null) {
    frame.append(el("span", { class: "none bad" }, rows.error_type[row]));
  } else {
    frame.append(el("span", { class: "none" }, "The image could not be read."));
  }
  const method = el("span", { class: "method" }, name);
  if (rows.error_type[row] !== null) method.append(el("span", { class: "badge bad" }, "failed"));
  else if (rows.accepted[row] === false) method.append(el("span", { class: "badge" }, "not accepted"));
  if (rows.neglected[row]) method.append(el("span", { class: "badge" }, "neglected"));
  const verdicts = el("span", { class: "verdicts" });
  for (const i of attendedOf(row).filter((i) => attention.found[i] !== null)) {
    verdicts.append(verdictOf(i), " ");
  }
  const caption = el("figcaption", {}, method, verdicts.childElementCount ? verdicts : null);
  if (rows.error_type[row] === null) {
    const refinements = rows.num_refinements[row];
    const refined = refinements ? ` · ${counted(refinements, "refinement", "refinements")}` : "";
    const loss = el("b", {}, told(rows.final_loss[row]));
    const tried = by === null ? "" : ` · ${counted(rows.tried[row], "try", "tries")}`;
    caption.append(el("span", { class: "figures" }, "loss ", loss, refined, tried));
  }
  return el("figure", {}, frame, caption, chart(row, subjects, top, large));
}

/** Show a detector's verdict on a subject. A subject found in another colour counts as missed. */
function verdictOf(i) {
  const [found, bound] = [attention.found[i], attention.bound[i]];
  if (found && bound === false) {
    const title = `${labels[i]} found, but not in the colour of the prompt`;
    return el("span", { class: "missed", title }, `✗ ${labels[i]}: other colour`);
  }
  const [mark, style, said] = found ? ["✓", "found", "found"] : ["✗", "missed", "not found"];
  return el("span", { class: style, title: `${labels[i]} ${said}` }, `${mark} ${labels[i]}`);
}

function cardOf(card) {
  const [first] = card;
  const left = visible(card);
  const subjects = labelsOf(card);
  const top = ceiling(card);
  const figures = left.map((row) => figureOf(row, subjects, top, false));
  const bar = chips(left, subjects, figures);
  const opens = { type: "button", dir: "auto", "aria-haspopup": "dialog" };
  const title = el("button", opens, titleOf(first));
  const pictures = el("div", { class: "pictures" }, ...figures);
  const under = el("p", { class: "under", dir: "auto" }, facts(card));
  const node = el("article", { class: "card" }, el("h2", {}, title), under, bar, pictures);
  node.clear = bar.clear;
  const open = () => change({ card: nameOf(card) });
  title.addEventListener("click", open);
  pictures.addEventListener("click", (event) => event.target.closest(".frame") && open());
  return node;
}

/** Return the name of a card in the URL, from the id of its first row. */
function nameOf(card) {
  return names[rows.card[card[0]]];
}

function titleOf(row) {
  return rows.prompt[row] ?? "(no prompt)";
}

/** Return what the rows of a card share; kept tries of a row and another may differ in their seeds. */
function facts(card) {
  const [first] = card;
  const set = rows.set[first] ? ` · ${rows.set[first]}` : "";
  const seeds = [...new Set(card.map((row) => rows.seed[row] ?? "–"))];
  return `${seeds.length === 1 ? "seed" : "seeds"} ${seeds.join(", ")}${set}`;
}

// --- details of a card ---------------------------------------------------------------------------

const dialog = byId("details");

function details(card) {
  const subjects = labelsOf(card);
  const top = ceiling(card);
  const figures = card.map((row) => figureOf(row, subjects, top, true));
  const bar = chips(card, subjects, figures);
  const title = el("h2", { id: "details-title", dir: "auto" }, titleOf(card[0]));
  byId("details-body").replaceChildren(
    title,
    el("p", { class: "under" }, facts(card)),
    bar,
    el("div", { class: "pictures" }, ...figures),
    bar.childElementCount ? el("p", { class: "legend" }, legend()) : "",
    ...card.filter((row) => rows.tried[row]).map(triesTable),
    comparison(card),
  );
  dialog.style.setProperty("--across", Math.max(2, card.length));
}

function legend() {
  const aims = thresholds.map(([step, share]) => `${told(share, 2)} at step ${step + 1}`);
  return (
    "Curves: the largest value of each subject's map, step by step; attend-and-excite's loss is one " +
    `minus the lowest.${aims.length ? ` Dashed: what its refinement aims at, ${aims.join(", ")}.` : ""}`
  );
}

function comparison(card) {
  const lines = [
    ["id", rows.id],
    ["error", rows.error],
    ["negative prompt", rows.negative_prompt],
    ["own final loss", rows.final_loss],
    ["refinements", rows.num_refinements],
    ["neglected", rows.neglected],
    ["forwards", rows.forwards],
    ["latency, s", rows.seconds],
    ["denoising steps", rows.num_inference_steps],
    ["guidance scale", rows.guidance_scale],
    ...scores.map((score) => [score.label, score.values]),
  ].filter(([, values]) => card.some((row) => values[row] !== null));
  const head = card.map((row) => el("th", { scope: "col" }, rows.method[row] ?? "–"));
  const body = lines.map(([label, values]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, label),
      ...card.map((row) => el("td", { dir: "auto" }, told(values[row]))),
    ),
  );
  const top = el("thead", {}, el("tr", {}, el("td"), ...head));
  const named = { role: "region", "aria-label": "Figures of each image" };
  return el(
    "div",
    { class: "scroll compare", tabindex: "0", ...named },
    el("table", {}, top, el("tbody", {}, ...body)),
  );
}

/** List a row's tries, with the pictures of the others if they were kept. */
function triesTable(row) {
  const own = triesOf(row);
  const pictured = own.some((i) => tries.picture[i] !== null);
  const lines = own.map((i) => [
    el("th", { scope: "row" }, String(tries.try[i])),
    pictured && thumbnail(tries.kept[i] ? rows.picture[row] : tries.picture[i], i),
    verdictOfTry(i),
    el("td", {}, tries.method[i]),
    el("td", {}, tries.seed[i]),
    el("td", {}, told(tries.value[i])),
    el("td", {}, `${tries.guided[i]} + ${tries.denoised[i]}`),
  ]);
  const heads = ["try", pictured && "picture", "verdict", "method", "seed", by];
  const head = [...heads, "forwards, guided + denoised"]
    .filter(Boolean)
    .map((name) => el("th", { scope: "col" }, name));
  const body = lines.map((cells, n) =>
    el("tr", { class: tries.kept[own[n]] && "kept" }, ...cells.filter(Boolean)),
  );
  const name = `Tries of ${rows.id[row]}`;
  const top = el("thead", {}, el("tr", {}, ...head));
  return el(
    "div",
    { class: "scroll tries", tabindex: "0", role: "region", "aria-label": name },
    el("table", {}, el("caption", { dir: "auto" }, name), top, el("tbody", {}, ...body)),
  );
}

function verdictOfTry(i) {
  const style = { accepted: "found", rejected: "missed" }[tries.verdict[i]];
  const cell = el("td", {}, el("span", { class: style }, tries.verdict[i]));
  if (tries.kept[i]) cell.append(" ", el("span", { class: "badge good" }, "kept"));
  if (tries.error[i]) cell.append(el("p", { class: "why", dir: "auto" }, tries.error[i]));
  return cell;
}

function thumbnail(picture, i) {
  const src = urlOf(picture);
  const alt = `try ${tries.try[i]}, ${tries.verdict[i]}`;
  const image = src && el("img", { src, alt, loading: "lazy", decoding: "async" });
  return el("td", {}, image || "–");
}

/** Open the card before or after the current one. */
function step(by) {
  const next = shown[shown.findIndex((card) => nameOf(card) === state.card) + by];
  if (next) change({ card: nameOf(next) });
}

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
