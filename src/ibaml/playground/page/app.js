// What all tabs share: changing between them, asking the server, and showing what it refuses.

import { startCurve } from "./curve.js";
import { startDraw } from "./draw.js";
import { startModel } from "./model.js";
import { startTable } from "./table.js";

const started = new Set();
const starters = { draw: startDraw, curve: startCurve, table: startTable, model: startModel };
const tabs = [...document.querySelectorAll("[role=tab]")];

function show(name) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (!started.has(name)) {
    started.add(name);
    starters[name]();
  }
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => {
    // Going to the fragment itself would take the focus from the tab.
    history.pushState(null, "", `#${tab.getAttribute("aria-controls")}`);
    fromHash();
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}

function fromHash() {
  show(location.hash.slice(1) in starters ? location.hash.slice(1) : "draw");
}

addEventListener("hashchange", fromHash);
addEventListener("popstate", fromHash);
fromHash();
