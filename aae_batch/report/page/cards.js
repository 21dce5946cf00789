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
