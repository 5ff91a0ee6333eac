// The form: a wish is enough; everything else is there for those who want it, with the server's own words and limits.

import { Advanced, OWN } from "./advanced.js";
import { Refused, call, getJob, short, submit } from "./api.js";
import { about, bytes, clock, directionOf, field, fill, h, markWrong, toast } from "./dom.js";
import { titleOf } from "./player.js";
import { said } from "./song.js";

/** @typedef {import("./api.js").Job} Job */

const TAGS = ["Intro", "Verse", "Pre-Chorus", "Chorus", "Bridge", "Solo", "Outro", "Instrumental"];
const FORMATS = [["mp3", "MP3"], ["wav", "WAV"], ["flac", "FLAC"], ["opus", "Opus"], ["aac", "AAC"]];
const TASKS = [["cover", "Cover: the same song, anew"], ["repaint", "Replace a part of it"], ["lego", "Add a layer"], ["extract", "Take a stem out"], ["complete", "Complete it"], ["text2music", "Only by its text"]];

export class Maker {
  /** @param {import("./songs.js").Library} library */
  constructor(library) {
    this.library = library;
    /** What is sent besides the fields that are shown. @type {Record<string, any>} */
    this.kept = {};
    this.advanced = new Advanced(() => this.changed());
    this.limits = { duration: 600, batch: 8 };
    this.build();
    document.addEventListener("remake", (event) => void this.remake(/** @type {CustomEvent} */ (event).detail));
  }

  build() {
    const area = (/** @type {any} */ more) => h("textarea", { ...more });
    this.wish = area({ rows: 3, maxlength: 2048, dir: "auto", placeholder: "A slow waltz about rain, female voice, piano and strings", oninput: () => this.changed() });
    this.wish.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); void this.make(); }
    });
    this.lyrics = area({ rows: 10, maxlength: 8192, placeholder: "[Verse]\nWhat is sung. Empty: the song is instrumental.", oninput: () => { this.count(); this.changed(); } });
    this.counter = h("small", {});
    this.instrumental = h("input", { type: "checkbox", onchange: () => { this.lyrics.disabled = this.instrumental.checked; this.changed(); } });
    this.language = h("input", { type: "text", list: "languages", maxlength: 40, placeholder: "auto", onchange: () => this.changed() });
    this.duration = h("input", { type: "text", inputmode: "decimal", placeholder: "auto", maxlength: 20, onchange: () => this.changed() });
    this.batch = h("input", { type: "number", min: 1, max: 8, value: "1", onchange: () => this.changed() });
    this.format = h("select", { onchange: () => this.changed() }, FORMATS.map(([value, text]) => h("option", { value }, text)));
    this.bpm = h("input", { type: "text", inputmode: "numeric", maxlength: 20, placeholder: "auto", onchange: () => this.changed() });
    this.keyScale = h("input", { type: "text", maxlength: 40, placeholder: "auto", onchange: () => this.changed() });
    this.meter = h("select", { onchange: () => this.changed() }, [["", "auto"], ["2", "2/4"], ["3", "3/4"], ["4", "4/4"], ["6", "6/8"]].map(([value, text]) => h("option", { value }, text)));
    this.quote = h("p.muted.quote", { "aria-live": "polite" });
    this.problem = h("p.error", { role: "alert", hidden: true });
    this.material = h("div.material", {});
    this.planBox = h("div.plan", { hidden: true });
    this.send = h("button.primary", { type: "submit" }, "Make a song");
    this.write = h("button", { type: "button", onclick: () => void this.writeOut() }, "Write it out");
    this.planFirst = h("button", { type: "button", onclick: () => void this.make("plan") }, "Plan first");
    const drop = h("input", { type: "file", accept: "audio/*,.wav,.mp3,.flac,.ogg,.opus,.m4a,.aac", onchange: () => { if (drop.files?.[0]) void this.upload(drop.files[0]); drop.value = ""; } });
    this.details = h("details.words", {}, h("summary", {}, "Lyrics, length and more"),
      h("div.tags", { role: "group", "aria-label": "Section tags" }, TAGS.map((tag) => h("button.quiet.small", { type: "button", onclick: () => this.tag(tag) }, `[${tag}]`))),
      field("Lyrics", this.lyrics, undefined, "lyrics"), this.counter,
      h("label.check", {}, this.instrumental, " Instrumental: nobody sings"),
      h("div.grid", {}, field("Length", this.duration, "seconds or 3:30", "duration"), field("Versions", this.batch, "to choose from", "batch_size"), field("Format", this.format, undefined, "formats"), field("Language", this.language, undefined, "vocal_language"),
        field("Tempo", this.bpm, "beats a minute", "bpm"), field("Key", this.keyScale, "such as A minor", "key_scale"), field("Meter", this.meter, undefined, "time_signature")),
      h("div.field", { data: { field: "src_audio" } }, h("label.drop", {}, h("span", {}, "Drop an audio file here, or choose one: as source or as an example of style"), drop), h("em.wrong", { role: "alert", hidden: true })),
      this.advanced.element);
    this.form = h("form.make", { novalidate: true, onsubmit: (/** @type {Event} */ e) => { e.preventDefault(); void this.make(); } },
      h("h1", {}, "What shall it be?"), field("Describe the song", this.wish, undefined, "prompt"), this.material, this.planBox,
      h("div.row", {}, this.send, this.write, this.planFirst, h("button.quiet", { type: "button", onclick: () => this.clear() }, "Clear")),
      this.quote, this.problem, this.details,
      h("datalist", { id: "languages" }, ["en", "zh", "ja", "ko", "de", "fr", "es", "it", "pt", "ru", "ar", "hi", "unknown"].map((value) => h("option", { value }))));
    this.form.addEventListener("dragover", (/** @type {DragEvent} */ e) => { e.preventDefault(); this.form.classList.add("over"); });
    this.form.addEventListener("dragleave", () => this.form.classList.remove("over"));
    this.form.addEventListener("drop", (/** @type {DragEvent} */ e) => { e.preventDefault(); this.form.classList.remove("over"); const file = e.dataTransfer?.files[0]; if (file) void this.upload(file); });
    this.form.addEventListener("keydown", (/** @type {KeyboardEvent} */ e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); void this.make(); } });
    this.count();
  }

  /** What this fleet can do, as its renderers say. @param {any} cluster */
  learn(cluster) {
    const limits = cluster.pools.filter((/** @type {any} */ p) => p.role === "render" && p.limits).map((/** @type {any} */ p) => p.limits);
    if (!limits.length) return;
    this.limits.duration = Math.max(...limits.map((/** @type {any} */ l) => l.max_duration || 600));
    this.limits.batch = Math.max(...limits.map((/** @type {any} */ l) => l.max_batch_size || l.max_batch || 8));
    this.batch.max = String(this.limits.batch);
    const hint = this.duration.parentElement?.querySelector("small");
    if (hint) hint.textContent = `seconds or 3:30; here up to ${clock(this.limits.duration)}`;
  }

  /** The request as the form has it. */
  request() {
    /** @type {Record<string, any>} */
    const body = { ...this.kept, ...this.advanced.values, formats: [this.format.value] };
    const text = { prompt: this.wish.value.trim(), vocal_language: this.language.value.trim(), duration: this.duration.value.trim(), bpm: this.bpm.value.trim(), key_scale: this.keyScale.value.trim(), time_signature: this.meter.value };
    for (const [name, value] of Object.entries(text)) if (value) body[name] = value; else delete body[name];
    if (this.instrumental.checked) body.instrumental = true;
    else if (this.lyrics.value.trim()) body.lyrics = this.lyrics.value;
    const versions = Number(this.batch.value);
    if (versions !== 1) body.batch_size = versions;
    if (this.planned) body.plan = { metadata: { ...this.planned.metadata, ...planChanges(this.planBox) }, ...(this.planKeeps?.checked ? { codes: this.planned.codes } : {}) };
    return body;
  }

  /** @param {"song" | "plan"} [kind] */
  async make(kind = "song") {
    if (this.send.disabled) return;
    this.say("");
    markWrong(this.form, []);
    const body = this.request();
    if (!body.prompt && !body.src_audio && !body.plan) { this.wish.focus(); this.say("Say in a few words what it shall be."); return; }
    this.send.disabled = this.planFirst.disabled = true;
    this.send.textContent = "Sending …";
    try {
      const job = await submit(kind === "plan" ? "v1/plans" : "v1/music", body);
      this.library.put(job);
      for (const warning of job.warnings) toast(said(warning));
      if (kind === "plan") this.waitForPlan(job.id);
      if (location.hash !== "#/" && location.hash !== "") location.hash = "#/";
    } catch (error) {
      this.refused(error);
    } finally {
      this.send.textContent = "Make a song";
      if (!this.pause) this.send.disabled = this.planFirst.disabled = false;
    }
  }

  /** @param {unknown} error */
  refused(error) {
    if (!(error instanceof Refused)) { this.say(String(error)); return; }
    const left = markWrong(this.form, error.errors);
    const text = error.errors.length && !left.length ? "" : error.errors.length ? left.map((e) => (e.field && !e.message.startsWith(e.field) ? `${e.field}: ${e.message}` : e.message)).join("; ") : error.message;
    if (error.status === 429 && error.retryAfter) this.countDown(error.retryAfter, text || error.message);
    else this.say(text);
  }

  /** A limit: say why, and until when. @param {number} seconds @param {string} why */
  countDown(seconds, why) {
    let left = Math.ceil(seconds);
    clearInterval(this.pause);
    const show = () => this.say(`${why} (again in ${about(left)})`);
    show();
    this.send.disabled = true;
    this.pause = setInterval(() => {
      left -= 1;
      if (left > 0) { show(); return; }
      clearInterval(this.pause);
      this.pause = undefined;
      this.send.disabled = this.planFirst.disabled = false;
      this.say("You can send it again now.");
    }, 1000);
  }

  /** @param {string} text */
  say(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
  }

  /** The planner writes caption, lyrics and metadata, to be edited. */
  async writeOut() {
    const wish = this.wish.value.trim();
    const lyrics = this.lyrics.value.trim();
    if (!wish && !lyrics) { this.wish.focus(); this.say("Say in a few words what it shall be."); return; }
    this.say("");
    this.write.disabled = true;
    this.write.textContent = "Writing …";
    try {
      const sample = lyrics ? await call("v1/format", { method: "POST", body: { caption: wish, lyrics } }) : await call("v1/inspire", { method: "POST", body: { query: wish, instrumental: this.instrumental.checked, ...(this.language.value.trim() ? { vocal_language: this.language.value.trim() } : {}) } });
      this.wish.value = sample.caption || wish;
      this.lyrics.value = sample.instrumental ? "" : sample.lyrics || this.lyrics.value;
      this.instrumental.checked = !!sample.instrumental;
      this.lyrics.disabled = this.instrumental.checked;
      this.duration.value = sample.duration ? String(sample.duration) : "";
      this.bpm.value = sample.bpm || "";
      this.keyScale.value = sample.keyscale || "";
      this.meter.value = sample.timesignature || "";
      this.language.value = sample.language && sample.language !== "unknown" ? sample.language : "";
      this.details.open = true;
      this.count();
      this.changed();
      if (sample.notice) toast(sample.notice);
    } catch (error) {
      this.refused(error);
    } finally {
      this.write.disabled = false;
      this.write.textContent = "Write it out";
    }
  }

  /** @param {string} id */
  waitForPlan(id) {
    const heard = (/** @type {Event} */ event) => {
      const job = /** @type {CustomEvent} */ (event).detail;
      if (job.id !== id || !job.finished_at) return;
      document.removeEventListener("job", heard);
      void getJob(id).then((whole) => { if (whole.plan) this.usePlan(whole); });
    };
    document.addEventListener("job", heard);
    toast("The planner writes. Its plan will stand here to be changed.");
  }

  /** @param {Job} job */
  usePlan(job) {
    this.planned = job.plan;
    const meta = job.plan.metadata;
    this.planKeeps = h("input", { type: "checkbox", checked: (job.plan.codes || []).length > 0 });
    const text = (/** @type {string} */ name, /** @type {string} */ label) => field(label, h("input", { type: "text", value: meta[name] ?? "", data: { plan: name } }));
    this.planBox.hidden = false;
    fill(this.planBox, h("h2", {}, "The plan"), field("Description", h("textarea", { rows: 3, value: meta.caption ?? "", data: { plan: "caption" } })),
      h("div.grid", {}, text("bpm", "Tempo"), text("keyscale", "Key"), text("timesignature", "Meter"), text("duration", "Length, seconds"), text("language", "Language")),
      this.planKeeps.checked && h("label.check", {}, this.planKeeps, ` Keep its ${job.plan.codes[0]?.length || 0} codes, as far as they fit`),
      h("button.quiet", { type: "button", onclick: () => this.noPlan() }, "Drop the plan"));
    this.changed();
  }

  noPlan() {
    this.planned = null;
    this.planBox.hidden = true;
    this.planBox.replaceChildren();
    this.changed();
  }

  /** @param {string} tag */
  tag(tag) {
    const { selectionStart: at, value } = this.lyrics;
    const before = value.slice(0, at);
    const text = `${before && !before.endsWith("\n") ? "\n" : ""}${before ? "\n" : ""}[${tag}]\n`;
    this.lyrics.setRangeText(text, at, at, "end");
    this.lyrics.focus();
    this.count();
    this.changed();
  }

  count() {
    this.lyrics.dir = directionOf(this.lyrics.value);
    this.counter.textContent = `${this.lyrics.value.length} of 8192 characters`;
  }

  /** @param {File} file */
  async upload(file) {
    const data = new FormData();
    data.append("file", file);
    fill(this.material, h("p.muted", {}, `Uploading ${file.name} (${bytes(file.size)}) …`));
    try {
      const stored = await call("v1/files", { method: "POST", body: data });
      this.useAudio(stored.id, `${stored.name}, ${clock(stored.duration)}`, "source");
    } catch (error) {
      fill(this.material);
      this.details.open = true;
      this.refused(error);
    }
  }

  /** @param {string} source what the API takes @param {string} name @param {"source" | "reference"} as */
  useAudio(source, name, as) {
    if (as === "source") { this.kept.src_audio = source; this.kept.task = this.kept.task || "cover"; } else this.kept.reference_audio = [source];
    const role = h("select", { "aria-label": "What it is for", onchange: () => { delete this.kept.src_audio; delete this.kept.task; delete this.kept.reference_audio; this.useAudio(source, name, role.value); } }, h("option", { value: "source", selected: as === "source" }, "source"), h("option", { value: "reference", selected: as === "reference" }, "example of style"));
    const task = h("select", { "aria-label": "What to do with it", onchange: () => { this.kept.task = task.value; this.useAudio(source, name, as); } }, TASKS.map(([value, text]) => h("option", { value, selected: value === this.kept.task }, text)));
    const number = (/** @type {string} */ key, /** @type {string} */ label) => field(label, h("input", { type: "number", step: 0.1, value: this.kept[key] ?? "", onchange: (/** @type {any} */ e) => { if (e.target.value === "") delete this.kept[key]; else this.kept[key] = Number(e.target.value); this.changed(); } }), undefined, key);
    fill(this.material, h("div.chip", {}, h("strong", { dir: "auto" }, name), role, as === "source" && task,
      as === "source" && ["repaint", "lego"].includes(this.kept.task) && h("div.grid", {}, number("repainting_start", "From, seconds"), number("repainting_end", "to (empty: the end)")),
      h("button.quiet", { type: "button", onclick: () => this.noAudio() }, "Remove")));
    this.changed();
  }

  noAudio() {
    for (const name of ["src_audio", "task", "reference_audio", "repainting_start", "repainting_end"]) delete this.kept[name];
    fill(this.material);
    this.changed();
  }

  clear() {
    for (const box of [this.wish, this.lyrics, this.language, this.duration, this.bpm, this.keyScale]) box.value = "";
    this.meter.value = "";
    this.batch.value = "1";
    this.instrumental.checked = this.lyrics.disabled = false;
    this.kept = {};
    this.advanced.set({});
    fill(this.material);
    this.noPlan();
    this.say("");
    markWrong(this.form, []);
    this.count();
  }

  /**
   * Something of a song: the same again, changed, or with it.
   * @param {{job: Job, how: string, item?: number}} asked
   */
  async remake({ job, how, item = 0 }) {
    const request = job.request;
    if (how === "same" || how === "again") {
      const body = { ...request };
      if (how === "again") { delete body.seed; delete body.lm_seed; }
      try {
        const made = await submit(job.kind === "plan" ? "v1/plans" : "v1/music", body);
        this.library.put(made);
        toast(how === "same" ? "Made once more, as it was." : "Made again, with another seed.");
        location.hash = "#/";
      } catch (error) {
        toast(error instanceof Error ? error.message : String(error), "bad");
      }
      return;
    }
    this.clear();
    location.hash = "#/";
    if (how === "edit") this.load(request);
    if (how === "plan") { this.load(request); this.usePlan(job); }
    if (how === "source" || how === "reference") this.useAudio(`song:${job.id}/${item}`, titleOf(short(job)), how);
    this.wish.focus();
    this.form.scrollIntoView({ block: "start" });
  }

  /** @param {Record<string, any>} request */
  load(request) {
    const r = { ...request };
    this.wish.value = r.prompt || "";
    this.instrumental.checked = r.instrumental === true || r.lyrics === "[Instrumental]";
    this.lyrics.value = this.instrumental.checked ? "" : r.lyrics || "";
    this.lyrics.disabled = this.instrumental.checked;
    this.duration.value = r.duration ?? "";
    this.batch.value = String(r.batch_size || 1);
    this.format.value = FORMATS.some(([f]) => f === r.formats?.[0]) ? r.formats[0] : "mp3";
    this.language.value = r.vocal_language || "";
    this.bpm.value = r.bpm ?? "";
    this.keyScale.value = r.key_scale || "";
    this.meter.value = r.time_signature ? String(r.time_signature) : "";
    const rest = Object.fromEntries(Object.entries(r).filter(([name]) => !OWN.includes(name) && name !== "seed"));
    this.advanced.set(rest);
    this.kept = Object.fromEntries(Object.entries(r).filter(([name]) => ["src_audio", "task", "reference_audio", "repainting_start", "repainting_end", "plan", "audio_codes", "timesteps"].includes(name)));
    if (Object.keys(rest).length || this.lyrics.value) this.details.open = true;
    if (this.kept.src_audio) this.useAudio(this.kept.src_audio, "its source", "source");
    this.count();
    this.changed();
  }

  /** Something changed: what would it take? */
  changed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => void this.ask(), 600);
  }

  async ask() {
    const body = this.request();
    if (!body.prompt && !body.src_audio && !body.plan) { this.quote.textContent = ""; return; }
    this.asked?.abort();
    this.asked = new AbortController();
    try {
      const quote = await call("v1/quote", { method: "POST", body, signal: this.asked.signal });
      const parts = [quote.eta_s !== null && `done in about ${about(quote.eta_s)}`, quote.position > 1 && `${quote.position - 1} before it`, quote.cost && `${Math.round(quote.cost.audio_s)} s of sound, ${about(quote.cost.plan_s + quote.cost.render_s)} of work`];
      fill(this.quote, parts.filter(Boolean).join(" · "), (quote.warnings || []).map((/** @type {any} */ w) => h("span.warn", {}, said(w))));
      markWrong(this.form, []);
    } catch (error) {
      if (!(error instanceof Refused)) return;
      this.quote.textContent = "";
      if (error.status === 422 || error.status === 400) { const at = document.activeElement; this.refused(error); if (at instanceof HTMLElement) at.focus(); }
    }
  }
}

/** What was changed in the plan's form. @param {HTMLElement} box */
function planChanges(box) {
  /** @type {Record<string, any>} */
  const changes = {};
  box.querySelectorAll("[data-plan]").forEach((control) => {
    const { value, dataset } = /** @type {HTMLInputElement} */ (control);
    const name = /** @type {string} */ (dataset.plan);
    changes[name] = value.trim() === "" ? null : ["bpm", "duration"].includes(name) ? Number(value) : value.trim();
  });
  return changes;
}
