"""Ask for a song, tell how far it is, and write the file. Needs httpx.

python song.py "calm piano, rain" song.mp3
"""

import json
import os
import sys
import uuid

import httpx

prompt = sys.argv[1] if len(sys.argv) > 1 else "calm piano, rain"
path = sys.argv[2] if len(sys.argv) > 2 else "song.mp3"
key = os.environ.get("ACESTEP_API_KEY")
server = httpx.Client(
    base_url=os.environ.get("ACESTEP_URL", "http://127.0.0.1:8000"),
    headers={"Authorization": f"Bearer {key}"} if key else {},
    timeout=60,
)

asked = {"prompt": prompt, "duration": 10, "formats": ["mp3"]}
# The same key with the same body gives the same job: safe to send again where no answer came.
answer = server.post("/v1/music", json=asked, headers={"Idempotency-Key": str(uuid.uuid4())})
if answer.status_code == 422:
    sys.exit("\n".join(f"{e['field']}: {e['message']}" for e in answer.json().get("errors", [])) or answer.text)
answer.raise_for_status()
job = answer.json()

with server.stream("GET", job["links"]["events"]) as events:
    event = ""
    for line in events.iter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            print(event, *(data[name] for name in ("stage", "done", "total") if name in data), file=sys.stderr)

while job["state"] in ("queued", "running"):  # once, unless the stream was cut
    job = server.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=50"}).raise_for_status().json()
if job["state"] != "succeeded":
    sys.exit(f"{job['state']}: {job['error']}")
with open(path, "wb") as file:
    file.write(server.get(job["result"]["items"][0]["audio"][0]["url"]).raise_for_status().content)
print(path)
