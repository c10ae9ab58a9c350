// ------------------------------------------------------------------------------------------------- other tables

function drawMeans(table, panel) {
  const labels = panel.sizes;
  const curves = viewOf(panel).curves.filter((curve) => isShown(curve.training) && !shown.hidden.has(curve.variant));
  const spreadAt = (curve, label) => curve.sizes.find((size) => size.label === label)?.[shown.accuracy];
  const rivals = curves.filter((curve) => !trainings.get(curve.training).retrained);
  const best = labels.map((label) => Math.max(...rivals.map((curve) => spreadAt(curve, label)?.mean ?? -1)));
  const several = panel.variants.length > 1;
  const head = element("tr", {}, heading("Training", ""), ...(several ? [heading("Compressor", "")] : []),
    ...["Dense", ...labels].map((label) => heading(label)));
  const rows = curves.map((curve) => element("tr", {},
    element("td", {}, sign(curve.training), curve.training, " ", badge(curve.training)),
    ...(several ? [cell(curve.variant, "")] : []),
    cell(percent(curve.dense)),
    ...labels.map((label, column) => {
      const spread = spreadAt(curve, label);
      const made = cell(spread ? percent(spread.mean) : "–");
      if (spread && curves.length > 1 && rivals.includes(curve) && spread.mean === best[column]) made.classList.add("best");
      if (spread && curve.runs > 1) made.append(element("small", { textContent: `${percent(spread.low)}–${percent(spread.high)}` }));
      return made;
    })));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

function drawLayers(table, view) {
  const head = element("tr", {}, heading("Layer", ""), heading("Kept", ""), ...view.sizes.map((label) => heading(label)));
  const rows = view.layers.map((layer) => element("tr", {},
    element("td", {}, element("code", { textContent: layer.name })),
    cell(layer.kind, ""),
    ...layer.cells.map((counts) => {
      if (!counts) return cell("–");
      const [kept, total, params, dense] = counts;
      const made = element("td", {
        className: "share", textContent: `${Math.round(100 * kept / total)}%`,
        title: `${kept} of ${total} (${layer.kind}); ${params.toLocaleString("en")} of ${dense.toLocaleString("en")} parameters`,
      });
      made.style.setProperty("--share", kept / total);
      return made;
    })));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

function sortable(table) {
  const headers = [...table.querySelectorAll("th")];
  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
    const up = header.getAttribute("aria-sort") !== "ascending";
    headers.forEach((other) => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (row) => row.cells[column].dataset.order;
    const compare = header.classList.contains("number")
      ? (a, b) => order(a) - order(b)
      : (a, b) => order(a).localeCompare(order(b), "en", { numeric: true });
    const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? compare(a, b) : compare(b, a)));
    table.tBodies[0].append(...rows);
  }));
}

// --------------------------------------------------------------------------------------------------- the page

// A figure is drawn when it comes near the screen: a comparison has many, and each takes a moment.
const figures = new Map();
const near = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  const figure = figures.get(target);
  figure.near = isIntersecting;
  refresh(figure);
}), { rootMargin: "400px" });

function refresh(figure, always = false) {
  const { stale } = figure.where.dataset;
  if (!stale || !(figure.near || always) || !viewOf(figure.panel)) return;
  delete figure.where.dataset.stale;
  drawFigure(figure.where, figure.section, figure.panel, figure.axis);
}

function draw() {
  figures.forEach((figure) => { figure.where.dataset.stale = "true"; });
  data.sections.forEach((section, s) => {
    section.panels.forEach((panel, p) => {
      const missing = !viewOf(panel);
      const article = document.getElementById(`panel-${s}-${p}`);
      article.classList.toggle("missing", missing);
      article.querySelector(".nothing").hidden = !missing;
      if (missing) return;
      drawStandings(document.getElementById(`standings-${s}-${p}`), panel);
      drawMeans(document.getElementById(`means-${s}-${p}`), panel);
    });
    const bestOf = document.getElementById(`best-of-${s}`);
    if (bestOf) drawBestOf(bestOf, section);
    drawChoices(s);
  });
  figures.forEach((figure) => refresh(figure));
}

// The first click on a training shows it alone; then a click adds or removes one; without any, all are shown.
function toggle(training) {
  if (!shown.alone.delete(training)) shown.alone.add(training);
  showTrainings();
}

function showTrainings() {
  const focused = document.activeElement;
  const table = focused?.closest?.("table")?.id;
  const picked = focused?.dataset?.training;
  draw();
  document.querySelectorAll(".legend [data-training]").forEach((button) =>
    button.setAttribute("aria-pressed", String(isShown(button.dataset.training))));
  document.querySelectorAll(".legend .all").forEach((button) => { button.disabled = shown.alone.size === 0; });
  // The tables were drawn anew: the keyboard gets its place back.
  if (table && picked) [...document.getElementById(table).querySelectorAll("[data-training]")].find((button) => button.dataset.training === picked)?.focus();
}

document.querySelectorAll(".legend [data-training]").forEach((button) => {
  button.querySelector("i").replaceWith(sign(button.dataset.training));
  button.addEventListener("click", () => toggle(button.dataset.training));
});
document.querySelectorAll(".legend .all").forEach((button) => button.addEventListener("click", () => {
  shown.alone.clear();
  showTrainings();
}));

document.querySelectorAll(".variants").forEach((legend) =>
  legend.querySelectorAll("line").forEach((line, index) =>
    line.setAttribute("stroke-dasharray", STROKES[index % STROKES.length])));

const variants = document.querySelectorAll("[data-variant]");
variants.forEach((button) => button.addEventListener("click", () => {
  if (!shown.hidden.delete(button.dataset.variant)) shown.hidden.add(button.dataset.variant);
  variants.forEach((other) => other.setAttribute("aria-pressed", String(!shown.hidden.has(other.dataset.variant))));
  draw();
}));

["accuracy", "view"].forEach((name) => document.querySelectorAll(`input[name=${name}]`).forEach((choice) =>
  choice.addEventListener("change", () => {
    shown[name] = choice.value;
    draw();
  })));

function showTheme() {
  document.documentElement.dataset.theme = chosen("theme");
  figures.forEach((figure) => { figure.where.dataset.stale = "true"; });
  figures.forEach((figure) => refresh(figure));
}
document.querySelectorAll("input[name=theme]").forEach((choice) => choice.addEventListener("change", showTheme));

data.sections.forEach((section, s) => {
  const networks = section.panels.flatMap((panel) => Object.values(panel.views)).flatMap((view) => view.curves).flatMap((curve) => curve.networks);
  const least = Math.min(...networks.flatMap((network) => network.points).map((point) => 1 - point.removed));
  const slider = document.getElementById(`keep-${s}`);
  slider.min = Math.min(99, Math.max(1, Math.ceil(100 * (least - data.slack))));
  slider.addEventListener("input", () => drawChoices(s));
  document.querySelectorAll(`input[name="by-${s}"]`).forEach((choice) => choice.addEventListener("change", () => drawChoices(s)));
  section.panels.forEach((panel, p) => panel.axes.forEach((_, axis) => {
    const where = document.getElementById(`figure-${s}-${p}-${axis}`);
    figures.set(where, { where, section, panel, axis, near: false });
    near.observe(where);
  }));
  if (section.layers.length === 0) return;
  const select = document.getElementById(`layers-of-${s}`);
  section.layers.forEach((view, index) => select.append(new Option(view.title, index)));
  select.addEventListener("change", () => drawLayers(document.getElementById(`layers-${s}`), section.layers[select.value]));
  drawLayers(document.getElementById(`layers-${s}`), section.layers[0]);
});

document.querySelectorAll("table.numbers").forEach(sortable);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
addEventListener("beforeprint", () => figures.forEach((figure) => refresh(figure, true)));
showTheme();
draw();
