// Making elements. All text goes in as text: a name that looks like markup stays a name.

export const byId = (id) => document.getElementById(id);

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.setAttribute("class", value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

export const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Touches the page only where something changed, so that focus, selection and screen readers stay where they are.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

// A table whose rows keep their identity from one poll to the next. `columns`: {title, text, cell?, class?}, where
// `cell(row)` makes the cell's content once, for things one can press.
export class KeyedTable {
  constructor(table, columns, caption) {
    this.columns = columns;
    this.rows = new Map();
    this.body = el("tbody");
    const heads = columns.map((column) => el("th", { scope: "col", class: column.class }, column.title));
    table.append(el("caption", { class: "unseen" }, caption), el("thead", {}, el("tr", {}, ...heads)), this.body);
    this.table = table;
  }

  show(items, keyOf) {
    setHidden(this.table, items.length === 0);
    const kept = new Set();
    const focused = document.activeElement;
    let place = this.body.firstElementChild;
    for (const item of items) {
      const key = keyOf(item);
      kept.add(key);
      const row = this.rows.get(key) ?? this.make(key, item);
      row.item = item;
      this.columns.forEach((column, index) => {
        if (column.text) setText(row.cells[index], column.text(item));
        if (column.state) row.cells[index].dataset.state = column.state(item);
        if (column.hint) row.cells[index].title = column.hint(item);
      });
      if (row.line === place) place = place.nextElementSibling;
      else this.body.insertBefore(row.line, place);
    }
    for (const [key, row] of this.rows) {
      if (!kept.has(key)) {
        row.line.remove();
        this.rows.delete(key);
      }
    }
    if (focused !== document.activeElement && this.body.contains(focused)) focused.focus();
  }

  make(key, item) {
    const row = { item };
    row.cells = this.columns.map((column) => {
      const content = column.cell ? column.cell(() => row.item) : null;
      return el(column.heading ? "th" : "td", { class: column.class, scope: column.heading ? "row" : null, "data-label": column.title }, content);
    });
    row.line = el("tr", {}, ...row.cells);
    this.rows.set(key, row);
    return row;
  }
}
