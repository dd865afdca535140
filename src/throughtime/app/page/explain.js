"use strict";
// The worked example, one step at a time: forward, losses, backward, clipping, update, training. All numbers come from the page's data.

const { word, letters, ids, weights, forward, backward, update, training, descent } = data;
const byId = (id) => document.getElementById(id);
const T = ids.length - 1, H = weights.hh.length;
const number = (value) => (value === 0 || Math.abs(value) < 0.0005 ? "0.000" : value.toFixed(3).replace("-", "−"));
const letter = (t) => letters[ids[t]];
const units = Array.from({ length: H }, (_, j) => String(j + 1));
const plus = (a, b) => a.map((row, i) => row.map((value, j) => value + b[i][j]));

/** Return a table of numbers under a name; `marked(row, column)` are shown bold. */
function matrix(name, values, rows, columns, marked = () => false) {
  const head = make("tr", {}, make("td"), ...columns.map((text) => make("th", { scope: "col", class: "number" }, text)));
  const body = values.map((row, i) =>
    make("tr", {}, make("th", { scope: "row" }, rows[i]), ...row.map((value, j) => make("td", { class: marked(i, j) ? "number marked" : "number" }, number(value)))));
  return make("div", { class: "scroll block" }, make("table", {}, make("caption", {}, name), head, ...body));
}

/** Return a table with a named column for each vector, a row for each unit or letter. */
function vectors(rows, columns, marked = -1) {
  const head = make("tr", {}, make("td"), ...columns.map(([name]) => make("th", { scope: "col", class: "number" }, name)));
  const body = rows.map((row, i) =>
    make("tr", { class: i === marked ? "marked" : "" }, make("th", { scope: "row" }, row),
      ...columns.map(([, values]) => make("td", { class: "number" }, typeof values[i] === "number" ? number(values[i]) : values[i]))));
  return make("div", { class: "scroll block" }, make("table", {}, head, ...body));
}

const beside = (...blocks) => make("div", { class: "beside" }, ...blocks);
const heading = (text) => make("h3", {}, text);
const line = (text) => make("p", {}, text);
const oneHot = (at) => letters.map((_, v) => (v === at ? "1" : "0"));

const stages = [
  {
    title: "Weights", equation: "h_t = tanh(W_xh x_t + W_hh h_{t−1}),  y_t = W_hy h_t,  p_t = softmax(y_t),  L_t = −ln p_t[target]",
    note: `${2 * H * letters.length + H * H} numbers, drawn between −1/√H and 1/√H with seed ${data.seed}. The network reads one letter at a time and predicts the next; h_0 = 0.`,
    numbers: () => [beside(
      matrix("W_xh", weights.xh, units, letters), matrix("W_hh", weights.hh, units, units), matrix("W_hy", weights.hy, letters, units))],
  },
  ...Array.from({ length: T }, (_, t) => ({
    title: `Forward, t = ${t + 1}: ${letter(t)} → ${letter(t + 1)}`, ahead: t,
    equation: "h_t = tanh(W_xh x_t + W_hh h_{t−1})",
    note: `x_t has its 1 at ${letter(t)}, so W_xh x_t is that column of W_xh. The target is ${letter(t + 1)}.`,
    numbers: () => {
      const before = t ? forward.h[t - 1] : units.map(() => 0);
      const sum = forward.from_input[t].map((value, j) => value + forward.from_state[t][j]);
      return [
        beside(
          matrix("W_xh", weights.xh, units, letters, (_, v) => v === ids[t]), matrix("W_hh", weights.hh, units, units),
          vectors(units, [["h_{t−1}", before], ["W_xh x_t", forward.from_input[t]], ["W_hh h_{t−1}", forward.from_state[t]], ["sum", sum], ["h_t = tanh", forward.h[t]]])),
        heading("Output and loss"),
        beside(matrix("W_hy", weights.hy, letters, units), vectors(letters, [["x_t", oneHot(ids[t])], ["y_t", forward.y[t]], ["p_t", forward.p[t]], ["target", oneHot(ids[t + 1])]], ids[t + 1])),
        line(`L_${t + 1} = −ln p_t[${letter(t + 1)}] = −ln ${number(forward.p[t][ids[t + 1]])} = ${number(forward.losses[t])} nats`),
      ];
    },
  })),
  {
    title: "Losses", equation: "L = Σ_t L_t", ahead: T - 1,
    note: `Guessing every letter alike would cost T ln V = ${number(T * Math.log(letters.length))} nats.`,
    numbers: () => [
      vectors(forward.losses.map((_, t) => `t = ${t + 1}: ${letter(t)} → ${letter(t + 1)}`), [["p_t[target]", forward.p.map((p, t) => p[ids[t + 1]])], ["L_t", forward.losses]]),
      line(`L = ${number(update.loss_before)} nats`),
    ],
  },
  ...Array.from({ length: T }, (_, i) => T - 1 - i).map((t) => ({
    title: `Backward, t = ${t + 1}: ${letter(t)} → ${letter(t + 1)}`, ahead: T - 1, behind: t,
    equation: "∂y_t = p_t − target,  ∂h_t = W_hyᵀ ∂y_t + W_hhᵀ ∂a_{t+1},  ∂a_t = ∂h_t ⊙ (1 − h_t²)",
    note: t === T - 1 ? "The last step: no later step sends anything." : `What arrives from t = ${t + 2} carries the losses of all later steps.`,
    numbers: () => {
      const step = backward.steps[t];
      const before = t ? forward.h[t - 1] : units.map(() => 0);
      const sum = (name) => backward.steps.slice(t).map((s) => s[name]).reduce(plus);
      const next = t ? backward.steps[t - 1].later : null;
      return [
        beside(
          vectors(letters, [["p_t", forward.p[t]], ["target", oneHot(ids[t + 1])], ["∂y_t", step.y]], ids[t + 1]),
          vectors(units, [["W_hyᵀ ∂y_t", step.own], ["from later", step.later], ["∂h_t", step.h], ["1 − h_t²", forward.h[t].map((h) => 1 - h * h)], ["∂a_t", step.a],
            ...(next ? [["W_hhᵀ ∂a_t", next]] : [])])),
        heading("This step's part of the gradient"),
        beside(
          matrix("∂a_t x_tᵀ", step.xh, units, letters, (_, v) => v === ids[t]), matrix("∂a_t h_{t−1}ᵀ", step.hh, units, units), matrix("∂y_t h_tᵀ", step.hy, letters, units),
          vectors(units, [["h_{t−1}", before], ["h_t", forward.h[t]]])),
        heading(`The sum so far, t = ${T} … ${t + 1}`),
        beside(matrix("∂L/∂W_xh", sum("xh"), units, letters), matrix("∂L/∂W_hh", sum("hh"), units, units), matrix("∂L/∂W_hy", sum("hy"), letters, units)),
      ];
    },
  })),
  {
    title: "The same gradient, loss by loss", equation: "∂L/∂W_hh = Σ_t ∂L_t/∂W_hh", ahead: T - 1, behind: 0,
    note: `Each loss sent back on its own; their sum, the one pass above and torch.autograd differ by at most ${backward.discrepancy.toExponential(0).replace("-", "−")}, which is rounding.`,
    numbers: () => [
      beside(...backward.per_loss.map((values, t) => matrix(`∂L_${t + 1}/∂W_hh`, values, units, units))),
      beside(matrix("Σ_t ∂L_t/∂W_hh", backward.per_loss.reduce(plus), units, units), matrix("torch.autograd", backward.autograd, units, units)),
      heading("How far each loss reaches back: ‖∂L_t/∂h_k‖"),
      line("Each step to the left multiplies by W_hhᵀ diag(1 − h_k²): this is where gradients vanish or explode."),
      vectors(backward.reach.map((_, t) => `L_${t + 1}`), backward.reach.map((_, k) => [`k = ${k + 1}`, backward.reach.map((row, t) => (k <= t ? row[k] : ""))])),
    ],
  },
  {
    title: "Clipping", equation: "g ← g · min(1, c/‖g‖)", ahead: T - 1, behind: 0,
    note: clipping(),
    numbers: () => {
      const before = { xh: backward.gradient.xh, hh: backward.gradient.hh, hy: backward.gradient.hy };
      return [
        line(`‖g‖ = ${number(update.norm)} over W_xh, W_hh and W_hy together; scale = ${number(update.scale)}`),
        heading("g before"), beside(...threeMatrices("∂L/∂W", before)), heading("g after"), beside(...threeMatrices("g", update.gradient)),
      ];
    },
  },
  {
    title: "Update", equation: `W ← W − η g,  learning rate η = ${descent.learning_rate}`, ahead: T - 1, behind: 0,
    note: `One step of gradient descent: the loss goes from ${number(update.loss_before)} to ${number(update.loss_after)} nats.`,
    numbers: () => [heading("W"), beside(...threeMatrices("W", weights)), heading("g"), beside(...threeMatrices("g", update.gradient)), heading("W − η g"), beside(...threeMatrices("new W", update.weights))],
  },
  {
    title: "Training", equation: "the same update again, until the network spells the word", ahead: T - 1, behind: 0,
    note: spelledText(),
    numbers: () => {
      const host = make("div", {}), shown = training.shown;
      queueMicrotask(() => new Curves(host, () => ({
        series: [{ name: "L", values: training.losses, colour: colourOf("one") }, { name: "‖g‖", values: training.norms, colour: colourOf("two") }],
        lines: descent.clip ? [{ value: descent.clip, name: "clip" }] : [], x: "updates", label: `Loss and gradient norm over ${training.losses.length - 1} updates`,
      })));
      const rows = shown.map((i) => String(i));
      const table = vectors(rows, [["L", shown.map((i) => training.losses[i])], ["‖g‖", shown.map((i) => training.norms[i])], ["spells", training.spelled]]);
      return [make("div", {}, host), heading("After some updates"), table];
    },
  },
];

function threeMatrices(name, values) {
  return [matrix(`${name}_xh`, values.xh, units, letters), matrix(`${name}_hh`, values.hh, units, units), matrix(`${name}_hy`, values.hy, letters, units)];
}

function clipping() {
  if (!descent.clip) return "Clipping is off (--clip 0).";
  return update.scale < 1 ? `‖g‖ is above c = ${descent.clip}: g is scaled down, its direction kept.` : `‖g‖ is at most c = ${descent.clip}: g is left as it is.`;
}

function spelledText() {
  const count = training.losses.length - 1;
  return training.is_spelled ? `It spells ${word} after ${count} updates.` : `It doesn't spell ${word} after ${count} updates: try a larger --hidden or another --seed.`;
}

/** Draw the network over time; what a stage looks at is coloured, and so is how far it has come. */
function drawNetwork({ ahead = -1, behind = T }) {
  const step = 104, left = 26, cell = Math.min(14, 60 / H), middle = 96, width = left + T * step + 20;
  const root = svg("svg", { width, height: 196, viewBox: `0 0 ${width} 196`, "aria-hidden": "true" });
  const arrow = (x1, y1, x2, y2, kind) => {
    const length = Math.hypot(x2 - x1, y2 - y1), [dx, dy] = [(x2 - x1) / length, (y2 - y1) / length];
    root.append(svg("line", { class: `arrow ${kind}`, x1, y1, x2: x2 - 4 * dx, y2: y2 - 4 * dy }));
    root.append(svg("polygon", { class: `head ${kind}`, points: `${x2},${y2} ${x2 - 8 * dx + 4 * dy},${y2 - 8 * dy - 4 * dx} ${x2 - 8 * dx - 4 * dy},${y2 - 8 * dy + 4 * dx}` }));
  };
  for (let t = 0; t < T; t++) {
    const x = left + t * step + 34, half = Math.max((H * cell) / 2, 8), isBack = t >= behind;
    const kind = t === behind || (behind === T && t === ahead) ? "now" : t <= ahead ? "done" : "";
    root.append(svg("text", { class: `letter ${kind}`, x, y: 186 }, letter(t)));
    root.append(svg("text", { class: `letter ${kind}`, x, y: 22 }, letter(t + 1)));
    if (t <= ahead) root.append(svg("text", { class: "small", x, y: 40 }, `p ${number(forward.p[t][ids[t + 1]])}`));
    arrow(x, 166, x, middle + 14, kind);
    arrow(x, middle - 14, x, 46, kind);
    for (let j = 0; j < H; j++) {
      const box = svg("rect", { class: "unit", x: x - half + j * cell, y: middle - 9, width: cell, height: 18 });
      if (t <= ahead) box.style.fill = `rgb(${rampColour((forward.h[t][j] + 1) / 2, true).join(" ")})`;
      root.append(box);
    }
    if (t < T - 1) {
      const next = x + step;
      arrow(x + half + 4, middle - 5, next - half - 4, middle - 5, t < ahead ? "done" : "");
      if (t >= behind - 1 && behind < T) {
        arrow(next - half - 4, middle + 6, x + half + 4, middle + 6, t >= behind ? "back" : "back next");
      }
    }
    if (isBack) {
      const size = Math.sqrt(backward.steps[t].h.reduce((sum, v) => sum + v * v, 0));
      root.append(svg("text", { class: "small gradient", x: x + 6, y: 142, "text-anchor": "start" }, `‖∂h‖ ${number(size)}`));
    }
  }
  const host = byId("network"), at = behind < T ? behind : Math.max(ahead, 0);
  host.replaceChildren(root);
  host.setAttribute("aria-label", `${word}, unrolled over ${T} steps; forward done to step ${ahead + 1}${behind < T ? `, backward to step ${behind + 1}` : ""}`);
  host.scrollLeft = at * step - host.clientWidth / 2;
}

let stage = 0;

function show(to) {
  stage = Math.min(Math.max(to, 0), stages.length - 1);
  const { title, equation, note, numbers } = stages[stage];
  byId("stage-title").textContent = title;
  byId("equation").textContent = equation;
  byId("note").textContent = note;
  byId("numbers").replaceChildren(...numbers());
  byId("where").textContent = `${stage + 1} of ${stages.length}`;
  byId("stage").value = stage;
  byId("stage").setAttribute("aria-valuetext", `${stage + 1} of ${stages.length}: ${title}`);
  for (const id of ["first", "back"]) byId(id).disabled = stage === 0;
  for (const id of ["last", "forward"]) byId(id).disabled = stage === stages.length - 1;
  drawNetwork(stages[stage]);
}

byId("subject").textContent = `throughtime explain · one-hot RNN, H = ${H}, V = ${letters.length}`;
byId("word").textContent = data.given > ids.length ? `${word} (the first ${ids.length} of ${data.given} letters)` : word;
byId("stage").max = stages.length - 1;
byId("first").addEventListener("click", () => show(0));
byId("back").addEventListener("click", () => show(stage - 1));
byId("forward").addEventListener("click", () => show(stage + 1));
byId("last").addEventListener("click", () => show(stages.length - 1));
byId("stage").addEventListener("input", () => show(Number(byId("stage").value)));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, .chart") || event.altKey || event.ctrlKey || event.metaKey) return;
  const to = { ArrowLeft: stage - 1, ArrowRight: stage + 1, Home: 0, End: stages.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  show(to);
});
dark.addEventListener("change", () => show(stage));
show(0);
