// A waveform that can be seeked and on which a region can be drawn.

import { call } from "./api.js";
import { h, clock } from "./dom.js";

/** A part of a song, in seconds, and what shall be there. @typedef {{start: number, end: number, prompt?: string, lyrics?: string}} Region */

export class Wave extends HTMLElement {
  constructor() {
    super();
    /** @type {Float32Array | null} largest magnitude of each bucket, 0 to 1 */
    this.peaks = null;
    this.duration = 0;
    this.time = 0;
    /** In order, beside each other. @type {Region[]} */
    this.regions = [];
    /** @type {{at: number, label: string}[]} */
    this.marks = [];
    /** Whether dragging chooses parts instead of seeking, and how many. @type {"" | "one" | "many"} */
    this.choosing = "";
    this.canvas = h("canvas", {});
    this.shape = new ResizeObserver(() => this.draw());
  }

  connectedCallback() {
    if (!this.canvas.isConnected) this.append(this.canvas);
    this.tabIndex = 0;
    this.setAttribute("role", "slider");
    this.setAttribute("aria-label", this.getAttribute("label") || "Position in the song");
    this.shape.observe(this);
    this.addEventListener("pointerdown", this.press);
    this.addEventListener("keydown", this.key);
    this.draw();
  }

  disconnectedCallback() {
    this.shape.disconnect();
  }

  /** @param {PointerEvent} down */
  press(down) {
    if (!this.duration || down.button) return;
    down.preventDefault();
    this.focus();
    const from = this.second(down);
    if (!this.choosing) { this.emit("seek", { time: from }); }
    const kept = this.choosing === "many" ? this.regions : [];
    /** @param {PointerEvent} move */
    const move = (move) => {
      const to = this.second(move);
      if (this.choosing) {
        this.regions = joined(kept, { start: Math.min(from, to), end: Math.max(from, to) });
        this.draw();
      } else this.emit("seek", { time: to });
    };
    const up = () => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", up);
      if (!this.choosing) return;
      this.regions = this.regions.filter(({ start, end }) => end - start >= 0.25);
      this.draw();
      this.emit("region", {});
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", up);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const step = { ArrowLeft: -5, ArrowRight: 5, PageDown: -30, PageUp: 30 }[event.key];
    if (event.key === "Home") this.emit("seek", { time: 0 });
    else if (step) this.emit("seek", { time: Math.min(this.duration, Math.max(0, this.time + step)) });
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** @param {PointerEvent} event */
  second(event) {
    const box = this.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * this.duration;
  }

  /** @param {string} name @param {any} detail */
  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail, bubbles: true }));
  }

  /** @param {number} time @param {number} [duration] */
  show(time, duration) {
    const [second, bar] = [Math.round(this.time), this.bar];
    this.time = time;
    const known = duration === undefined || !isFinite(duration) || duration === this.duration;
    if (!known) this.duration = /** @type {number} */ (duration);
    if (known && bar === this.bar && second === Math.round(time) && this.hasAttribute("aria-valuenow")) return; // it looks the same
    this.setAttribute("aria-valuemin", "0");
    this.setAttribute("aria-valuemax", String(Math.round(this.duration)));
    this.setAttribute("aria-valuenow", String(Math.round(time)));
    this.setAttribute("aria-valuetext", `${clock(time)} of ${clock(this.duration)}`);
    this.draw();
  }

  /** How many bars were played. */
  get bar() { return this.duration ? Math.ceil((this.time / this.duration) * (this.canvas.width / (window.devicePixelRatio || 1) / BAR_PX)) : 0; }

  draw() {
    const pen = penOf(this, this.canvas);
    if (!pen) return;
    const { clientWidth: width, clientHeight: height } = this;
    const [done, rest, mark] = colours(this);
    const x = this.duration ? (this.time / this.duration) * width : 0;
    pen.fillStyle = mark;
    pen.globalAlpha = 0.3;
    for (const { start, end } of this.duration ? this.regions : []) pen.fillRect((start / this.duration) * width, 0, Math.max(2, ((end - start) / this.duration) * width), height);
    pen.globalAlpha = 1;
    bars(pen, this.peaks, width, height, (at) => (at < x ? done : rest));
    pen.fillStyle = mark;
    for (const { at } of this.marks) if (this.duration) pen.fillRect((at / this.duration) * width, 0, 1, height);
  }
}
customElements.define("song-wave", Wave);

/** The shape of a song in a list: only to look at, and asked for once it is seen. */
export class Sketch extends HTMLElement {
  /** @param {string} id @param {number} item */
  constructor(id = "", item = 0) {
    super();
    this.song = { id, item };
    this.canvas = h("canvas", {});
    this.setAttribute("aria-hidden", "true");
  }

  connectedCallback() {
    this.append(this.canvas);
    seen.observe(this);
  }

  disconnectedCallback() { seen.unobserve(this); }

  async draw() {
    const peaks = await peaksOf(this.song.id, this.song.item);
    const pen = peaks && penOf(this, this.canvas);
    if (pen) bars(pen, peaks, this.clientWidth, this.clientHeight, () => colours(this)[1]);
  }
}
customElements.define("song-sketch", Sketch);
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) { seen.unobserve(target); void /** @type {Sketch} */ (target).draw(); }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.querySelectorAll("song-wave, song-sketch").forEach((shape) => void /** @type {Wave | Sketch} */ (shape).draw()));

/** What draws on an element's canvas, in its pixels; null while it has no size. @param {HTMLElement} element @param {HTMLCanvasElement} canvas */
function penOf(element, canvas) {
  const { clientWidth: width, clientHeight: height } = element;
  if (!width || !height) return null;
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

/** Of what was played, of the rest, of marks. @param {HTMLElement} element */
function colours(element) {
  const style = getComputedStyle(element);
  return ["--accent", "--wave", "--mark"].map((name) => style.getPropertyValue(name).trim() || "gray");
}

const BAR_PX = 3;

/** @param {CanvasRenderingContext2D} pen @param {Float32Array | null} peaks @param {number} width @param {number} height @param {(x: number) => string} colour */
function bars(pen, peaks, width, height, colour) {
  const count = Math.max(1, Math.floor(width / BAR_PX));
  for (let i = 0; i < count; i++) {
    let peak = 0.04;
    if (peaks?.length) {
      const from = Math.floor((i * peaks.length) / count);
      const to = Math.max(from + 1, Math.floor(((i + 1) * peaks.length) / count));
      for (let k = from; k < to; k++) peak = Math.max(peak, peaks[k]);
    }
    const tall = Math.max(2, Math.min(1, peak) * (height - 2));
    pen.fillStyle = colour(i * BAR_PX);
    pen.fillRect(i * BAR_PX, (height - tall) / 2, BAR_PX - 1, tall);
  }
}

/** Parts with one more, which takes in those that it overlaps. @param {Region[]} regions @param {Region} one */
function joined(regions, one) {
  const apart = regions.filter(({ start, end }) => end < one.start || start > one.end);
  const over = regions.filter((region) => !apart.includes(region));
  const all = { ...over[0], start: Math.min(one.start, ...over.map(({ start }) => start)), end: Math.max(one.end, ...over.map(({ end }) => end)) };
  return [...apart, all].sort((a, b) => a.start - b.start);
}

/** @type {Map<string, Promise<Float32Array | null>>} */
const known = new Map();

/**
 * Peaks of one version of a song, as its renderer wrote them. Null where there are none.
 * @param {string} id
 * @param {number} index
 */
export function peaksOf(id, index) {
  const name = `${id}/${index}`;
  let found = known.get(name);
  if (!found) {
    found = call(`v1/jobs/${encodeURIComponent(id)}/files/${index}.peaks`).then(read, () => null);
    known.set(name, found);
    if (known.size > 200) known.delete(/** @type {string} */ (known.keys().next().value));
  }
  return found;
}

/** @param {{full_scale: number, levels: {min: number[], max: number[]}[]}} file */
function read(file) {
  const { min, max } = file.levels[file.levels.length - 1];
  return Float32Array.from(max, (high, i) => Math.max(high, -min[i]) / file.full_scale);
}
