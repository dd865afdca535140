"use strict";
// RNN and LSTM through time, forward and backward, for one row in float64: the equations of throughtime/cells, gates in the order i f g o.
// A matrix of (rows, columns) is one flat Float64Array.

/** y += W x */
function addProduct(y, weight, x) {
  for (let row = 0, at = 0; row < y.length; row++) {
    let sum = 0;
    for (let column = 0; column < x.length; column++) sum += weight[at++] * x[column];
    y[row] += sum;
  }
}

/** y += Wᵀ x */
function addTransposedProduct(y, weight, x) {
  for (let row = 0, at = 0; row < x.length; row++) {
    for (let column = 0; column < y.length; column++) y[column] += weight[at++] * x[row];
  }
}

/** W += a xᵀ */
function addOuterProduct(weight, a, x) {
  for (let row = 0, at = 0; row < a.length; row++) {
    for (let column = 0; column < x.length; column++) weight[at++] += a[row] * x[column];
  }
}

const sigmoid = (a) => 1 / (1 + Math.exp(-a));

const CELLS = {
  rnn: {
    gates: 1,
    states: 1,
    /** h_t = tanh(a_t) */
    step(a) {
      const h = a.map(Math.tanh);
      return { state: [h], saved: { h } };
    },
    /** ∂a_t = ∂h_t ⊙ (1 − h_t²) */
    stepBackward([gradH], { h }) {
      return { gradA: gradH.map((g, j) => g * (1 - h[j] * h[j])), carried: [null] };
    },
  },
  lstm: {
    gates: 4,
    states: 2,
    /** c_t = f ⊙ c_{t−1} + i ⊙ g,  h_t = o ⊙ tanh(c_t) */
    step(a, [, cBefore]) {
      const size = cBefore.length;
      const part = (gate, f) => Float64Array.from({ length: size }, (_, j) => f(a[gate * size + j]));
      const [i, f, g, o] = [part(0, sigmoid), part(1, sigmoid), part(2, Math.tanh), part(3, sigmoid)];
      const c = cBefore.map((before, j) => f[j] * before + i[j] * g[j]);
      const tanhC = c.map(Math.tanh);
      return { state: [o.map((gate, j) => gate * tanhC[j]), c], saved: { cBefore, i, f, g, o, tanhC } };
    },
    /** ∂c = ∂c_t + ∂h_t ⊙ o ⊙ (1 − tanh²(c_t)); the gates' ∂a from it, and ∂c_{t−1} = ∂c ⊙ f */
    stepBackward([gradH, gradC], { cBefore, i, f, g, o, tanhC }) {
      const size = gradH.length;
      const gradA = new Float64Array(4 * size);
      const carriedC = new Float64Array(size);
      for (let j = 0; j < size; j++) {
        const toC = gradC[j] + gradH[j] * o[j] * (1 - tanhC[j] * tanhC[j]);
        gradA[j] = toC * g[j] * i[j] * (1 - i[j]);
        gradA[size + j] = toC * cBefore[j] * f[j] * (1 - f[j]);
        gradA[2 * size + j] = toC * i[j] * (1 - g[j] * g[j]);
        gradA[3 * size + j] = gradH[j] * tanhC[j] * o[j] * (1 - o[j]);
        carriedC[j] = toC * f[j];
      }
      return { gradA, carried: [null, carriedC] };
    },
  },
};

const norm = (...vectors) => Math.sqrt(vectors.reduce((sum, v) => v.reduce((s, x) => s + x * x, sum), 0));

/**
 * Run a cell over a sequence and carry the losses' gradients back through time.
 *
 * @param name "rnn" or "lstm".
 * @param weights weight_ih (G·H, I), weight_hh (G·H, H), bias_ih and bias_hh (G·H).
 * @param inputs x_t for each step, each (I).
 * @param gradOutputs ∂L_t/∂h_t for each step's own loss, each (H).
 * @returns outputs h_t; states ‖∂L/∂s_t‖ over the whole state, for each step; gradient, of the weights; steps, the norm of each step's part of
 *   ∂L/∂W_hh, which is ‖∂a_t‖ ‖h_{t−1}‖ since that part is an outer product; gradInputs ∂x_t.
 */
function backpropagateThroughTime(name, weights, inputs, gradOutputs) {
  const cell = CELLS[name];
  const size = weights.bias_hh.length / cell.gates;
  let state = Array.from({ length: cell.states }, () => new Float64Array(size));
  const outputs = [], before = [], saved = [];
  for (const x of inputs) {
    const a = weights.bias_ih.map((b, j) => b + weights.bias_hh[j]);
    addProduct(a, weights.weight_ih, x);
    addProduct(a, weights.weight_hh, state[0]);
    before.push(state[0]);
    const result = cell.step(a, state);
    state = result.state;
    saved.push(result.saved);
    outputs.push(state[0]);
  }

  const gradient = {};
  for (const key of Object.keys(weights)) gradient[key] = new Float64Array(weights[key].length);
  const steps = new Float64Array(inputs.length), states = new Float64Array(inputs.length), gradInputs = [];
  let gradState = state.map((part) => new Float64Array(part.length));
  for (let t = inputs.length - 1; t >= 0; t--) {
    gradState[0] = gradState[0].map((g, j) => g + gradOutputs[t][j]); // the step's own loss joins what comes from later steps
    states[t] = norm(...gradState);
    const { gradA, carried } = cell.stepBackward(gradState, saved[t]);
    gradInputs[t] = new Float64Array(inputs[t].length);
    addTransposedProduct(gradInputs[t], weights.weight_ih, gradA);
    addOuterProduct(gradient.weight_ih, gradA, inputs[t]);
    addOuterProduct(gradient.weight_hh, gradA, before[t]);
    for (const bias of [gradient.bias_ih, gradient.bias_hh]) gradA.forEach((g, j) => (bias[j] += g));
    steps[t] = norm(gradA) * norm(before[t]);
    gradState = carried.map((part) => part ?? new Float64Array(size));
    addTransposedProduct(gradState[0], weights.weight_hh, gradA);
  }
  return { outputs, states, gradient, steps, gradInputs };
}

/** A generator of random numbers that gives the same ones every time (mulberry32), normal by Box and Muller. */
function normalNumbers(seed) {
  let s = seed >>> 0;
  const uniform = () => {
    s = (s + 0x6d2b79f5) >>> 0;
    let t = Math.imul(s ^ (s >>> 15), 1 | s);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

/** Return a random orthogonal matrix (size, size), by Gram and Schmidt. */
function orthogonal(size, draw) {
  const rows = [];
  while (rows.length < size) {
    const row = Float64Array.from({ length: size }, draw);
    for (let twice = 0; twice < 2; twice++) {
      for (const other of rows) {
        const along = row.reduce((sum, x, j) => sum + x * other[j], 0);
        row.forEach((x, j) => (row[j] = x - along * other[j]));
      }
    }
    const length = norm(row);
    rows.push(row.map((x) => x / length));
  }
  return Float64Array.from(rows.flatMap((row) => [...row]));
}

/** Draw the weights of a small cell: W_hh orthogonal times `gain`, gate by gate, and a forget gate that opens at σ(forgetBias). */
function drawWeights(name, size, width, gain, forgetBias, seed) {
  const { gates } = CELLS[name];
  const draw = normalNumbers(seed);
  const blocks = Array.from({ length: gates }, () => orthogonal(size, draw));
  const bias = new Float64Array(gates * size);
  if (name === "lstm") bias.fill(forgetBias, size, 2 * size);
  return {
    weight_ih: Float64Array.from({ length: gates * size * width }, () => draw() / Math.sqrt(width) / 2),
    weight_hh: Float64Array.from(blocks.flatMap((block) => [...block]), (w) => w * gain),
    bias_ih: bias,
    bias_hh: new Float64Array(gates * size),
  };
}
