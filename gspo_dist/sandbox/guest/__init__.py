"""The process inside the sandbox: it forks the program for every test, watches it, and tells how it ended.

It imports the standard library alone, and little of that: it starts once per program, and json, signal and
platform would double its start. Its modules travel through the pipe (local.py), so no room must hold them.
It never learns what a right answer is, so a program that took it over would gain nothing.

    local.py                                  watch.py (process 1 of its namespace)     program.py
    --------                                  -------------------------------------     ----------
    {"code", "limits", "setup", ...}      ->  room.py builds the room, drops rights
                                          <-  {"ready"} or {"refused"}
    {"input"}                             ->  forks                                 ->  limits, filter, code
                                              reads with caps, looks at memory      <-  output
                                          <-  {"status", "stdout", ...}, after killing all that is left
"""
