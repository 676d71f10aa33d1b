"""Tools of MCP servers, by the package `mcp` (2.3): the server is a process of its own, spoken to over its
standard input and output.
"""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import Coroutine
from typing import Any

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
        try:
            self.listed = self._wait(self._connect())
        except Exception as error:
            cause = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            raise ValueError(
                f"environment.tools: the MCP server {command!r} does not answer: {type(cause).__name__}: "
                f"{cause}; run the command by hand to see why"
            ) from error

    async def _connect(self) -> list[Any]:
        from mcp import StdioServerParameters
        from mcp.client.client import Client

        program, *arguments = shlex.split(self.command)
        self.client = Client(StdioServerParameters(command=program, args=arguments))
        await self.client.__aenter__()
        tools, cursor = [], None
        while True:
            page = await self.client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
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
        result = await self.client.call_tool(name, arguments)
        text = "\n".join(getattr(part, "text", str(part)) for part in result.content)
        if result.is_error:
            raise RuntimeError(text)
        return text

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        # Without a deadline here: the parent of this process has one, and ends it.
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()
