// Ask for a song, tell how far it is, and write the file. Node.js 18 or newer, no packages.
//
// node song.mjs "calm piano, rain" song.mp3
import { randomUUID } from "node:crypto";
import { writeFile } from "node:fs/promises";

const [prompt = "calm piano, rain", path = "song.mp3"] = process.argv.slice(2);
const server = process.env.ACESTEP_URL ?? "http://127.0.0.1:8000";
const headers = process.env.ACESTEP_API_KEY ? { Authorization: `Bearer ${process.env.ACESTEP_API_KEY}` } : {};

async function ask(url, options = {}) {
  const answer = await fetch(new URL(url, server), { ...options, headers: { ...headers, ...options.headers } });
  if (!answer.ok) throw new Error(`${answer.status}: ${(await answer.json()).detail}`);
  return answer;
}

// The same key with the same body gives the same job: safe to send again where no answer came.
let job = await (await ask("/v1/music", {
  method: "POST",
  headers: { "Content-Type": "application/json", "Idempotency-Key": randomUUID() },
  body: JSON.stringify({ prompt, duration: 10, formats: ["mp3"] }),
})).json();

let rest = "";
for await (const piece of (await ask(job.links.events)).body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + piece).split("\n");
  rest = lines.pop();
  for (const line of lines) if (/^(event|data): /.test(line)) console.error(line);
}

while (job.state === "queued" || job.state === "running") { // once, unless the stream was cut
  job = await (await ask(`/v1/jobs/${job.id}`, { headers: { Prefer: "wait=50" } })).json();
}
if (job.state !== "succeeded") throw new Error(`${job.state}: ${job.error?.message}`);
const audio = await ask(job.result.items[0].audio[0].url);
await writeFile(path, Buffer.from(await audio.arrayBuffer()));
console.log(path);
