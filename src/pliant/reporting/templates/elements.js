// Draws the page from `data`:
//   {trainings: [{name, ours, retrained}], slack, kept: [share], refitted, sections: [{top, panels: [panel], layers: [layers]}]}
//   panel:    {compressor, title, removes, patterned, axes: [title], variants: [name], sizes: [label],
//              views: {epochs or time: {curves: [curve], standings: {accuracy: [standing]}}}}
//   accuracy: top1, top1_raw or top1_reestimated; standings by the last one if anything was refitted
//   curve:    {training, variant, runs, dense, networks: [{run, command: [word] or null, points: [point]}],
//              sizes: [{label, pattern, shares: [per axis], accuracy: {mean, low, high}, ..., tip}]}
//   point:    {removed, accuracy, ..., val, ratio, pattern}, val null if it is not known
//   standing: {curve: index, areas: [estimate per axis], other: estimate, versus: estimate or null, is_baseline,
//              is_best, kept: [accuracy or null], cost: {step, memory, seconds} or null}; estimate: {mean, half, n}
//   layers:   {title, sizes: [label], layers: [{name, kind, cells: [[kept, total, params, params_dense] or null]}]}
// Accuracies and shares are fractions. All text goes into the page as text, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x"];
const SIGNS = ["●", "■", "◆", "▲", "✚", "★", "▼", "✖"];
const DASHES = ["solid", "dot", "dashdot", "longdashdot"];
const STROKES = ["", "2 3", "7 3 2 3", "12 3 2 3"];
const FEW = 6; // with more curves, bands and dense networks would hide each other
const CONFIG = {
  displaylogo: false,
  responsive: true,
  displayModeBar: "hover",
  modeBarButtons: [["toImage", "resetScale2d"]],
};

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value ?? "";
const shown = {
  accuracy: chosen("accuracy"), // browsers restore it on reload
  view: chosen("view"),
  alone: new Set(), // trainings; empty: all
  hidden: new Set(), // variants
};
const place = new Map(data.trainings.map((training, index) => [training.name, index]));
const trainings = new Map(data.trainings.map((training) => [training.name, training]));

const percent = (fraction) => (100 * fraction).toFixed(1);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
// Twenty trainings differ in colour, marker and dash: any two of them in at least one, the first eight in two.
const toneOf = (training) => place.get(training) % 8;
const rowOf = (training) => Math.floor(place.get(training) / 8);
const markOf = (training) => (place.get(training) + 3 * rowOf(training)) % 8;
const isShown = (training) => shown.alone.size === 0 || shown.alone.has(training);
const viewOf = (panel) => panel.views[shown.view || Object.keys(panel.views)[0]];

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// plotly.js knows no CSS variables: ask the browser what they are now, "rgb(…)".
const probe = element("i", { hidden: true });
document.body.append(probe);
function css(name, alpha = 1) {
  probe.style.color = `var(${name})`;
  const [red, green, blue] = getComputedStyle(probe).color.match(/[\d.]+/g);
  return `rgba(${red}, ${green}, ${blue}, ${alpha})`;
}

function sign(training) {
  const made = element("i", { textContent: SIGNS[markOf(training)] });
  made.style.color = `var(--tone-${toneOf(training)})`;
  made.setAttribute("aria-hidden", "true");
  return made;
}

function badge(training) {
  return trainings.get(training).ours ? element("span", { className: "badge", textContent: "ours" }) : null;
}

const cell = (text, className = "number") => element("td", { className, textContent: text });
const heading = (text, className = "number", title = "") => element("th", { className, textContent: text, title });
const plusMinus = (half) => (half === null ? "" : ` ± ${percent(half)}`);

function estimateCell(estimate, sign = "") {
  const made = cell(`${sign && estimate.mean >= 0 ? "+" : ""}${percent(estimate.mean)}`.replace("-", "−"));
  if (estimate.half !== null) made.append(element("small", { textContent: plusMinus(estimate.half) }));
  return made;
}
