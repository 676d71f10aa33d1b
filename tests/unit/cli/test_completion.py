"""Completion offers the keys of the schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_completion_offers_the_keys_of_the_schema(tmp_path: Path):
    script = tmp_path / "complete.sh"
    gspo = Path(sys.executable).with_name("gspo")
    script.write_text(
        f'eval "$({gspo} completion bash)"\nPATH="{gspo.parent}:$PATH"\n'
        'COMP_LINE="gspo train learner.optimizer.l"\n'
        "COMP_WORDS=(gspo train learner.optimizer.l); COMP_CWORD=2\n"
        '_gspo_complete; printf "%s\\n" "${COMPREPLY[@]}"\n'
        "COMP_WORDS=(gspo comp); COMP_CWORD=1\n"
        '_gspo_complete; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    out = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False).stdout
    assert "learner.optimizer.lr=" in out
    assert out.splitlines()[-2:] == ["compare", "completion"]
