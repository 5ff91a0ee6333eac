"""What the `mcp` package is told of this server, and one exchange of its protocol."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    BlobResourceContents,
    CallToolRequestParams,
    CallToolResult,
    ContentBlock,
    ListResourcesResult,
    ListResourceTemplatesResult,
    ListToolsResult,
    PaginatedRequestParams,
    ReadResourceRequestParams,
    ReadResourceResult,
    Resource,
    ResourceLink,
    ResourceTemplate,
    TextContent,
    TextResourceContents,
    Tool,
    ToolAnnotations,
)
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from acestep import __version__
from deployments.ingress.errors import answer_to
from deployments.ingress.mcp import resources, tools
from deployments.ingress.native.answers import Audio, JobView, SongResult

Context = ServerRequestContext[Any, Request]
INSTRUCTIONS = (
    "Makes songs with ACE-Step 1.5. Every song is a job: make_song, plan_song and edit_song answer at once with the job; wait_for_job "
    "answers when it has ended, or with how far it is; call it again until state is succeeded, failed or cancelled. Give people the links of "
    "the answer or of play_link: they open in any browser or player and need no key. A job goes on where a call is given up; cancel_job ends it."
)


@dataclass(frozen=True)
class _Told:
    """An error as the HTTP API tells it."""

    status: int
    problem: dict[str, Any]


def _request(ctx: Context) -> Request:
    assert ctx.request is not None, "there is no other way to call than HTTP"
    return ctx.request


async def _told(ctx: Context, error: Exception) -> _Told:
    answer = await answer_to(_request(ctx), error)
    problem = json.loads(bytes(answer.body))
    if after := answer.headers.get("retry-after"):
        problem["retry_after"] = int(after)
    return _Told(answer.status_code, problem)


def _call(ctx: Context) -> tools.Call:
    request = _request(ctx)
    return tools.Call(request.app.state.service, request.state.caller, ctx.session.report_progress)


async def list_tools(ctx: Context, params: PaginatedRequestParams | None) -> ListToolsResult:
    """All tools, on one page."""
    listed = [
        Tool(
            name=tool.name, title=tool.title, description=tool.description, input_schema=tool.takes, output_schema=tool.gives,
            annotations=ToolAnnotations(
                read_only_hint=tool.reads_only, destructive_hint=tool.destroys, idempotent_hint=tool.reads_only or tool.destroys,
                open_world_hint=False,
            ),
        )
        for tool in tools.TOOLS.values()
    ]  # fmt: skip
    return ListToolsResult(tools=listed)


async def call_tool(ctx: Context, params: CallToolRequestParams) -> CallToolResult:
    """A tool's answer, as JSON and as the text of it; or what is wrong, as the HTTP API says it, for the model to mend.

    Raises:
        MCPError: there is no such tool.
    """
    tool = tools.TOOLS.get(params.name)
    if tool is None:
        raise MCPError(INVALID_PARAMS, f"there is no tool {params.name[:64]!r}; there are {', '.join(tools.TOOLS)}")
    try:
        answer = await tool.run(_call(ctx), dict(params.arguments or {}))
    except MCPError:
        raise
    except Exception as error:
        problem = (await _told(ctx, error)).problem
        return CallToolResult(content=[_text(problem)], structured_content=problem, is_error=True)
    shown = tools.shown(answer)
    return CallToolResult(content=[_text(shown), *_songs(answer)], structured_content=shown)


def _text(value: Any) -> ContentBlock:
    return TextContent(type="text", text=json.dumps(value, ensure_ascii=False))


def _songs(answer: Any) -> list[ContentBlock]:
    """Links to the songs of an ended job, for clients that play or fetch them."""
    if not isinstance(answer, JobView) or not isinstance(answer.result, SongResult):
        return []
    files: list[Audio] = [file for item in answer.result.items for file in item.audio]
    return [
        ResourceLink(type="resource_link", uri=file.url, name=f"{answer.id} {file.format}", mime_type=file.content_type, size=file.bytes)
        for file in files
    ]  # fmt: skip


async def list_resources(ctx: Context, params: PaginatedRequestParams | None) -> ListResourcesResult:
    """The caller's songs, newest first, after what all callers have in common."""
    cursor = params.cursor if params else None
    try:
        found, following = await resources.songs(_call(ctx), cursor)
    except Exception as error:
        raise await _failed(ctx, error) from None
    listed = [Resource(**vars(resource)) for resource in ([] if cursor else resources.COMMON) + found]
    return ListResourcesResult(resources=listed, next_cursor=following)


async def list_templates(ctx: Context, params: PaginatedRequestParams | None) -> ListResourceTemplatesResult:
    """How resources are named."""
    return ListResourceTemplatesResult(
        resource_templates=[
            ResourceTemplate(name=t.name, uri_template=t.uri, description=t.description, mime_type=t.mime_type)
            for t in resources.TEMPLATES
        ]
    )


async def read_resource(ctx: Context, params: ReadResourceRequestParams) -> ReadResourceResult:
    """A resource's content."""
    try:
        content, mime_type = await resources.read(_call(ctx), params.uri)
    except Exception as error:
        raise await _failed(ctx, error) from None
    if isinstance(content, bytes):
        blob = base64.b64encode(content).decode()
        return ReadResourceResult(contents=[BlobResourceContents(uri=params.uri, mime_type=mime_type, blob=blob)])
    return ReadResourceResult(contents=[TextResourceContents(uri=params.uri, mime_type=mime_type, text=content)])


async def _failed(ctx: Context, error: Exception) -> MCPError:
    told = await _told(ctx, error)
    code = INVALID_PARAMS if told.status < 500 else INTERNAL_ERROR
    return MCPError(code, told.problem["detail"], told.problem)


SERVER: Server[Any] = Server(
    "acestep", version=__version__, title="ACE-Step 1.5", instructions=INSTRUCTIONS, on_list_tools=list_tools, on_call_tool=call_tool,
    on_list_resources=list_resources, on_list_resource_templates=list_templates, on_read_resource=read_resource,
)  # fmt: skip


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """One exchange. Its tasks end with it: nothing is kept from one to the next, and a client that leaves leaves nothing behind.

    Host and Origin were checked before (`middleware.Strangers`).
    """
    manager = StreamableHTTPSessionManager(SERVER, stateless=True)
    async with manager.run():
        await manager.handle_request(scope, receive, send)
