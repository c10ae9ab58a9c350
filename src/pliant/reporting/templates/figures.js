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
