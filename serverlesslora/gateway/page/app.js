// Asks the server every second how it is, and shows it; says so when nobody answers.

import { Chart, logarithmic, windowOf } from "./charts.js";
import { byId, setHidden, setText } from "./elements.js";
import { age, count, money, seconds } from "./numbers.js";
import { Playground } from "./playground.js";
import { Functions, showLadder, showMemory, showOverview, Workers } from "./tables.js";

const EVERY_MS = 1000;
const HIDDEN_MS = 15000; // nobody looks
const SLOWEST_MS = 15000;
const PATIENCE_MS = 8000;
const KEY = "serverlesslora-key";

let currency = "";
let failures = 0;
let timer = 0;
let heardAt = null; // of this computer's clock, ms
let retryAt = 0;

const key = () => sessionStorage.getItem(KEY);
const headers = () => (key() ? { authorization: `Bearer ${key()}` } : {});

const playground = new Playground(headers, () => soon(0));
const functions = new Functions((name) => playground.choose(name));
const workers = new Workers();
const nothing = "No request in the last hour.";
const charts = {
  ttft: new Chart(byId("ttft-chart"), {
    label: "Time to first token",
    scale: logarithmic,
    series: [{ name: "p95", color: "second" }, { name: "p50", color: "first" }],
    format: seconds,
    empty: `${nothing} Times appear with the first one.`,
  }),
  cost: new Chart(byId("cost-chart"), {
    label: "Cost so far",
    series: [{ name: "so far", color: "first", area: true, joins: Infinity }],
    format: (value) => money(value, currency),
    empty: "Nothing was spent in the last hour. Memory is added once a minute.",
  }),
  requests: new Chart(byId("requests-chart"), {
    label: "Requests per minute",
    series: [{ name: "per minute", color: "first", bars: 60 }, { name: "errors", color: "bad", bars: 60 }],
    format: count,
    empty: `${nothing} Send one from the playground.`,
  }),
};

function showCharts(data) {
  const { history } = data;
  const window = windowOf(data);
  charts.ttft.show(history.at.map((at, i) => ({ at, values: [history.ttft_p95[i], history.ttft_p50[i]] })), window);
  let sum = 0;
  const costs = history.at.map((at, i) => ({ at, values: [(sum += history.cost[i])] }));
  charts.cost.show(sum > 0 ? costs : [], window);
  const minutes = new Map();
  history.at.forEach((at, i) => {
    const minute = Math.floor(at / 60) * 60;
    const [all, bad] = minutes.get(minute) ?? [0, 0];
    minutes.set(minute, [all + history.requests[i], bad + history.errors[i]]);
  });
  const bars = [...minutes].map(([at, values]) => ({ at, values }));
  charts.requests.show(bars.some((bar) => bar.values[0]) ? bars : [], window);
}

function show(data) {
  currency = data.currency;
  setText(byId("version"), data.version);
  setHidden(byId("scope"), data.tenant === null);
  setText(byId("scope"), data.tenant === null ? "" : `tenant ${data.tenant}`);
  showOverview(data);
  functions.show(data);
  workers.show(data);
  showLadder(data);
  showMemory(data);
  showCharts(data);
  playground.offer(data.functions.map((f) => f.name), data.bases);
}

function connection(state, text) {
  byId("connection").dataset.state = state;
  document.body.dataset.connection = state;
  setText(byId("connection"), text);
}

function askForKey(why) {
  setHidden(byId("content"), true);
  setHidden(byId("key-panel"), false);
  setText(byId("key-error"), why);
  connection("locked", "locked");
}

async function poll() {
  let response, data;
  try {
    response = await fetch("live", { headers: headers(), signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    if (response.status === 401) {
      askForKey(key() ? "This key is not valid (any more)." : "");
      return;
    }
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    data = await response.json();
  } catch (error) {
    failures += 1;
    const wait = Math.min(SLOWEST_MS, EVERY_MS * 2 ** failures);
    retryAt = Date.now() + wait;
    if (!response) tellLost();
    else connection("lost", `Not current: ${error.message}`);
    soon(wait);
    return;
  }
  failures = 0;
  heardAt = Date.now();
  setHidden(byId("key-panel"), true);
  setHidden(byId("content"), false);
  setHidden(byId("forget"), !key());
  connection("live", "live");
  soon(document.hidden ? HIDDEN_MS : EVERY_MS);
  show(data);
}

function tellLost() {
  const since = heardAt === null ? "" : `, last heard ${age((Date.now() - heardAt) / 1000)} ago`;
  connection("lost", `Connection lost${since}; trying again in ${age(Math.max(0, retryAt - Date.now()) / 1000)}`);
}

function soon(wait) {
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  connection("connecting", "connecting …");
  soon(0);
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
document.addEventListener("visibilitychange", () => document.hidden || soon(0));
setInterval(() => {
  if (byId("connection").dataset.state === "lost" && heardAt !== null && failures) tellLost();
}, 1000);
poll();
