// One request at a time, its answer token by token, and what it took.

import { byId, el, setText } from "./elements.js";
import { count, perSecond, seconds } from "./numbers.js";

// Server-sent events of a response: the text after `data: `, event by event.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

// "worker;dur=51.2, adapter;dur=3.1": the rung of the ladder that was met, and how long the way up took.
function coldOf(response) {
  const [rung, time] = (response.headers.get("x-serverlesslora-cold") ?? "").split(",")[0].split(";dur=");
  return { rung: rung.trim(), seconds: Number(time) / 1000 };
}

async function messageOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

export class Playground {
  constructor(headers, onEnd) {
    Object.assign(this, { headers, onEnd, running: null, names: "" });
    this.model = byId("model");
    this.answer = byId("answer");
    this.prompt = byId("prompt");
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    byId("abort").addEventListener("click", () => this.running?.abort());
    byId("playground").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.ask();
      }
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.running?.abort());
    this.say("", "empty", "The answer appears here.");
  }

  offer(functions, bases) {
    const names = JSON.stringify([functions, bases]);
    if (names === this.names) return;
    this.names = names;
    const chosen = this.model.value;
    const group = (label, all) => (all.length ? el("optgroup", { label }, ...all.map((name) => el("option", { value: name }, name))) : null);
    this.model.replaceChildren(...[group("Functions", functions), group("Backbones, without an adapter", bases)].filter(Boolean));
    if ([...functions, ...bases].includes(chosen)) this.model.value = chosen;
    byId("send").disabled = this.model.options.length === 0;
  }

  choose(name) {
    this.model.value = name;
    this.prompt.focus();
  }

  say(text, state, placeholder = "") {
    this.answer.dataset.state = state;
    this.answer.dataset.placeholder = placeholder;
    setText(this.answer, text);
  }

  async ask() {
    const prompt = this.prompt.value || this.prompt.placeholder;
    if (this.running || !this.model.value) return;
    this.running = new AbortController();
    this.swap("send", "abort");
    this.answer.setAttribute("aria-busy", "true");  // read aloud once, when it is complete
    this.say("", "running", "waiting for the first token …");
    const took = { began: performance.now(), first: null, last: null, chunks: 0, tokens: null };
    byId("facts").replaceChildren();
    try {
      await this.stream(prompt, took);
      this.answer.dataset.state = "done";
    } catch (error) {
      if (error.name === "AbortError") this.answer.dataset.state = "aborted";
      else this.say(error instanceof TypeError ? "The connection to the server was lost." : error.message, "error");
    } finally {
      this.facts(took);
      this.answer.removeAttribute("aria-busy");
      this.running = null;
      this.swap("abort", "send");
      this.onEnd();
    }
  }

  // One of the two buttons can be pressed at a time; the focus is not lost with the other.
  swap(from, to) {
    const had = document.activeElement === byId(from);
    byId(to).disabled = false;
    if (had) byId(to).focus();
    byId(from).disabled = true;
  }

  async stream(prompt, took) {
    const body = {
      model: this.model.value,
      messages: [{ role: "user", content: prompt }],
      max_tokens: Math.max(1, Number(byId("max-tokens").value) || 64),
      temperature: 0,
      stream: true,
      stream_options: { include_usage: true },
    };
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...this.headers() },
      body: JSON.stringify(body),
      signal: this.running.signal,
    });
    if (!response.ok) throw new Error(await messageOf(response));
    took.cold = coldOf(response);
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) took.tokens = chunk.usage.completion_tokens;
      const delta = chunk.choices?.[0]?.delta ?? {};
      const text = (delta.reasoning_content ?? "") + (delta.content ?? "");
      took.reason = chunk.choices?.[0]?.finish_reason ?? took.reason;
      if (!text) continue;
      took.last = performance.now();
      took.first ??= took.last;
      took.chunks += 1;
      this.answer.append(text);
      if (took.chunks % 8 === 1) this.facts(took);
    }
  }

  facts(took) {
    const tokens = took.tokens ?? took.chunks;
    const spanS = (took.last - took.first) / 1000;
    const cold = took.cold && (took.cold.rung === "hot" ? "hot" : `${took.cold.rung} (${seconds(took.cold.seconds)})`);
    const facts = [
      ["First token", took.first === null ? "–" : seconds((took.first - took.began) / 1000)],
      ["Met", cold ?? "–"],
      ["Tokens", count(tokens)],
      ["Speed", tokens > 1 && spanS > 0 ? perSecond((tokens - 1) / spanS, "tokens") : "–"],
      ["Ended", took.reason ?? (this.answer.dataset.state === "aborted" ? "aborted" : "–")],
    ];
    byId("facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }
}
