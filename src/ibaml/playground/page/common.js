// Asking the server, and small parts of pages.

export const byId = (id) => document.getElementById(id);

// Answers, or null where the server refused: the tab then shows its sentence.
export async function ask(tab, body) {
  const error = byId(`${tab}-error`);
  const panel = byId(tab);
  panel.setAttribute("aria-busy", "true");
  try {
    const response = await fetch(`api/${tab}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const answer = await response.json();
    const told = answer.error ?? (answer.warnings ?? []).join(" ");
    error.hidden = told === "";
    error.textContent = told;
    return response.ok ? answer : null;
  } catch (failure) {
    error.hidden = false;
    error.textContent = `The server does not answer (${failure.message}): is "ibaml playground" still running?`;
    return null;
  } finally {
    panel.setAttribute("aria-busy", "false");
  }
}

// Asks one question at a time; of those that come meanwhile only the last one is asked.
export function latest(tab, show) {
  let waiting = null;
  let busy = false;
  return async function (body) {
    waiting = body;
    if (busy) return;
    busy = true;
    try {
      while (waiting !== null) {
        const asked = waiting;
        waiting = null;
        const answer = await ask(tab, asked);
        if (answer !== null) show(answer);
      }
    } finally {
      busy = false;
    }
  };
}

export function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// Rows of a table; cells are text or elements, and `mark(index)` names the class of a row.
export function fillTable(table, header, rows, mark = () => "") {
  const kinds = header.map((_, column) => rows.every((row) => isNumber(row[column])) ? "number" : "");
  const cell = (tag) => (value, column) => element(tag, { className: kinds[column] }, [value]);
  table.replaceChildren(
    element("thead", {}, [element("tr", {}, header.map(cell("th")))]),
    element("tbody", {}, rows.map((row, index) => element("tr", { className: mark(index) }, row.map(cell("td"))))),
  );
}

const isNumber = (value) => typeof value === "string" && Number.isFinite(Number(value.replace(/[<>%]/g, "")));

export function fillList(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => [
    element("dt", { textContent: name }), element("dd", { textContent: value }),
  ]));
}

export function percent(value) {
  if (value > 0.9995) return ">99.9%";
  if (value < 0.0005) return "<0.1%";
  return `${(100 * value).toFixed(value > 0.0995 && value < 0.9905 ? 0 : 1)}%`;
}
export const short = (value) => Number(value.toPrecision(3)).toString();
