// The tab Table.

import { ask, byId, element, fillTable, short, svg } from "./common.js";

export function startTable() {
  const text = byId("table-text");

  byId("table-example").addEventListener("click", async () => {
    fill(await (await fetch("fields.csv")).text());
    await go();
  });
  byId("table-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file !== undefined) fill(await file.text());
  });
  byId("table-go").addEventListener("click", go);

  function fill(csv) {
    text.value = csv;
    for (const id of ["table-group", "table-target"]) choose(byId(id), [], "");
  }

  async function go() {
    byId("table-says").textContent = "Learning what groups are like ...";
    byId("table-answers").replaceChildren();
    byId("table-note").hidden = true;
    const answer = await ask("table", {
      csv: text.value, group: byId("table-group").value, target: byId("table-target").value,
    });
    if (answer === null) {
      byId("table-says").textContent = "";
      return;
    }
    choose(byId("table-group"), answer.columns, answer.group);
    choose(byId("table-target"), answer.columns, answer.target);
    show(answer);
  }
}

function choose(select, columns, chosen) {
  const options = ["", ...columns].map((name) => element("option", { value: name, textContent: name || "guess" }));
  select.replaceChildren(...options);
  select.value = chosen;
}

function show({ answers, target, group, next, learned_from: count, choice }) {
  const best = new Set(Object.values(next));
  const named = Object.entries(next).map(([name, position]) => `${name}: ${inputs(answers[position])}`);
  byId("table-says").textContent = `Learned from ${count} groups; chosen: ${choice.split(",")[0]}. Measure next, in ${
    group} ${named.join("; ")}.`;
  const low = Math.min(...answers.map((each) => each.lower));
  const high = Math.max(...answers.map((each) => each.upper));
  const names = Object.keys(answers[0].inputs);
  byId("table-note").hidden = false;
  fillTable(
    byId("table-answers"),
    [group, ...names, target, "90% interval", "", "saves"],
    answers.map((each) => [
      each.group, ...names.map((name) => `${each.inputs[name] ?? ""}`), short(each.mean),
      `${short(each.lower)} to ${short(each.upper)}`, interval(each, low, high), short(each.gain),
    ]),
    (index) => best.has(index) ? "next" : "",
  );
}

const inputs = (answer) => Object.entries(answer.inputs).map(([name, value]) => `${name} ${value ?? "unknown"}`).join(", ");

function interval({ lower, mean, upper }, low, high) {
  const at = (value) => 4 + 142 * (value - low) / (high - low || 1);
  const picture = svg("svg", { viewBox: "0 0 150 14", "aria-hidden": "true" });
  picture.append(
    svg("line", { x1: at(lower), x2: at(upper), y1: 7, y2: 7 }), svg("circle", { cx: at(mean), cy: 7, r: 4 }));
  return picture;
}
