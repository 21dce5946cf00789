// --- a card --------------------------------------------------------------------------------------

function figureOf(row, subjects, top, large) {
  const picture = urlOf(rows.picture[row]);
  const name = rows.method[row] ?? "no method";
  const [width, height] = [rows.width[row] ?? 1, rows.height[row] ?? 1];
  const opens = large && typeof rows.picture[row] === "string";
  const link = opens ? { href: picture, target: "_blank", title: "Open the image" } : {};
  const shape = { class: "frame", style: `aspect-ratio: ${width} / ${height}` };
  const frame = el(opens ? "a" : "div", { ...shape, ...link });
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
    frame.classList.add("failed");
    frame.append(el("p", { class: "none bad", dir: "auto" }, reasonOf(row)));
  } else {
    frame.append(el("span", { class: "none" }, "The image could not be read."));
  }
  const method = el("span", { class: "method" }, name);
  const failed = rows.error_type[row] !== null;
  if (failed) method.append(el("span", { class: "badge bad", title: rows.error_type[row] }, "failed"));
  else if (rows.accepted[row] === false) method.append(el("span", { class: "badge" }, "not accepted"));
  if (rows.neglected[row]) method.append(el("span", { class: "badge" }, "neglected"));
  const verdicts = el("span", { class: "verdicts" });
  for (const i of attendedOf(row).filter((i) => attention.found[i] !== null)) {
    verdicts.append(verdictOf(i), " ");
  }
  const caption = el("figcaption", {}, method, verdicts.childElementCount ? verdicts : null);
  if (!failed) {
    const refinements = rows.num_refinements[row];
    const refined = refinements ? ` · ${counted(refinements, "refinement", "refinements")}` : "";
    const loss = el("b", {}, told(rows.final_loss[row]));
    const tried = by === null ? "" : ` · ${counted(rows.tried[row], "try", "tries")}`;
    caption.append(el("span", { class: "figures" }, "loss ", loss, refined, tried));
  }
  if (!failed) caption.append(choosing(row));
  if (large) caption.append(identity(row));
  const figure = el("figure", {}, frame, caption, chart(row, subjects, top, large));
  figure.row = row;
  mark(figure);
  return figure;
}

/** Return why a row failed. The message may begin with the row's id, which the page shows elsewhere. */
function reasonOf(row) {
  const error = rows.error[row] ?? rows.error_type[row];
  const named = `row ${rows.id[row]}: `;
  return error.startsWith(named) ? error.slice(named.length) : error;
}

/** Return a row's id with a button that copies it, and the name of a file that has no link. */
function identity(row) {
  const id = rows.id[row];
  const copy = el("button", { type: "button", class: "small", "aria-label": `Copy the id ${id}` }, "Copy");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(id);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(copy.previousElementSibling); // for the browser's own copying
    }
  });
  const file = rows.file[row];
  const place = file && el("code", {}, data.root ? `${data.root}/${file}` : file);
  return el("span", { class: "identity" }, el("code", {}, id), " ", copy, place && el("br"), place);
}

/** Show a detector's verdict on a subject. A subject found in another colour counts as missed. */
function verdictOf(i) {
  const [found, other] = [attention.found[i], attention.bound[i] === false];
  const said = !found ? "not found" : other ? "found, but not in the colour of the prompt" : "found";
  const mark = isMissed(i) ? el("b", { class: "missed" }, "✗") : el("b", { class: "found" }, "✓");
  const text = ` ${labels[i]}${found && other ? ": other colour" : ""}`;
  return el("span", { class: "verdict", title: `${labels[i]} ${said}` }, mark, text);
}

/** Return whether a detector looked for a subject and missed it, or found it in another colour. */
function isMissed(i) {
  return attention.found[i] === false || attention.bound[i] === false;
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
    timeline(card, bar, figures) ?? "",
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
    ["error", rows.error],
    ["negative prompt", rows.negative_prompt],
    [data.lossesCompare ? "final loss" : "own final loss", rows.final_loss],
    ["refinements", rows.num_refinements],
    ["neglected", rows.neglected],
    ["forwards", rows.forwards],
    ["latency, s", rows.seconds],
    ["denoising steps", rows.num_inference_steps],
    ["guidance scale", rows.guidance_scale],
    ...scores.map((score) => [score.label, score.values]),
  ].filter(([, values]) => card.some((row) => values[row] !== null) && varies(values));
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
  if (!lines.length) return "";
  return el(
    "div",
    { class: "scroll compare", tabindex: "0", ...named },
    el("table", {}, top, el("tbody", {}, ...body)),
  );
}

/** Return whether values differ between images, in a dataset of several. */
function varies(values) {
  const known = values.filter((value, row) => value !== null && rows.error_type[row] === null);
  return known.length < 2 || isVaried(known);
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
