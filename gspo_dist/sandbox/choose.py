"""From a name to a sandbox: `auto` takes the strongest one of this host, and never the weak one."""

from __future__ import annotations

from gspo_dist.checks import choose
from gspo_dist.sandbox.local import LOCAL, refusal
from gspo_dist.sandbox.protocol import Sandbox
from gspo_dist.sandbox.service import ServiceSandbox

NAMES = ("auto", "bubblewrap", "namespaces", "process", "http")
STRONG = ("bubblewrap", "namespaces")
"""Those that hide the host, in the order in which `auto` tries them."""


def sandbox_named(
    name: str, url: str | None = None, kind: str = "sandboxfusion", field: str = "sandbox"
) -> Sandbox:
    """The sandbox `name` of this host, or the service behind `url`.

    Raises ValueError where the host does not give it, with the reasons and the way out.
    """
    choose(field, name, NAMES)
    if (name == "http") != (url is not None):
        raise ValueError(
            f"{field}_url must be given for {field} http, and for no other: got {name} and {url!r}"
        )
    if url is not None:
        return ServiceSandbox(url, choose(f"{field}_kind", kind, ("sandboxfusion", "piston")))
    wanted = STRONG if name == "auto" else (name,)
    reasons = []
    for one in wanted:
        why = refusal(one)
        if not why:
            return LOCAL[one]
        reasons.append(f"{one}: {why}")
    raise ValueError(
        f"{field} {name} must be able to run programs on this host: got {'; '.join(reasons)}. Install "
        f"bubblewrap, run as root or where users may make namespaces, or name {field} http. "
        f"{field} process runs without a room of its own: programs then see this host's files"
    )
