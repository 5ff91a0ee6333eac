// One song: hear it, see what was made and why, and make something of it.

import { ACTIVE, Refused, at, call, getJob, purgeJob, short } from "./api.js";
import { bytes, clock, directionOf, fill, h, moment, toast } from "./dom.js";
import { Edits } from "./edits.js";
import { player, titleOf, versionsOf } from "./player.js";
import { canBeHeard, describe } from "./songs.js";
import { Wave, peaksOf } from "./wave.js";

/** @typedef {import("./api.js").Job} Job */

/** @type {Record<string, [string, string]>} */
const BESIDE = { lrc: ["Timed lyrics", "lrc"], latent: ["Latents", "safetensors"] };
const DONE = { extend: "An extension", replace: "Parts replaced", cover: "A cover", vary: "A variation", layer: "A layer added", stem: "A stem" };

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
    if (!gone.aborted) fill(main, h("h1", {}, "Song"), h("p.error", { role: "alert" }, error instanceof Refused ? error.message : String(error)), h("p", {}, !(error instanceof Refused && error.status === 404) && [h("button", { type: "button", onclick: () => void showSong(main, id, library, gone) }, "Try again"), " "], h("a", { href: "#/" }, "Back to the songs")));
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
    const active = ACTIVE.includes(job.state);
    const made = job.state === "succeeded" && items.length > 0;
    const few = short(job);
    if (made && !this.edits) this.edits = new Edits(job, this.wave, () => this.item, this.library);
    this.play = h(`button.play${made ? "" : ".live"}`, { type: "button", onclick: () => void player.play(few, this.item) });
    this.versions = h("span.versions", {});
    const lyrics = request.lyrics || "";
    this.lyrics = h("pre.lyrics", { dir: directionOf(lyrics) }, lyrics);
    this.line.textContent = describe(few);
    const act = (/** @type {string} */ text, /** @type {() => any} */ onclick) => h("button.quiet", { type: "button", onclick }, text);
    const named = (/** @type {string} */ name, /** @type {any[]} */ ...acts) => h("div.group", { role: "group", "aria-label": name }, h("span.muted", {}, name), h("div.row", {}, acts));
    fill(
      this.main,
      h("p", {}, h("a", { href: "#/" }, "‹ Songs")),
      h("div.top", {},
        h("div", {}, h("h1", { dir: "auto" }, titleOf(few)), this.line),
        h("div.row", {},
          active && h("button", { type: "button", disabled: job.cancel_requested, onclick: () => void this.library.cancel(job) }, job.cancel_requested ? "Stopping …" : "Cancel"),
          act("Rename", () => this.rename()),
          made && h("button.quiet.heart", { type: "button", "aria-pressed": String(!!few.favourite), onclick: () => void this.like() }, few.favourite ? "♥\ufe0e Favourite" : "♡\ufe0e Favourite"))),
      job.lineage && this.madeFrom(job.lineage),
      job.notice && h("p.notice", {}, job.notice),
      job.error && h("p.error", { role: "alert" }, job.error.message),
      job.warnings.length > 0 && h("ul.warnings", { "aria-label": "What was changed" }, job.warnings.map((w) => h("li", {}, said(w)))),
      (made || canBeHeard(job)) && h("section.hear", { "aria-label": "Listen" }, this.play, made ? [this.wave, this.versions] : h("p.muted", {}, "Listen while it is made: it plays as soon as there is sound.")),
      h("section.doing", { "aria-label": "Make something of it" },
        this.edits && [h("div.group", { role: "group", "aria-label": "Work on it" }, h("span.muted", {}, "Work on it"), this.edits.row), this.edits.form],
        named("Once more", act("Again, another seed", () => this.remake("again")), !active && act(made ? "Exact replay" : "Try again", () => this.remake("same")), act("Change and make", () => this.remake("edit")), job.plan && act("Edit its plan", () => this.remake("plan"))),
        made && named("For another", act("Use as source", () => this.remake("source")), act("Use as reference", () => this.remake("reference"))),
        made && named("Files", items.map((/** @type {any} */ item, /** @type {number} */ i) => this.files(item, `${i + 1}`, items.length > 1)))),
      h("div.columns", {},
        lyrics && h("section", {}, h("h2", {}, "Lyrics"), this.lyrics),
        h("section", {}, h("h2", {}, "What was made"), h("dl.facts", {},
          fact("Description", meta.caption || request.prompt), fact("Wish", meta.caption && meta.caption !== request.prompt ? request.prompt : ""),
          fact("Length", items[0] ? clock(items[0].duration) : meta.duration && clock(meta.duration)), fact("Tempo", meta.bpm && `${meta.bpm} bpm`), fact("Key", meta.keyscale), fact("Meter", meta.timesignature),
          fact("Language", meta.language), fact("Task", request.task), fact("Seeds", items.map((/** @type {any} */ i) => i.seed).join(", ") || (job.seeds || []).join(", ")), fact("Model", job.result?.renderer), fact("Planner", job.plan?.model),
          fact("Card", job.result?.device), fact("Asked", moment(job.created_at)), fact("Took", job.usage && `${job.usage.total_s.toFixed(1)} s, of it planner ${job.usage.device_s.plan} s and renderer ${job.usage.device_s.render} s`),
          fact("Begun", job.attempts > 1 ? `${job.attempts} times` : "")))),
      h("details", {}, h("summary", {}, "Everything the server says of it (JSON)"), h("pre.json", {}, JSON.stringify(job, null, 2))),
      h("p", {}, !active && h("button.danger", { type: "button", onclick: () => void this.remove() }, "Delete song and audio")),
    );
    if (made) this.load();
    this.buttons();
  }

  /** Of one version: sound, and what lies beside it. @param {any} item @param {string} number @param {boolean} several */
  files(item, number, several) {
    const link = (/** @type {any} */ file, /** @type {string} */ name, /** @type {string} */ ending) => [h("a", { href: at(file.url), download: `${fileName(this.job)}-${number}.${ending}` }, name), h("small", {}, bytes(file.bytes))];
    return [
      item.audio.map((/** @type {any} */ file) => h("span.file", {}, several && `${number}: `, link(file, file.format.toUpperCase(), file.format.replace(/\d+$/, "")),
        h("button.quiet.small", { type: "button", onclick: () => void copy(at(file.url)) }, "Copy link"))),
      (item.files || []).filter((/** @type {any} */ file) => BESIDE[file.kind]).map((/** @type {any} */ file) => h("span.file", {}, link(file, ...BESIDE[file.kind])))];
  }

  /** Where the song comes from. @param {NonNullable<Job["lineage"]>} lineage */
  madeFrom({ verb, parents, regions }) {
    const link = (/** @type {{job: string, item: number, field: string}} */ parent) => {
      const a = h("a", { href: `#/song/${parent.job}`, dir: "auto" }, "a song");
      const known = this.library.jobs.get(parent.job);
      const name = (/** @type {import("./api.js").Short} */ song) => { a.textContent = titleOf(song) + (versionsOf(song).length > 1 ? `, version ${parent.item + 1}` : ""); };
      if (known) name(known);
      else getJob(parent.job).then((whole) => name(short(whole)), () => a.replaceWith("a song that is gone"));
      return [parent.field === "reference_audio" ? " in the style of " : " of ", a];
    };
    const where = regions.map(({ start, end }) => `${start < 0 ? `${clock(-start)} before` : clock(start)} to ${clock(end)}`).join(", ");
    return h("p.lineage", {}, verb ? DONE[verb] : "Made", parents.map(link), where && `: ${where}`);
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
    this.play.classList.toggle("on", on);
    this.play.setAttribute("aria-label", on ? "Pause" : this.job.result ? "Play" : "Listen while it is made");
    const items = this.job.result?.items || [];
    if (player.job?.id === this.job.id && player.item !== this.item) { this.item = player.item; if (items.length) this.load(); }
    fill(this.versions, items.length > 1 && items.map((/** @type {any} */ item, /** @type {number} */ i) => h("button.version", { type: "button", "aria-pressed": String(i === this.item), onclick: () => { this.item = i; this.load(); void player.play(short(this.job), i); } }, `${i + 1} · ${item.seed}`)));
  }

  /** @param {number} time */
  async seek(time) {
    if (player.job?.id !== this.job.id || player.item !== this.item) await player.play(short(this.job), this.item);
    player.seek(time);
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
