// --- keep and drop -------------------------------------------------------------------------------
//
// The reader's choices, by id, which the browser remembers for each dataset.

const CHOICES = `aae-batch-choices ${data.dataset}`;
const WORDS = { keep: "kept", drop: "dropped" };
const KEYS = { k: "keep", d: "drop", u: null };
let choices = restored();

function restored() {
  try {
    return new Map(Object.entries(JSON.parse(remembered(CHOICES) ?? "{}")));
  } catch {
    return new Map(); // not what this page wrote
  }
}

/** Return "keep", "drop" or undefined. A failed row may have the id of another, and is no choice. */
function choiceOf(row) {
  return rows.error_type[row] === null ? choices.get(rows.id[row]) : undefined;
}

/** Choose `choice` for rows with an image, or nothing if it is null. */
function choose(chosen, choice) {
  for (const row of chosen.filter((row) => rows.error_type[row] === null)) {
    if (choice) choices.set(rows.id[row], choice);
    else choices.delete(rows.id[row]);
  }
  remember(CHOICES, JSON.stringify(Object.fromEntries(choices)));
  showChoices();
}

/** Create the buttons of a figure. */
function choosing(row) {
  const buttons = Object.keys(WORDS).map((choice) => {
    const name = choice === "keep" ? "Keep" : "Drop";
    const label = `${name} ${rows.id[row]}`;
    const button = el("button", { type: "button", class: "small", "data-choice": choice, "aria-label": label }, name);
    button.addEventListener("click", () => choose([row], choiceOf(row) === choice ? null : choice));
    return button;
  });
  return el("span", { class: "choosing" }, ...buttons);
}

/** Mark a figure as its row is chosen. */
function mark(figure) {
  const choice = choiceOf(figure.row);
  figure.classList.toggle("kept", choice === "keep");
  figure.classList.toggle("dropped", choice === "drop");
  for (const button of figure.querySelectorAll("[data-choice]")) {
    button.setAttribute("aria-pressed", button.dataset.choice === choice);
  }
}

/** Return the ids of the rows chosen, in the order of the manifest. */
function idsOf(choice) {
  return rows.id.filter((_, row) => choiceOf(row) === choice);
}

function showChoices() {
  for (const figure of document.querySelectorAll("figure")) mark(figure);
  const counts = Object.fromEntries(Object.keys(WORDS).map((choice) => [choice, idsOf(choice).length]));
  byId("choices").hidden = !counts.keep && !counts.drop;
  for (const [choice, word] of Object.entries(WORDS)) {
    byId(`count-${choice}`).textContent = `${counts[choice].toLocaleString("en")} ${word}`;
    byId(`ids-${choice}`).disabled = !counts[choice];
  }
  for (const option of form.elements.show.options) {
    if (!CHOSEN.has(option.value)) continue;
    const [, test] = CHOSEN.get(option.value);
    const offered = (counts.keep || counts.drop) && rows.id.some((_, row) => test(row));
    option.hidden = option.disabled = !offered && state.show !== option.value;
  }
}

/** Have the browser download the ids, one a line, for `aae-batch export --ids`. */
function download(choice) {
  const text = idsOf(choice).map((id) => `${id}\n`).join("");
  const href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  el("a", { href, download: `${WORDS[choice]}.txt` }).click();
  URL.revokeObjectURL(href);
}

for (const choice of Object.keys(WORDS)) {
  byId(`ids-${choice}`).addEventListener("click", () => download(choice));
}
window.addEventListener("storage", ({ key }) => {
  if (key !== CHOICES) return; // another tab's choice is one here
  choices = restored();
  showChoices();
});
