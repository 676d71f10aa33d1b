"""The trainer's side of a self-check in a process of its own."""

from __future__ import annotations

import pytest

from gspo_dist.learners import own_process


def test_a_process_that_comes_to_nothing_says_how_it_ended(tmp_path, monkeypatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'Fatal: no such kernel' >&2; exit 134\n")
    program.chmod(0o755)
    monkeypatch.setattr(own_process.sys, "executable", str(program))
    with pytest.raises(RuntimeError, match=r"it ended with 134: Fatal: no such kernel"):
        own_process.ask("module", {"model_type": "llama"})
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(own_process, "TIMEOUT_S", 0.2)
    with pytest.raises(RuntimeError, match="more than 0 s"):
        own_process.ask("module", {"model_type": "llama"})


def test_it_is_given_the_config_and_the_folder_and_no_gpu(tmp_path, monkeypatch) -> None:
    program = tmp_path / "python"
    said = '[{"property": "\'"$2"\'", "passed": true, "measured": "\'"$3 $CUDA_VISIBLE_DEVICES"\'"}]'
    program.write_text(f'#!/bin/sh\n[ "$(cat)" = \'{{"model_type": "llama"}}\' ] && echo \'{said}\'\n')
    program.chmod(0o755)
    monkeypatch.setattr(own_process.sys, "executable", str(program))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    [found] = own_process.ask("module", {"model_type": "llama"}, tmp_path)
    assert (found.property, found.passed, found.measured) == ("module", True, f"{tmp_path} ")
