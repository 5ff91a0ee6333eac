"""The API of this project: `/v1/music`, `/v1/jobs`, texts, events, health."""
