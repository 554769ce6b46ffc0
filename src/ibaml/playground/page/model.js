// The tab Your model.

import { ask, byId, element, fillList, fillTable } from "./common.js";

export function startModel() {
  byId("model-look").addEventListener("click", async () => show(await ask("model", { folder: byId("model-folder").value })));
  byId("model-go").addEventListener("click", async () => {
    const [support, query] = await Promise.all(["model-support", "model-query"].map((id) => upload(byId(id))));
    if (support === null && query === null) {
      const error = byId("model-error");
      error.hidden = false;
      error.textContent = "No file is chosen: choose one with known examples, and one with those to predict.";
      return;
    }
    show(await ask("model", { folder: byId("model-folder").value, support, query }));
  });
}

async function upload(input) {
  const [file] = input.files;
  if (file === undefined) return null;
  const url = await new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: reject });
    reader.readAsDataURL(file);
  });
  return { name: file.name, base64: url.slice(url.indexOf(",") + 1) };
}

function show(answer) {
  fillList(byId("model-about"), answer?.about ?? []);
  const table = byId("model-answers");
  const says = byId("model-says");
  says.replaceChildren();
  table.replaceChildren();
  if (answer?.header === undefined) return;
  const shown = answer.rows.length < answer.num_rows ? `the first ${answer.rows.length} of ${answer.num_rows}` : answer.num_rows;
  const link = element("a", {
    href: URL.createObjectURL(new Blob([answer.csv], { type: "text/csv" })), download: "predicted.csv", textContent: "all as CSV",
  });
  says.append(`${shown} predictions; `, link);
  fillTable(table, answer.header, answer.rows);
}
