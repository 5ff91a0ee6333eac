// A waveform that can be seeked and on which a region can be drawn.

import { call } from "./api.js";
import { h, clock } from "./dom.js";

/** @typedef {{start: number, end: number}} Region seconds */

export class Wave extends HTMLElement {
  constructor() {
    super();
    /** @type {Float32Array | null} largest magnitude of each bucket, 0 to 1 */
    this.peaks = null;
    this.duration = 0;
    this.time = 0;
    /** @type {Region | null} */
    this.region = null;
    /** @type {{at: number, label: string}[]} */
    this.marks = [];
    this.choosing = false;
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
    /** @param {PointerEvent} move */
    const move = (move) => {
      const to = this.second(move);
      if (this.choosing) {
        this.region = { start: Math.min(from, to), end: Math.max(from, to) };
        this.draw();
      } else this.emit("seek", { time: to });
    };
    const up = () => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", up);
      if (!this.choosing) return;
      if (this.region && this.region.end - this.region.start < 0.25) this.region = null;
      this.draw();
      this.emit("region", { region: this.region });
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
    this.time = time;
    if (duration !== undefined && isFinite(duration)) this.duration = duration;
    this.setAttribute("aria-valuemin", "0");
    this.setAttribute("aria-valuemax", String(Math.round(this.duration)));
    this.setAttribute("aria-valuenow", String(Math.round(time)));
    this.setAttribute("aria-valuetext", `${clock(time)} of ${clock(this.duration)}`);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this;
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    const pen = this.canvas.getContext("2d");
    const style = getComputedStyle(this);
    const [done, rest, mark] = ["--accent", "--wave", "--mark"].map((name) => style.getPropertyValue(name).trim() || "gray");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const x = this.duration ? (this.time / this.duration) * width : 0;
    if (this.region && this.duration) {
      pen.fillStyle = mark;
      pen.globalAlpha = 0.3;
      const left = (this.region.start / this.duration) * width;
      pen.fillRect(left, 0, Math.max(2, ((this.region.end - this.region.start) / this.duration) * width), height);
      pen.globalAlpha = 1;
    }
    const bar = 3;
    const bars = Math.max(1, Math.floor(width / bar));
    for (let i = 0; i < bars; i++) {
      let peak = 0.04;
      if (this.peaks?.length) {
        const from = Math.floor((i * this.peaks.length) / bars);
        const to = Math.max(from + 1, Math.floor(((i + 1) * this.peaks.length) / bars));
        for (let k = from; k < to; k++) peak = Math.max(peak, this.peaks[k]);
      }
      const tall = Math.max(2, Math.min(1, peak) * (height - 2));
      pen.fillStyle = i * bar < x ? done : rest;
      pen.fillRect(i * bar, (height - tall) / 2, bar - 1, tall);
    }
    pen.fillStyle = mark;
    for (const { at } of this.marks) if (this.duration) pen.fillRect((at / this.duration) * width, 0, 1, height);
  }
}
customElements.define("song-wave", Wave);

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
