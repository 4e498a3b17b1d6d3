// Line and bar charts over the last hour: plain SVG, drawn to the width there is.

import { el, svg } from "./elements.js";
import { clock } from "./numbers.js";

const HEIGHT = 180;
const MARGIN = { left: 8, right: 8, top: 18, bottom: 22 };

// 1, 2 or 5 times a power of ten: at most three lines up to `top`.
function niceStep(top) {
  const raw = top / 3;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= raw);
}

// Lines of the grid, and how a value becomes a height from 0 to 1.
function linear(values) {
  const most = Math.max(...values) || 1;
  const step = niceStep(most);
  const top = Math.ceil(most / step - 1e-9) * step;
  const lines = Array.from({ length: Math.round(top / step) + 1 }, (_, place) => place * step);
  return { lines, height: (value) => value / top };
}

// By powers of ten: a cold start beside a hundred warm ones hides neither.
export function logarithmic(values) {
  const low = Math.floor(Math.log10(Math.max(1e-4, Math.min(...values))));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values, 1e-4))));
  const lines = Array.from({ length: high - low + 1 }, (_, place) => 10 ** (low + place));
  return { lines, height: (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low) };
}

// How much of the hour is shown: all of it, or less while the server is young.
export function windowOf(data) {
  const spanS = Math.min(3600, Math.max(600, Math.ceil(data.up_s / 600) * 600));
  return { from: data.at - spanS, to: data.at };
}

export class Chart {
  // `series`: {name, color, area?, bars?}; `format`: a value with its unit.
  constructor(place, { series, format, empty, label, scale = linear }) {
    Object.assign(this, { place, series, format, empty, label, scale, drawn: "" });
    this.legend = el("p", { class: "legend" });
    this.figure = el("div", { class: "plot" });
    place.append(this.legend, this.figure);
    new ResizeObserver(() => this.draw()).observe(this.figure);
    this.figure.addEventListener("pointermove", (event) => this.point(event));
    this.figure.addEventListener("pointerleave", () => this.point(null));
  }

  // `points`: [{at, values: [one for each series or null]}], oldest first.
  show(points, window) {
    const inside = points.filter((point) => point.at >= window.from - 60);
    this.points = inside;
    this.window = window;
    this.draw();
  }

  draw() {
    if (!this.points) return;
    const values = this.points.flatMap((point) => point.values).filter((value) => value !== null);
    const width = Math.max(200, this.figure.clientWidth);
    const now = JSON.stringify([Math.floor(this.window.to / 10), width, this.points.length, this.points.at(-1)]);
    if (now === this.drawn) return;
    this.drawn = now;
    if (values.length === 0) {
      this.legend.replaceChildren();
      this.figure.replaceChildren(el("p", { class: "empty" }, this.empty));
      return;
    }
    const last = this.points.at(-1);
    this.tell(last);
    const { lines, height } = this.scale(values);
    const { from, to } = this.window;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    this.x = (at) => MARGIN.left + (inner.width * (at - from)) / (to - from);
    const y = (value) => MARGIN.top + inner.height * (1 - height(value));
    const parts = [];
    for (const line of lines) {
      parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(line), y2: y(line) }));
      if (line > 0) parts.push(svg("text", { class: "tick", x: MARGIN.left, y: y(line) - 3 }, this.format(line)));
    }
    const steps = width < 260 || (to - from) % 1200 ? 2 : 4;
    for (let place = 0; place <= steps; place++) {
      const at = from + ((to - from) * place) / steps;
      const anchor = place === 0 ? "start" : place === steps ? "end" : "middle";
      const text = place === steps ? "now" : `−${Math.round((to - at) / 60)} min`;
      parts.push(svg("text", { class: "tick", x: this.x(at), y: HEIGHT - 6, "text-anchor": anchor }, text));
    }
    this.series.forEach((one, index) => parts.push(...(one.bars ? this.bars(one, index, y) : this.line(one, index, y))));
    this.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    const told = this.series.map((one, index) => `${one.name} ${this.valueText(last.values[index])}`).join(", ");
    this.figure.replaceChildren(
      svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${this.label}: ${told}` }, ...parts, this.cursor),
    );
  }

  // Neighbours are joined; what stands alone is a dot.
  line(one, index, y) {
    const runs = [];
    let before = -Infinity;
    for (const point of this.points) {
      const value = point.values[index];
      if (value === null) continue;
      if (!runs.length || point.at - before > (one.joins ?? 65)) runs.push([]);
      runs.at(-1).push([Math.max(MARGIN.left, this.x(point.at)), y(value)]);
      before = point.at;
    }
    const parts = [];
    for (const run of runs) {
      const path = run.map(([x, height]) => `${x.toFixed(1)},${height.toFixed(1)}`);
      if (one.area) parts.push(svg("polygon", { class: `area ${one.color}`, points: [`${run[0][0]},${y(0)}`, ...path, `${run.at(-1)[0]},${y(0)}`].join(" ") }));
      if (run.length > 1) parts.push(svg("polyline", { class: `line ${one.color}`, points: path.join(" ") }));
      const [x, height] = run.at(-1);
      parts.push(svg("circle", { class: `dot ${one.color}`, cx: x, cy: height, r: 2.5 }));
    }
    return parts;
  }

  bars(one, index, y) {
    const width = Math.max(2, this.x(one.bars) - this.x(0) - 1.5);
    const edge = this.x(this.window.to);
    return this.points
      .filter((point) => point.values[index])
      .map((point) => {
        const height = y(0) - y(point.values[index]);
        return svg("rect", { class: `bar ${one.color}`, x: this.x(point.at), y: y(point.values[index]), width: Math.max(2, Math.min(width, edge - this.x(point.at))), height, rx: 1 });
      });
  }

  valueText(value) {
    return value === null || value === undefined ? "–" : this.format(value);
  }

  tell(point, when = "latest") {
    const entries = this.series.map((one, index) =>
      el("span", {}, el("i", { class: `swatch ${one.color}` }), `${one.name} `, el("b", {}, this.valueText(point.values[index]))),
    );
    this.legend.replaceChildren(...entries, el("span", { class: "when" }, when));
  }

  point(event) {
    if (!this.points?.length || !this.cursor) return;
    if (event === null) {
      this.cursor.setAttribute("visibility", "hidden");
      this.tell(this.points.at(-1));
      return;
    }
    const wanted = event.clientX - this.figure.getBoundingClientRect().left;
    const nearest = this.points.reduce((best, point) => (Math.abs(this.x(point.at) - wanted) < Math.abs(this.x(best.at) - wanted) ? point : best));
    this.cursor.setAttribute("visibility", "visible");
    this.cursor.setAttribute("x1", this.x(nearest.at));
    this.cursor.setAttribute("x2", this.x(nearest.at));
    this.tell(nearest, clock(nearest.at));
  }
}
