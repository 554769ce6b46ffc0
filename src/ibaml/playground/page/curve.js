// The tab Curve: two pictures of the same points.

import { byId, latest, short, svg } from "./common.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM, EDGE] = [600, 420, 34, 24, 8];
const [X, Y] = [[-5, 5], [-7, 7]];
const toX = (x) => LEFT + (x - X[0]) / (X[1] - X[0]) * (WIDTH - LEFT - EDGE);
const toY = (y) => EDGE + (Y[1] - y) / (Y[1] - Y[0]) * (HEIGHT - BOTTOM - EDGE);
const fromX = (px) => X[0] + (px - LEFT) / (WIDTH - LEFT - EDGE) * (X[1] - X[0]);
const fromY = (py) => Y[1] - (py - EDGE) / (HEIGHT - BOTTOM - EDGE) * (Y[1] - Y[0]);
// Where a hidden wave is measured, and the noise there.
const MEASURED = [[-4, 0.15], [-2.2, -0.1], [0.4, 0.05], [2.6, -0.2], [4.3, 0.1], [-0.9, 0.12], [1.5, -0.08], [3.5, 0.07]];
const wave = (x) => 3.2 * Math.sin(x - 1.1);

export function startCurve() {
  let points = [];
  let measured = 0;
  const predict = latest("curve", show);

  function show(answer) {
    plot(byId("learned"), answer, answer.learned);
    plot(byId("plain"), answer, answer.plain);
    const width = (band) => `Mean width of the band: ${short(band.width)}`;
    byId("learned-text").textContent = `${width(answer.learned)}, after ${points.length} point${points.length === 1 ? "" : "s"}.`;
    const { length_scale: length, signal, noise } = answer.kernel;
    byId("plain-text").textContent =
      `${width(answer.plain)}. Found from the points: length-scale ${short(length)}, signal ${short(signal)}, noise ${short(noise)}.`;
  }

  function set(changed) {
    points = changed;
    predict({ points });
  }

  for (const name of ["learned", "plain"]) {
    byId(name).addEventListener("click", (event) => {
      const box = byId(name).getBoundingClientRect();
      const x = fromX((event.clientX - box.left) * WIDTH / box.width);
      const y = fromY((event.clientY - box.top) * HEIGHT / box.height);
      if (x >= X[0] && x <= X[1] && y >= Y[0] && y <= Y[1]) set([...points, [x, y]]);
    });
  }
  byId("point-add").addEventListener("click", () => {
    set([...points, [byId("point-x"), byId("point-y")].map((input) => input.value === "" ? null : Number(input.value))]);
  });
  byId("point-wave").addEventListener("click", () => {
    const [x, noise] = MEASURED[measured++ % MEASURED.length];
    set([...points, [x, wave(x) + noise]]);
  });
  byId("point-undo").addEventListener("click", () => set(points.slice(0, -1)));
  byId("point-clear").addEventListener("click", () => { measured = 0; set([]); });
  set([]);
}

function plot(picture, { x, points }, band) {
  const path = (ys) => ys.map((y, index) => `${index ? "L" : "M"}${toX(x[index]).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
  const back = band.lower.map((y, index) => `L${toX(x[index]).toFixed(1)} ${toY(y).toFixed(1)}`).reverse().join("");
  const clip = `inside-${picture.id}`;
  const frame = { x: LEFT, y: EDGE, width: WIDTH - LEFT - EDGE, height: HEIGHT - BOTTOM - EDGE };
  const clipPath = svg("clipPath", { id: clip });
  clipPath.append(svg("rect", frame));
  const curves = svg("g", { "clip-path": `url(#${clip})` });
  curves.append(
    svg("path", { class: "band", d: `${path(band.upper)}${back}Z` }),
    ...band.functions.map((ys) => svg("path", { class: "drawn", d: path(ys) })),
    svg("path", { class: "mean", d: path(band.mean) }),
  );
  const ticks = [-4, -2, 0, 2, 4];
  picture.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  picture.replaceChildren(
    clipPath,
    ...ticks.map((at) => svg("line", { class: "grid", x1: toX(at), x2: toX(at), y1: EDGE, y2: HEIGHT - BOTTOM })),
    ...[...ticks, -6, 6].map((at) => svg("line", { class: "grid", x1: LEFT, x2: WIDTH - EDGE, y1: toY(at), y2: toY(at) })),
    ...ticks.map((at) => svg("text", { x: toX(at), y: HEIGHT - 7, "text-anchor": "middle" }, `${at}`)),
    ...[...ticks, -6, 6].map((at) => svg("text", { x: LEFT - 6, y: toY(at) + 4, "text-anchor": "end" }, `${at}`)),
    curves,
    ...points.map(([px, py]) => svg("circle", { class: "point", cx: toX(px), cy: toY(py), r: 5.5 })),
  );
}
