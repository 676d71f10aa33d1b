"""Makes kuberay_rayjob.json out of KubeRay's own CRD: what a RayJob may hold, and of which types.

    python -m tests.unit.cli.kuberay_schema ray.io_rayjobs.yaml > tests/unit/cli/kuberay_rayjob.json

The CRD is helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of KubeRay 1.7.0 (Apache License 2.0). Left
out are descriptions, defaults and the status. Equal parts, such as a pod's template, are kept once.
Kubernetes drops a field that it does not know in silence; here it is refused.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

LEFT_OUT = ("description", "default")
SMALLEST = 120
"""Parts shorter than this are not worth a name."""


def main(path: str) -> None:
    """Prints the schema."""
    crd = yaml.load(Path(path).read_text(), Loader=yaml.CSafeLoader)
    served = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = strict(served["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    counts: Counter[str] = Counter()
    count(schema, counts)
    named: dict[str, tuple[str, Any]] = {}
    schema = shared(schema, counts, named)
    schema["$defs"] = dict(named.values())
    print(json.dumps(schema, separators=(",", ":")).replace('"d', '\n"d').replace("#/$defs/\n", "#/$defs/"))


def strict(part: Any) -> Any:
    """Without texts, and without room for fields that are not named."""
    if isinstance(part, list):
        return [strict(item) for item in part]
    if not isinstance(part, dict):
        return part
    texts = {key for key in part if key in LEFT_OUT and not isinstance(part[key], dict)}
    texts |= {key for key in part if key.startswith(("x-kubernetes-list", "x-kubernetes-map"))}
    kept = {key: strict(value) for key, value in part.items() if key not in texts}
    if isinstance(kept.get("properties"), dict) and kept.get("type") == "object":
        kept.setdefault("additionalProperties", False)
    return kept


def count(part: Any, counts: Counter[str]) -> None:
    """How often every part occurs."""
    if isinstance(part, dict):
        counts[json.dumps(part, sort_keys=True)] += 1
    for item in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        count(item, counts)


def shared(part: Any, counts: Counter[str], named: dict[str, tuple[str, Any]]) -> Any:
    """With a reference in the place of every part that occurs again."""
    if isinstance(part, list):
        return [shared(item, counts, named) for item in part]
    if not isinstance(part, dict):
        return part
    text = json.dumps(part, sort_keys=True)
    inside = {key: shared(value, counts, named) for key, value in part.items()}
    if counts[text] == 1 or len(text) < SMALLEST or part.get("type") not in ("object", "array"):
        return inside
    named.setdefault(text, (f"d{len(named)}", inside))
    return {"$ref": f"#/$defs/{named[text][0]}"}


if __name__ == "__main__":
    main(sys.argv[1])
