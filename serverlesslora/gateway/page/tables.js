// Functions, workers, memory and the ladder: what is where, and what it took to get there.

import { byId, el, KeyedTable, setHidden, setText } from "./elements.js";
import { age, bytes, count, counted, money, percent, seconds } from "./numbers.js";

const ROWS = 100; // a page is read by people; who looks for one of a thousand filters
const STATES = { hot: 0, disk: 1, cold: 2 };
const STATE_HINTS = {
  hot: "its adapter is loaded in a worker that serves",
  disk: "its worker serves; the adapter is read with the next request",
  cold: "no worker; the next request starts one",
};
const RUNGS = [
  ["hot", "nothing was missing"],
  ["adapter-ram", "adapter from host memory"],
  ["adapter-disk", "adapter from disk"],
  ["worker", "a worker was started"],
  ["backbone", "the backbone was loaded"],
  ["remote", "fetched from elsewhere first"],
];
const KINDS = [
  ["backbone", "Backbone"],
  ["worker", "Workers"],
  ["adapter", "Adapters"],
  ["kv", "KV cache"],
  ["process", "Server processes"],
  ["shared", "Libraries and shared pages"],
];
// "demo/launcher:4711" is the launcher, whatever its number.
const nameOf = (part) => part.name.slice(part.name.indexOf("/") + 1).replace(/:\d+$/, "");
const afterSlash = (domain, backbone) => (domain.startsWith(`${backbone}/`) ? domain.slice(backbone.length + 1) : domain);

export class Functions {
  constructor(onChoose) {
    const button = (item) => {
      const made = el("button", { class: "link", type: "button", title: "Try it in the playground", onclick: () => onChoose(item().name) });
      made.append(item().name);
      return made;
    };
    const number = "number";
    this.table = new KeyedTable(
      byId("functions"),
      [
        { title: "Function", heading: true, cell: button },
        { title: "State", class: "state", text: (f) => f.state, state: (f) => f.state, hint: (f) => STATE_HINTS[f.state] },
        { title: "Version", class: "optional", text: (f) => f.version ?? "–" },
        { title: "Tenant", class: "optional name", text: (f) => f.tenant ?? "–" },
        { title: "Open", class: "number optional", text: (f) => count(f.open_requests ?? 0) },
        { title: "Requests", class: number, text: (f) => (f.requests === null ? "–" : count(f.requests ?? 0)) },
        { title: "TTFT p50", class: number, text: (f) => seconds(f.ttft_p50) },
        { title: "p95", class: "number optional", text: (f) => seconds(f.ttft_p95) },
        { title: "Cost", class: "number optional", text: (f) => (f.requests === null ? "–" : money(f.cost ?? 0, this.currency)) },
      ],
      "Functions, their state and their last hour",
    );
    byId("filter").addEventListener("input", () => this.draw());
  }

  show(data) {
    this.all = data.functions.toSorted(
      (a, b) => STATES[a.state] - STATES[b.state] || (b.requests ?? 0) - (a.requests ?? 0) || (a.name < b.name ? -1 : 1),
    );
    this.currency = data.currency;
    this.draw();
  }

  draw() {
    if (!this.all) return;
    const wanted = byId("filter").value.trim().toLowerCase();
    const found = wanted ? this.all.filter((f) => `${f.name} ${f.tenant ?? ""}`.toLowerCase().includes(wanted)) : this.all;
    this.table.show(found.slice(0, ROWS), (f) => f.name);
    const counts = Object.keys(STATES).map((state) => [state, this.all.filter((f) => f.state === state).length]);
    setText(byId("states"), counts.filter(([, n]) => n).map(([state, n]) => `${count(n)} ${state}`).join(" · "));
    const hidden = found.length - ROWS;
    setText(
      byId("functions-more"),
      this.all.length === 0
        ? "Nothing is deployed yet: serverlesslora deploy NAME ./adapter"
        : found.length === 0
          ? `No function matches “${wanted}”.`
          : hidden > 0
            ? `${counted(hidden, "function", "functions")} more: filter to find them.`
            : "",
    );
    setHidden(byId("filter"), this.all.length < 8);
  }
}

export class Workers {
  constructor() {
    this.table = new KeyedTable(
      byId("workers"),
      [
        { title: "Domain", heading: true, class: "name", text: (w) => afterSlash(w.domain, w.backbone), hint: (w) => w.worker_id },
        { title: "State", class: "state", text: (w) => w.state, state: (w) => w.state },
        { title: "Backbone", class: "optional name", text: (w) => w.backbone },
        { title: "Device", class: "optional", text: (w) => w.device },
        { title: "Adapters", class: "names optional", text: (w) => w.functions.join(", ") || "–" },
        { title: "Open", class: "number", text: (w) => count(w.open_requests) },
        { title: "KV used", class: "number optional", text: (w) => percent(w.kv_usage) },
        { title: "Memory", class: "number", text: (w) => (w.size_bytes ? bytes(w.size_bytes) : "–"), hint: (w) => `of it KV ${bytes(w.kv_bytes)}, adapters ${bytes(w.adapter_bytes)}` },
        { title: "Idle", class: "number optional", text: (w) => (w.open_requests ? "busy" : age(w.idle_s)) },
        { title: "Age", class: "number optional", text: (w) => age(w.age_s) },
        { title: "PID", class: "number optional", text: (w) => (w.pid === null ? "–" : String(w.pid)) },
      ],
      "Worker processes",
    );
  }

  show(data) {
    this.table.show(data.workers, (w) => w.worker_id);
    const note = data.workers.length ? counted(data.workers.length, "process", "processes") : "none: the next request starts one";
    setText(byId("workers-sum"), note);
    const backbones = data.server?.backbones ?? [];
    const key = JSON.stringify(backbones);
    if (key === this.backbones) return;
    this.backbones = key;
    byId("backbones").replaceChildren(
      ...backbones.map((b) => {
        const facts = [b.device, b.sharing, b.size_bytes ? bytes(b.size_bytes) : null, `mapped by ${counted(b.workers, "worker", "workers")}`];
        return el("li", { "data-state": b.state }, el("b", {}, b.name), ` ${b.state} `, el("span", { class: "quiet" }, facts.filter(Boolean).join(" · ")));
      }),
    );
  }
}

export function showOverview(data) {
  const { hour, server } = data;
  const colds = Object.entries(hour.colds).filter(([rung]) => rung !== "hot").reduce((sum, [, [n]]) => sum + n, 0);
  const started = Object.values(hour.colds).reduce((sum, [n]) => sum + n, 0);
  const states = data.functions.reduce((n, f) => n + (f.state === "hot"), 0);
  const tiles = [
    ["Functions", count(data.functions.length), `${count(states)} hot`],
    ["Requests", count(hour.requests), server ? `${count(server.running)} running, ${count(server.waiting)} waiting` : ""],
    ["Errors", count(hour.errors), hour.requests ? percent(hour.errors / hour.requests) : "", hour.errors ? "bad" : null],
    ["First token p50", seconds(hour.ttft_p50), `p95 ${seconds(hour.ttft_p95)}`],
    ["Cold starts", count(colds), started ? `${percent(colds / started)} of requests` : ""],
    ["Output", `${count(hour.tokens)}`, "tokens"],
    ["Cost", money(hour.cost, data.currency), "device and memory"],
  ];
  const key = JSON.stringify(tiles);
  const place = byId("overview");
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  place.replaceChildren(
    ...tiles.map(([name, value, more, state]) =>
      el("div", { "data-state": state }, el("dt", {}, name), el("dd", {}, value), el("dd", { class: "quiet" }, more || " ")),
    ),
  );
}

export function showLadder(data) {
  const colds = data.hour.colds;
  const key = JSON.stringify(colds);
  const place = byId("ladder");
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  const most = Math.max(0, ...Object.values(colds).map(([n]) => n));
  if (!most) {
    place.replaceChildren(el("p", { class: "empty" }, "No request in the last hour. Ask something: the first one shows what a cold start takes."));
    return;
  }
  const lines = RUNGS.map(([rung, meaning]) => {
    const [n, median] = colds[rung] ?? [0, null];
    const bar = el("span", { class: `bar rung-${rung}` });
    bar.style.width = `${(100 * n) / most}%`;
    return el(
      "tr",
      { class: n ? null : "none", title: meaning },
      el("th", { scope: "row" }, rung),
      el("td", { class: "track" }, bar),
      el("td", { class: "number" }, count(n)),
      el("td", { class: "number" }, rung === "hot" ? "–" : seconds(median)),
    );
  });
  const heads = ["Rung", "", "Requests", "Median"].map((title) => el("th", { scope: "col", class: title === "Rung" || !title ? null : "number" }, title));
  place.replaceChildren(el("table", { class: "ladder" }, el("caption", { class: "unseen" }, "Requests by the rung they met"), el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...lines)));
}

export function showMemory(data) {
  setHidden(byId("memory-panel"), !data.server);
  if (!data.server) return;
  const { capacity_bytes: capacity, parts, measured_bytes: measured } = data.server.memory;
  const place = byId("memory");
  const width = place.clientWidth;
  const { backbones } = data.server;
  const key = JSON.stringify([capacity, parts, measured, width, backbones.map((b) => b.workers)]);
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  const held = parts.reduce((sum, part) => sum + part.size_bytes, 0);
  setText(byId("memory-sum"), held ? `${bytes(held)} of ${bytes(capacity)}, ${percent(held / capacity)}` : "");
  if (!held) {
    place.replaceChildren(el("p", { class: "empty" }, "Nothing is loaded yet."));
    return;
  }
  const used = el("span", {});
  used.style.width = `${Math.min(100, (100 * held) / capacity)}%`;
  const budget = el("div", { class: "budget", role: "img", "aria-label": `${percent(held / capacity)} of the budget is used` }, used);
  const map = el("div", { class: "map", "aria-hidden": "true" });
  const legend = el("ul", { class: "map-legend" });
  for (const [kind, title] of KINDS) {
    const mine = parts.filter((part) => part.kind === kind).sort((a, b) => b.size_bytes - a.size_bytes);
    const size = mine.reduce((sum, part) => sum + part.size_bytes, 0);
    if (!size) continue;
    const group = el("div", { class: `group ${kind}` });
    group.style.flexGrow = size;
    const copies = backbones.reduce((sum, b) => sum + b.workers, 0);
    const note = kind === "backbone" ? `one copy ${mine.length > 1 ? "each" : "for all"}, mapped by ${counted(copies, "worker", "workers")}` : counted(mine.length, "piece", "pieces");
    const isTiny = (width * size) / held < 4 * mine.length; // pixels; the group is drawn as one
    for (const part of kind === "backbone" || !isTiny ? mine : [{ name: note, size_bytes: size }]) {
      const piece = el("div", { class: "piece", title: `${title}: ${part.name}, ${bytes(part.size_bytes)}` });
      piece.style.flexGrow = part.size_bytes;
      const sharers = backbones.find((b) => kind === "backbone" && b.name === part.name)?.workers;
      if (kind === "backbone") piece.append(el("b", {}, `${nameOf(part)}, ${bytes(part.size_bytes)}`), el("span", {}, `shared by ${counted(sharers ?? 0, "worker", "workers")}`));
      else if ((width * part.size_bytes) / held > 74) piece.append(el("b", {}, nameOf(part)), el("span", {}, bytes(part.size_bytes)));
      group.append(piece);
    }
    map.append(group);
    legend.append(el("li", {}, el("i", { class: `swatch ${kind}` }), `${title} `, el("b", {}, bytes(size)), el("span", { class: "quiet" }, note)));
  }
  const kernel = measured ? el("p", { class: "quiet" }, `The kernel counts ${bytes(measured)}.`) : null;
  place.replaceChildren(...[budget, map, legend, kernel].filter(Boolean));
}
