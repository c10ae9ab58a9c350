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
  const other = shown.accuracy === "top1" ? "raw" : data.refitted ? "refitted" : "re-est.";
  const name = panel.patterned ? "Mean" : "Area";
  const head = element("tr", {},
    heading("Training", ""),
    ...(several ? [heading("Compressor", "")] : []),
    heading(name), ...(hasBaseline ? [heading("Vs best baseline")] : []), heading("Dense"),
    ...(panel.patterned ? [] : data.kept.map((share) => heading(`${Math.round(100 * share)} %`, "number", "kept"))),
    heading(`${name}, ${other}`, "number", data.refitted ? "by another accuracy" : "with the other BatchNorm statistics"),
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
