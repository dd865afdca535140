"use strict";
// Charts: curves in SVG, matrices on a canvas. They take their colours from the page's style, so that light and dark both work.

const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  light: ["#f3f6fa", "#c3d8ef", "#7fb0e0", "#2f72ba", "#0d3566"],
  dark: ["#20262d", "#1f4670", "#2f74bd", "#79b0f2", "#e2effd"],
  divergingLight: ["#b9530f", "#eeb288", "#f5f3ef", "#9cc2ea", "#2563a8"],
  divergingDark: ["#f0a066", "#8a5228", "#2b2a27", "#2b5c94", "#79b0f2"],
};

/** Return [r, g, b] for a share 0 … 1 of the way along a ramp; `diverging` has its neutral in the middle. */
function rampColour(share, diverging = false) {
  const stops = RAMPS[diverging ? (dark.matches ? "divergingDark" : "divergingLight") : dark.matches ? "dark" : "light"];
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const left = Math.min(Math.floor(place), stops.length - 2);
  const channel = (colour, at) => parseInt(colour.slice(1 + 2 * at, 3 + 2 * at), 16);
  return [0, 1, 2].map((at) => Math.round(channel(stops[left], at) + (channel(stops[left + 1], at) - channel(stops[left], at)) * (place - left)));
}

/** Paint an element, and choose an ink that can be read on it. */
function paint(element, colour) {
  const [r, g, b] = colour.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  element.style.background = `rgb(${colour.join(" ")})`;
  element.style.color = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff"; // each 4.5 : 1 or better
}

/** Draw a ramp from left to right on a small canvas. */
function drawRamp(canvas, diverging = false) {
  canvas.width = 128;
  canvas.height = 1;
  const pixels = new ImageData(128, 1);
  for (let x = 0; x < 128; x++) pixels.data.set([...rampColour(x / 127, diverging), 255], 4 * x);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Three significant digits, powers of ten where zeros would hide them. */
function figure(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1).replace("-", "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

function powerOfTen(exponent) {
  const digits = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return exponent === 0 ? "1" : "10" + [...String(exponent)].map((d) => digits[d]).join("");
}

function niceStep(span, count) {
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
}

/** Run a drawing now, and again when its place changes width or the colours change. */
function redrawn(host, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth !== width) {
      width = host.clientWidth;
      draw();
    }
  }).observe(host);
  dark.addEventListener("change", draw);
}

/**
 * A chart of curves over 0 … n − 1, or from `first`.
 *
 * `host` is an element; the chart is put into it, and can be read point by point with the pointer or the arrow keys.
 * `describe()` returns {series: [{name, values, colour, dashed, dots}], log, x, first, lines: [{value, name}], band: {low, high, colour}, label}.
 */
class Curves {
  constructor(host, describe) {
    this.host = host;
    this.describe = describe;
    this.at = null;
    this.readout = document.createElement("output");
    this.readout.className = "readout";
    this.readout.setAttribute("aria-live", "polite");
    this.legend = document.createElement("div");
    this.legend.className = "legend";
    host.classList.add("chart");
    host.tabIndex = 0;
    host.setAttribute("role", "img");
    host.after(this.legend, this.readout);
    host.addEventListener("pointermove", (event) => this.read(this.indexAt(event.clientX)));
    host.addEventListener("pointerdown", (event) => this.read(this.indexAt(event.clientX)));
    host.addEventListener("keydown", (event) => this.key(event));
    redrawn(host, () => this.draw());
    this.draw();
  }

  key(event) {
    const end = this.count - 1, at = this.at ?? 0;
    const to = { ArrowLeft: at - 1, ArrowRight: at + (this.at !== null), Home: 0, End: end, PageUp: at - 10, PageDown: at + 10 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.read(Math.min(Math.max(to, 0), end));
  }

  indexAt(clientX) {
    const box = this.host.getBoundingClientRect();
    const share = (clientX - box.left - this.left) / (box.width - this.left - this.right);
    return Math.min(Math.max(Math.round(share * (this.count - 1)), 0), this.count - 1);
  }

  read(index) {
    const { series, x, first = 0 } = this.about;
    this.at = index;
    const values = series.map((s) => `${s.name} ${figure(s.values[index] ?? null)}`);
    this.readout.textContent = `${x} ${index + first}: ${values.join(", ")}`;
    this.crosshair.setAttribute("x1", this.xOf(index));
    this.crosshair.setAttribute("x2", this.xOf(index));
    this.crosshair.setAttribute("visibility", "visible");
  }

  draw() {
    const about = (this.about = this.describe());
    const { series, log, x, first = 0, lines = [], band } = about;
    this.count = Math.max(2, ...series.map((s) => s.values.length));
    const width = Math.max(this.host.clientWidth, 240), height = about.height ?? 230;
    this.left = 52;
    this.right = 12;
    const top = 10, bottom = 34;
    const usable = (v) => Number.isFinite(v) && (!log || v > 0);
    const scale = (v) => (log ? Math.log10(v) : v);
    const all = [...series.flatMap((s) => [...s.values]), ...(band ? [...band.low, ...band.high] : [])].filter(usable).map(scale);
    let low = Math.min(...all, ...lines.map((l) => scale(l.value))), high = Math.max(...all, ...lines.map((l) => scale(l.value)));
    if (!Number.isFinite(low)) [low, high] = [0, 1];
    if (log) {
      high = Math.ceil(high - 1e-9);
      low = Math.max(Math.floor(low), high - (about.decades ?? 12));
      if (high - low < 1) low = high - 1;
    } else if (high - low < 1e-9) {
      [low, high] = [low - 0.5, high + 0.5];
    } else {
      const margin = 0.05 * (high - low);
      [low, high] = [low - margin, high + margin];
    }
    this.xOf = (i) => this.left + (i / (this.count - 1)) * (width - this.left - this.right);
    const yOf = (v) => top + ((high - Math.min(Math.max(scale(v), low), high)) / (high - low)) * (height - top - bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });

    const step = log ? Math.max(1, Math.ceil((high - low) / 6)) : niceStep(high - low, 5);
    for (let v = log ? high : Math.ceil(low / step) * step; log ? v >= low - 1e-9 : v <= high; v += log ? -step : step) {
      const value = log ? 10 ** v : v;
      root.append(svg("line", { class: "grid", x1: this.left, x2: width - this.right, y1: yOf(value), y2: yOf(value) }));
      root.append(svg("text", { x: this.left - 7, y: yOf(value) + 4, "text-anchor": "end" }, log ? powerOfTen(Math.round(v)) : figure(Number(v.toFixed(9)))));
    }
    const every = Math.max(1, niceStep(this.count - 1, Math.max(2, Math.min(8, width / 80))));
    for (let i = 0; i < this.count; i += every) {
      root.append(svg("text", { x: this.xOf(i), y: height - bottom + 16, "text-anchor": "middle" }, String(i + first)));
    }
    root.append(svg("text", { x: width - this.right, y: height - 4, "text-anchor": "end" }, x));
    for (const line of lines) {
      root.append(svg("line", { class: "axis", x1: this.left, x2: width - this.right, y1: yOf(line.value), y2: yOf(line.value), "stroke-dasharray": "2 4" }));
      root.append(svg("text", { x: width - this.right - 2, y: yOf(line.value) - 5, "text-anchor": "end" }, line.name));
    }
    if (band) {
      const points = (values) => values.map((v, i) => (usable(v) ? `${this.xOf(i)},${yOf(v)}` : null));
      const outline = [...points(band.high), ...points(band.low).reverse()].filter(Boolean);
      root.append(svg("polygon", { points: outline.join(" "), fill: band.colour, "fill-opacity": 0.16 }));
    }
    for (const { values, colour, dashed, dots } of series) {
      const isSeen = (v) => usable(v) && scale(v) >= low; // below the axis a curve ends where it meets it
      const at = (v, i) => `${this.xOf(i).toFixed(1)},${yOf(v).toFixed(1)}`;
      const points = [...values].map((v, i) => (isSeen(v) || (usable(v) && (isSeen(values[i - 1]) || isSeen(values[i + 1]))) ? at(v, i) : " "));
      for (const part of points.join(" ").split(/ {2,}/).filter(Boolean)) {
        root.append(svg("polyline", { class: "series", points: part.trim(), stroke: colour, "stroke-dasharray": dashed ? "5 4" : "none" }));
      }
      for (const point of dots ? points.filter((p) => p !== " ") : []) {
        const [cx, cy] = point.split(",");
        root.append(svg("circle", { cx, cy, r: 3.5, fill: colour }));
      }
    }
    this.crosshair = svg("line", { class: "crosshair", x1: 0, x2: 0, y1: top, y2: height - bottom, visibility: "hidden" });
    root.append(this.crosshair);
    this.host.replaceChildren(root);
    this.host.setAttribute("aria-label", `${about.label}. Arrow keys read it point by point.`);
    this.legend.replaceChildren(
      ...(series.length > 1 ? series : []).map(({ name, colour, dashed }) => {
        const entry = document.createElement("span"), mark = document.createElement("i");
        mark.style.borderTopColor = colour;
        mark.style.borderTopStyle = dashed ? "dashed" : "solid";
        entry.append(mark, name);
        return entry;
      }),
    );
    if (this.at !== null) this.read(Math.min(this.at, this.count - 1));
  }
}

/**
 * A matrix on a canvas, a pixel for each entry.
 *
 * `describe()` returns {rows, columns, share(row, column) → 0 … 1 or null, text(row, column), label, height, diverging}.
 */
class HeatMap {
  constructor(host, describe) {
    this.host = host;
    this.describe = describe;
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("aria-hidden", "true");
    this.readout = document.createElement("output");
    this.readout.className = "readout";
    this.readout.setAttribute("aria-live", "polite");
    this.cursor = null;
    host.classList.add("chart");
    host.tabIndex = 0;
    host.setAttribute("role", "img");
    host.append(this.canvas);
    host.after(this.readout);
    const follow = (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.read((event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
    };
    host.addEventListener("pointermove", follow);
    host.addEventListener("pointerdown", follow);
    host.addEventListener("keydown", (event) => this.key(event));
    redrawn(host, () => this.draw());
    this.draw();
  }

  key(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [row, column] = this.cursor ?? [this.about.rows - 1, this.about.columns - 1];
    this.read((row + move[0] + 0.5) / this.about.rows, (column + move[1] + 0.5) / this.about.columns);
  }

  read(down, right) {
    const { rows, columns, text } = this.about;
    const row = Math.min(Math.max(Math.floor(down * rows), 0), rows - 1);
    const column = Math.min(Math.max(Math.floor(right * columns), 0), columns - 1);
    this.cursor = [row, column];
    this.readout.textContent = text(row, column);
  }

  draw() {
    const { rows, columns, share, label, height = 230, diverging } = (this.about = this.describe());
    const pixels = new ImageData(columns, rows);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const value = share(row, column);
        if (value !== null) pixels.data.set([...rampColour(value, diverging), 255], 4 * (row * columns + column));
      }
    }
    const source = new OffscreenCanvas(columns, rows);
    source.getContext("2d").putImageData(pixels, 0, 0);
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(Math.max(this.host.clientWidth, 200) * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(source, 0, 0, this.canvas.width, this.canvas.height);
    this.host.setAttribute("aria-label", `${label}. Arrow keys read it entry by entry.`);
  }
}

/** Return the colour that a name has in the page's style. */
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Make an element with a text, or with children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The page's data: JSON beside the scripts, arrays in it as base64. */
const data = JSON.parse(document.getElementById("data").textContent);

/** Return the bytes of a packed array. */
const unpacked = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
