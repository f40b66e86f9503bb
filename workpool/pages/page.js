// Helpers of both pages. Texts are set as text, never as HTML.

export const find = (id) => document.getElementById(id);

export function show(id, text) {
  find(id).textContent = text;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 90) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${(value / 3600).toFixed(1)} h` : `${Math.round(value / 86400)} d`;
}

export function fillTable(id, rows, columns) {
  const body = find(id);
  body.replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement("tr");
      for (const column of columns) {
        const cell = document.createElement("td");
        cell.textContent = column.text(row);
        cell.className = column.style ?? "";
        line.append(cell);
      }
      return line;
    }),
  );
}

export function fillList(id, pairs) {
  find(id).replaceChildren(
    ...pairs.flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const definition = document.createElement("dd");
      term.textContent = name;
      definition.textContent = value;
      return [term, definition];
    }),
  );
}

export function drawLine(id, values, limit) {
  const top = limit ?? Math.max(...values.filter((value) => value !== null), 1e-9);
  const points = values
    .map((value, at) => (value === null ? null : `${at},${30 - (28 * Math.min(value, top)) / top}`))
    .filter((point) => point !== null);
  find(id).setAttribute("points", points.join(" "));
}

// Calls `update` every `interval` milliseconds while somebody looks at the page.
export function whileVisible(update, interval) {
  let timer = null;
  const turn = async () => {
    timer = null;
    await update();
    if (!document.hidden) timer = setTimeout(turn, interval);
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
      timer = null;
    } else if (timer === null) turn();
  });
  turn();
}
