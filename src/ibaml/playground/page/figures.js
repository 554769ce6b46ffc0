// Drawings to start with, for who has no time to draw: each call gives one with a tilt and a wobble of its own.

const turn = (count) => [...Array(count + 1).keys()].map((index) => 2 * Math.PI * index / count);
const line = (...corners) => corners.slice(1).flatMap((end, index) =>
  [...Array(9).keys()].map((step) => corners[index].map((from, axis) => from + (end[axis] - from) * step / 8)));

const FIGURES = {
  circle: [turn(32).map((angle) => [Math.sin(angle), -Math.cos(angle)])],
  cross: [line([0, -1], [0, 1]), line([-1, 0], [1, 0])],
  triangle: [line([0, -1], [1, 0.8], [-1, 0.8], [0, -1])],
  zigzag: [line([-1, -0.4], [-0.5, 0.4], [0, -0.4], [0.5, 0.4], [1, -0.4])],
};

export function figure(name, number) {
  const wave = (phase) => Math.sin(12.9898 * number + 4.1 * phase);
  const angle = 0.2 * wave(1);
  const [wide, high] = [130 + 30 * wave(2), 130 + 30 * wave(3)];
  return FIGURES[name].map((stroke) => stroke.map(([x, y], index) => {
    const [dx, dy] = [6 * Math.sin(0.4 * index + number), 6 * Math.cos(0.3 * index + 2 * number)];
    return [
      240 + wide * (x * Math.cos(angle) - y * Math.sin(angle)) + dx,
      240 + high * (x * Math.sin(angle) + y * Math.cos(angle)) + dy,
    ];
  }));
}
