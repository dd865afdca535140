"use strict";
// The report of `throughtime gradients`: figures from its data, a text that can be asked, and a small cell that runs here.

const { report, matrix, reading } = data;
const top_ = report.lanes[matrix.lane];
const byId = (id) => document.getElementById(id);
const say = (id, text) => (byId(id).textContent = text);
const SERIES = ["one", "two", "three", "four"];
const percent = (share) => `${figure(100 * share)} %`;

const COLOURS = { healthy: "good", undecided: "open" };

/** Return where a horizon lies, as text: "34 [31–37]"; an interval over one row there is none. */
function horizonText({ lag, low, high }) {
  if (lag === null) return `beyond ${report.lags - 1}`;
  return report.rows === 1 ? `${lag}` : `${lag} [${low ?? "beyond"}–${high ?? "beyond"}]`;
}

/** Return where 1/1000 is left in fresh networks, as text: "1/1000 at lag 37, 35 to 40, 3 seeds". */
function reachText({ seeds, reach, at_last_lag }) {
  if (reach.lag === null) return `×${figure(at_last_lag)} left at lag ${report.lags - 1}, ${seeds} seeds`;
  const end = (lag) => lag ?? `beyond ${report.lags - 1}`;
  const range = reach.low === reach.high ? "" : `, ${end(reach.low)} to ${end(reach.high)}`;
  return `1/1000 at lag ${reach.lag}${range}, ${seeds} seeds`;
}

function showHead() {
  say("subject", `${report.subject} · ${report.source}`);
  say("verdict", report.sentence);
  byId("verdict").classList.add(COLOURS[report.verdict] ?? "bad");
  const names = { 0.5: "half", 0.01: "1/100", 0.001: "1/1000" };
  const tiles = top_.horizons.map((h) => [horizonText(h), `lag at which ${names[h.epsilon]} of the gradient is left`]);
  tiles.push([`×${figure(top_.decay_per_step)}`, "the tail's factor per step"]);
  const { bptt, bias } = top_.truncation;
  tiles.push([bias === null ? "–" : percent(bias), `of the gradient's mass is lost to BPTT in chunks of ${bptt} steps`]);
  const enough = top_.truncation_lengths.find((t) => t.bias === 0.1);
  tiles.push([enough.steps === null ? "–" : `${enough.steps}`, "steps: BPTT in chunks of this length would lose 10\u00a0%"]);
  if (top_.cancellation !== null) {
    tiles.push([figure(top_.cancellation), `agreement κ over ${top_.cancellation_steps} steps: 1 where losses pull a state the same way`]);
  }
  const few = report.rows < 8 ? " Few sequences make it wide." : "";
  say("interval", report.rows > 1 ? `[a–b] is the 95 % interval over ${report.rows} sequences that the same weights read.${few}` : "One sequence was read: how far others differ isn't known.");
  byId("tiles").append(...tiles.map(([value, name]) => make("li", {}, make("b", {}, value), make("span", {}, name))));
}

function showCurve() {
  say("curve-state", top_.state.includes(",") ? `The state is (${top_.state}), in one norm.` : "");
  new Curves(byId("curve"), () => {
    const lanes = [...report.lanes].reverse();
    const series = lanes.map((lane, i) => ({ name: lane.name, values: lane.curve, colour: colourOf(SERIES[i % 4]) }));
    const half = top_.quantiles.find((q) => q.quantile === 0.5);
    series.push({ name: "median", values: half.curve, colour: colourOf("four"), dashed: true });
    if (top_.paths) {
      const direct = top_.paths.direct.map((v) => (v === null ? null : v / top_.paths.total[0]));
      series.push({ name: "additive path alone", values: direct, colour: colourOf("three"), dashed: true });
    }
    return {
      series, log: true, x: "lag k", lines: [{ value: 1e-3, name: "1/1000" }], decades: 60,
      band: { low: matrix.lowest, high: matrix.highest, colour: colourOf("one") },
      label: `Lag curve. ${report.sentence}`,
    };
  });
}

function showMatrix() {
  const bytes = unpacked(matrix.norms.data);
  const [rows, columns] = matrix.norms.shape;
  const { low, high } = matrix.norms;
  say("matrix-lane", report.lanes.length > 1 ? `Shown: ${top_.name}.` : "");
  say("matrix-low", figure(10 ** low));
  say("matrix-high", figure(10 ** high));
  const value = (byte) => 10 ** (low + ((byte - 1) / 254) * (high - low));
  new HeatMap(byId("matrix"), () => ({
    rows, columns, height: 260,
    share: (row, column) => (bytes[row * columns + column] === 0 ? null : (bytes[row * columns + column] - 1) / 254),
    text: (row, column) => {
      const byte = bytes[row * columns + column];
      const place = `loss at s = ${matrix.losses[row]}, step t = ${column}`;
      return byte === 0 ? `${place}: not followed` : `${place}: ${byte === 1 ? "at most " : ""}${figure(value(byte))}`;
    },
    label: `Lag matrix of ${rows} losses over ${columns} steps`,
  }));
  const ramp = () => drawRamp(byId("matrix-ramp"));
  dark.addEventListener("change", ramp);
  ramp();
}

/** Fill a table; columns whose every entry is a number or a dash stand to the right. */
function fillTable(id, head, rows) {
  const cell = (tag, text) => make(tag, { class: /^[–\d×−%]/.test(text) ? "number" : "" }, text);
  byId(id).append(make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text))));
  byId(id).append(...rows.map(([first, ...rest]) => make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((text) => cell("td", text)))));
}

function showSpectrum() {
  const lanes = report.lanes.filter((lane) => lane.lyapunov_exponents.length).reverse();
  if (lanes.length) {
    new Curves(byId("exponents"), () => ({
      series: lanes.map((lane, i) => ({ name: lane.name, values: lane.lyapunov_exponents, colour: colourOf(SERIES[i % 4]), dots: true })),
      x: "exponent", first: 1, height: 180, lines: [{ value: 0, name: "neither" }],
      label: `Lyapunov exponents, the largest ${figure(lanes[0].lyapunov_exponents[0])} nats per step`,
    }));
    const [low, high] = top_.lyapunov_range.map(figure);
    say("exponent-range", `The largest lies from ${low} to ${high} over the sequences; they are of ${report.steps} steps, not of ever longer ones.`);
  } else {
    say("exponents", "Not taken: the sequences have ends.");
  }
  const rows = report.lanes.map((lane) => [
    lane.name, figure(lane.jacobian_norm), figure(lane.jacobian_spectral_radius),
    lane.bound ? figure(lane.bound.sigma_max) : "–", lane.bound ? figure(lane.bound.bound) : "–",
  ]);
  say("jacobian", report.lanes.some((lane) => lane.jacobian_norm === null) ? "‖J‖ and its radius aren't taken of wide states." : "");
  const head = ["", "‖J‖", "radius of J", "σ_max(W_hh)", "bound γσ_max"];
  const told = head.map((_, column) => column === 0 || rows.some((row) => row[column] !== "–"));
  const chosen = (row) => row.filter((_, column) => told[column]);
  if (told.filter(Boolean).length > 1) fillTable("steps", chosen(head), rows.map(chosen));
}

function showGates() {
  if (top_.gates.length) {
    const rows = report.lanes.flatMap((lane) =>
      lane.gates.map((gate) => [
        report.lanes.length > 1 ? `${lane.name}, ${gate.name}` : gate.name, figure(gate.mean), percent(gate.closed), percent(gate.open),
      ]));
    fillTable("gates", ["gate", "mean", "below 0.1", "above 0.9"], rows);
  } else {
    byId("gates").append(make("tr", {}, make("td", {}, "A simple RNN has no gates.")));
  }
  if (top_.time_constants) {
    const [low, middle, high] = top_.time_constants.map(figure);
    say("memory", `Memory time constants 1/(1 − f): ${low} to ${high} steps, median ${middle}.`);
  }
  const clip = report.clip;
  if (clip) {
    byId("clip").append(make("table", { id: "clip-table" }));
    fillTable("clip-table", ["steps clipped", percent(clip.share)], [
      ["of steps", String(clip.steps)], ["mean scale", `×${figure(clip.scale)}`], ["norms logged", String(clip.logged)],
      ["median norm before", figure(clip.median)], ["largest", figure(clip.largest)], ["not finite", String(clip.not_finite)],
    ]);
  } else {
    byId("clip").append(make("p", { class: "note" }, "Nothing was trained with clipping here; the small cell below shows what clipping does."));
  }
  const named = (t) => `${t.cell === report.cell ? "" : `--cell ${t.cell} `}--init ${t.init}`;
  const tried = report.trials.filter((t) => t.reaches_further);
  const rows = [...(report.fresh ? [[`${named(report.fresh)}, its own`, reachText(report.fresh)]] : []), ...tried.map((t) => [named(t), reachText(t)])];
  if (report.trials.length && !tried.length) rows.push(["none of the others reaches further", ""]);
  fillTable("trials", ["start", "gradient"], rows);
}

/** The text as the network read it; each character can be asked what its prediction hangs on. */
class Ribbon {
  constructor() {
    this.host = byId("ribbon");
    this.lanes = reading.lanes.map((lane) => ({ ...lane, fields: lane.fields.map((f) => ({ ...f, bytes: unpacked(f.data) })) }));
    this.shares = new Uint16Array(unpacked(reading.shares.data).buffer);
    this.lags = reading.shares.shape[1];
    this.selected = null;
    this.focused = 0;
    this.isText = reading.texts !== null;
    say("ribbon-help", (this.isText
      ? "The text as the network read it, a cell for each token. Click one: earlier text is coloured by its share of that prediction's gradient, "
      : "The steps of one sequence of white noise. Click one: earlier steps are coloured by their share of that loss's gradient, ")
      + "‖∂L_s/∂x_t‖. Arrow keys move, Enter chooses, Escape goes back to the units.");
    this.cells = Array.from({ length: reading.steps }, (_, t) => {
      const cell = make("span", { role: "option", tabindex: t === 0 ? "0" : "-1", "aria-selected": "false", "aria-label": `step ${t}: ${this.name(t)}` }, this.isText ? this.name(t) || "·" : "·");
      cell.dataset.step = t;
      return cell;
    });
    this.host.append(...this.cells);
    this.fillControls();
    this.host.addEventListener("click", (event) => {
      const cell = event.target.closest("[role=option]");
      if (cell) this.select(Number(cell.dataset.step));
    });
    this.host.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("[role=option]");
      if (cell) this.tell(Number(cell.dataset.step));
    });
    this.host.addEventListener("focusin", (event) => this.tell(Number(event.target.dataset.step)));
    this.host.addEventListener("keydown", (event) => this.key(event));
    byId("clear").addEventListener("click", () => this.select(null));
    dark.addEventListener("change", () => this.paint());
    this.paint();
  }

  name(t) {
    return this.isText ? reading.texts[t] ?? "" : `step ${t}`;
  }

  fillControls() {
    const layer = byId("layer"), unit = byId("unit");
    this.lanes.forEach((lane, i) => layer.append(make("option", { value: i }, lane.name)));
    layer.value = this.lanes.length - 1;
    byId("layer-label").hidden = this.lanes.length === 1;
    const fillFields = () => {
      const before = byId("quantity").value;
      const options = this.lane.fields.flatMap((f) => [
        make("option", { value: `${f.name}/unit` }, `${f.name}, one unit`), make("option", { value: `${f.name}/mean` }, `${f.name}, mean of units`),
      ]);
      byId("quantity").replaceChildren(...options);
      if ([...byId("quantity").options].some((o) => o.value === before)) byId("quantity").value = before;
      unit.max = this.lane.units - 1;
      unit.value = Math.min(Number(unit.value) || 0, this.lane.units - 1);
    };
    fillFields();
    layer.addEventListener("change", () => (fillFields(), this.select(null)));
    for (const control of [byId("quantity"), unit]) control.addEventListener("input", () => this.select(null));
  }

  get lane() {
    return this.lanes[Number(byId("layer").value)];
  }

  /** Return the field that is shown, and whether its mean over the units is. */
  get shown() {
    const [name, what] = byId("quantity").value.split("/");
    return { field: this.lane.fields.find((f) => f.name === name), isMean: what === "mean" };
  }

  /** Return the shown quantity at step t. */
  value(t) {
    const { field, isMean } = this.shown, units = this.lane.units;
    const scaled = (j) => field.low + (field.bytes[t * units + j] / 255) * (field.high - field.low);
    byId("unit").disabled = isMean;
    if (!isMean) return scaled(Math.min(Math.max(Math.round(Number(byId("unit").value) || 0), 0), units - 1));
    let sum = 0;
    for (let j = 0; j < units; j++) sum += scaled(j);
    return sum / units;
  }

  /** Return the share of the selected prediction's gradient that reaches step t. */
  share(t) {
    const lag = this.selected - t;
    return lag < 0 || lag >= this.lags ? 0 : this.shares[this.selected * this.lags + lag] / 65535;
  }

  select(t) {
    this.selected = t === this.selected ? null : t;
    if (t !== null) this.focus(t);
    byId("clear").disabled = this.selected === null;
    this.paint();
  }

  focus(t) {
    this.cells[this.focused].tabIndex = -1;
    this.focused = t;
    this.cells[t].tabIndex = 0;
    this.cells[t].focus();
  }

  key(event) {
    const t = this.focused, last = this.cells.length - 1;
    const across = this.cells.filter((cell) => cell.offsetTop === this.cells[t].offsetTop).length;
    const to = { ArrowLeft: t - 1, ArrowRight: t + 1, ArrowUp: t - across, ArrowDown: t + across, Home: 0, End: last }[event.key];
    if (to !== undefined) this.focus(Math.min(Math.max(to, 0), last));
    else if (event.key === "Enter" || event.key === " ") this.select(t);
    else if (event.key === "Escape") this.select(null);
    else return;
    event.preventDefault();
  }

  /** Say what is known of a step: its value, or its share of the selected prediction's gradient. */
  tell(t) {
    const here = this.isText ? `step ${t} “${this.name(t)}”` : `step ${t}`;
    if (this.selected === null) say("ribbon-readout", `${here}: ${figure(this.value(t))}`);
    else if (t > this.selected) say("ribbon-readout", `${here} comes after the prediction`);
    else if (t !== this.selected) say("ribbon-readout", `${here}: ${percent(this.share(t))} of the gradient of the prediction at step ${this.selected}`);
    else this.tellSelected();
  }

  tellSelected() {
    const reached = (wanted) => {
      let sum = 0;
      for (let lag = 0; lag <= this.selected; lag++) if ((sum += this.share(this.selected - lag)) >= wanted) return lag + 1;
      return this.selected + 1;
    };
    const unit = this.isText ? "token" : "step";
    const count = (n) => `${n === 1 ? `the last ${unit}` : `the last ${n} ${unit}s`}`;
    const what = this.isText ? `The prediction of “${this.name(this.selected + 1)}” after “${this.name(this.selected)}”` : "The loss";
    say("ribbon-readout", `${what} (step ${this.selected}): half of its gradient comes from ${count(reached(0.5))}, 90 % from ${count(reached(0.9))}.`);
  }

  paint() {
    const chosen = this.selected !== null;
    const { field, isMean } = this.shown;
    const values = this.cells.map((_, t) => (chosen ? this.share(t) : this.value(t)));
    const signed = !chosen && field.low < 0;
    let low = 0, high = Math.max(...values);
    if (!chosen) [low, high] = isMean ? [Math.min(...values), Math.max(...values)] : [field.low, field.high];
    if (signed) [low, high] = [-Math.max(-low, high), Math.max(-low, high)];
    this.cells.forEach((cell, t) => {
      const later = chosen && t > this.selected;
      cell.classList.toggle("later", later);
      cell.setAttribute("aria-selected", String(t === this.selected));
      const place = later || high === low ? 0 : (values[t] - low) / (high - low);
      paint(cell, rampColour(chosen ? Math.sqrt(place) : place, signed)); // a share is seen by its square root: most are small
    });
    this.values = values;
    drawRamp(byId("ribbon-ramp"), signed);
    say("ribbon-low", chosen ? "0" : figure(low));
    say("ribbon-high", chosen ? percent(high) : figure(high));
    if (chosen) this.tellSelected();
    else say("ribbon-readout", isMean ? `Colour: ${field.name}, the mean of ${this.lane.units} units.` : `Colour: ${field.name} of unit ${byId("unit").value}.`);
  }
}

/** A small cell whose gradients are carried back at each move of a slider. */
class Playground {
  static size = 16;
  static width = 4;

  constructor() {
    this.seed = 1;
    const cell = report.cell.startsWith("rnn") ? "rnn" : "lstm";
    document.querySelector(`input[name=cell][value=${cell}]`).checked = true;
    for (const input of document.querySelectorAll("input[name=cell], #gain, #bias, #clip-norm, #steps-back")) {
      input.addEventListener("input", () => this.run());
    }
    byId("redraw").addEventListener("click", () => (this.seed++, this.run()));
    this.compute();
    this.charts = [
      new Curves(byId("play-curve"), () => ({
        series: [{ name: "‖∂L/∂s‖", values: this.byLag, colour: colourOf("one") }], log: true, x: "lag k", height: 210,
        lines: [{ value: 1e-3, name: "1/1000" }], label: `Gradient of the state by lag: ${this.verdict.sentence}`,
      })),
      new Curves(byId("play-steps"), () => ({
        series: [
          { name: "before clipping", values: this.parts, colour: colourOf("two"), dashed: this.scale < 1 },
          { name: "after", values: this.clippedParts, colour: colourOf("one") },
        ],
        log: true, x: "lag k", height: 210, label: `Parts of the weights' gradient by lag, scaled by ${figure(this.scale)}`,
      })),
      new HeatMap(byId("play-state"), () => ({
        rows: Playground.size, columns: this.result.outputs.length, height: 112, diverging: true,
        share: (unit, t) => (this.result.outputs[t][unit] / this.largest + 1) / 2,
        text: (unit, t) => `unit ${unit} at step ${t + 1}: ${figure(this.result.outputs[t][unit])}`,
        label: `Hidden state over the sequence, from ${figure(-this.largest)} to ${figure(this.largest)}`,
      })),
    ];
    this.tell();
  }

  get settings() {
    const value = (id) => Number(byId(id).value);
    return {
      cell: document.querySelector("input[name=cell]:checked").value,
      gain: value("gain"), bias: value("bias"), clip: 10 ** value("clip-norm"), steps: value("steps-back"),
    };
  }

  compute() {
    const { cell, gain, bias, clip, steps } = this.settings;
    const { size, width } = Playground;
    const weights = drawWeights(cell, size, width, gain, bias, this.seed);
    const draw = normalNumbers(this.seed + 1000);
    const inputs = Array.from({ length: steps }, () => Float64Array.from({ length: width }, draw));
    const direction = Float64Array.from({ length: size }, draw), length = norm(direction);
    const gradOutputs = inputs.map(() => new Float64Array(size));
    gradOutputs[steps - 1] = direction.map((x) => x / length);
    this.result = backpropagateThroughTime(cell, weights, inputs, gradOutputs);
    this.byLag = [...this.result.states].reverse().map((v) => v / this.result.states[steps - 1]);
    this.parts = [...this.result.steps].reverse();
    this.largest = Math.max(...this.result.outputs.map((h) => Math.max(...h.map(Math.abs))));
    this.norm = norm(...Object.values(this.result.gradient));
    this.scale = Math.min(1, clip / this.norm);
    this.clippedParts = this.parts.map((part) => part * this.scale);
    this.verdict = this.judge();
  }

  /** Say what the curve comes to over its T steps, by the same rule as the report. */
  judge() {
    const largest = Math.max(...this.byLag), last = this.byLag.length - 1;
    const gone = this.byLag.findIndex((v) => v < 1e-3);
    if (largest >= 10) return { kind: "exploding", sentence: `exploding: ×${figure(largest)} at lag ${this.byLag.indexOf(largest)}` };
    if (gone >= 0) return { kind: "vanishing", sentence: `vanishing beyond lag ${gone}` };
    return { kind: "healthy", sentence: `healthy within ${last + 1} steps: at lag ${last}, ${figure(this.byLag[last])} is left` };
  }

  tell() {
    const { cell, gain, bias, clip, steps } = this.settings;
    byId("bias").disabled = cell === "rnn";
    const shown = { gain: figure(gain), bias: cell === "rnn" ? "LSTM only" : figure(bias), "clip-norm": figure(clip), "steps-back": String(steps) };
    for (const [id, text] of Object.entries(shown)) document.querySelector(`output[for=${id}]`).textContent = text;
    const clipped = this.scale < 1 ? `clipping scales it by ${figure(this.scale)}` : "below the clip";
    say("play-verdict", `${this.verdict.sentence}; ‖∂L/∂W‖ = ${figure(this.norm)}, ${clipped}`);
    byId("play-verdict").className = `small-verdict ${this.verdict.kind === "healthy" ? "good" : "bad"}`;
  }

  run() {
    this.compute();
    for (const chart of this.charts) chart.draw();
    this.tell();
  }
}

showHead();
showCurve();
showMatrix();
showSpectrum();
showGates();
const ribbon = new Ribbon();
const playground = new Playground();
