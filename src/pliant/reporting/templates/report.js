// Draws the page from `data`:
//   {trainings: [{name, ours, retrained}], slack, kept: [share], sections: [{top, panels: [panel], layers: [layers]}]}
//   panel:    {compressor, title, removes, patterned, axes: [title], variants: [name], sizes: [label],
//              views: {epochs or time: {curves: [curve], standings: {top1: [standing], top1_raw: [standing]}}}}
//   curve:    {training, variant, runs, dense, networks: [{run, command: [word] or null, points: [point]}],
//              sizes: [{label, pattern, shares: [per axis], top1: {mean, low, high}, top1_raw: {...}, tip}]}
//   point:    {removed, top1, top1_raw, val, ratio, pattern}, val null if it is not known
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

// ---------------------------------------------------------------------------------------------------- figures

function traces(curve, panel, at, ends, few) {
  const colour = css(`--tone-${toneOf(curve.training)}`);
  const several = panel.variants.length > 1;
  const dash = DASHES[(several ? panel.variants.indexOf(curve.variant) : rowOf(curve.training)) % DASHES.length];
  const value = (size, kind) => 100 * size[shown.accuracy][kind];
  const drawn = [];
  if (few) {
    drawn.push({
      x: ends, y: ends.map(() => 100 * curve.dense), mode: "lines", hoverinfo: "skip", opacity: 0.75,
      line: { color: colour, width: 1.2, dash: "dash" },
    });
  }
  // Different N:M patterns are different things: no line leads from one to the next.
  const sizes = curve.sizes.filter((size) => !size.pattern);
  if (few && curve.runs > 1) {
    const back = [...sizes].reverse();
    drawn.push({
      x: [...sizes, ...back].map(at),
      y: [...sizes.map((size) => value(size, "high")), ...back.map((size) => value(size, "low"))],
      mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: css(`--tone-${toneOf(curve.training)}`, 0.15), hoverinfo: "skip",
    });
  }
  drawn.push({
    x: sizes.map(at), y: sizes.map((size) => value(size, "mean")),
    mode: "lines", line: { color: colour, width: few ? 2.2 : 1.6, dash }, hoverinfo: "skip",
  });
  const patterns = curve.sizes.filter((size) => size.pattern);
  drawn.push({
    x: curve.sizes.map(at), y: curve.sizes.map((size) => value(size, "mean")),
    mode: "markers", marker: { color: colour, size: few ? 8 : 7, symbol: SYMBOLS[markOf(curve.training)] },
    // Patterns have no band, so they have bars.
    ...(few && patterns.length > 0 && curve.runs > 1 ? {
      error_y: {
        type: "data", symmetric: false, color: colour, thickness: 1.2, width: 4,
        array: curve.sizes.map((size) => value(size, "high") - value(size, "mean")),
        arrayminus: curve.sizes.map((size) => value(size, "mean") - value(size, "low")),
      },
    } : {}),
    hovertext: curve.sizes.map((size) => size.tip), hoverinfo: "text",
  });
  return drawn;
}

function context(curves, at) {
  const sizes = curves.flatMap((curve) => [...curve.sizes.filter((size) => !size.pattern), null]);
  return {
    x: sizes.map((size) => (size ? at(size) : null)), y: sizes.map((size) => (size ? 100 * size[shown.accuracy].mean : null)),
    mode: "lines", line: { color: css("--muted", 0.3), width: 1 }, hoverinfo: "skip", connectgaps: false,
  };
}

function drawFigure(where, section, panel, axis) {
  const every = viewOf(panel).curves.filter((curve) => !shown.hidden.has(curve.variant));
  const curves = every.filter((curve) => isShown(curve.training));
  const others = every.filter((curve) => !isShown(curve.training));
  const sizes = every.flatMap((curve) => curve.sizes);
  // Ratios stand at the share that is left. N:M patterns stand side by side, because several have the same share, and
  // so do the trainings of a pattern, because equal accuracies would hide each other.
  const right = 2 + 100 * Math.max(1, ...sizes.map((size) => size.shares[axis]));
  const aside = (curve) => (curves.length > 1 ? 0.6 * (curves.indexOf(curve) / (curves.length - 1) - 0.5) : 0);
  const at = panel.patterned
    ? (size, curve) => panel.sizes.indexOf(size.label) + aside(curve)
    : (size) => 100 * size.shares[axis];
  const ends = panel.patterned ? [-0.5, panel.sizes.length - 0.5] : [right, -2];
  const title = (text) => ({ text, font: { size: 13 } });
  const lines = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false };
  const shares = { title: title(panel.axes[axis]), range: ends, ticksuffix: "%" };
  const names = { title: title("N:M pattern"), range: ends, tickvals: [...panel.sizes.keys()], ticktext: panel.sizes, showgrid: false };
  const few = curves.length <= FEW;
  const drawn = curves.flatMap((curve) => traces(curve, panel, (size) => at(size, curve), ends, few));
  Plotly.react(where, others.length > 0 && !panel.patterned ? [context(others, at), ...drawn] : drawn, {
    xaxis: { ...lines, ...(panel.patterned ? names : shares) },
    yaxis: { ...lines, title: title("test accuracy"), range: [0, section.top + 1], ticksuffix: "%" },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--muted") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--ink") },
    margin: { l: 58, r: 8, t: 28, b: 48 }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 }, align: "left" },
    // A finger that scrolls the page must not zoom the figure.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    uirevision: `zoom ${shown.view}`,
  }, CONFIG);
}

// ----------------------------------------------------------------------------------------------- the standings

function trainingButton(training) {
  const made = element("button", { type: "button", className: "pick" }, sign(training), training);
  made.dataset.training = training;
  made.setAttribute("aria-pressed", String(isShown(training)));
  made.addEventListener("click", () => toggle(training));
  return made;
}

function drawStandings(table, panel) {
  const { curves, standings } = viewOf(panel);
  const rows = standings[shown.accuracy];
  const several = panel.variants.length > 1;
  const hasCost = rows.some((row) => row.cost);
  const hasBaseline = rows.some((row) => row.versus) && rows.length > 1;
  const other = shown.accuracy === "top1" ? "raw" : "re-est.";
  const name = panel.patterned ? "Mean" : "Area";
  const head = element("tr", {},
    heading("Training", ""),
    ...(several ? [heading("Compressor", "")] : []),
    heading(name), ...(hasBaseline ? [heading("Vs best baseline")] : []), heading("Dense"),
    ...(panel.patterned ? [] : data.kept.map((share) => heading(`${Math.round(100 * share)} %`, "number", "kept"))),
    heading(`${name}, ${other}`, "number", "with the other BatchNorm statistics"),
    ...(panel.axes.length > 1 ? [heading("By MACs", "number", "the area against the multiply-accumulates removed")] : []),
    ...(hasCost ? [heading("Step", "number", "time of a training step, times SGD's"), heading("Memory", "number", "times SGD's"),
      heading("Trained", "number", "seconds")] : []),
    heading("Seeds"));
  const body = rows.map((row) => {
    const curve = curves[row.curve];
    const difference = () => {
      if (row.is_baseline) return cell("best baseline", "number baseline");
      return row.versus ? estimateCell(row.versus, "+") : cell("–");
    };
    const made = element("tr", {},
      element("td", {}, trainingButton(curve.training), " ", badge(curve.training)),
      ...(several ? [cell(curve.variant, "")] : []),
      estimateCell(row.areas[0]), ...(hasBaseline ? [difference()] : []), cell(percent(curve.dense)),
      ...(panel.patterned ? [] : row.kept.map((accuracy) => cell(accuracy === null ? "–" : percent(accuracy)))),
      estimateCell(row.other),
      ...row.areas.slice(1).map((estimate) => estimateCell(estimate)),
      ...(hasCost ? (row.cost
        ? [cell(`${row.cost.step.toFixed(2)}×`), cell(`${row.cost.memory.toFixed(2)}×`), cell(`${Math.round(row.cost.seconds).toLocaleString("en")} s`)]
        : [cell("–"), cell("–"), cell("–")]) : []),
      cell(String(row.areas[0].n)));
    made.classList.toggle("best", row.is_best && rows.length > 1);
    made.classList.toggle("retrained", trainings.get(curve.training).retrained);
    made.classList.toggle("faint", !isShown(curve.training));
    return made;
  });
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

function drawBestOf(table, section) {
  const panels = section.panels.filter((panel) => viewOf(panel));
  const who = (view, row) => {
    if (!row) return [cell("–", ""), cell("–"), cell("–")];
    const curve = view.curves[row.curve];
    return [element("td", {}, sign(curve.training), curve.training, " ", badge(curve.training)), estimateCell(row.areas[0]), cell(percent(curve.dense))];
  };
  const body = panels.map((panel) => {
    const view = viewOf(panel);
    const rivals = view.standings[shown.accuracy].filter((row) => !trainings.get(view.curves[row.curve].training).retrained);
    const isOurs = (row) => trainings.get(view.curves[row.curve].training).ours;
    const ours = rivals.find(isOurs);
    const baseline = rivals.find((row) => row.is_baseline);
    const difference = ours && baseline ? estimateCell(ours.versus, "+") : cell("–");
    return element("tr", {}, element("td", { textContent: panel.title }), difference, ...who(view, ours), ...who(view, baseline));
  });
  const head = element("tr", {}, heading("Compressed by", ""), heading("Ours − baseline", "number", "difference of the areas"),
    heading("Best of ours", ""), heading("Area"), heading("Dense"), heading("Best baseline", ""), heading("Area"), heading("Dense"));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

// ------------------------------------------------------------------------------------------------ choice of size

// The accuracy of a network with a share removed, as the area takes it: {value, measured}, or null out of reach.
function at(points, removed, of) {
  const best = new Map();
  points.forEach((point) => {
    const known = best.get(point.removed);
    if (of(point) !== null && (known === undefined || of(point) > of(known))) best.set(point.removed, point);
  });
  const sorted = [...best.values()].sort((a, b) => a.removed - b.removed);
  if (sorted.length === 0) return null;
  const near = sorted.find((point) => Math.abs(point.removed - removed) <= data.slack);
  for (let index = 1; index < sorted.length; index += 1) {
    const [left, right] = [sorted[index - 1], sorted[index]];
    if (left.removed <= removed && removed <= right.removed) {
      const part = (removed - left.removed) / (right.removed - left.removed);
      const between = (get) => get(left) + (get(right) - get(left)) * part;
      return { value: between(of), ratio: between((point) => point.ratio), measured: near !== undefined };
    }
  }
  const last = sorted.at(-1);
  const missed = removed - last.removed;
  return missed >= 0 && missed <= data.slack ? { value: of(last), ratio: last.ratio, measured: true } : null;
}

// The best pattern that keeps no more than asked for, like `at`.
function patternAt(points, removed, of) {
  const small = points.filter((point) => point.removed >= removed - data.slack && of(point) !== null);
  if (small.length === 0) return null;
  const best = small.reduce((a, b) => (of(b) > of(a) ? b : a));
  return { value: of(best), ratio: best.ratio, pattern: best.pattern, measured: true };
}

const quote = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

function commandOf(panel, network, found, keep) {
  if (!network.command) return null;
  const fraction = String(Number(keep.toFixed(2)));
  let size = ["--keep_params", fraction];
  if (panel.patterned) size = found.pattern ? ["--pattern", found.pattern] : null;
  else if (!panel.removes) size = ["--ratio", String(Number(found.ratio.toFixed(3)))];
  if (size === null) return null;
  const out = `small-${network.run}-${panel.compressor}-${found.pattern ? found.pattern.replace(":", "of") : Math.round(100 * keep)}`;
  return [...network.command, ...size, "--out", out].map(quote).join(" ");
}

function choiceOf(panel, curve, keep) {
  const look = panel.patterned ? patternAt : at;
  const found = curve.networks.map((network) => ({
    network,
    accuracy: look(network.points, 1 - keep, (point) => point[shown.accuracy]),
    val: look(network.points, 1 - keep, (point) => point.val)?.value ?? -1,
  }));
  const base = { panel, curve, training: curve.training, least: Math.max(...found.map(({ network }) => 1 - Math.max(...network.points.map((point) => point.removed)))) };
  if (found.some(({ accuracy }) => accuracy === null)) return { ...base, value: null };
  const values = found.map(({ accuracy }) => accuracy.value);
  const best = found.reduce((a, b) => (b.val > a.val ? b : a));
  return {
    ...base,
    value: mean(values), low: Math.min(...values), high: Math.max(...values), runs: values.length,
    measured: found.every(({ accuracy }) => accuracy.measured),
    val: mean(found.map(({ val }) => val)),
    pattern: best.accuracy.pattern,
    command: commandOf(panel, best.network, best.accuracy, keep),
  };
}

function choices(section, by, keep) {
  const panels = section.panels.filter((panel) => viewOf(panel));
  const real = panels.filter((panel) => panel.removes);
  const open = by !== "" ? [section.panels[by]].filter(viewOf) : real.length > 0 ? real : panels;
  const all = open.flatMap((panel) => viewOf(panel).curves.map((curve) => choiceOf(panel, curve, keep)));
  const best = new Map();
  all.forEach((choice) => {
    const key = by === "" ? choice.training : `${choice.training} ${choice.curve.variant}`;
    const known = best.get(key);
    const better = !known || (choice.value !== null && (known.value === null || choice.val > known.val))
      || (choice.value === null && known.value === null && choice.least < known.least);
    if (better) best.set(key, choice);
  });
  const last = (choice) => (choice.value === null ? 2 : trainings.get(choice.training).retrained ? 1 : 0);
  return [...best.values()].sort((a, b) => last(a) - last(b) || b.value - a.value);
}

function say(section, text) {
  section.querySelector(".status").textContent = text;
}

async function copy(button, code, section) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    say(section, "Copied.");
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  } catch {
    // Without permission the reader has to copy: the text is selected.
    code.focus();
    getSelection().selectAllChildren(code);
    say(section, "The command is selected: copy it with the keyboard.");
  }
}

function choiceRow(choice, rank, section, top) {
  const { training, curve, value } = choice;
  const retrained = trainings.get(training).retrained;
  const made = element("li", { className: "choice" });
  made.dataset.of = training;
  const who = element("div", { className: "who" },
    element("span", { className: "rank", textContent: rank === null ? "–" : String(rank) }), sign(training),
    element("span", { className: "name", textContent: training }), badge(training),
    element("small", { textContent: choice.pattern ? `${curve.variant} ${choice.pattern}` : curve.variant }));
  if (value === null) {
    made.classList.add("out");
    made.append(who, element("div", { className: "what", textContent: `not reached: measured down to ${percent(choice.least)} %` }));
    return made;
  }
  made.classList.toggle("first", rank === 1);
  const bar = element("span", { className: "bar" });
  bar.style.setProperty("--part", value / top);
  bar.style.setProperty("--tone", `var(--tone-${toneOf(training)})`);
  const spread = choice.runs > 1 ? ` (${percent(choice.low)}–${percent(choice.high)})` : "";
  const loss = 100 * (value - curve.dense);
  made.append(who, element("div", { className: "what" }, bar,
    element("b", { className: "accuracy", textContent: `${choice.measured ? "" : "≈ "}${percent(value)}` }),
    element("small", { textContent: `${spread} ${loss < 0 ? "−" : "+"}${Math.abs(loss).toFixed(1)} to dense ${percent(curve.dense)}` })));
  if (choice.command) {
    const code = element("code", { textContent: choice.command, tabIndex: 0 });
    const button = element("button", { type: "button", className: "copy", textContent: "copy" });
    button.setAttribute("aria-label", `Copy the command for ${training}`);
    button.addEventListener("click", () => copy(button, code, section));
    made.append(element("div", { className: "command" }, code, button));
  } else {
    made.append(element("div", { className: "command none", textContent: retrained
      ? "a reference: it was trained again after compression, which no single command does"
      : "the dense network, or a compressor that the command line does not have" }));
  }
  return made;
}

function drawChoices(s) {
  const section = data.sections[s];
  const keep = Number(document.getElementById(`keep-${s}`).value) / 100;
  const where = document.getElementById(`choices-${s}`);
  document.getElementById(`kept-${s}`).textContent = `${Math.round(100 * keep)} %`;
  const found = choices(section, chosen(`by-${s}`), keep);
  const top = Math.max(...found.map((choice) => choice.value ?? 0)) || 1;
  let rank = 0;
  const rows = found.map((choice) => {
    const counts = choice.value !== null && !trainings.get(choice.training).retrained;
    if (counts) rank += 1;
    return choiceRow(choice, counts ? rank : null, where.closest("article"), top);
  });
  where.replaceChildren(...(rows.length > 0 ? rows : [element("li", { className: "note", textContent: "Nothing was measured with this compressor in this comparison." })]));
}

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
