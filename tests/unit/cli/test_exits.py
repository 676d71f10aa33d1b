"""How a command ends: the status says whether the input or the run was at fault."""

from __future__ import annotations

import pytest

from gspo_dist.cli.exits import guarded


def raises(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("steps must be at least 1"), 2, "gspo: error: steps must be at least 1\n"),
        (KeyboardInterrupt(), 130, "gspo: error: interrupted\n"),
        (
            OSError("disk full"),
            1,
            "gspo: error: OSError: disk full\n(GSPO_TRACEBACK=1 shows the traceback)\n",
        ),
    ],
)
def test_the_status_says_who_is_at_fault(error, status, message, capsys, monkeypatch):
    monkeypatch.delenv("GSPO_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        guarded(raises(error))
    assert stop.value.code == status
    assert capsys.readouterr().err == message


def test_notes_are_shown_with_the_error(capsys):
    error = RuntimeError("rank 1 died")
    error.add_note("saved after step 3")
    with pytest.raises(SystemExit):
        guarded(raises(error))
    assert "RuntimeError: rank 1 died\nsaved after step 3\n" in capsys.readouterr().err


def test_a_traceback_is_shown_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("GSPO_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        guarded(raises(RuntimeError("rank 1 died")))
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_what_works_is_returned():
    assert guarded(lambda: 7) == 7
