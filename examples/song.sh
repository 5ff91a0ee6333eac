#!/usr/bin/env bash
# Ask for a song, wait for it, and write the file. Needs curl and python3, which reads the JSON.
#
# ./song.sh "calm piano, rain" song.mp3
set -euo pipefail
prompt=${1:-calm piano, rain} path=${2:-song.mp3}
server=${ACESTEP_URL:-http://127.0.0.1:8000}
key=(${ACESTEP_API_KEY:+-H "Authorization: Bearer $ACESTEP_API_KEY"})

ask() { curl --silent --show-error --fail-with-body --max-time 90 ${key[@]+"${key[@]}"} "$@"; }
get() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }

body=$(PROMPT=$prompt python3 -c 'import json, os; print(json.dumps({"prompt": os.environ["PROMPT"], "duration": 10, "formats": ["mp3"]}))')
job=$(ask "$server/v1/music" -H 'Content-Type: application/json' -H 'Prefer: wait=50' -d "$body") || { echo "$job" >&2; exit 1; }
while state=$(get '["state"]' <<<"$job"); [ "$state" = queued ] || [ "$state" = running ]; do
  echo "$state, done in $(get '["eta_s"]' <<<"$job") s" >&2
  job=$(ask "$server/v1/jobs/$(get '["id"]' <<<"$job")" -H 'Prefer: wait=50')
done
[ "$state" = succeeded ] || { get '["error"]' <<<"$job" >&2; exit 1; }
ask -o "$path" "$server$(get '["result"]["items"][0]["audio"][0]["url"]' <<<"$job")"
echo "$path"
