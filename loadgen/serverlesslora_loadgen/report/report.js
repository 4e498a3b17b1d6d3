"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const page = JSON.parse(document.getElementById("figures").textContent);
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const PRINTED = 700; // px that are as wide as a printed page

  const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");

  // Only what is named as a colour is turned: a name from a trace may look like one.
  function turned(value, key, table) {
    if (Array.isArray(value)) return value.map((item) => turned(item, key, table));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, turned(item, name, table)]));
    }
    return typeof value === "string" && /color/i.test(key) ? table[value] || value : value;
  }

  async function draw(name, width) {
    const drawn = Object.entries(page.figures).map(([id, figure]) => {
      const { data, layout } = turned(figure, "", name === "dark" ? page.dark : {});
      const place = document.getElementById("figure-" + id);
      const size = width ? { width, autosize: false } : { autosize: true };
      return Plotly.react(place, data, { ...layout, ...size, template: page.templates[name] }, config);
    });
    await Promise.all(drawn);
    root.dataset.drawn = width ? "print" : name;
  }

  function failed(error) {
    for (const place of document.querySelectorAll(".plot:empty")) place.textContent = "This figure cannot be drawn: " + error;
    throw error;
  }

  let printing = null; // what to go back to
  const redraw = () => printing || draw(theme()).catch(failed);

  // --- light, dark, or what the system says
  const button = document.getElementById("theme");
  function choose(next) {
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    button.textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[next];
    button.setAttribute("aria-label", "Colours: " + next + ". Change.");
  }
  button.addEventListener("click", () => {
    const order = ["auto", "light", "dark"];
    choose(order[(order.indexOf(root.dataset.theme || "auto") + 1) % 3]);
    redraw();
  });
  choose("auto");
  button.hidden = false;
  system.addEventListener("change", redraw);

  // --- paper is white, has one width, and folds nothing away
  addEventListener("beforeprint", () => {
    const folded = [...document.querySelectorAll("details:not([open])")];
    printing = { folded, theme: root.dataset.theme };
    for (const details of folded) details.open = true;
    root.dataset.theme = "light";
    draw("light", PRINTED).catch(failed);
  });
  addEventListener("afterprint", () => {
    for (const details of printing.folded) details.open = false;
    if (printing.theme) root.dataset.theme = printing.theme;
    else delete root.dataset.theme;
    printing = null;
    redraw();
  });

  // --- tables that can be sorted; n counts as the number it shows
  for (const head of document.querySelectorAll("table.sortable thead th")) {
    const sort = document.createElement("button");
    sort.append(...head.childNodes);
    head.append(sort);
    sort.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") !== "descending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const body = head.closest("table").tBodies[0];
      const of = (row) => {
        const cell = row.cells[head.cellIndex];
        return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v === "" ? -Infinity : Number(cell.dataset.v);
      };
      const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0) * (falling ? -1 : 1);
      body.append(...[...body.rows].sort((a, b) => order(of(a), of(b))));
    });
  }

  const copy = document.getElementById("copy");
  copy.hidden = false;
  copy.addEventListener("click", () => {
    const command = document.getElementById("command");
    getSelection().selectAllChildren(command);
    navigator.clipboard?.writeText(command.textContent).catch(() => {}); // at least it is selected now
    copy.textContent = "copied";
  });

  redraw();
})();
