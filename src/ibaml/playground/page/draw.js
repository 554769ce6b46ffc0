// The tab Draw.

import { byId, element, fillList, fillTable, latest, percent } from "./common.js";
import { figure } from "./figures.js";
import { Pad, paint } from "./pad.js";

const MOST_CLASSES = 10;
const MOST_DRAWINGS = 5;
const NAMES = "ABCDEFGHIJ";

export function startDraw() {
  // Examples in the order in which they came; each knows its class by number.
  let classes = ["A", "B"].map((name) => ({ name }));
  let examples = [];

  const judge = latest("draw", show);
  const teach = new Pad(byId("teach"), () => listClasses());
  const question = new Pad(byId("ask"), (finished) => ask(finished));

  function ask(finished) {
    const sent = examples.map(({ of, strokes }) => ({ label: of.name.trim(), strokes }));
    judge({ examples: sent, query: question.strokes, history: finished });
  }

  function listClasses() {
    byId("classes").replaceChildren(...classes.map((each, index) => classRow(each, index)));
  }

  function classRow(each, index) {
    const own = examples.filter(({ of }) => of === each);
    const name = element("input", { value: each.name, maxLength: 20, ariaLabel: `Name of class ${index + 1}` });
    name.addEventListener("change", () => {
      const wanted = name.value.trim();
      // Two classes of one name would be one.
      if (wanted !== "" && !classes.some((other) => other !== each && other.name === wanted)) each.name = wanted;
      listClasses();
      ask(true);
    });
    const add = element("button", { textContent: "Add", ariaLabel: `Add to ${each.name}`, id: `add-${index}` });
    add.disabled = teach.strokes.length === 0 || own.length >= MOST_DRAWINGS;
    add.addEventListener("click", () => {
      examples.push({ of: each, strokes: teach.strokes });
      teach.set([]);
      ask(true);
      byId("teach").focus({ preventScroll: true });
    });
    const count = element("span", { className: "hint", textContent: `${own.length} of ${MOST_DRAWINGS}` });
    const thumbs = element("div", { className: "thumbs" }, own.map((example, number) => {
      const small = element("canvas", { width: 88, height: 88 });
      paint(small, example.strokes);
      const button = element("button", { title: "Remove", ariaLabel: `Remove drawing ${number + 1} of ${each.name}` }, [small]);
      button.addEventListener("click", () => {
        examples = examples.filter((other) => other !== example);
        listClasses();
        ask(true);
      });
      return button;
    }));
    return element("div", { className: "class" }, [name, count, add, thumbs]);
  }

  function show({ verdict, seen, history }) {
    byId("seen").hidden = byId("seen-text").hidden = seen === "";
    if (seen !== "") byId("seen").src = seen;
    byId("verdict").textContent = sentence(verdict);
    const told = verdict !== null && verdict.probabilities.length > 0;
    byId("bars").replaceChildren(...(told ? bars(verdict) : []));
    fillList(byId("uncertainty"), told ? uncertainty(verdict) : []);
    // While a line is drawn the answers are of one drawing alone: the table waits for its end.
    if (question.current !== null) return;
    byId("history-text").hidden = history.length > 0;
    fillTable(byId("history"), history.length ? historyHeader(verdict) : [], history.map((row) => historyRow(row, verdict)));
  }

  byId("teach-undo").addEventListener("click", () => teach.undo());
  byId("teach-clear").addEventListener("click", () => teach.set([]));
  byId("ask-undo").addEventListener("click", () => question.undo());
  byId("ask-clear").addEventListener("click", () => question.set([]));
  byId("add-class").addEventListener("click", () => {
    const name = [...NAMES].find((letter) => !classes.some((each) => each.name === letter));
    if (name !== undefined) classes.push({ name });
    byId("add-class").disabled = classes.length >= MOST_CLASSES;
    listClasses();
  });
  byId("draw-example").addEventListener("click", () => {
    classes = ["circle", "cross", "triangle"].map((name) => ({ name }));
    examples = [0, 1, 2].flatMap((round) => classes.map((of, index) => ({ of, strokes: figure(of.name, 3 * round + index) })));
    listClasses();
    question.set(figure("zigzag", 1));
  });
  byId("draw-reset").addEventListener("click", () => {
    classes = ["A", "B"].map((name) => ({ name }));
    examples = [];
    byId("add-class").disabled = false;
    teach.set([]);
    question.set([]);
  });
  listClasses();
}

function sentence(verdict) {
  if (verdict === null) return "Draw a question.";
  if (verdict.says === "too few") return "Add examples of two classes.";
  if (verdict.says === "none of these") return "None of these";
  const best = Math.max(...verdict.probabilities);
  if (verdict.says === "not sure") return `Not sure; ${verdict.labels[verdict.probabilities.indexOf(best)]}, perhaps`;
  return `${verdict.says}, ${percent(best).replace(">", "over ")} sure`;
}

function bars(verdict) {
  const dimmed = verdict.says === "none of these" ? " dimmed" : "";
  const list = verdict.labels.map((label, index) => {
    const fill = element("div", { className: "fill" });
    fill.style.width = `${100 * verdict.probabilities[index]}%`;
    return element("div", { className: `bar${dimmed}` }, [
      element("span", { className: "name", textContent: label, title: label }),
      element("div", { className: "track" }, [fill]),
      element("span", { className: "value", textContent: percent(verdict.probabilities[index]) }),
    ]);
  });
  if (!dimmed) return list;
  return [element("p", { className: "hint", textContent: "If it were one of them, it would be:" }), ...list];
}

function uncertainty(verdict) {
  const most = Math.log(verdict.labels.length);
  const nats = (value) => `${entropy(value)} nats`;
  return [
    ["total uncertainty", `${nats(verdict.total)} of at most ${most.toFixed(2)}`],
    ["of which epistemic", `${nats(verdict.epistemic)}: what more examples would remove`],
    ["foreignness", `${verdict.foreignness.toFixed(2)}: ${verdict.foreignness > 0 ? "above" : "below"} 0, so ${
      verdict.foreignness > 0 ? "none of these" : "one of them"}`],
  ];
}

const entropy = (value) => value < 0.0005 ? "<0.001" : value.toFixed(3);

const historyHeader = (verdict) => ["examples", "added", ...verdict.labels, "total", "epistemic", "says"];

function historyRow(row, verdict) {
  const probabilities = verdict.labels.map((label) => {
    const index = row.labels.indexOf(label);
    return index < 0 ? "" : percent(row.probabilities[index]);
  });
  return [`${row.num_examples}`, row.added, ...probabilities, entropy(row.total), entropy(row.epistemic), row.says];
}
