"""The Model Context Protocol at `/mcp`: the native API as tools and resources for agents.

`route.py` is the door: key, rate, body. Behind it the `mcp` package speaks the protocol (streamable HTTP, no sessions, so any router answers
any request); it is imported when somebody first asks, not when the router starts. `tools.py` and `resources.py` call what the native routes
call and answer with their models.
"""
