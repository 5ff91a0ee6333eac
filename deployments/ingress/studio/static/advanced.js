// Every field of a request that the form has no place for, from the API's schema: its words, its defaults, its limits.

import { call } from "./api.js";
import { field, fill, h } from "./dom.js";

/** Fields that have a place of their own in the form. */
export const OWN = [
  "prompt", "lyrics", "instrumental", "duration", "batch_size", "formats", "vocal_language", "bpm", "key_scale", "time_signature", "src_audio", "from", "task",
  "reference_audio", "repainting_start", "repainting_end", "plan", "webhook_url", "audio_codes", "timesteps",
];
/** @type {[string, (name: string) => boolean][]} */
const GROUPS = [
  ["Seeds", (n) => /seed/.test(n)],
  ["Planner", (n) => /^(lm_|use_cot|thinking|constrained)/.test(n)],
  ["Edits of source audio", (n) => /^(repaint|regions|audio_cover|cover_|chunk_mask|track_|global_caption|instruction|flow_edit|retake)/.test(n)],
  ["Sound file", (n) => /^(bitrate|normal|loudness|fade|mp3|sample_rate|cover_art)/.test(n)],
  ["Renderer", (n) => /^(model|steps|guidance|shift|infer|sampler|use_adg|cfg_|lora|dcw|velocity|latent)/.test(n)],
  ["Other", () => true],
];

const WRITTEN = /** @type {Record<string, string>} */ ({ Lora: "LoRA", Loras: "LoRAs", Cot: "CoT" });

export class Advanced {
  /** @param {() => void} changed */
  constructor(changed) {
    this.changed = changed;
    /** What was chosen, by field. @type {Record<string, any>} */
    this.values = {};
    /** @type {any} */
    this.schema = null;
    this.groups = h("div.groups", {}, "…");
    this.element = h("details", { ontoggle: () => { if (this.element.open) void this.learn(); } }, h("summary", {}, "Advanced"), this.groups);
  }

  /** @param {Record<string, any>} values */
  set(values) {
    this.values = values;
    this.draw();
  }

  async learn() {
    if (this.schema || this.asking) return;
    this.asking = true;
    try {
      this.schema = await call("v1/music/schema");
      this.draw();
    } catch (error) {
      this.groups.textContent = error instanceof Error ? error.message : String(error);
    }
    this.asking = false;
  }

  draw() {
    if (!this.schema) return;
    const properties = Object.entries(this.schema.properties).filter(([name]) => !OWN.includes(name));
    const left = new Set(properties.map(([name]) => name));
    fill(this.groups, GROUPS.map(([title, belongs]) => {
      const mine = properties.filter(([name]) => left.has(name) && belongs(name));
      mine.forEach(([name]) => left.delete(name));
      return mine.length ? h("fieldset", {}, h("legend", {}, title), h("div.grid", {}, mine.map(([name, facts]) => this.control(name, facts)))) : null;
    }));
  }

  /** One field of the schema. @param {string} name @param {any} facts */
  control(name, facts) {
    const kinds = [facts, ...(facts.anyOf || []), ...(facts.anyOf || []).flatMap((/** @type {any} */ k) => k.anyOf || [])].map((k) => (k.$ref ? this.schema.$defs[k.$ref.split("/").pop()] : k));
    const of = (/** @type {string} */ type) => kinds.find((k) => k.type === type);
    const choices = kinds.find((k) => k.enum)?.enum;
    const label = (facts.title || name).replace(/\b(Lm|Cfg|Adg|Dcw|Loras?|Cot)\b/g, (/** @type {string} */ word) => WRITTEN[word] || word.toUpperCase());
    const numbers = of("integer") && of("array"); // one, or one for each version
    const set = (/** @type {any} */ value) => { if (value === undefined) delete this.values[name]; else this.values[name] = value; this.changed(); };
    const now = this.values[name];
    const preset = facts.default === null || facts.default === undefined ? "checkpoint's own" : String(facts.default);
    let control;
    if (choices || of("boolean")) {
      const values = choices || [true, false];
      control = h("select", { onchange: (/** @type {any} */ e) => set(e.target.value === "" ? undefined : choices ? e.target.value : e.target.value === "true") }, h("option", { value: "" }, `default (${preset})`), values.map((/** @type {any} */ v) => h("option", { value: String(v), selected: now === v }, typeof v === "boolean" ? (v ? "yes" : "no") : v)));
    } else if ((of("number") || of("integer")) && !of("array")) {
      const n = of("integer") || of("number");
      const least = n.minimum ?? n.exclusiveMinimum;
      control = h("input", { type: "number", min: least, max: n.maximum, step: n.type === "integer" ? 1 : "any", placeholder: preset, value: now ?? "", onchange: (/** @type {any} */ e) => set(e.target.value === "" ? undefined : Number(e.target.value)) });
    } else {
      const structured = !numbers && (of("array") || of("object"));
      const read = (/** @type {string} */ text) => { if (numbers) { const all = text.split(/[\s,[\]]+/).filter(Boolean).map(Number); return all.length === 1 ? all[0] : all; } return structured ? JSON.parse(text) : text; };
      control = h("input", { type: "text", placeholder: numbers ? "a number, or 1, 2, 3" : structured ? "JSON" : preset, value: now === undefined ? "" : structured ? JSON.stringify(now) : numbers ? [now].flat().join(", ") : now, onchange: (/** @type {any} */ e) => { const text = e.target.value; if (!text) { set(undefined); return; } try { set(read(text)); } catch { set(text); } } });
    }
    return field(label, control, facts.description, name);
  }
}
