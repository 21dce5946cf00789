// --- attention maps ------------------------------------------------------------------------------

document.documentElement.style.setProperty(
  "--ramp",
  [0, 51, 102, 153, 204, 255].map((i) => `rgb(${ramp[i].join(" ")})`).join(", "),
);

const timeBlocks = document.querySelectorAll("script[data-times]");
const blocksRead = new Map();
let maps = null; // of the last step, once they are read

const mapsRead = new Promise((done) => setTimeout(done)) // after the cards, which do without
  .then(() => unpacked(byId("maps")))
  .then((buffer) => (maps = buffer));

/** Return a subject's map at a step, or the last if it is null, and the attention at 255; or a promise. */
function mapAt(i, step) {
  const size = attention.height[i] * attention.width[i];
  if (step === null || !attention.times?.[i]) {
    const last = () => [new Uint8Array(maps, mapStarts[i], size), attention.scale[i]];
    return maps ? last() : mapsRead.then(last);
  }
  const [block, start, steps, scales] = attention.times[i];
  const nth = steps.findLastIndex((one) => one <= step);
  if (!blocksRead.has(block)) blocksRead.set(block, unpacked(timeBlocks[block]));
  const there = (buffer) => [new Uint8Array(buffer, start + nth * size, size), scales[nth]];
  return blocksRead.get(block).then(there);
}

/** Draw a map over its image: bilinear between cells, more opaque where attention is higher. */
function draw(canvas, map, height, width) {
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
  let at = null; // the step; null for the last
  const overlay = (subject) => card.forEach((row, i) => lay(figures[i], mapOf(row, subject), at));
  const press = (subject) => {
    pressed = subject;
    for (const one of bar.children) one.setAttribute("aria-pressed", one.subject === pressed);
    overlay(pressed);
  };
  const buttons = subjects.flatMap((subject, i) => {
    if (card.every((row) => mapOf(row, subject) === undefined)) return [];
    const button = el("button", { type: "button", class: "chip", "data-number": i + 1 });
    button.append(sample(i), el("span", { dir: "auto" }, subject));
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
  bar.move = (step) => {
    at = step;
    press(pressed ?? buttons[0].subject);
  };
  return bar;
}

/** Lay a map over a figure's image, or remove it if `i` is undefined. */
function lay(figure, i, step) {
  const canvas = figure.querySelector("canvas");
  const wanted = (figure.wanted = {});
  const put = ([map, most]) => {
    if (figure.wanted !== wanted) return; // another came while this was read
    figure.querySelector(".scale")?.remove();
    draw(canvas, map, attention.height[i], attention.width[i]);
    canvas.classList.add("on");
    const from = canvas.clientWidth > 200 ? "attention 0 " : "0 ";
    const scale = el("span", { class: "scale" }, from, el("i"), ` ${most.toPrecision(2)}`);
    figure.querySelector(".frame").append(scale);
  };
  if (!canvas || i === undefined) {
    figure.querySelector(".scale")?.remove();
    canvas?.classList.remove("on");
    return;
  }
  const map = mapAt(i, step);
  if (map instanceof Promise) map.then(put);
  else put(map);
}

/** Create the slider that moves the maps of a card through the steps; null if only the last was kept. */
function timeline(card, bar, figures) {
  if (!attention.times || !card.some((row) => attendedOf(row).length)) return null;
  const kept = card.flatMap(attendedOf).flatMap((i) => attention.times[i]?.[2] ?? []);
  if (!kept.length) return el("p", { class: "legend" }, "Maps over time are in this page for its first rows only.");
  const steps = [...new Set(kept)].sort((a, b) => a - b);
  const last = steps.at(-1) + 1;
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1 });
  const said = el("output", {}, `step ${last} of ${last}`);
  const tell = (step) => {
    said.textContent = `step ${step + 1} of ${last}`;
    slider.setAttribute("aria-valuetext", said.textContent);
  };
  slider.addEventListener("input", () => {
    const step = steps[Number(slider.value)];
    tell(step);
    bar.move(step);
    for (const figure of figures) figure.querySelector(".chart")?.point(step);
  });
  tell(last - 1);
  return el("label", { class: "timeline" }, el("span", {}, "Maps at"), slider, said);
}

/** Draw a piece of a subject's curve. Subjects differ in number and line, since prompts name colours. */
function sample(i) {
  const box = { class: "sample", viewBox: "0 0 24 6", "aria-hidden": "true" };
  return svg("svg", box, svg("path", { class: `curve line-${i % LINES}`, d: "M1 3H23" }));
}

// --- curves --------------------------------------------------------------------------------------

/** Return a card's highest value, rounded up: the common scale of its charts. */
function ceiling(card) {
  const most = card.flatMap(attendedOf).reduce((high, i) => Math.max(high, ...curveOf(i)), 0);
  const top = Math.max(most, ...thresholds.map(([, share]) => share)) * 1.05;
  return [0.05, 0.1, 0.2, 0.4, 0.6, 0.8].find((value) => top <= value) ?? 1;
}

/** Plot the max attention per step of each subject, and the thresholds; null without curves. */
function chart(row, subjects, top, large) {
  const attended = attendedOf(row).filter((i) => attention.steps[i]);
  if (!attended.length) return null;
  const steps = attention.steps[attended[0]];
  const [width, height] = [320, large ? 150 : 42];
  const [left, right, bottom] = large ? [34, 14, 22] : [0, 0, 0];
  const x = (step) => left + ((width - left - right) * step) / Math.max(1, steps - 1);
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
    const end = { x: width - right, y: height - 5, "text-anchor": "end" };
    parts.push(svg("text", end, String(steps)));
  }
  thresholds.forEach(([step, share], n) => {
    if (step >= steps) return;
    const end = Math.min(steps - 1, thresholds[n + 1]?.[0] ?? steps - 1);
    parts.push(svg("path", { class: "threshold", d: `M${x(step)} ${y(share)}H${x(end)}` }));
  });
  for (const i of attended) {
    const points = Array.from(curveOf(i), point).join(" ");
    const line = `curve line-${subjects.indexOf(labels[i]) % LINES}`;
    parts.push(svg("polyline", { class: line, points }));
  }
  if (large) {
    let free = Infinity;
    for (const i of attended.toSorted((a, b) => curveOf(a).at(-1) - curveOf(b).at(-1))) {
      free = Math.min(y(curveOf(i).at(-1)) + 4, free);
      const place = { class: "number", x: width, y: free, "text-anchor": "end" };
      parts.push(svg("text", place, String(subjects.indexOf(labels[i]) + 1)));
      free -= 12;
    }
  }
  const spoken = attended.map((i) => {
    const [from, to] = [curveOf(i).at(0), curveOf(i).at(-1)].map((value) => told(value, 2));
    return `${labels[i]} from ${from} to ${to}`;
  });
  const label = `Largest attention over ${steps} steps: ${spoken.join("; ")}`;
  const fit = large ? "xMidYMid meet" : "none";
  const box = { class: "chart", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: fit };
  const cursor = svg("path", { class: "cursor" });
  const plot = svg("svg", { ...box, role: "img", "aria-label": label }, ...parts, cursor);
  plot.point = (step) => cursor.setAttribute("d", step < steps ? `M${x(step)} ${y(top)}V${y(0)}` : "");
  return plot;
}
