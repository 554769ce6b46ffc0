// A canvas to draw on, by mouse, finger or keyboard.

const SIZE = 480;
const LINE_WIDTH = 18;
const KEY_STEP = 15;

export function paint(canvas, strokes) {
  const pen = canvas.getContext("2d");
  const scale = canvas.width / SIZE;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  Object.assign(pen, { lineWidth: LINE_WIDTH * scale, lineCap: "round", lineJoin: "round", strokeStyle: "#111" });
  for (const stroke of strokes) {
    pen.beginPath();
    pen.moveTo(stroke[0][0] * scale, stroke[0][1] * scale);
    // A line to its own start makes a dot of a single point.
    for (const [x, y] of stroke) pen.lineTo(x * scale, y * scale);
    pen.stroke();
  }
}

export class Pad {
  // `onChange(finished)` is called while drawing, and with true when the pen is lifted.
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.strokes = [];
    this.cursor = [SIZE / 2, SIZE / 2];
    this.current = null;
    this.byKeyboard = false;
    canvas.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      this.byKeyboard = false;
      this.down(this.place(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.current === null || this.byKeyboard) return;
      for (const each of event.getCoalescedEvents?.() ?? [event]) this.current.push(this.place(each));
      this.changed(false);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.lift());
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { this.lift(); this.byKeyboard = false; this.show(); });
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const within = (value) => Math.max(0, Math.min(SIZE, value));
    return [within((event.clientX - box.left) * SIZE / box.width), within((event.clientY - box.top) * SIZE / box.height)];
  }

  down(point) {
    this.current = [point];
    this.strokes.push(this.current);
    this.changed(false);
  }

  lift() {
    if (this.current === null) return;
    this.current = null;
    this.changed(true);
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      this.cursor = this.cursor.map((value, axis) =>
        Math.max(0, Math.min(SIZE, value + KEY_STEP * moves[event.key][axis])));
      if (this.current !== null && this.byKeyboard) this.current.push([...this.cursor]);
      this.byKeyboard = true;
      this.changed(false);
    } else if (event.key === " ") {
      this.byKeyboard = true;
      if (this.current === null) this.down([...this.cursor]); else this.lift();
    } else if (event.key === "Backspace") {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
  }

  undo() {
    this.current = null;
    this.strokes.pop();
    this.changed(true);
  }

  set(strokes) {
    this.current = null;
    this.strokes = strokes;
    this.changed(true);
  }

  changed(finished) {
    this.show();
    this.onChange(finished);
  }

  show() {
    paint(this.canvas, this.strokes);
    if (!this.byKeyboard) return;
    const pen = this.canvas.getContext("2d");
    pen.beginPath();
    pen.arc(...this.cursor, 12, 0, 2 * Math.PI);
    Object.assign(pen, { lineWidth: 3, strokeStyle: this.current === null ? "#0b5cad" : "#a4161a" });
    pen.stroke();
  }
}
