// What can be made of a song: the API's verbs, on parts of it or on all of it.

import { Refused, call, edit } from "./api.js";
import { clock, field, fill, h, markWrong, toast } from "./dom.js";
import { said } from "./song.js";

/** @typedef {import("./api.js").Job} Job */
/** @typedef {import("./wave.js").Region} Region */
/** @typedef {{name: import("./api.js").Verb, label: string, task?: string, about: string, parts?: "one" | "many", fields: () => HTMLElement[]}} Verb */

const TRACKS = ["vocals", "backing_vocals", "drums", "bass", "guitar", "keyboard", "percussion", "strings", "synth", "fx", "brass", "woodwinds"];
const words = (/** @type {string} */ label) => field(label, h("textarea", { name: "prompt", rows: 2, maxlength: 2048, placeholder: "as it is", dir: "auto" }), undefined, "prompt");
const number = (/** @type {string} */ name, /** @type {string} */ label, /** @type {Record<string, any>} */ more) => field(label, h("input", { name, type: "number", ...more }), undefined, name);
const share = (/** @type {string} */ name, /** @type {string} */ label, /** @type {number} */ value) => number(name, label, { min: 0, max: 1, step: 0.05, value: String(value) });
const track = (/** @type {string} */ label) => field(label, h("select", { name: "track_name" }, TRACKS.map((name) => h("option", { value: name }, name.replace("_", " ")))), undefined, "track_name");

/** @type {Verb[]} */
const VERBS = [
  { name: "replace", label: "Replace parts", task: "repaint", parts: "many", about: "Drag across the waveform, as often as you like; all outside of these parts stays as it is.", fields: () => [] },
  { name: "extend", label: "Extend", task: "repaint", about: "Goes on before or after the song.", fields: () => [number("before", "Seconds before", { min: 0, max: 600, step: 1, value: "0" }), number("after", "Seconds after", { min: 0, max: 600, step: 1, value: "30" }), words("How it goes on")] },
  { name: "vary", label: "Vary a little", about: "The same plan and seed, with a share of other noise.", fields: () => [share("strength", "How much, 0 to 1", 0.3)] },
  { name: "cover", label: "Cover", task: "cover", about: "The same song in another style.", fields: () => [words("In which style"), share("audio_cover_strength", "How near to it, 0 to 1", 1)] },
  { name: "layer", label: "Add a layer", task: "lego", parts: "one", about: "One more track; drag across the waveform to have it in a part only.", fields: () => [track("Which track"), words("What it plays")] },
  { name: "stem", label: "Take a stem out", task: "extract", about: "One track of the song alone.", fields: () => [track("Which track")] },
];

export class Edits {
  /** @param {Job} job @param {import("./wave.js").Wave} wave @param {() => number} item @param {import("./songs.js").Library} library */
  constructor(job, wave, item, library) {
    this.job = job;
    this.wave = wave;
    this.item = item;
    this.library = library;
    /** @type {Verb | null} */
    this.verb = null;
    this.buttons = new Map(VERBS.map((verb) => [verb, h("button.quiet", { type: "button", "aria-expanded": "false", onclick: () => this.open(this.verb === verb ? null : verb) }, verb.label)]));
    this.parts = h("ol.parts", { "aria-label": "Parts" });
    this.problem = h("p.error", { role: "alert", hidden: true });
    this.send = h("button.primary", { type: "submit" }, "Make it");
    this.form = h("form.edit", { hidden: true, novalidate: true, onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); void this.make(); } });
    this.row = h("div.row", {}, [...this.buttons.values()]);
    wave.addEventListener("region", () => this.drawParts());
    void this.learn();
  }

  /** Grey, with the reason, what no renderer here can do. */
  async learn() {
    let pools;
    try {
      pools = (await call("v1/cluster")).pools.filter((/** @type {any} */ pool) => pool.role === "render" && pool.tasks);
    } catch { return; /* then the server says it when it is asked for */ }
    const models = [...new Set(pools.map((/** @type {any} */ pool) => pool.model))].join(", ");
    const greyed = [...this.buttons].filter(([{ task }]) => task && pools.length && !pools.some((/** @type {any} */ pool) => pool.tasks.includes(task))).map(([, button]) => button);
    for (const button of greyed) {
      button.disabled = true;
      button.setAttribute("aria-describedby", "why-not");
    }
    if (greyed.length) this.row.append(h("small", { id: "why-not" }, `Not with ${models}, but with a base model: ${greyed.map((button) => button.textContent.toLowerCase()).join(", ")}.`));
  }

  /** @param {Verb | null} verb */
  open(verb) {
    this.verb = verb;
    for (const [one, button] of this.buttons) button.setAttribute("aria-expanded", String(one === verb));
    this.wave.choosing = verb?.parts || "";
    this.wave.regions = [];
    this.wave.draw();
    this.form.hidden = !verb;
    if (!verb) return;
    this.say("");
    fill(this.form, h("p.muted", {}, verb.about),
      verb.parts && [this.parts, h("button.quiet.small", { type: "button", onclick: () => this.addPart() }, "Add a part by numbers")],
      h("div.fields", {}, verb.fields()), this.problem, h("div.row", {}, this.send, h("button.quiet", { type: "button", onclick: () => this.open(null) }, "Never mind")));
    this.drawParts();
  }

  addPart() {
    const last = this.wave.regions.at(-1)?.end ?? 0;
    const { duration } = this.wave;
    if (this.verb?.parts === "one") this.wave.regions = [];
    if (last < duration) this.wave.regions.push({ start: last, end: Math.min(duration, last + 10) });
    this.wave.draw();
    this.drawParts();
    this.parts.lastElementChild?.querySelector("input")?.focus();
  }

  drawParts() {
    if (!this.verb?.parts) return;
    const { regions, duration } = this.wave;
    const seconds = (/** @type {Region} */ region, /** @type {"start" | "end"} */ side, /** @type {string} */ label) => h("label", {}, label, h("input", {
      type: "number", min: 0, max: duration, step: 0.1, value: region[side].toFixed(1), onchange: (/** @type {any} */ e) => { region[side] = Number(e.target.value); this.wave.draw(); },
    }));
    fill(this.parts, regions.map((region) => h("li", {},
      h("div.row", {}, seconds(region, "start", "From, seconds"), seconds(region, "end", "to"),
        h("button.quiet.small", { type: "button", "aria-label": `Forget ${clock(region.start)} to ${clock(region.end)}`, onclick: () => { this.wave.regions = regions.filter((one) => one !== region); this.wave.draw(); this.drawParts(); } }, "×")),
      this.verb?.parts === "many" && h("label", {}, "What shall be there", h("input", { type: "text", maxlength: 2048, dir: "auto", placeholder: "as in the song", value: region.prompt || "", onchange: (/** @type {any} */ e) => { region.prompt = e.target.value.trim(); } })),
      this.verb?.parts === "many" && h("label", {}, "What is sung there", h("textarea", { rows: 2, maxlength: 8192, dir: "auto", placeholder: "as in the song", value: region.lyrics || "", onchange: (/** @type {any} */ e) => { region.lyrics = e.target.value.trim(); } })))));
  }

  /** @param {string} text */
  say(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
  }

  /** What the verb is sent. */
  body() {
    /** @type {Record<string, any>} */
    const body = { item: this.item() };
    this.form.querySelectorAll("[name]").forEach((/** @type {HTMLInputElement} */ control) => {
      const value = control.value.trim();
      if (value) body[control.name] = control.type === "number" ? Number(value) : value;
    });
    const parts = this.wave.regions.map(({ start, end, prompt, lyrics }) => ({ start: round(start), end: round(end), ...(prompt ? { prompt } : {}), ...(lyrics ? { lyrics } : {}) }));
    if (this.verb?.parts === "many") body.regions = parts;
    if (this.verb?.parts === "one" && parts.length) [body.repainting_start, body.repainting_end] = [parts[0].start, parts[0].end];
    return body;
  }

  async make() {
    if (!this.verb || this.send.disabled) return;
    this.say("");
    markWrong(this.form, []);
    this.send.disabled = true;
    try {
      const job = await edit(this.job.id, this.verb.name, this.body());
      this.library.put(job);
      for (const warning of job.warnings) toast(said(warning));
      this.open(null);
      location.hash = "#/";
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const left = markWrong(this.form, error.errors);
      this.say(error.errors.length ? left.map((one) => one.message).join("; ") : error.message);
    } finally {
      this.send.disabled = false;
    }
  }
}

/** @param {number} seconds */
const round = (seconds) => Math.round(seconds * 1000) / 1000;
