// One song: hear it, see what was made and why, and make something of it.

import { ACTIVE, Refused, at, call, getJob, purgeJob, short } from "./api.js";
import { bytes, clock, field, fill, h, moment, toast } from "./dom.js";
import { player, playable, titleOf } from "./player.js";
import { describe } from "./songs.js";
import { Wave, peaksOf } from "./wave.js";

/** @typedef {import("./api.js").Job} Job */

/**
 * @param {HTMLElement} main
 * @param {string} id
 * @param {import("./songs.js").Library} library
 * @param {AbortSignal} gone
 */
export async function showSong(main, id, library, gone) {
  fill(main, h("p.muted", {}, "Looking …"));
  let job;
  try {
    job = await getJob(id);
  } catch (error) {
    if (!gone.aborted) fill(main, h("h1", {}, "Song"), h("p.error", { role: "alert" }, error instanceof Refused ? error.message : String(error)), h("p", {}, h("button", { type: "button", onclick: () => void showSong(main, id, library, gone) }, "Try again"), " ", h("a", { href: "#/" }, "Back to the songs")));
    return;
  }
  if (gone.aborted) return;
  const view = new SongView(main, job, library, gone);
  library.put(job);
  document.addEventListener("job", (event) => { const now = /** @type {CustomEvent} */ (event).detail; if (now.id === id) void view.heard(now); }, { signal: gone });
  document.addEventListener("playing-at", (event) => view.tick(/** @type {CustomEvent} */ (event).detail), { signal: gone });
  document.addEventListener("player-changed", () => view.buttons(), { signal: gone });
}

class SongView {
  /** @param {HTMLElement} main @param {Job} job @param {import("./songs.js").Library} library @param {AbortSignal} gone another view is shown */
  constructor(main, job, library, gone) {
    this.gone = gone;
    this.main = main;
    this.library = library;
    this.job = job;
    this.item = player.job?.id === job.id ? player.item : 0;
    this.wave = new Wave();
    this.key = JSON.stringify([job.state, job.stage, /** @type {any} */ (job).title, short(job).cancel_requested]);
    this.line = h("p.muted", {});
    this.wave.addEventListener("seek", (event) => void this.seek(/** @type {CustomEvent} */ (event).detail.time));
    this.wave.addEventListener("region", () => this.verbs());
    this.draw();
  }

  /** News of the job, in few words: what only the whole view has is asked for when it has moved on. @param {import("./api.js").Short} now */
  async heard(now) {
    const key = JSON.stringify([now.state, now.stage, now.title, now.cancel_requested]);
    if (key === this.key) { this.line.textContent = describe(now); return; }
    this.key = key;
    try {
      await this.again();
    } catch { /* the next news may do */ }
  }

  draw() {
    const { job } = this;
    const items = job.result?.items || [];
    const meta = job.plan?.metadata || {};
    const request = job.request;
    const made = job.state === "succeeded" && items.length > 0;
    this.play = h("button.play", { type: "button", onclick: () => void player.play(short(job), this.item) });
    this.versions = h("span.versions", {});
    this.verbBox = h("div.verbs", {});
    const lyrics = request.lyrics || "";
    this.lyrics = h("pre.lyrics", { dir: "auto" }, lyrics);
    const few = short(job);
    this.line.textContent = describe(few);
    fill(
      this.main,
      h("p", {}, h("a", { href: "#/" }, "‹ Songs")),
      h("h1", { dir: "auto" }, titleOf(few)),
      this.line,
      job.notice && h("p.notice", {}, job.notice),
      job.error && h("p.error", { role: "alert" }, job.error.message),
      job.warnings.length > 0 && h("ul.warnings", { "aria-label": "What was changed" }, job.warnings.map((w) => h("li", {}, said(w)))),
      ACTIVE.includes(job.state) && h("p", {}, h("button", { type: "button", disabled: job.cancel_requested, onclick: () => void this.library.cancel(job) }, job.cancel_requested ? "Stopping …" : "Cancel")),
      made && h("section.hear", { "aria-label": "Listen" }, h("div.row", {}, this.play, this.versions), this.wave, h("p.muted.small", {}, "Drag across the waveform after pressing ", h("em", {}, "Choose a part"), " to work on that part alone.")),
      h("div.row.acts", {},
        h("button", { type: "button", onclick: () => this.remake("again") }, "Again, another seed"),
        !ACTIVE.includes(job.state) && h("button.quiet", { type: "button", onclick: () => this.remake("same") }, made ? "Exact replay" : "Try again"),
        h("button.quiet", { type: "button", onclick: () => this.remake("edit") }, "Change and make"),
        made && h("button.quiet", { type: "button", onclick: () => this.remake("source") }, "Use as source"),
        made && h("button.quiet", { type: "button", onclick: () => this.remake("reference") }, "Use as reference"),
        job.plan && h("button.quiet", { type: "button", onclick: () => this.remake("plan") }, "Edit its plan"),
        h("button.quiet", { type: "button", onclick: () => this.rename() }, "Rename"),
        made && h("button.quiet.heart", { type: "button", "aria-pressed": String(!!few.favourite), onclick: () => void this.like() }, few.favourite ? "♥ Favourite" : "♡ Favourite")),
      this.verbBox,
      made && h("section", {}, h("h2", {}, "Files"), h("ul.files", {}, items.map((/** @type {any} */ item, /** @type {number} */ i) => item.audio.map((/** @type {any} */ file) =>
        h("li", {}, items.length > 1 && `Version ${i + 1}: `, h("a", { href: at(file.url), download: `${fileName(job)}-${i + 1}.${file.format.replace(/\d+$/, "")}` }, file.format.toUpperCase()), ` ${bytes(file.bytes)} `,
          h("button.quiet.small", { type: "button", onclick: () => void copy(at(file.url)) }, "Copy link")))))),
      h("div.columns", {},
        lyrics && h("section", {}, h("h2", {}, "Lyrics"), this.lyrics),
        h("section", {}, h("h2", {}, "What was made"), h("dl.facts", {},
          fact("Description", meta.caption || request.prompt), fact("Wish", meta.caption && meta.caption !== request.prompt ? request.prompt : ""),
          fact("Length", items[0] ? clock(items[0].duration) : meta.duration && clock(meta.duration)), fact("Tempo", meta.bpm && `${meta.bpm} bpm`), fact("Key", meta.keyscale), fact("Meter", meta.timesignature),
          fact("Language", meta.language), fact("Task", request.task), fact("Seeds", items.map((/** @type {any} */ i) => i.seed).join(", ") || (job.seeds || []).join(", ")), fact("Model", job.result?.renderer), fact("Planner", job.plan?.model),
          fact("Card", job.result?.device), fact("Asked", moment(job.created_at)), fact("Took", job.usage && `${job.usage.total_s.toFixed(1)} s, of it planner ${job.usage.device_s.plan} s and renderer ${job.usage.device_s.render} s`),
          fact("Begun", job.attempts > 1 ? `${job.attempts} times` : "")))),
      h("details", {}, h("summary", {}, "Everything the server says of it (JSON)"), h("pre.json", {}, JSON.stringify(job, null, 2))),
      h("p", {}, !ACTIVE.includes(job.state) && h("button.danger", { type: "button", onclick: () => void this.remove() }, "Delete song and audio")),
    );
    if (made) this.load();
    this.buttons();
    this.verbs();
  }

  load() {
    const item = this.item;
    this.wave.show(0, this.job.result.items[item].duration);
    void peaksOf(this.job.id, item).then((found) => { if (item === this.item) { this.wave.peaks = found; this.wave.draw(); } });
    void this.loadLyrics();
  }

  /** Lines that follow the song, where it was asked for `timestamps`; their section tags are marks on the waveform. */
  async loadLyrics() {
    const item = this.item;
    /** @type {{at: number, end: number, element: HTMLElement}[]} */
    this.lines = [];
    this.wave.marks = [];
    const files = this.job.result.items[item].files || [];
    if (!files.some((/** @type {any} */ file) => file.kind === "lyrics")) return;
    let timed;
    try {
      timed = await call(`v1/jobs/${encodeURIComponent(this.job.id)}/files/${item}.lyrics`);
    } catch { return; /* the lyrics stand there without times */ }
    if (item !== this.item || this.gone.aborted) return;
    const lines = timed.sentences.map((/** @type {any} */ line) => ({
      at: line.start, end: line.end, element: h("button.line", { type: "button", title: `Play from ${clock(line.start)}`, onclick: () => void this.seek(line.start) }, line.text),
    }));
    this.wave.marks = timed.sentences.filter((/** @type {any} */ line) => line.text.startsWith("[")).map((/** @type {any} */ line) => ({ at: line.start, label: line.text }));
    this.lines = lines;
    fill(this.lyrics, lines.map((/** @type {any} */ line) => line.element));
    this.wave.draw();
  }

  buttons() {
    if (!this.play) return;
    const on = player.plays(this.job.id);
    this.play.textContent = on ? "❚❚" : "▶";
    this.play.setAttribute("aria-label", on ? "Pause" : "Play");
    const items = this.job.result?.items || [];
    if (player.job?.id === this.job.id && player.item !== this.item) { this.item = player.item; this.load(); }
    fill(this.versions, items.length > 1 && items.map((/** @type {any} */ item, /** @type {number} */ i) => h("button.version", { type: "button", "aria-pressed": String(i === this.item), onclick: () => { this.item = i; this.load(); void player.play(short(this.job), i); } }, `${i + 1} · ${item.seed}`)));
  }

  /** @param {number} time */
  async seek(time) {
    if (player.job?.id !== this.job.id || player.item !== this.item) await player.play(short(this.job), this.item);
    player.audio.currentTime = time;
    player.toggle(true);
  }

  /** @param {{id?: string, item: number, time: number}} now */
  tick(now) {
    if (now.id !== this.job.id || now.item !== this.item) return;
    this.wave.show(now.time);
    for (const line of this.lines || []) {
      const sung = now.time >= line.at && now.time < line.end;
      if (sung !== line.element.hasAttribute("aria-current")) line.element.toggleAttribute("aria-current", sung);
    }
  }

  /** What can be made of this song, by region where one is drawn. */
  verbs() {
    const { job, wave } = this;
    const item = job.result?.items?.[this.item];
    if (job.state !== "succeeded" || !item) return;
    const region = wave.region;
    const source = { src_audio: playable(short(job), this.item) };
    const where = region ? `${clock(region.start)} to ${clock(region.end)}` : "";
    const choose = h("button.quiet", { type: "button", "aria-pressed": String(wave.choosing), onclick: () => { wave.choosing = !wave.choosing; if (!wave.choosing) wave.region = null; wave.draw(); this.verbs(); } }, wave.choosing ? "Forget the part" : "Choose a part");
    const start = h("input", { type: "number", min: 0, max: item.duration, step: 0.1, value: region ? region.start.toFixed(1) : "", onchange: () => this.typed(start, end) });
    const end = h("input", { type: "number", min: 0, max: item.duration, step: 0.1, value: region ? region.end.toFixed(1) : "", onchange: () => this.typed(start, end) });
    fill(this.verbBox, h("h2", {}, "Make something of it"),
      h("div.row", {}, choose, wave.choosing && field("From, seconds", start), wave.choosing && field("to", end)),
      h("div.row", {},
        verb(region ? `Replace ${where}` : "Replace a part", region ? "" : "choose a part first", () => this.work({ ...source, task: "repaint", repainting_start: region?.start, repainting_end: region?.end })),
        verb("Extend by 30 s", "", () => this.work({ ...source, task: "repaint", repainting_start: item.duration, repainting_end: item.duration + 30 })),
        verb("30 s before", "", () => this.work({ ...source, task: "repaint", repainting_start: -30, repainting_end: 0 })),
        verb("Cover", "", () => this.work({ ...source, task: "cover" })),
      ));
  }

  /** @param {HTMLInputElement} start @param {HTMLInputElement} end */
  typed(start, end) {
    const [from, to] = [Number(start.value), Number(end.value)];
    if (start.value && end.value && to > from) { this.wave.region = { start: from, end: to }; this.wave.draw(); this.verbs(); }
  }

  /** @param {Record<string, any>} changes */
  work(changes) {
    document.dispatchEvent(new CustomEvent("remake", { detail: { job: this.job, how: "work", changes } }));
  }

  /** @param {string} how */
  remake(how) {
    document.dispatchEvent(new CustomEvent("remake", { detail: { job: this.job, how, item: this.item } }));
  }

  rename() {
    const title = prompt("What shall it be called? (empty: by its description)", /** @type {any} */ (this.job).title || "");
    if (title !== null) void this.library.change(this.job.id, { title: title.trim() || null });
  }

  async like() {
    await this.library.change(this.job.id, { favourite: !short(this.job).favourite });
    await this.again();
  }

  /** Look at the job again, and show it unless another view is shown by now. */
  async again() {
    const job = await getJob(this.job.id);
    if (this.gone.aborted) return;
    this.job = job;
    this.draw();
  }

  async remove() {
    if (!confirm("Delete this song with its audio? This cannot be undone.")) return;
    try {
      await purgeJob(this.job.id);
      this.library.drop(this.job.id);
      toast("Deleted.");
      location.hash = "#/";
    } catch (error) {
      toast(error instanceof Error ? error.message : String(error), "bad");
    }
  }
}

/** @param {string} name @param {string} why greyed, where there is a reason @param {() => void} act */
const verb = (name, why, act) => h("button.quiet", { type: "button", disabled: !!why, title: why || null, onclick: act }, name);
/** @param {string} name @param {any} value */
const fact = (name, value) => (value ? h("div", {}, h("dt", {}, name), h("dd", { dir: "auto" }, value)) : null);

/** A warning in words. @param {any} warning */
export function said(warning) {
  if (typeof warning === "string") return warning;
  const { field: name, asked, given, reason } = warning;
  const change = JSON.stringify(asked) !== JSON.stringify(given) ? `${name}: ${plain(asked)} became ${plain(given)}` : name || "";
  return [change, reason].filter(Boolean).join(": ");
}
/** @param {any} value */
const plain = (value) => (value === null ? "nothing" : typeof value === "object" ? JSON.stringify(value).slice(0, 80) : String(value).slice(0, 80));

/** @param {Job} job */
const fileName = (job) => titleOf(short(job)).replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || job.id;

/** @param {string} text */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied. The link works without a key until it expires (a day, unless the server says otherwise).");
  } catch {
    prompt("Copy this link:", text);
  }
}
