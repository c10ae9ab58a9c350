// Draws the page from `data`:
//   {trainings: [name], sections: [{top, panels: [{axes: [title], variants: [name], steps: [label],
//    curves: [curve]}], layers: [view]}]}
//   curve: {training, variant, runs, dense, steps: [{label, pattern, shares: [per axis], top1: {mean, low, high},
//           top1_raw: {...}, records: [{shares, top1, top1_raw, tip}]}]}
//   view:  {title, steps: [label], layers: [{name, kind, cells: [{kept, total, params, params_dense} or null]}]}
// Accuracies and shares are fractions. All text goes into the page as text, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x"];
const SIGNS = ["●", "■", "◆", "▲", "✚", "★", "▼", "✖"];
const DASHES = ["solid", "dot", "dashdot", "longdashdot"];
const STROKES = ["", "2 3", "7 3 2 3", "12 3 2 3"];
const CONFIG = {
  displaylogo: false,
  responsive: true,
  displayModeBar: "hover",
  modeBarButtons: [["toImage", "resetScale2d"]],
};

const shown = {
  accuracy: document.querySelector("input[name=accuracy]:checked").value, // browsers restore it on reload
  hidden: { training: new Set(), variant: new Set() },
};

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const percent = (fraction) => (100 * fraction).toFixed(1);
const toneOf = (training) => data.trainings.indexOf(training);
const colourOf = (training) => css(`--tone-${toneOf(training) % 8}`);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function sign(training) {
  const made = element("i", { textContent: SIGNS[toneOf(training) % 8] });
  made.style.color = `var(--tone-${toneOf(training) % 8})`;
  made.setAttribute("aria-hidden", "true");
  return made;
}

// ---------------------------------------------------------------------------------------------------- figures

function visible(curve) {
  return !shown.hidden.training.has(curve.training) && !shown.hidden.variant.has(curve.variant);
}

function traces(curve, panel, place, ends) {
  const colour = colourOf(curve.training);
  const dash = DASHES[panel.variants.indexOf(curve.variant) % DASHES.length];
  const value = (step, kind) => 100 * step[shown.accuracy][kind];
  const drawn = [{
    x: ends, y: ends.map(() => 100 * curve.dense), mode: "lines", hoverinfo: "skip", opacity: 0.75,
    line: { color: colour, width: 1.2, dash: "dash" },
  }];
  // Different N:M patterns are different things: no line leads from one to the next.
  const steps = curve.steps.filter((step) => !step.pattern);
  if (curve.runs > 1) {
    const back = [...steps].reverse();
    drawn.push({
      x: [...steps, ...back].map((step) => place(step, step)),
      y: [...steps.map((step) => value(step, "high")), ...back.map((step) => value(step, "low"))],
      mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: `${colour}26`, hoverinfo: "skip",
    });
  }
  drawn.push({
    x: steps.map((step) => place(step, step)), y: steps.map((step) => value(step, "mean")),
    mode: "lines", line: { color: colour, width: 2.2, dash }, hoverinfo: "skip",
  });
  const points = curve.steps.flatMap((step) => step.records.map((record) => [step, record]));
  drawn.push({
    x: points.map(([step, record]) => place(step, record)), y: points.map(([, record]) => 100 * record[shown.accuracy]),
    mode: "markers", marker: { color: colour, size: 7, symbol: SYMBOLS[toneOf(curve.training) % 8] },
    hovertext: points.map(([, record]) => record.tip), hoverinfo: "text",
  });
  return drawn;
}

function drawFigure(where, section, panel, axis) {
  const steps = panel.curves.flatMap((curve) => curve.steps);
  // N:M patterns stand side by side, for several have the same share; ratios stand at the share that is left.
  const patterns = steps.some((step) => step.pattern);
  const right = 2 + 100 * Math.max(1, ...steps.flatMap((step) => step.records).map((record) => record.shares[axis]));
  const place = patterns ? (step) => step.label : (_, point) => 100 * point.shares[axis];
  const ends = patterns ? [panel.steps[0], panel.steps.at(-1)] : [right, -2];
  const title = (text) => ({ text, font: { size: 13 } });
  const lines = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false };
  const shares = { title: title(panel.axes[axis]), range: ends, ticksuffix: "%" };
  const names = { title: title("N:M pattern"), type: "category", categoryorder: "array", categoryarray: panel.steps };
  Plotly.react(where, panel.curves.filter(visible).flatMap((curve) => traces(curve, panel, place, ends)), {
    xaxis: { ...lines, ...(patterns ? names : shares) },
    yaxis: { ...lines, title: title("test accuracy"), range: [0, section.top + 1], ticksuffix: "%" },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--muted") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--ink") },
    margin: { l: 58, r: 8, t: 28, b: 48 }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 }, align: "left" },
    // A finger that scrolls the page must not zoom the figure.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    uirevision: "keep the zoom",
  }, CONFIG);
}

// ----------------------------------------------------------------------------------------------------- tables

function drawMeans(table, panel) {
  const labels = panel.steps;
  const curves = panel.curves.filter(visible);
  const at = (curve, label) => curve.steps.find((step) => step.label === label)?.[shown.accuracy];
  const best = labels.map((label) => Math.max(...curves.map((curve) => at(curve, label)?.mean ?? -1)));
  const several = panel.variants.length > 1;
  const head = element("tr", {}, element("th", { textContent: "Training" }),
    ...(several ? [element("th", { textContent: "Compressor" })] : []),
    ...["Dense", ...labels].map((label) => element("th", { className: "number", textContent: label })));
  const rows = curves.map((curve) => element("tr", {},
    element("td", {}, sign(curve.training), curve.training),
    ...(several ? [element("td", { textContent: curve.variant })] : []),
    element("td", { className: "number", textContent: percent(curve.dense) }),
    ...labels.map((label, column) => {
      const spread = at(curve, label);
      const cell = element("td", { className: "number", textContent: spread ? percent(spread.mean) : "–" });
      if (spread && curves.length > 1 && spread.mean === best[column]) cell.classList.add("best");
      if (spread && curve.runs > 1) cell.append(element("small", { textContent: `${percent(spread.low)}–${percent(spread.high)}` }));
      return cell;
    })));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

function drawLayers(table, view) {
  const head = element("tr", {}, element("th", { textContent: "Layer" }), element("th", { textContent: "Kept" }),
    ...view.steps.map((label) => element("th", { className: "number", textContent: label })));
  const rows = view.layers.map((layer) => element("tr", {},
    element("td", {}, element("code", { textContent: layer.name })),
    element("td", { textContent: layer.kind }),
    ...layer.cells.map((cell) => {
      if (!cell) return element("td", { className: "number", textContent: "–" });
      const made = element("td", {
        className: "share", textContent: `${Math.round(100 * cell.kept / cell.total)}%`,
        title: `${cell.kept} of ${cell.total} (${layer.kind}); ${cell.params.toLocaleString("en")} of ${cell.params_dense.toLocaleString("en")} parameters`,
      });
      made.style.setProperty("--share", cell.kept / cell.total);
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

function draw() {
  data.sections.forEach((section, s) => section.panels.forEach((panel, p) => {
    panel.axes.forEach((_, axis) => drawFigure(document.getElementById(`figure-${s}-${p}-${axis}`), section, panel, axis));
    drawMeans(document.getElementById(`means-${s}-${p}`), panel);
  }));
}

document.querySelectorAll("[data-training]").forEach((button) =>
  button.querySelector("i").replaceWith(sign(button.dataset.training)));

document.querySelectorAll(".variants").forEach((legend) =>
  legend.querySelectorAll("line").forEach((line, index) =>
    line.setAttribute("stroke-dasharray", STROKES[index % STROKES.length])));

Object.entries(shown.hidden).forEach(([kind, hidden]) => {
  const buttons = document.querySelectorAll(`[data-${kind}]`);
  buttons.forEach((button) => button.addEventListener("click", () => {
    if (!hidden.delete(button.dataset[kind])) hidden.add(button.dataset[kind]);
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(!hidden.has(other.dataset[kind]))));
    draw();
  }));
});

document.querySelectorAll("input[name=accuracy]").forEach((choice) => choice.addEventListener("change", () => {
  shown.accuracy = choice.value;
  draw();
}));

data.sections.forEach((section, s) => {
  if (section.layers.length === 0) return;
  const select = document.getElementById(`layers-of-${s}`);
  section.layers.forEach((view, index) => select.append(new Option(view.title, index)));
  select.addEventListener("change", () => drawLayers(document.getElementById(`layers-${s}`), section.layers[select.value]));
  drawLayers(document.getElementById(`layers-${s}`), section.layers[0]);
});

document.querySelectorAll("table.numbers").forEach(sortable);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
