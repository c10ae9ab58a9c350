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
