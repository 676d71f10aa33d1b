"""Tools of MCP servers, by the package `mcp` (2.3): the server is a process of its own, spoken to over its
standard input and output.

A server that ends costs the episode whose call it did not answer. Another one is started for the next call.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import threading
from collections.abc import Coroutine
from typing import Any

from gspo_dist.environments.protocol import ToolFailure
from gspo_dist.environments.tools import Tool


def mcp_tools(command: str) -> list[Tool]:
    """All tools of the server that `command` starts. It ends with this process.

    ValueError: it cannot be started, or it does not speak MCP.
    """
    server = Server(command)
    return [server.tool(listed) for listed in server.listed]


class Server:
    """One MCP server, and the thread in which this process speaks to it."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="mcp", daemon=True).start()
        self.client: Any = None
        """None while there is no server."""
        try:
            self.listed = self._wait(self._connect())
        except Exception as error:
            raise ValueError(
                f"environment.tools: the MCP server {command!r} does not answer: {_cause(error)}; run the "
                "command by hand to see why"
            ) from error

    async def _connect(self) -> list[Any]:
        """Starts the server. Returns its tools."""
        from mcp import StdioServerParameters
        from mcp.client.client import Client

        program, *arguments = shlex.split(self.command)
        # mcp 2.3 would give the server a few variables only, and a server of one's own has its keys and its
        # import path there.
        client = Client(StdioServerParameters(command=program, args=arguments, env=dict(os.environ)))
        await client.__aenter__()
        tools, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                self.client = client
                return tools

    def tool(self, listed: Any) -> Tool:
        """One of its tools, as this project takes them."""
        about = {
            "name": listed.name,
            "description": listed.description or "",
            "parameters": dict(listed.input_schema),
        }
        return Tool(
            {"type": "function", "function": about},
            lambda **arguments: self._wait(self._call(listed.name, arguments)),
        )

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        if self.client is None:
            try:
                await self._connect()
            except Exception as error:
                raise ToolFailure(
                    f"the MCP server {self.command!r} does not start: {_cause(error)}"
                ) from error
        try:
            result = await self.client.call_tool(name, arguments)
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise
            self.client = None
            raise ToolFailure(f"the MCP server {self.command!r} ended while {name} was called") from error
        text = "\n".join(getattr(part, "text", str(part)) for part in result.content)
        if result.is_error:
            raise RuntimeError(text)
        return text

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        # Without a deadline here: the parent of this process has one, and ends it.
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


def _cause(error: BaseException) -> str:
    """What went wrong, in words. A group of errors is told by its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
