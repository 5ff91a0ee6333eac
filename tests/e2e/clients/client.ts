// What tests/e2e/test_generated_clients.py runs: a song, a plan that is edited, a part made anew, events and an error, by generated types.
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

type JobView = components["schemas"]["JobView"];
type JobEvent = components["schemas"]["JobEvent"];

const url = process.argv[2]!;
const api = createClient<paths>({ baseUrl: url });
const wait = { header: { prefer: "wait=50" } };

function ended(job: JobView | undefined): JobView {
  if (job?.state !== "succeeded") throw new Error(`not a song: ${JSON.stringify(job)}`);
  return job;
}

const asked = { prompt: "calm piano", duration: 10, steps: 1, seed: 1 };
const song = ended((await api.POST("/v1/music", { params: wait, body: asked })).data);
if (!song.result || !("items" in song.result)) throw new Error("no items");
const audio = song.result.items[0]!.audio[0]!;
const sound = await (await fetch(url + audio.url)).blob();
if (sound.size !== audio.bytes) throw new Error(`${sound.size} bytes`);

const planned = ended((await api.POST("/v1/plans", { params: wait, body: { ...asked, thinking: false } })).data);
const metadata = { ...planned.plan!.metadata, bpm: 80 };
const edited = ended((await api.POST("/v1/music", { params: wait, body: { ...asked, plan: { ...planned.plan!, metadata } } })).data);
if (edited.plan!.metadata?.bpm !== 80) throw new Error("the edit is lost");

const uploaded = await api.POST("/v1/files", {
  body: { file: "" },
  bodySerializer: () => { const form = new FormData(); form.set("file", sound, "song.wav"); return form; },
});
const window = { task: "repaint" as const, src_audio: uploaded.data!.id, repainting_start: 2, repainting_end: 4 };
const { duration, ...rest } = asked;
ended((await api.POST("/v1/music", { params: wait, body: { ...rest, ...window } })).data);

const told = await api.GET("/v1/jobs/{job_id}/events", { params: { path: { job_id: song.id } }, parseAs: "text" });
const seen = told.data!.split("\n\n").filter((frame) => frame.includes("event: ")).map((frame) => {
  const lines = new Map(frame.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
  return { event: lines.get("event"), data: JSON.parse(lines.get("data")!), id: Number(lines.get("id")) } as JobEvent;
});
for (const event of seen) if (event.data.job_id !== song.id) throw new Error("another job");

const refused = await api.POST("/v1/music", { body: { prompt: "x", duration: 5 } });
if (refused.data || !refused.error) throw new Error("not refused");
console.log(JSON.stringify({ events: seen.map((event) => event.event), refused: refused.error.errors![0]!.field }));
